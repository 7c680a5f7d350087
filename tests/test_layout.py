"""The shape of the source: who may import whom, how long it is, what is named and explained."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILE_LINES, KERNEL_FILE_LINES = 400, 600
FUNCTION_LINES, FORMULA_LINES = 50, 80
BANNED = {"utils", "common", "helpers", "manager", "base", "misc"}
ENVIRONMENT = {"EFFPASS_CACHE_DIR"}

# lowest first: a module imports from rows above its own, and from its own component
LAYERS: list[set[str]] = [
    {"chains", "token_report"},
    {"report"},
    {"axes", "graph", "rows"},
    {"ops"},
    {"patterns", "passes", "fit", "capture", "lowering"},
    {"config", "lower", "ledger", "debug", "onnx_compiler"},
    {"backend"},
    {"explain", "export"},
    {"effpass"},  # the public names
    {"cli"},
]
LOWERING_SEES = {"ops", "report", "lowering"}


def files(*folders: str) -> list[Path]:
    """Python files of these folders, those behind the link ``effpass/lowering`` left out."""
    found = [p for folder in folders for p in sorted((ROOT / folder).rglob("*.py"))]
    return [p for p in found if not any(parent.is_symlink() for parent in p.parents)]


SOURCE = files("effpass", "lowering", "examples")
ALL = [*SOURCE, *files("tests")]


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def component(path: Path) -> str:
    """The part of effpass a file belongs to: ``effpass/graph/clean.py`` -> ``graph``."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] == "lowering":
        return "lowering"
    return "effpass" if parts[1] == "__init__" else parts[1]


COMPONENTS = {component(p) for p in files("effpass", "lowering")}


def imports(path: Path) -> Iterator[str]:
    """Components of effpass that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            dotted = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == "effpass":
            dotted = [f"effpass.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            dotted = [node.module or ""]
        else:
            continue
        for name in dotted:
            head, *rest = name.split(".")
            if head == "effpass":
                yield rest[0] if rest and rest[0] in COMPONENTS else "effpass"


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def is_kernel(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Whether Triton compiles it: arguments are what a launch gives, only constants say so."""
    return any("triton.jit" in ast.unparse(decorator) for decorator in function.decorator_list)


def layer(name: str) -> int:
    return next(i for i, row in enumerate(LAYERS) if name in row)


def test_every_component_has_a_layer() -> None:
    assert set().union(*LAYERS) >= COMPONENTS


@pytest.mark.parametrize("path", files("effpass", "lowering"), ids=named)
def test_imports_point_down(path: Path) -> None:
    mine = component(path)
    allowed = {c for c in COMPONENTS if c == mine or layer(c) < layer(mine)}
    if mine == "lowering":
        allowed &= LOWERING_SEES
    assert set(imports(path)) <= allowed


def test_imports_are_found() -> None:
    """The rule above would hold of everything if nothing were found."""
    assert {"ledger", "lower", "capture", "lowering"} <= set(imports(ROOT / "effpass/backend.py"))
    assert "ops" in set(imports(ROOT / "lowering/step.py"))


@pytest.mark.parametrize("path", ALL, ids=named)
def test_files_are_short_and_well_named(path: Path) -> None:
    limit = KERNEL_FILE_LINES if named(path).startswith("lowering/") else FILE_LINES
    assert len(path.read_text().splitlines()) <= limit
    assert path.stem not in BANNED


def budget(path: Path, function: str) -> int:
    """Lines a function may have: an op's gradient is one formula, nothing is won by cutting it."""
    formula = named(path).startswith("effpass/ops/") and function == "_backward"
    return FORMULA_LINES if formula else FUNCTION_LINES


@pytest.mark.parametrize("path", [p for p in ALL if "lowering" not in p.parts], ids=named)
def test_functions_are_short(path: Path) -> None:
    lines = {f.name: f.end_lineno - f.lineno + 1 for f in functions(path)}  # type: ignore[operator]
    assert not {name: n for name, n in lines.items() if n > budget(path, name)}


def test_kernel_files_are_short() -> None:
    kernels = [*(ROOT / "lowering").rglob("*.cpp"), *(ROOT / "lowering").rglob("*.h")]
    long = {named(p) for p in kernels if len(p.read_text().splitlines()) > KERNEL_FILE_LINES}
    assert kernels and not long


@pytest.mark.parametrize("path", SOURCE, ids=named)
def test_public_names_have_docstrings(path: Path) -> None:
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), "the module has none"
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    top = [node for node in tree.body if isinstance(node, kinds)]
    inner = [m for c in top if isinstance(c, ast.ClassDef) for m in c.body if isinstance(m, kinds)]
    private_classes = {m for c in top if c.name.startswith("_") for m in getattr(c, "body", ())}
    public = [n for n in top + inner if not n.name.startswith("_") and n not in private_classes]
    assert not [n.name for n in public if not ast.get_docstring(n)]


@pytest.mark.parametrize("path", SOURCE, ids=named)
def test_arguments_and_results_are_annotated(path: Path) -> None:
    bare = set()
    for node in functions(path):
        if is_kernel(node):
            continue
        given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        given += [a for a in (node.args.vararg, node.args.kwarg) if a]
        missing = [a.arg for a in given if a.annotation is None and a.arg not in ("self", "cls")]
        if missing or (node.returns is None and node.name != "__init__"):
            bare.add(f"{node.name}({', '.join(missing)})")
    assert not bare


def test_environment_variables() -> None:
    kernels = [*(ROOT / "lowering").rglob("*.cpp"), *(ROOT / "lowering").rglob("*.h")]
    text = "\n".join(p.read_text() for p in [*SOURCE, *kernels])
    assert set(re.findall(r"\bEFFPASS_[A-Z0-9_]+", text)) == ENVIRONMENT
