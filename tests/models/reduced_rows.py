"""The golden table of ReduceTokens on packed sequences: rows that are given, and padded batches.

``python -m tests.models.reduced_rows`` writes it anew.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import maybe_mark_dynamic

from effpass.ledger import report
from effpass.report import GraphReport
from tests.models import rows
from tests.models.zoo import FAMILIES

PATH = Path(__file__).parent.parent / "golden" / "reduced_rows.json"
LENGTHS = [9, 1, 13, 4]
KINDS = ("packed_rows", "pack_varlen")
FIELDS: dict[str, Any] = {"ratio": 0.15, "layers": [0]}


def compiled(model: nn.Module, pack: bool = False, **fields: Any) -> Any:
    """The model with tokens that leave; ``pack``: and without padding."""
    torch._dynamo.reset()
    options = {"pack_varlen": pack, "reduce_tokens": FIELDS | fields, "compiler": "eager"}
    return torch.compile(model, backend="effpass", options=options)


def ran(family: str, kind: str, model: nn.Module) -> tuple[Tensor, GraphReport]:
    """Outputs of all sequences end to end, and the report of the graph that made them."""
    ids = rows.sequences(LENGTHS)
    run = compiled(model, kind == "pack_varlen")
    if kind == "packed_rows":
        out = rows.tokens(run(**rows.arguments(model, rows.row(family, ids))))
        return out, report(run).graphs[-1]
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    padded = torch.zeros_like(mask)
    padded[mask.bool()] = torch.cat(ids)
    out = rows.tokens(run(input_ids=padded, attention_mask=mask, **_uncached(model)))
    return out[mask.bool()][None], report(run).graphs[-1]


def alone(model: nn.Module, **fields: Any) -> Tensor:
    """Outputs of every sequence by itself, reduced by the same options."""
    run, found = compiled(model, **fields), []
    for each in rows.sequences(LENGTHS):
        row = each[None]
        maybe_mark_dynamic(row, 1)  # one compilation for all lengths
        found.append(rows.tokens(run(input_ids=row, **_uncached(model))))
    return torch.cat(found, 1)


def _uncached(model: nn.Module) -> dict[str, Any]:
    given = rows.arguments(model, rows.row("", rows.sequences([3])))
    return {name: value for name, value in given.items() if name == "use_cache"}


def entry(graph: GraphReport) -> dict[str, Any]:
    """How many tokens stay of all sequences, or the codes and reasons of declines."""
    if graph.reductions and graph.reductions[-1].sequences == tuple(LENGTHS):
        return {"tokens": list(graph.reductions[-1].lengths)}
    return {"declined": {d.code: d.reason for d in graph.declined}}


def measure(family: str) -> dict[str, Any]:
    """The row of one family."""
    found: dict[str, Any] = {}
    for kind in KINDS:
        model, _ = FAMILIES[family]()
        try:
            with torch.no_grad():
                found[kind] = entry(ran(family, kind, model)[1])
        except Exception as error:  # of any kind: Dynamo wraps what a backend raises
            found[kind] = {"error": str(error).split("\n\n")[0].rpartition("RowError: ")[2]}
    return found


def expected() -> dict[str, dict[str, Any]]:
    """The table as committed."""
    return json.loads(PATH.read_text())


if __name__ == "__main__":
    table = {family: measure(family) for family in rows.families()}
    PATH.write_text(json.dumps(table, indent=2) + "\n")
    print(f"wrote {PATH}")
