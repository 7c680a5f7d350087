"""When and how known functions are found, proven, substituted or declined."""

import importlib
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.models.mamba2 import modeling_mamba2

from effpass.capture import known
from tests.capture.traced import Traced
from tests.tolerances import close

HEAD = "import torch\nimport torch.nn.functional as F\nfrom torch import nn\n"
HEAD += "from transformers.activations import ACT2FN\n\n"
Write = Callable[[str], str]


def text(*names: str) -> str:
    """Source of functions of transformers, without the wrapper that looks for kernels."""
    sources = (inspect.getsource(inspect.unwrap(getattr(modeling_mamba2, n))) for n in names)
    return HEAD + "\n\n".join(s[s.index("def ") :] for s in sources)


CONV = text("causal_conv1d_fn", "causal_conv1d_update")
HELPERS = ("pad_tensor_by_size", "reshape_into_chunks", "segment_sum")
CHUNKS = text(*HELPERS, "mamba2_chunk_scan", "mamba2_selective_state_update")


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Writes a module as remote code has it; returns its name. Nothing stays imported."""
    known.install()
    package = tmp_path / "transformers_modules"
    package.mkdir()
    (package / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    names = (f"modeling_{i}" for i in range(100))

    def write(source: str) -> str:
        name = next(names)
        (package / f"{name}.py").write_text(source)
        return f"transformers_modules.{name}"

    yield write
    for name in [name for name in sys.modules if name.startswith("transformers_modules")]:
        del sys.modules[name]


def found(module: str) -> set[str]:
    return {k.function for k in known.registered() if k.module == module}


def the_reason(module: str) -> str:
    (record,) = [d for d in known.declined() if d.module == module]
    return record.reason


@pytest.fixture(autouse=True)
def no_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of other tests, whose modules bear the same names."""
    for name, empty in (("_registered", []), ("_declined", []), ("_proofs", {})):
        monkeypatch.setattr(known, name, empty)


def ops_of(module: ModuleType) -> Traced:
    x, weight = torch.randn(1, 3, 6), torch.randn(3, 4)
    traced = Traced(lambda x: module.causal_conv1d_fn(x, weight, activation="silu"))
    close(traced(x), module.causal_conv1d_fn(x, weight, activation="silu"), "model_fp32")
    return traced


def test_a_module_imported_later_is_covered(write: Write) -> None:
    name = write(CONV)
    module = importlib.import_module(name)
    assert found(name) == {"causal_conv1d_fn", "causal_conv1d_update"}
    assert ops_of(module).ops() == {"causal_conv1d": 1}
    assert not known.declined()


def test_a_module_loaded_from_its_file_by_hand_is_covered(write: Write) -> None:
    """As transformers loads remote code: no finder is asked; compiling looks again."""
    name = write(CONV)
    path = Path(sys.path[0]) / name.replace(".", "/")
    spec = importlib.util.spec_from_file_location(name, path.with_suffix(".py"))
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    assert not found(name)
    assert ops_of(module).ops() == {"causal_conv1d": 1}


def test_a_reloaded_module_is_covered_again(write: Write) -> None:
    name = write(CONV)
    module = importlib.import_module(name)
    before = module.causal_conv1d_fn
    importlib.reload(module)
    assert module.causal_conv1d_fn is not before
    assert ops_of(module).ops() == {"causal_conv1d": 1}


def test_installing_and_considering_twice_changes_nothing(write: Write) -> None:
    module = importlib.import_module(write(CONV))
    before = known.registered()
    known.install()
    known.consider(module)
    assert known.registered() == before and not known.declined()


def test_source_and_loader_stay_as_they_are(write: Write) -> None:
    module = importlib.import_module(write(CONV))
    assert "padding = weight.shape[-1] - 1" in inspect.getsource(module.causal_conv1d_fn)
    assert type(module.__spec__.loader).__name__ == "SourceFileLoader"


