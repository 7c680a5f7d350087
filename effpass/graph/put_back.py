"""Put a changed part back: from the new value of a view to the new value of what it is a view of.

One row a view op: what is selected is scattered, what is moved is moved back, what is reshaped is
reshaped back. An op without a row cannot be written through.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from effpass.graph.emit import Emitter, same_layout, same_sizes

aten = torch.ops.aten
Whole = Callable[[], Node]


@dataclass(frozen=True)
class Change:
    """``part`` is the new value of ``view``; ``whole()`` is the old value of its ``parent``."""

    view: Node
    parent: Node
    part: Node
    whole: Whole
    before: Node
    emit: Emitter

    def call(self, target: Any, *args: Any, **kwargs: Any) -> Node:
        """One call in front of the write."""
        return self.emit.call(self.before, self.before, target, *args, **kwargs)


def put_back(change: Change) -> Node:
    """The new value of the parent; the view is not ``irreversible``, and not all of it."""
    view = change.view
    if view.target is operator.getitem:
        return _piece(change)
    return ROWS[view.target](change)  # type: ignore[index]


def irreversible(view: Node, parent: Node) -> str:
    """Why a write through ``view`` cannot be put back into ``parent``; empty if it can."""
    name = getattr(view.target, "_opname", view.name)
    if name == "detach":
        return "it is written through detach"
    if view.meta["val"].dtype != parent.meta["val"].dtype:
        return f"it is written through {name} as another dtype"
    if view.target is operator.getitem:
        return "" if _range(view, parent) else f"it is written through a piece of {view.args[0]}"
    if name in SAME and all_of(view.meta["val"], parent.meta["val"]):
        return ""
    if view.target not in ROWS or view.kwargs:
        return f"it is written through {name}"
    return "" if view.target is not aten.narrow.default or _fixed(view, parent) else NARROW


def cut(view: Node, parent: Node) -> tuple[Any, tuple[Any, ...]] | None:
    """The op and operands that cut the same piece as a getitem of a chunk, split or unbind."""
    found = _range(view, parent)
    if found is None:
        return None
    dim, start, end = found
    if view.args[0].target is aten.unbind.int:  # type: ignore[union-attr]
        return aten.select.int, (dim, start)
    return aten.slice.Tensor, (dim, start, end)


NARROW = "it is written through narrow at a place that is not a number"
# ops that give their operand itself, or a view of all of it
SAME = ("alias", "contiguous", "to", "dropout", "positive", "type_as", "expand", "expand_as")


def all_of(view: Tensor, whole: Tensor) -> bool:
    """A view is all of ``whole``, as it lies."""
    offset = same_sizes([view.storage_offset()], [whole.storage_offset()])
    return offset and same_layout(view, whole)


def _fixed(view: Node, parent: Node) -> bool:
    dim, start, length = view.args[1:4]
    if not all(isinstance(n, int) for n in (dim, start, length)):
        return False
    return start >= 0 or isinstance(_size(parent, dim), int)  # type: ignore[operator]


def _select(c: Change) -> Node:
    return c.call(aten.select_scatter.default, c.whole(), c.part, *c.view.args[1:])


def _slice(c: Change) -> Node:
    return c.call(aten.slice_scatter.default, c.whole(), c.part, *c.view.args[1:])


def _narrow(c: Change) -> Node:
    dim, start, length = c.view.args[1:4]
    first = start % _size(c.parent, dim) if start < 0 else start  # type: ignore[operator]
    end = first + length  # type: ignore[operator]
    return c.call(aten.slice_scatter.default, c.whole(), c.part, dim, first, end)


def _diagonal(c: Change) -> Node:
    return c.call(aten.diagonal_scatter.default, c.whole(), c.part, *c.view.args[1:])


def _same_move(c: Change) -> Node:
    """Moves that are their own inverse."""
    return c.call(c.view.target, c.part, *c.view.args[1:])


def _permute(c: Change) -> Node:
    order = [int(d) % len(c.view.args[1]) for d in c.view.args[1]]  # type: ignore[arg-type, union-attr]
    back = [order.index(d) for d in range(len(order))]
    return c.call(aten.permute.default, c.part, back)


def _movedim(c: Change) -> Node:
    source, destination = c.view.args[1:3]
    return c.call(c.view.target, c.part, destination, source)


def _unsqueeze(c: Change) -> Node:
    return c.call(aten.squeeze.dim, c.part, c.view.args[1])


def _reshape(c: Change) -> Node:
    sizes = c.emit.sizes(c.before, c.parent)
    return c.call(aten.reshape.default, c.part, sizes)


def _piece(c: Change) -> Node:
    dim, start, end = _range(c.view, c.parent)  # type: ignore[misc]
    if c.view.args[0].target is aten.unbind.int:  # type: ignore[union-attr]
        return c.call(aten.select_scatter.default, c.whole(), c.part, dim, start)
    return c.call(aten.slice_scatter.default, c.whole(), c.part, dim, start, end)


def _range(view: Node, parent: Node) -> tuple[int, int, int] | None:
    """Dim, start and end of one piece of a chunk, split or unbind; None if not plain numbers."""
    pieces, index = view.args
    if not isinstance(pieces, Node) or not isinstance(index, int):
        return None
    if pieces.target not in PIECES:
        return None
    dim = _dim(pieces) % parent.meta["val"].dim()
    values: list[Tensor] = list(pieces.meta["val"])
    if pieces.target is aten.unbind.int:
        return dim, index, index + 1
    sizes = [v.shape[dim] for v in values]
    if not all(isinstance(n, int) for n in sizes[: index + 1]):
        return None
    start = sum(sizes[:index])
    return dim, start, start + sizes[index]


def _dim(pieces: Node) -> int:
    if "dim" in pieces.kwargs:
        return int(pieces.kwargs["dim"])  # type: ignore[arg-type]
    place = PIECES[pieces.target]  # type: ignore[index]
    return int(pieces.args[place]) if len(pieces.args) > place else 0  # type: ignore[arg-type]


def _size(node: Node, dim: Any) -> int:
    return node.meta["val"].shape[dim]


# where each op keeps its dim
PIECES = {
    aten.unbind.int: 1,
    aten.chunk.default: 2,
    aten.split.Tensor: 2,
    aten.split_with_sizes.default: 2,
    aten.tensor_split.sections: 2,
    aten.tensor_split.indices: 2,
}
ROWS: dict[Any, Callable[[Change], Node]] = {
    aten.select.int: _select,
    aten.slice.Tensor: _slice,
    aten.narrow.default: _narrow,
    aten.diagonal.default: _diagonal,
    aten.permute.default: _permute,
    aten.unsqueeze.default: _unsqueeze,
    **dict.fromkeys(
        (
            *(aten.transpose.int, aten.swapaxes.default, aten.swapdims.default),
            *(aten.t.default, aten.numpy_T.default, aten.mT.default),
        ),
        _same_move,
    ),
    **dict.fromkeys(
        (aten.movedim.int, aten.movedim.intlist, aten.moveaxis.int, aten.moveaxis.intlist),
        _movedim,
    ),
    **dict.fromkeys(
        (
            *(aten.view.default, aten.reshape.default, aten.view_as.default),
            *(aten.reshape_as.default, aten.flatten.using_ints, aten.unflatten.int),
            *(aten.ravel.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims),
        ),
        _reshape,
    ),
}
