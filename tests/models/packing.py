"""The golden table of PackVarlen: which families of the zoo run packed, and why others do not.

``python -m tests.models.packing`` writes it anew.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from effpass.ledger import report
from effpass.report import GraphReport
from tests.models.zoo import FAMILIES

PATH = Path(__file__).parent.parent / "golden" / "packing.json"
OPTIONS: dict[str, Any] = {"pack_varlen": True, "compiler": "eager"}


def row(graph: GraphReport) -> dict[str, Any]:
    """Attention, scans and convolutions that run packed, and parts that run with their padding.

    Or the code and reason of a decline.
    """
    packed = [a.count for a in graph.applied if a.rewrite == "pack_varlen"]
    declined = [d for d in graph.declined if d.code.startswith("pack_varlen")]
    if packed:
        return {"packed": packed[0]} | ({"with padding": packed[1]} if packed[1:] else {})
    return {"code": declined[0].code, "reason": declined[0].reason, "where": declined[0].where}


def expected() -> dict[str, dict[str, Any]]:
    """The table as committed."""
    return json.loads(PATH.read_text())


def families() -> list[str]:
    """Those that take a padding mask."""
    return [f for f in FAMILIES if "attention_mask" in FAMILIES[f]()[1](2, 9, True)]


def _measure(family: str) -> dict[str, Any]:
    model, make_inputs = FAMILIES[family]()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="effpass", options=OPTIONS)
    with torch.no_grad():
        compiled(**make_inputs(3, 11, True))
    return row(report(compiled).graphs[0])


if __name__ == "__main__":
    table = {family: _measure(family) for family in families()}
    PATH.write_text(json.dumps(table, indent=2) + "\n")
    print(f"wrote {PATH}")