def test_equal_code_is_proven_once(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    proven: list[Any] = []
    prove = known.prove

    def counted(original: Any, *rest: Any) -> str | None:
        proven.append(original)
        return prove(original, *rest)

    monkeypatch.setattr(known, "prove", counted)
    for _ in range(3):
        importlib.import_module(write(CONV))
    assert [f.__name__ for f in proven] == ["causal_conv1d_fn", "causal_conv1d_update"]


def test_a_changed_signature_is_declined(write: Write) -> None:
    name = write(CONV.replace("activation: str | None = None,\n    **kw", "act=None,\n    **kw"))
    importlib.import_module(name)
    assert the_reason(name) == (
        "its parameters changed: expected hidden_states, weight, bias, activation; "
        "found hidden_states, weight, bias, act"
    )


def test_a_changed_body_is_disproved_and_runs_as_it_is(write: Write) -> None:
    name = write(CONV.replace("[:, :, :seq_len]", "[:, :, 1 : seq_len + 1]"))
    module = importlib.import_module(name)
    assert "the op disagrees with it: the output differs by" in the_reason(name)
    assert found(name) == {"causal_conv1d_update"}
    assert ops_of(module).ops() == {}


def test_a_changed_helper_is_disproved(write: Write) -> None:
    """The function's own text is that of a proven one; what it calls is not."""
    importlib.import_module(write(CHUNKS))
    broken = write(CHUNKS.replace("diagonal=-1", "diagonal=0"))
    importlib.import_module(broken)
    assert found(broken) == {"mamba2_selective_state_update"}
    assert "the op disagrees with it" in the_reason(broken)


def test_a_function_that_fails_is_declined(write: Write) -> None:
    name = write(CONV.replace("padding = weight.shape[-1] - 1", "padding = weight.no_such_thing"))
    importlib.import_module(name)
    assert "the function itself failed: AttributeError" in the_reason(name)


def test_a_missing_companion_is_declined(write: Write) -> None:
    name = write(text("causal_conv1d_fn"))
    importlib.import_module(name)
    assert the_reason(name).startswith("causal_conv1d_fn is there, causal_conv1d_update is not")


def test_what_is_no_plain_function_is_declined(write: Write) -> None:
    source = CONV + "\n\nclass Kernel:\n    def __call__(self):\n        pass\n\n"
    name = write(source + "causal_conv1d_fn = Kernel()\n")
    importlib.import_module(name)
    assert the_reason(name).startswith("it is a Kernel, not a plain function")


WRAPPED = CONV.replace("def causal_conv1d_fn", "@wrap\ndef causal_conv1d_fn").replace(
    HEAD,
    HEAD
    + "import functools\n\ndef wrap(torch_function):\n    is_new_implementation = NEW\n"
    + "    @functools.wraps(torch_function)\n    def wrapped(*args, **kwargs):\n"
    + "        assert not is_new_implementation\n"
    + "        return torch_function(*args, **kwargs)\n    return wrapped\n\n",
)


@pytest.mark.parametrize("new", [False, True])
def test_an_installed_kernel_is_kept_on_a_gpu(
    write: Write, monkeypatch: pytest.MonkeyPatch, new: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    name = write(WRAPPED.replace("NEW", str(new)))
    importlib.import_module(name)
    assert ("causal_conv1d_fn" in found(name)) is not new
    if new:
        assert the_reason(name) == "it runs a GPU kernel here, and effpass has none for it yet"


def test_nothing_global_is_touched(write: Write) -> None:
    """Imported under a default device, a default dtype, fake tensors and autocast at once."""
    state = torch.random.get_rng_state()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("meta"), FakeTensorMode(), torch.autocast("cpu", torch.bfloat16):
            name = write(CONV + "\n\n" + CHUNKS)
            importlib.import_module(name)
    finally:
        torch.set_default_dtype(torch.float32)
    assert len(found(name)) == 4 and not known.declined()
    assert torch.equal(torch.random.get_rng_state(), state)


def test_a_module_may_be_imported_inside_compiled_code(write: Write) -> None:
    name = write(CONV)
    x, weight = torch.randn(1, 3, 6), torch.randn(3, 4)

    def forward(x: torch.Tensor) -> torch.Tensor:
        module = importlib.import_module(name)
        return module.causal_conv1d_fn(x, weight)

    compiled = torch.compile(forward, backend="eager")
    close(compiled(x), forward(x), "model_fp32")
    assert found(name) == {"causal_conv1d_fn", "causal_conv1d_update"}


def test_threads_substitute_once(write: Write) -> None:
    name = write("")
    module = importlib.import_module(name)
    exec(compile(CONV, "remote.py", "exec"), vars(module))
    threads = [threading.Thread(target=known.consider, args=(module,)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    functions = sorted(k.function for k in known.registered() if k.module == name)
    assert functions == ["causal_conv1d_fn", "causal_conv1d_update"]


def test_unknown_modules_are_left_alone() -> None:
    here = SimpleNamespace(__name__="somebody.elses.module", causal_conv1d_fn=len)
    known.consider(here)  # type: ignore[arg-type]
    assert not known.registered() and not known.declined()
