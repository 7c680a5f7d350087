"""The golden table of ReduceTokens: which families of the zoo reduce, and why others do not.

``python -m tests.models.reduction`` writes it anew.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from effpass.ledger import report
from effpass.report import GraphReport
from tests.models.zoo import FAMILIES

PATH = Path(__file__).parent.parent / "golden" / "reduction.json"
OPTIONS: dict[str, Any] = {
    "reduce_tokens": {"keep": 0.75, "layers": [0]},
    "compiler": "eager",
}


def row(graph: GraphReport) -> dict[str, Any]:
    """Tokens and the share of operations saved, or the code and reason of a decline."""
    if graph.reductions:
        (found,) = graph.reductions
        return {"tokens": list(found.lengths), "saved": round(found.saved, 3)}
    (declined,) = (d for d in graph.declined if d.code.startswith("reduce_tokens"))
    return {"code": declined.code, "reason": declined.reason, "where": declined.where}


def expected() -> dict[str, dict[str, Any]]:
    """The table as committed."""
    return json.loads(PATH.read_text())


def measure(family: str) -> dict[str, Any]:
    """The row of one family."""
    model, make_inputs = FAMILIES[family]()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="effpass", options=OPTIONS)
    with torch.no_grad():
        compiled(**make_inputs(3, 16, True))
    return row(report(compiled).graphs[0])


if __name__ == "__main__":
    table = {family: measure(family) for family in FAMILIES}
    PATH.write_text(json.dumps(table, indent=2) + "\n")
    print(f"wrote {PATH}")
