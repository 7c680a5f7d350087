"""The golden table of the front door: what each family of the zoo is raised to, and what is not.

``python -m tests.models.golden`` writes it anew.
"""

import json
from collections import Counter
from pathlib import Path

import torch

from effpass.ledger import report
from effpass.report import GraphReport
from tests.models.zoo import FAMILIES

PATH = Path(__file__).parent.parent / "golden" / "front_door.json"
Row = dict[str, dict[str, int]]


def row(graph: GraphReport) -> Row:
    """Ops of one graph, and library functions that were traced as they are, with their counts."""
    ops = Counter(chosen.op for chosen in graph.chosen)
    return {
        "ops": dict(sorted(ops.items())),
        "unraised": dict(sorted(Counter(miss.idiom for miss in graph.misses).items())),
    }


def expected() -> dict[str, Row]:
    """The table as committed."""
    return json.loads(PATH.read_text())


def _measure(family: str) -> Row:
    model, make_inputs = FAMILIES[family]()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="effpass", options={"compiler": "eager"})
    compiled(**make_inputs(2, 11, False))
    return row(report(compiled).graphs[0])


if __name__ == "__main__":
    table = {family: _measure(family) for family in FAMILIES}
    PATH.write_text(json.dumps(table, indent=2) + "\n")
    print(f"wrote {PATH}")
