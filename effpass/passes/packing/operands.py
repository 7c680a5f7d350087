"""In which form a node that treats every token by itself reads what it reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch.fx import Node

from effpass.axes.labels import opname, single
from effpass.axes.relation import Relation, is_tensor, values
from effpass.passes.packing.places import Holds, Unpackable

if TYPE_CHECKING:
    from effpass.passes.packing.rewrite import Rewriter


def operands(rewriter: Rewriter, relation: Relation) -> Callable[[Node], Node]:
    """How a free node reads its operands."""
    places, node = rewriter.places, relation.node
    out = places.of(node)

    def operand(source: Node) -> Node:
        if not is_tensor(source):
            return rewriter.whole(source)
        holds = places.of(source).holds
        if holds in (Holds.TOKENS, Holds.POSITIONS):
            return rewriter.packed(source)
        if holds is Holds.NEITHER:
            return rewriter.whole(source)
        if holds is Holds.SQUARE:
            raise Unpackable("pairs", node, "it reads a value of every pair of tokens")
        shape, rank = values(source)[0].shape, values(node)[0].dim()
        at = -1 if out.token is None else out.token - (rank - len(shape))
        pointwise = torch.Tag.pointwise in node.target.tags or opname(node) == "expand"  # type: ignore[union-attr]
        if not pointwise or out.batch == out.token or at < 0 or not single(shape[at]):
            raise Unpackable("rows", node, "it reads a value of every row, not element by element")
        return rewriter.rows_as_tokens(source, at)

    return operand
