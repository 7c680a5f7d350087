"""What the documentation says is run, and its numbers are the measured ones."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import effpass
from effpass.config import PASSES, TARGETS
from tests.scripts import load

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!http)([^)#]+)\)")


def blocks(path: Path, language: str) -> list[str]:
    return [body for name, body in FENCE.findall(path.read_text()) if name == language]


def run(path: Path, folder: Path) -> str:
    """Runs a page's Python blocks as one program; they may change what is process-global."""
    script = folder / "page.py"
    script.write_text("\n".join(blocks(path, "python")))
    command = [sys.executable, "-W", "ignore", str(script)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.mark.parametrize("path", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.name)
def test_snippets_run(path: Path, tmp_path: Path) -> None:
    printed = run(path, tmp_path)
    for sample in blocks(path, "text"):
        words = set(re.findall(r"[a-z_]{3,}", sample))
        assert words and words <= set(re.findall(r"[a-z_]{3,}", printed))


@pytest.mark.parametrize("path", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda p: p.name)
def test_links_lead_somewhere(path: Path) -> None:
    missing = [to for to in LINK.findall(path.read_text()) if not (path.parent / to).exists()]
    assert not missing


def test_readme_names_every_option() -> None:
    readme = (ROOT / "README.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| `(.+?)` \|", readme, re.MULTILINE)
    config = effpass.Config()
    assert {name: default.replace('"', "'") for name, default in rows} == {
        **{name: "False" for name in PASSES},
        **{name: repr(getattr(config, name)) for name in config.__dataclass_fields__},
    }
    assert all(f'`"{target}"`' in readme for target in TARGETS)


def test_readme_table_is_the_measured_one() -> None:
    readme_table = load("benchmarks/readme_table.py")
    readme = (ROOT / "README.md").read_text()
    result = json.loads(readme_table.RESULT.read_text())
    assert not result["settings"]["quick"]
    assert readme_table.rewritten(readme, result) == readme


def test_pages_of_results_are_their_json() -> None:
    tables = load("benchmarks/tables.py")
    for path in (ROOT / "docs" / "results").glob("*.json"):
        result = json.loads(path.read_text())
        if "rows" in result:  # of compare.py; other benchmarks have no page
            assert path.with_suffix(".md").read_text() == tables.page(result)


@pytest.mark.parametrize("name", load("benchmarks/docs_tables.py").TABLES)
def test_tables_of_pages_are_the_measured_ones(name: str) -> None:
    found, made = load("benchmarks/docs_tables.py").made(name)
    assert found == made


def test_changelog_tells_of_this_version() -> None:
    assert f"## {effpass.__version__}\n" in (ROOT / "CHANGELOG.md").read_text()
