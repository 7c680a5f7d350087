"""Tokens into one row, back to where they were, and padding to zero."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.fx import Node

from effpass.axes.relation import values
from effpass.passes.packing.places import Holds, Places

if TYPE_CHECKING:
    from effpass.passes.packing.rewrite import Rewriter

aten = torch.ops.aten


def gather(rewriter: Rewriter, node: Node) -> Node:
    """The real tokens of a plain value of tokens or positions, in one row."""
    place, plain, index = rewriter.place(node), rewriter.plain(node), rewriter.index
    token, batch = place.token, place.batch
    assert token is not None
    if place.holds is Holds.POSITIONS or batch is None:
        return rewriter.call(aten.index_select.default, plain, token, index["columns"])
    if batch == token:
        return rewriter.call(aten.index_select.default, plain, token, index["indices"])
    front = rewriter.call(aten.movedim.intlist, plain, [batch, token], [0, 1])
    flat = rewriter.call(aten.flatten.using_ints, front, 0, 1)
    chosen = rewriter.call(aten.index_select.default, flat, 0, index["indices"])
    rows = rewriter.call(aten.unsqueeze.default, chosen, 0)
    return rewriter.call(aten.movedim.intlist, rows, [0, 1], [batch, token])


def put_back(rewriter: Rewriter, node: Node) -> Node:
    """The packed form of a value of tokens in its rows, zero at padding."""
    made = _in_rows(rewriter, node)
    value = values(node)[0]
    return rewriter.call(aten.contiguous.default, made) if value.is_contiguous() else made


def _in_rows(rewriter: Rewriter, node: Node) -> Node:
    place, packed, graph = rewriter.place(node), rewriter.packed(node), rewriter.graph
    assert place.token is not None
    if place.batch is not None and place.batch != place.token:
        packed = rewriter.call(aten.squeeze.dim, packed, place.batch)
    token = place.token - (place.batch is not None and place.batch < place.token)
    first = rewriter.call(aten.movedim.int, packed, token, 0)
    all_tokens = graph.call_function(operator.mul, (rewriter.b, rewriter.t))
    size = graph.call_method("size", (first,))
    rest = graph.call_function(operator.getitem, (size, slice(1, None)))
    shape = graph.call_function(operator.add, ((all_tokens,), rest))
    empty = graph.call_method("new_zeros", (first, shape))
    filled = rewriter.call(aten.index_copy.default, empty, 0, rewriter.index["indices"], first)
    if place.batch == place.token:
        return rewriter.call(aten.movedim.int, filled, 0, place.token)
    shape = graph.call_function(operator.add, ((rewriter.b, rewriter.t), rest))
    rows = graph.call_method("reshape", (filled, shape))
    if place.batch is None:
        row = rewriter.call(aten.squeeze.dim, rows, 0)
        return rewriter.call(aten.movedim.int, row, 0, place.token)
    return rewriter.call(aten.movedim.intlist, rows, [0, 1], [place.batch, place.token])


def clear(value: Tensor, node: Node, places: Places, real: Tensor, factor: float = 0.0) -> Tensor:
    """A value of ``node``, zero (or ``factor`` times what it was) where ``real`` (b, t) is not.

    A value that does not hold tokens is left as it is. Rows and tokens may share dims with more.
    """
    if node not in places.solution or places.of(node).holds is not Holds.TOKENS:
        return value
    names = {**dict.fromkeys(places.batch, 0), **dict.fromkeys(places.token, 1)}
    shape: list[int] = []
    axes: list[int] = []
    for dim, size in zip(places.solution.dims(node), value.shape, strict=True):
        parts = [real.shape[names[n]] if n in names else 0 for n in dim] or [size]
        for i, label in enumerate(dim):
            if label in names:
                axes.append(names[label])
            elif parts.count(0) > 1:
                parts[i] = int(places.solution.classes.sizes[label])
        known = torch.Size([part for part in parts if part]).numel()
        shape += [part or size // known for part in parts]
    where = [i for i, label in enumerate(_flat(places, node)) if label in names]
    view = [1] * len(shape)
    for at, axis in zip(where, axes, strict=True):
        view[at] = real.shape[axis]
    keep = real if axes in ([0, 1], [1]) else real.t()
    keep = keep.reshape(view).expand(shape).reshape(value.shape)
    return torch.where(keep, value, torch.zeros_like(value) if factor == 0 else value * factor)


def _flat(places: Places, node: Node) -> list[int | None]:
    """All labels of a value's dims, one after the other; None for a dim without."""
    return [n for dim in places.solution.dims(node) for n in (dim or (None,))]
