"""What is found in every family of the zoo, as the page ``docs/coverage.md``.

``python -m tests.models.coverage`` writes it anew.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from tests.models.through_graph import CALLED, KNOWN, LENGTH, Row, explained, rows
from tests.models.zoo import FAMILIES

PATH = Path(__file__).parent.parent.parent / "docs" / "coverage.md"
HEAD = """# Coverage: what is found in which family

Written by `python -m tests.models.coverage` with {versions}.

The models of [tests/models/zoo.py](../tests/models/zoo.py), tiny and with random weights, on 2
sequences of {length} tokens, in evaluation, gradients recorded. A number counts what an idiom found
in the whole model, of two layers mostly; an op that passed through several idioms (a loop that
became a recurrence, then a scan) counts in each. *{known}*: substituted by name, before any pattern
is asked. *{called}*: the model itself calls `scaled_dot_product_attention`. What was seen and not
raised stands below each table.

## As they come

The models as `transformers` makes them.
"""
GRAPH = """
## Through the graph

The table of known functions is empty and `attn_implementation="eager"`: patterns alone, as for code
that no table knows.
"""


def versions() -> str:
    """The versions a page is written with."""
    import transformers

    return f"torch {torch.__version__.partition('+')[0]}, transformers {transformers.__version__}"


def page(comes: dict[str, Row], graph: dict[str, Row]) -> str:
    """The whole page."""
    head = HEAD.format(versions=versions(), length=LENGTH, known=KNOWN, called=CALLED)
    return "\n".join([head + table(comes), GRAPH + table(graph)])


def table(rows: dict[str, Row]) -> str:
    """A table, families by idioms, and the list of misses."""
    idioms = columns(rows.values())
    lines = [f"| family | {' | '.join(idioms)} |", "|---" + "|--:" * len(idioms) + "|"]
    lines += [line(family, row, idioms) for family, row in rows.items()]
    return "\n".join(["", *lines, "", "Not raised:", "", *misses(rows), ""])


def line(family: str, row: Row, idioms: Iterable[str]) -> str:
    """One family's counts."""
    cells = [str(row["counts"].get(idiom, "")) for idiom in idioms]
    return f"| {family} | {' | '.join(cells)} |"


def columns(rows: Iterable[Row]) -> list[str]:
    """Idioms that found something, known functions and torch's own first."""
    found = dict.fromkeys(idiom for row in rows for idiom in row["counts"])
    return sorted(found, key=lambda idiom: (idiom not in (KNOWN, CALLED), idiom))


def misses(rows: dict[str, Row]) -> list[str]:
    """One line a reason, with the families that have it."""
    families: dict[str, list[str]] = {}
    for family, row in rows.items():
        for reason, count in row["misses"].items():
            families.setdefault(reason, []).append(f"{family} ({count})" if count > 1 else family)
    return [f"- {reason}: {', '.join(names)}" for reason, names in sorted(families.items())]


def comes(families: Iterable[str]) -> dict[str, Row]:
    """Rows of families as they come."""
    return {family: explained(*FAMILIES[family]()) for family in families}


if __name__ == "__main__":
    PATH.write_text(page(comes(FAMILIES), rows(list(FAMILIES))))
    print(f"wrote {PATH}")
