"""Parallel scans: a first-order recurrence written as a tree of combines.

Halving (Blelloch), doubling (Hillis-Steele), up and down sweeps, divide and conquer, and what
``associative_scan`` expands into, all apply (a1, b1), (a2, b2) -> (a1 a2, a2 b1 + b2) to pieces of
time. Whichever pieces: the first combine says which tensors may be a and b, and every node behind
them is then followed in terms of intervals of time (``scans.intervals``). A node that is
W(0, t, t) at every t is h[t] = a[t] h[t-1] + b[t], by construction: a wrong combine, a wrong shift
or a cut through the channels never gets there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.fx import Graph, Node

from effpass.patterns.proposal import Idiom, Proposal
from effpass.patterns.scans.broken_scans import explain
from effpass.patterns.scans.combines import (
    Leaves,
    combines,
    first_combines,
    followed,
    rank,
    readings,
    whole,
)
from effpass.patterns.scans.interval_rules import Sight, created
from effpass.patterns.scans.intervals import ONE, TIME, ZERO, Value


def check(node: Node) -> Proposal | None:
    """The recurrence that starts with this combine; Missed where something breaks it off."""
    tried = _TRIED.setdefault(node.graph, set())
    begun: list[tuple[Leaves, Sight]] = []
    for combine in combines(node):
        for leaves in readings(combine):
            if leaves in tried:  # from another first combine of the same tree
                return None
            sight, state = followed(leaves)
            if state is not None:
                return _proposal(leaves, state, sight)
            tried.add(leaves)
            begun.append((leaves, sight))
    explain(node, begun)
    return None


_TRIED: WeakKeyDictionary[Graph, set[Leaves]] = WeakKeyDictionary()
IDIOM = Idiom("parallel scan", first_combines, check)


def _proposal(leaves: Leaves, state: Node, sight: Sight) -> Proposal:
    others = _other_inputs(leaves, state, sight)
    fills = {ZERO: torch.zeros_like, ONE: torch.ones_like}
    draw = {node: fills[code] for node in others if (code := created(node)) in fills}
    return proposal(leaves, state, sight, (leaves.a, leaves.b, *others), state, draw)


def proposal(
    leaves: Leaves,
    state: Node,
    sight: Sight,
    inputs: tuple[Node, ...],
    output: Node,
    draw: Mapping[Node, Callable[[Tensor], Tensor]],
) -> Proposal:
    """``output`` is what ``state`` is in terms of a and b, the first two ``inputs``."""
    value = sight.values[state]
    assert isinstance(value, Value)
    dims = whole(leaves, sight)
    time = next(i for i, atom in enumerate(dims) if atom.name == TIME)
    order = [dims.index(dim[0]) if dim else None for dim in value.dims]

    def build(a: Tensor, b: Tensor, *_: Any) -> Sequence[Tensor]:
        return [_arranged(recurrence(a, b, time), order)]

    tokens = {node: rank(node) - (len(dims) - time) for node in inputs[:2]}
    at = (order.index(time),)
    return Proposal("linear_recurrence", inputs, (output,), build, draw, tokens, at)


def _other_inputs(leaves: Leaves, state: Node, sight: Sight) -> list[Node]:
    """Sizes, and new tensors made like something that is no piece of a or b."""
    found: list[Node] = []
    seen, pending = {leaves.a, leaves.b}, [state]
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        size = not isinstance(node.meta.get("val"), Tensor | list | tuple) and node.op != "get_attr"
        like = node.all_input_nodes if created(node) is not None else []
        if size or not all(sight.values.get(source) for source in like):
            found.append(node)
        else:
            pending += node.all_input_nodes
    return found


def recurrence(a: Tensor, b: Tensor, time: int) -> Tensor:
    """h[t] = a[t] h[t-1] + b[t] of broadcast a and b, in their dims, of which ``time`` is one."""
    if list(map(str, a.shape)) != list(map(str, b.shape)):
        a, b = torch.broadcast_tensors(a, b)
    batched = a.dim() > 2  # the first of the other dims
    dtype = torch.promote_types(a.dtype, b.dtype)
    a, b = (v if v.dtype == dtype else v.to(dtype) for v in (a, b))
    a, b = (_moved(v, time, 0) for v in (a, b))
    a, b = (v.movedim(1, 0) if batched else v[None] for v in (a, b))
    h, _ = torch.ops.effpass.linear_recurrence(_flat(a), _flat(b))
    h = h.reshape(a.shape) if h.dim() != a.dim() else h
    return _moved(h.movedim(1, 0) if batched else h[0], 0, time)


def _flat(v: Tensor) -> Tensor:
    """(b, t, ...) -> (b, t, d)."""
    return v[..., None] if v.dim() == 2 else v.flatten(2) if v.dim() > 3 else v


def _moved(v: Tensor, source: int, to: int) -> Tensor:
    return v if source == to else v.movedim(source, to)


def _arranged(h: Tensor, order: Sequence[int | None]) -> Tensor:
    """The dims in another order; None is a new one of size 1, those left out have size 1."""
    kept = [dim for dim in order if dim is not None]
    dropped = [dim for dim in range(h.dim()) if dim not in kept]
    if [*dropped, *kept] != [*range(h.dim())]:
        h = h.permute([*dropped, *kept])
    for _ in dropped:
        h = h.squeeze(0)
    for place, dim in enumerate(order):
        h = h.unsqueeze(place) if dim is None else h
    return h
