"""Losses inside the graph: cross entropy over tokens whose targets are ignored at padding.

A target of ``ignore_index`` weighs nothing, in sums and in means, so the loss of real tokens alone
is the loss, exactly if every target at padding is ignored. Targets are integers that come with each
batch, so that is asked of each batch: one in which padding has a target runs with its padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch.fx import Node

from effpass.axes.labels import KEEPS, RESHAPES, opname
from effpass.axes.relation import arguments, is_tensor, values
from effpass.graph.source import keep_source
from effpass.passes.packing.places import Holds, Places, Unpackable
from effpass.passes.packing.samples import Samples

if TYPE_CHECKING:
    from effpass.passes.packing.rewrite import Rewriter

LOSSES = ("cross_entropy_loss", "nll_loss", "nll_loss_nd")
VIEWS = (*KEEPS, *RESHAPES, "to", "_to_copy", "log_softmax", "_log_softmax")


@dataclass(frozen=True)
class Ignored:
    """``target``, of the positions from ``first`` of every row on, is ``index`` at padding."""

    target: Node
    index: int
    first: int = 0


def is_loss(node: Node) -> bool:
    """Whether a node is a cross entropy with integers as targets, summed or averaged."""
    if opname(node) not in LOSSES:
        return False
    given = arguments(node)
    whole = is_tensor(given["target"]) and not given["target"].meta["val"].is_floating_point()
    return whole and given["reduction"] in (1, 2)


def packed_loss(rewriter: Rewriter, node: Node) -> Node:
    """The loss of real tokens alone. Raises Unpackable where it has no such form."""
    given = arguments(node)
    tensors = given["self"], given["target"]
    if any(rewriter.place(n).holds is not Holds.TOKENS for n in tensors):
        raise Unpackable("loss", node, "its scores or targets are not one a token")
    found = Ignored(given["target"], given["ignore_index"])
    if not _rows_first(rewriter.places, given["target"]) or not rewriter.samples.light(tensors[1]):
        raise Unpackable("loss", node, "its targets are not integers (batch, tokens) of the input")
    packed = [rewriter.packed(n) for n in tensors]
    rest: list[Any] = [
        rewriter.whole(value) if is_tensor(value) else value
        for name, value in given.items()
        if name not in ("self", "target")
    ]
    rewriter.readers.ignored.append(found)
    return keep_source(node, rewriter.call(node.target, *packed, *rest))


def ignored(node: Node, places: Places, samples: Samples) -> Ignored | None:
    """What makes a loss right where its scores are zero at padding; None where nothing does.

    Scores may be those of a part of the positions, as where a model drops the last.
    """
    given = arguments(node)
    target = given["target"]
    if not samples.light(target):
        return None
    source = given["self"]
    while opname(source) in VIEWS and is_tensor(source.args[0]):
        source = source.args[0]
    if opname(source) != "slice":
        return None
    cut = arguments(source)
    place = places.of(cut["self"])
    if place.holds is not Holds.TOKENS or place.batch == place.token:
        return None
    first = cut["start"] or 0
    rank = values(source)[0].dim()
    part = places.solution.dims(source)[cut["dim"] % rank]
    if cut["dim"] % rank != place.token or cut["step"] != 1 or not isinstance(first, int):
        return None
    dims = [label for dim in places.solution.dims(target) for label in dim]
    return Ignored(target, given["ignore_index"], first) if dims == [*places.batch, *part] else None


def _rows_first(places: Places, target: Node) -> bool:
    dims = [label for dim in places.solution.dims(target) for label in dim]
    return dims == [*places.batch, *places.token]
