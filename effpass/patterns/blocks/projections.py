"""Projections: a product of channels with a weight matrix, in whatever spelling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.fx import Node

from effpass.axes.contraction import contraction, is_float
from effpass.axes.labels import KEEPS, RESHAPES, argument, opname
from effpass.graph.emit import same_sizes

CASTS = ("to", "_to_copy", "type_as")
FLIPS = ("t", "transpose", "permute", "numpy_T", "mT", "swapaxes")


@dataclass(frozen=True)
class Weight:
    """A matrix of the model; with ``flipped``, its columns are the outputs, not its rows."""

    node: Node
    flipped: bool

    @property
    def outputs(self) -> Any:
        """How many channels it makes."""
        return self.node.meta["val"].shape[1 if self.flipped else 0]


@dataclass(frozen=True)
class Projection:
    """``node`` is ``x @ weight^T + bias`` over the last dim of ``x``."""

    node: Node
    x: Node
    weight: Weight
    bias: Node | None


def projection(node: Node) -> Projection | None:
    """The projection that a node computes."""
    name = opname(node)
    if name == "linear":
        x, weight, bias = (argument(node, i) for i in range(3))
        return _made(node, x, _weight(weight, False), bias)
    if name == "add":
        return _biased(node)
    product = contraction(node)
    if product is None or product.factor != 1 or product.addend_factor != 1:
        return None
    axes, held, out = product.left_axes, product.right_axes, product.out_axes
    if len(held) != 2 or len(axes) < 2 or axes[-1] not in held:
        return None
    free = held[0] if axes[-1] == held[1] else held[1]
    if (*axes[:-1], free) != out:
        return None
    weight = _weight(product.right, axes[-1] == held[0])
    return _made(node, product.left, weight, product.addend)


def through(node: Node) -> Node | None:
    """The source of a cast, a copy, a view that keeps the last dim, dropout that drops nothing."""
    name, source = opname(node), argument(node, 0)
    if not is_float(node) or not is_float(source):
        return None
    if name in CASTS or name in KEEPS:
        return source
    if name == "dropout":
        return source if not node.args[2] or node.args[1] == 0 else None
    if name in RESHAPES:
        shapes = source.meta["val"].shape, node.meta["val"].shape
        return source if all(shapes) and same_sizes(shapes[0][-1:], shapes[1][-1:]) else None
    return None


def part(node: Node) -> tuple[Node, int, int] | None:
    """The tensor of whose last dim a node is a part, and from where to where."""
    name, source = opname(node), argument(node, 0)
    if getattr(node.target, "__name__", "") == "getitem" and isinstance(source, Node):
        return _piece(source, node)
    if name != "slice" or not is_float(source):
        return None
    rank, width = source.meta["val"].dim(), source.meta["val"].shape[-1]
    dim, start, end = (*node.args[1:], *(None,) * 3)[:3] if len(node.args) > 1 else (0, None, None)
    step = argument(node, 4)
    if not isinstance(width, int) or not isinstance(dim, int) or dim % rank != rank - 1:
        return None
    first, last, stride = slice(start, end, step).indices(width)  # type: ignore[arg-type]
    return (source, first, last) if stride == 1 else None


def _piece(source: Node, node: Node) -> tuple[Node, int, int] | None:
    """One output of chunk or split."""
    whole = argument(source, 0)
    if opname(source) not in ("chunk", "split", "split_with_sizes", "tensor_split"):
        return None
    pieces, index = source.meta.get("val"), argument(node, 1)
    dim = source.kwargs.get("dim", argument(source, 2) or 0)
    if not is_float(whole) or not isinstance(pieces, Sequence) or not isinstance(dim, int):
        return None
    rank = whole.meta["val"].dim()
    widths = [piece.shape[-1] for piece in pieces]
    if dim % rank != rank - 1 or not all(isinstance(width, int) for width in widths):
        return None
    start = sum(widths[:index])
    return whole, start, start + widths[index]


def _biased(node: Node) -> Projection | None:
    """A product, and a vector that is added behind it."""
    if len(node.args) != 2 or node.kwargs:
        return None
    for product, bias in (node.args, node.args[::-1]):
        if not isinstance(product, Node) or not isinstance(bias, Node):
            continue
        if opname(product) == "add" or not _vector(bias):
            continue
        found = projection(product)
        if found is not None and found.bias is None and len(product.users) == 1:
            return Projection(node, found.x, found.weight, bias)
    return None


def _made(node: Node, x: Any, weight: Weight | None, bias: Any) -> Projection | None:
    if weight is None or not is_float(x) or not is_float(node):
        return None
    if bias is not None and not _vector(bias):
        return None
    return Projection(node, x, weight, bias)


def _weight(node: Any, flipped: bool) -> Weight | None:
    """The matrix of the model behind casts and transpositions."""
    while isinstance(node, Node) and node.op == "call_function":
        name = opname(node)
        flipped ^= name in FLIPS
        if name not in (*CASTS, *KEEPS, *FLIPS) or not is_float(argument(node, 0)):
            return None
        node = node.args[0]
    return Weight(node, flipped) if is_float(node) and node.meta["val"].dim() == 2 else None


def _vector(node: Any) -> bool:
    """Whether a node is a vector of the model, perhaps cast."""
    while isinstance(node, Node) and opname(node) in CASTS:
        node = argument(node, 0)
    if not isinstance(node, Node) or node.op == "call_function":
        return False
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dim() == 1
