"""Tokens into one row, and back to where they were."""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING

import torch
from torch.fx import Node

from effpass.passes.packing.places import Holds

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
