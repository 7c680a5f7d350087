"""The golden table of ReduceTokens: which families of the zoo reduce, and why others do not.

``python -m tests.models.reduction`` writes it anew.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from effpass.ledger import report
from effpass.report import GraphReport
from tests.models.zoo import FAMILIES
from tests.tolerances import close

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


def compilers_agree(
    model: nn.Module,
    settings: dict[str, Any],
    batches: list[dict[str, Any]],
    read: Callable[[Any], Tensor],
) -> None:
    """Inductor's outputs, as ``read`` takes them, and gradients are eager's for every batch."""
    weights = [p for p in model.parameters() if p.requires_grad]
    found: dict[str, list[Any]] = {"eager": [], "inductor": []}
    for compiler, results in found.items():
        torch._dynamo.reset()
        options = {"reduce_tokens": settings, "compiler": compiler}
        run = torch.compile(model, backend="effpass", options=options)
        for batch in batches:
            out = read(run(**batch))
            results.append(out)
            results += torch.autograd.grad(out.square().mean(), weights, allow_unused=True)
    for mine, theirs in zip(found["inductor"], found["eager"], strict=True):
        if theirs is None:  # AOTAutograd answers zeros for weights of outputs that nobody reads
            assert mine is None or not mine.any()
        else:
            close(mine, theirs, "zoo_gradient_fp32")


if __name__ == "__main__":
    table = {family: measure(family) for family in FAMILIES}
    PATH.write_text(json.dumps(table, indent=2) + "\n")
    print(f"wrote {PATH}")
