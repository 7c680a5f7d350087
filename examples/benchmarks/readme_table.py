"""Writes the table of ``docs/results/compare.json`` into README.md, between its markers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tables import between, summary, table

ROOT = Path(__file__).parent.parent.parent
RESULT = ROOT / "docs" / "results" / "compare.json"
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def rewritten(readme: str, result: dict[str, Any]) -> str:
    """``readme`` with the table of ``result`` between its markers; ValueError without markers."""
    return between(readme, BEGIN, END, f"{table(result)}\n\n{summary(result)}")


def main() -> None:
    """Rewrites README.md in place."""
    path = ROOT / "README.md"
    path.write_text(rewritten(path.read_text(), json.loads(RESULT.read_text())))


if __name__ == "__main__":
    main()
