"""Writes the measured tables of the documentation from ``docs/results/*.json``, between markers.

    python examples/benchmarks/docs_tables.py

A page says ``<!-- measured: NAME -->`` where the table NAME begins, and ``<!-- end -->`` behind it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from setting import ROOT

DOCS, END = ROOT / "docs", "<!-- end -->"
NAMES = {"minilm": "MiniLM", "mamba1": "Mamba-1", "mamba2": "Mamba-2"}
Rows = Iterable[tuple[str, ...]]


def padding(result: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Rows of ``packing.json``: milliseconds, and how far packed is from the padding's due."""
    arms = ("eager", "torch.compile", "effpass, padded", "packed", "unpadded")
    yield ("", "padding", *arms, "vs eager", "of the padding's due")
    for order, row in result["sentences"].items():
        yield (f"MiniLM, sentences, {order}", *_times(row))
    for part, suffix in (("share", ""), ("training", ", training")):
        for name, rows in result[part].items():
            for i, row in enumerate(rows):
                yield ("" if i else NAMES[name] + suffix, *_times(row))


def _times(row: dict[str, Any]) -> Iterator[str]:
    yield f"{row['padding']:.0%}".replace("%", " %")
    for arm in ("eager", "inductor", "effpass", "packed", "unpadded"):
        seconds = row["median_s"].get(arm)
        yield f"{seconds * 1000:.0f} ms" if seconds else ""
    faster = row["speedup_over_eager"]
    yield f"**{faster:.2f}x**" if faster else ""
    yield f"{row['packed_over_bound']:.2f}"


def training(result: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Rows of ``packed_training.json``: microseconds a real token."""
    yield ("", "compiled by", "layout", "padding", "a token", "packed effpass is faster")
    for model in result["models"].values():
        for i, way in enumerate(model["ways"]):
            ours = way["packed_is_faster"] == 1
            yield (
                "" if i else model["title"],
                *(way["arm"], way["layout"], f"{way['padding']:.0%}".replace("%", " %")),
                f"{way['us_per_token']:.0f} us",
                "" if ours else f"**{way['packed_is_faster']:.2f}x**",
            )


TABLES: dict[str, tuple[str, str, Callable[[dict[str, Any]], Rows]]] = {
    "packing": ("packing.md", "packing.json", padding),
    "packed_training": ("packing.md", "packed_training.json", training),
}


def table(rows: Rows) -> str:
    """Markdown of rows, the first of which are the titles; numbers to the right."""
    titles, *body = rows
    sides = [":" if all(_wordy(row[i]) for row in body) else "" for i in range(len(titles))]
    lines = ["| " + " | ".join(titles) + " |"]
    lines.append("|" + "|".join("---" if side else "--:" for side in sides) + "|")
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in body)])


def _wordy(cell: str) -> bool:
    return not any(c.isdigit() for c in cell) or cell[:1].isalpha()


def rewritten(page: str, name: str, body: str) -> str:
    """``page`` with ``body`` between the markers of ``name``; ValueError without markers."""
    begin = f"<!-- measured: {name} -->"
    head, found, rest = page.partition(begin)
    _, also, tail = rest.partition(END)
    if not found or not also:
        raise ValueError(f"expected {begin} and {END}, found them missing")
    return f"{head}{begin}\n{body}\n{END}{tail}"


def made(name: str) -> tuple[str, str]:
    """A page as it is, and with the table ``name`` written anew."""
    page, source, rows = TABLES[name]
    text = (DOCS / page).read_text()
    result = json.loads((DOCS / "results" / source).read_text())
    return text, rewritten(text, name, table(rows(result)))


def main() -> None:
    """Rewrites every page in place."""
    for name, (page, _, _) in TABLES.items():
        (DOCS / page).write_text(made(name)[1])


if __name__ == "__main__":
    main()
