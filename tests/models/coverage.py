"""What is found in every family of the zoo, as the page ``docs/coverage.md``.

``python -m tests.models.coverage`` writes it anew. Each family is explained twice: as it comes, and
through the graph, with the table of known functions empty and attention written out. The latter
runs in a process of its own, since a function that was substituted once stays so.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

import effpass
from effpass.capture import known
from effpass.ops import OPS
from effpass.report import Report
from tests.models.zoo import FAMILIES, Family

PATH = Path(__file__).parent.parent.parent / "docs" / "coverage.md"
LENGTH = 11
KNOWN, CALLED = "known function", "torch's own"
Row = dict[str, dict[str, int]]

HEAD = """# Coverage: what is found in which family

Written by `python -m tests.models.coverage` with {versions}: the models of
[tests/models/zoo.py](../tests/models/zoo.py), tiny and with random weights, on 2 sequences of
{length} tokens, in evaluation and with gradients. A number counts what an idiom found in the whole
model; an op that passed through several idioms (a loop that became a recurrence, then a scan) counts
in each. *{known}*: substituted by name, before any pattern is asked. *{called}*: the model calls
`scaled_dot_product_attention` itself. What was seen and not raised stands below each table.
"""
COMES = """
## As they come

The models as `transformers` makes them.
"""
GRAPH = """
## Through the graph

The table of known functions is empty and `attn_implementation="eager"`: patterns alone, as for code
that no table knows.
"""


def versions() -> str:
    """The versions a page was written with."""
    import transformers

    return f"torch {torch.__version__.partition('+')[0]}, transformers {transformers.__version__}"


def measured(family: str, graph: bool) -> Row:
    """Counts by idiom, and reasons of misses with theirs, of one family in this process."""
    make = FAMILIES[family]
    assert isinstance(make, Family)
    if graph:
        assert not known.TABLE and not known.registered(), "functions were substituted before"
        make = dataclasses.replace(make, fields=make.fields | {"attn_implementation": "eager"})
    model, make_inputs = make()
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return row(effpass.explain(model, **make_inputs(2, LENGTH, False)))


def row(report: Report) -> Row:
    """What the page tells of one report."""
    counts: Counter[str] = Counter()
    for layer in report.coverage:
        for found in layer.found:
            by = found.idioms or ((KNOWN if found.op in OPS else CALLED),)
            counts.update({idiom: found.count * layer.layers for idiom in by})
    misses = Counter(f"{miss.idiom}: {miss.reason}" for miss in report.misses)
    return {"counts": dict(counts), "misses": dict(misses)}


def through_the_graph(families: Sequence[str]) -> dict[str, Row]:
    """Rows of these families with the front door closed, from another process."""
    command = [sys.executable, "-m", "tests.models.coverage", "--closed", *families]
    done = subprocess.run(command, capture_output=True, text=True, cwd=PATH.parent.parent)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def page(comes: dict[str, Row], graph: dict[str, Row]) -> str:
    """The whole page."""
    head = HEAD.format(versions=versions(), length=LENGTH, known=KNOWN, called=CALLED)
    return head + COMES + "\n".join(table(comes)) + "\n" + GRAPH + "\n".join(table(graph)) + "\n"


def table(rows: dict[str, Row]) -> list[str]:
    """Lines of a table, families by idioms, and of the list of misses."""
    idioms = columns(rows.values())
    lines = ["", f"| family | {' | '.join(idioms)} |", "|---" + "|--:" * len(idioms) + "|"]
    for family, each in rows.items():
        cells = [str(each["counts"].get(idiom, "")) for idiom in idioms]
        lines.append(f"| {family} | {' | '.join(cells)} |")
    return [*lines, "", "Not raised:", "", *misses(rows)]


def columns(rows: Iterable[Row]) -> list[str]:
    """Idioms that found something, known functions and torch's own first."""
    found = dict.fromkeys(idiom for each in rows for idiom in each["counts"])
    return sorted(found, key=lambda idiom: (idiom not in (KNOWN, CALLED), idiom))


def misses(rows: dict[str, Row]) -> list[str]:
    """One line a reason, with the families that have it."""
    families: dict[str, list[str]] = {}
    for family, each in rows.items():
        for reason, count in each["misses"].items():
            families.setdefault(reason, []).append(f"{family} ({count})" if count > 1 else family)
    return [f"- {reason}: {', '.join(names)}" for reason, names in sorted(families.items())]


def _closed(families: Sequence[str]) -> dict[str, Any]:
    """Rows of these families, in this process; no function may have been substituted yet."""
    known.TABLE = ()
    return {family: measured(family, graph=True) for family in families}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--closed", nargs="*", help="print rows of these families, front door closed")
    arguments = parser.parse_args()
    if arguments.closed:
        print(json.dumps(_closed(arguments.closed)))
    else:
        PATH.write_text(
            page(
                {family: measured(family, graph=False) for family in FAMILIES},
                through_the_graph(list(FAMILIES)),
            )
        )
        print(f"wrote {PATH}")
