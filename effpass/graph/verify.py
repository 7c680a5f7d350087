"""Verify: run a rewritten graph beside the captured one on the inputs at hand, and compare."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from effpass.graph.clean import graphs
from effpass.graph.writes import writes

# largest difference allowed, relative to the largest value: a few hundred roundings of a deep model
ALLOWED = {torch.float64: 1e-9, torch.float32: 2e-4, torch.float16: 3e-2, torch.bfloat16: 1e-1}


class VerificationError(RuntimeError):
    """A rewritten graph computes something else than the captured one."""


def verify(before: GraphModule, after: GraphModule, inputs: Sequence[Any]) -> str:
    """Runs both on copies of ``inputs``; answers the largest relative difference as text.

    Outputs and inputs written in place are compared. Raises VerificationError naming the first
    value that differs. Answers "not run: ..." where the graph cannot be run on the side.
    """
    reason = cannot_run(before, inputs)
    if reason is not None:
        return f"not run: {reason}"
    expected, actual = run_copy(before, inputs), run_copy(after, inputs)
    worst = 0.0
    for i, (want, have) in enumerate(zip(expected, actual, strict=True)):
        if isinstance(want, Tensor):
            worst = max(worst, difference(i, want, have))
    return f"equal within {worst:.1e} of the largest value"


def cannot_run(gm: GraphModule, inputs: Sequence[Any]) -> str | None:
    """Why a graph cannot be run on the side; None where it can."""
    if any(isinstance(v, FakeTensor) for v in inputs):
        return "the inputs are fake (distributed wrappers give no real ones)"
    written = _written(gm)
    if any(isinstance(v, torch.nn.Parameter) and n in written for n, v in _named(gm, inputs)):
        return "the graph writes to parameters"
    if any(node.op == "get_attr" for node in written):
        return "the graph writes to tensors that are not its inputs"
    return None


def _named(gm: GraphModule, inputs: Sequence[Any]) -> list[tuple[Node, Any]]:
    return list(zip(gm.graph.find_nodes(op="placeholder"), inputs, strict=True))


def _written(gm: GraphModule) -> set[Node]:
    """Nodes that some op writes to in place, and what they are views of."""
    found: set[Node] = set()
    for body in graphs(gm):
        for node in body.graph.nodes:
            pending = writes(node)
            while pending:
                target = pending.pop()
                if target not in found:
                    found.add(target)
                    pending += target.all_input_nodes[:1]  # a view's base comes first
    return found


def run_copy(gm: GraphModule, inputs: Sequence[Any]) -> list[Any]:
    """Outputs, and inputs after the call, of a graph that runs on copies of ``inputs``."""
    copies = [_copy(v) for v in inputs]
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        outputs = gm(*copies)
    return [*pytree.tree_leaves(outputs), *copies]


def _copy(value: Any) -> Any:
    if isinstance(value, torch.nn.Parameter):
        return value.detach()
    if isinstance(value, Tensor):
        return value.detach().clone()
    return value.node.hint if isinstance(value, torch.SymInt) else value


def difference(index: int, want: Tensor, have: Tensor) -> float:
    """How far ``have`` is from ``want``, of its largest value. Raises VerificationError."""
    if want.shape != have.shape or want.dtype != have.dtype:
        raise VerificationError(
            f"value {index}: expected {want.dtype} of shape {tuple(want.shape)}, "
            f"found {have.dtype} of shape {tuple(have.shape)}"
        )
    if not want.is_floating_point():
        if not torch.equal(want, have):
            raise VerificationError(f"value {index} ({want.dtype}) is not equal")
        return 0.0
    a, b = want.double(), have.double()
    if not torch.equal(a.isnan(), b.isnan()) or not torch.equal(a.isinf(), b.isinf()):
        raise VerificationError(f"value {index}: NaN or infinity in different places")
    finite = a.isfinite()
    if not finite.any():
        return 0.0
    scale = a[finite].abs().max().clamp_min(1e-30)
    worst = ((a - b)[finite].abs().max() / scale).item()
    if worst > ALLOWED.get(want.dtype, 1e-1):
        raise VerificationError(
            f"value {index} differs by {worst:.2e} of its largest value, "
            f"allowed {ALLOWED.get(want.dtype, 1e-1):.0e} in {want.dtype}"
        )
    return worst
