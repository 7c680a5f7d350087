"""Proof: run a region and what replaces it on random inputs, in float64, and compare.

Structure has already been checked; numbers only veto. Three draws: random inputs with masks partly
active, the same with every token of the second half drawn anew (outputs before it must not move,
where the idiom is causal), and one with masks fully active.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from effpass.graph.region import Region, evaluate
from effpass.graph.writes import writes
from effpass.patterns.proposal import Missed, Proposal

# of the largest value: float64 sums of some thousand terms in another order, through exponentials
ALLOWED = 1e-7
FEW = 64  # nodes between two inputs of one region


def prove(proposal: Proposal, region: Region, thorough: bool = True) -> str:
    """Raises Missed when region and replacement disagree; answers how close they are, as text.

    Where structure has settled all but sizes and constants, one draw is enough: not ``thorough``.
    """
    generator = torch.Generator().manual_seed(0)
    derived = _derived(region)
    values = [_draw(node, proposal, generator, 0.8) for node in region.inputs]
    given = _consistent(region, values, derived)
    first, worst = _compare(proposal, region, given)
    if not thorough:
        return f"equal within {worst:.0e} on one random input in float64"
    later = [_disturbed(node, v, proposal, generator) for node, v in _pairs(region, values)]
    changed = _consistent(region, later, derived)
    second, other = _compare(proposal, region, changed)
    pairs = zip(region.inputs, given, changed, strict=True)
    if all(_same(a, b) for node, a, b in pairs if node in derived):
        _causal(proposal, region, first, second)  # else a state is made of later tokens
    full = [_draw(node, proposal, generator, 1.0) for node in region.inputs]
    _, third = _compare(proposal, region, _consistent(region, full, derived))
    return f"equal within {max(worst, other, third):.0e} on three random inputs in float64"


def _same(a: Any, b: Any) -> bool:
    return torch.equal(a, b) if isinstance(a, Tensor) else a == b  # a size is a number


def _pairs(region: Region, values: list[Any]) -> list[tuple[Node, Any]]:
    return list(zip(region.inputs, values, strict=True))


def _derived(region: Region) -> dict[Node, list[Node]]:
    """Inputs that are computed from others alone (a slice of one, say), and by which nodes."""
    found = {}
    for node in sorted(region.inputs):
        between: set[Node] = set()
        pending = [] if node.op == "placeholder" else [node]
        while pending and len(between) < FEW:
            each = pending.pop()
            if each in between or (each in region.inputs and each is not node):
                continue
            between.add(each)
            pending += each.all_input_nodes
        pure = all(n.op == "call_function" and not writes(n) for n in between)
        if between and not pending and pure and any(n.all_input_nodes for n in between):
            found[node] = sorted(between)
    return found


def _consistent(region: Region, values: list[Any], derived: dict[Node, list[Node]]) -> list[Any]:
    """The values, those of derived inputs computed from the others."""
    known = dict(zip(region.inputs, values, strict=True))
    for node, between in derived.items():
        known[node] = evaluate(between, [node], known, double=True)[0]
    return list(known.values())


def _draw(node: Node, proposal: Proposal, generator: torch.Generator, kept: float) -> Any:
    like = node.meta["val"]
    if not isinstance(like, Tensor):
        return _hint(like)
    shape = [_hint(size) for size in like.shape]
    if like.is_floating_point():
        value = torch.randn(shape, generator=generator, dtype=torch.float64)
    else:
        value = (torch.rand(shape, generator=generator) < kept).to(like.dtype)
    return proposal.draw[node](value) if node in proposal.draw else value


def _disturbed(node: Node, value: Any, proposal: Proposal, generator: torch.Generator) -> Any:
    if node not in proposal.tokens:
        return value
    dim = proposal.tokens[node]
    half = value.shape[dim] // 2
    fresh = _draw(node, proposal, generator, 0.8)
    return torch.cat(
        [value.narrow(dim, 0, half), fresh.narrow(dim, half, value.shape[dim] - half)], dim
    )


def _compare(proposal: Proposal, region: Region, values: Sequence[Any]) -> tuple[list[Any], float]:
    with torch.no_grad():
        try:
            wanted = region.run(values, double=True)
        except RuntimeError as error:
            raise Missed(f"the region cannot be run alone: {error}", region.outputs[0]) from error
        replacement = proposal.reference or proposal.build
        try:
            made = list(replacement(*values[: len(proposal.inputs)]))
        except RuntimeError as error:
            raise Missed(
                f"the op cannot be run on its inputs: {error}", region.outputs[0]
            ) from error
    worst = 0.0
    for node, want, have in zip(region.outputs, wanted, made, strict=True):
        worst = max(worst, _difference(node, want, have))
    return wanted, worst


def _difference(node: Node, want: Tensor, have: Tensor) -> float:
    if want.shape != have.shape:
        raise Missed(f"proof: shape {tuple(want.shape)} against {tuple(have.shape)}", node)
    if not want.numel():
        return 0.0
    want, have = want.double(), have.double()
    if not torch.equal(want.isnan(), have.isnan()):
        raise Missed("proof: NaN in different places", node)
    finite = want.isfinite() & have.isfinite()
    if not torch.equal(want.where(~finite, 0), have.where(~finite, 0)) and not want.isnan().any():
        raise Missed("proof: infinity in different places", node)
    scale = want[finite].abs().max().clamp_min(1e-30) if finite.any() else torch.tensor(1.0)
    worst = ((want - have)[finite].abs().max() / scale).item() if finite.any() else 0.0
    if worst > ALLOWED:
        raise Missed(f"proof: region and op differ by {worst:.1e} of the largest value", node)
    return worst


def _causal(proposal: Proposal, region: Region, first: list[Any], second: list[Any]) -> None:
    for node, dim, a, b in zip(region.outputs, proposal.output_tokens, first, second, strict=False):
        half = a.shape[dim] // 2
        if half and _difference_of(a.narrow(dim, 0, half), b.narrow(dim, 0, half)):
            raise Missed("proof: it reads tokens of the future", node)


def _difference_of(a: Tensor, b: Tensor) -> bool:
    scale = a.abs().max().clamp_min(1e-30)
    return bool(((a - b).abs().max() / scale) > ALLOWED)


def _hint(size: Any) -> Any:
    return size.node.hint if isinstance(size, torch.SymInt | torch.SymFloat) else size
