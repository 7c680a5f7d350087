"""Labels: which dim of one tensor is which dim of another, through views and products.

Each dim carries a tuple of labels, outermost first: a dim that merges two carries both labels, a
dim of size 1 carries none. A view that cuts a dim cuts its label, everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import sympy
import torch
from torch import SymInt, Tensor
from torch.fx import Node

Dim = tuple[int, ...]
Dims = tuple[Dim, ...]

KEEPS = ("contiguous", "clone", "alias", "lift_fresh", "lift_fresh_copy")
PERMUTES = (
    *("transpose", "swapaxes", "swapdims", "permute", "movedim", "moveaxis"),
    *("t", "mT", "adjoint", "numpy_T"),
)
RESHAPES = (
    *("view", "reshape", "_unsafe_view", "view_as", "reshape_as", "flatten", "unflatten"),
    *("unsqueeze", "squeeze"),
)
EXPANDS = ("expand", "expand_as", "broadcast_to")
PRIMES = (2, 3, 5, 7, 11, 13, 17, 19)


class Labels:
    """Hands out labels, and remembers their sizes and into which parts they were cut."""

    def __init__(self) -> None:
        self.sizes: list[sympy.Expr] = []
        self.parts: dict[int, Dim] = {}

    def fresh(self, size: Any) -> Dim:
        """A dim of one new label; of none for size 1."""
        return () if single(size) else (self._new(expression(size)),)

    def of(self, node: Node) -> Dims:
        """New labels for every dim of a node's value."""
        return tuple(self.fresh(size) for size in node.meta["val"].shape)

    def resolve(self, labels: Iterable[int]) -> Dim:
        """The labels, each that was cut replaced by its parts."""
        found: list[int] = []
        for label in labels:
            found += self.resolve(self.parts[label]) if label in self.parts else (label,)
        return tuple(found)

    def resolved(self, dims: Dims) -> Dims:
        """``resolve`` of every dim."""
        return tuple(self.resolve(dim) for dim in dims)

    def regroup(self, dims: Dims, shape: Sequence[Any]) -> Dims | None:
        """The dims of a tensor of ``dims`` seen in another shape; None where it is not certain."""
        pending = [label for dim in dims for label in self.resolve(dim)]
        found: list[Dim] = []
        for size in map(expression, shape):
            group, missing = [], size
            while missing != 1:
                if not pending:
                    return None
                label = pending.pop(0)
                if (rest := quotient(missing, self.sizes[label])) is not None:
                    missing = rest
                elif (rest := quotient(self.sizes[label], missing)) is not None:
                    label, inner = self.cut(label, missing, rest)
                    pending.insert(0, inner)
                    missing = sympy.Integer(1)
                else:
                    return None
                group.append(label)
            found.append(tuple(group))
        return None if pending else tuple(found)

    def behind(self, node: Node, dims: Dims) -> Dims | None:
        """The dims of a view's source, from those of the view; None where it is no view."""
        source = argument(node, 0)
        if not isinstance(source, Node) or not isinstance(source.meta.get("val"), Tensor):
            return None
        name, shape = opname(node), source.meta["val"].shape
        if name in KEEPS:
            return dims
        if name in PERMUTES:
            order = _order(node, len(shape))
            back = {d: dims[i] for i, d in enumerate(order)}
            return tuple(back[d] for d in range(len(shape)))
        if name in RESHAPES:
            return self.regroup(dims, shape)
        if name in EXPANDS:
            return aligned(dims, shape)
        if name == "repeat_interleave":
            return self._before_repeats(node, dims, shape)
        return None

    def through(self, node: Node, dims: Dims) -> Dims | None:
        """The dims of a view, from those of its source; None where it is no (simple) view."""
        if not isinstance(node.meta.get("val"), Tensor):
            return None  # unbind, say
        name, shape = opname(node), node.meta["val"].shape
        if name in KEEPS:
            return dims
        if name in PERMUTES:
            return tuple(dims[d] for d in _order(node, len(dims)))
        return self.regroup(dims, shape) if name in RESHAPES else None

    def _new(self, size: sympy.Expr) -> int:
        self.sizes.append(size)
        return len(self.sizes) - 1

    def cut(self, label: int, outer: sympy.Expr, inner: sympy.Expr) -> Dim:
        """Cuts a label in two, everywhere; answers the parts."""
        self.parts[label] = (self._new(outer), self._new(inner))
        return self.parts[label]

    def _before_repeats(self, node: Node, dims: Dims, shape: Sequence[Any]) -> Dims | None:
        """Each index repeated in place: the inner part of the dim is new."""
        repeats, dim = (*node.args[1:], None, None)[:2]
        dim = node.kwargs.get("dim", dim)
        if not isinstance(repeats, int) or not isinstance(dim, int):
            return None
        dim %= len(dims)
        parts = self.regroup((dims[dim],), (shape[dim], repeats))
        return None if parts is None else (*dims[:dim], parts[0], *dims[dim + 1 :])


def argument(node: Node, position: int) -> Any:
    """One positional argument of a node; None where it has fewer."""
    return node.args[position] if position < len(node.args) else None


def opname(node: Node) -> str:
    """The name of a node's ATen operation without its overload; empty for anything else."""
    if node.op != "call_function" or getattr(node.target, "namespace", "") != "aten":
        return ""
    return node.target._opname  # type: ignore[union-attr]


def is_attention(node: Node) -> bool:
    """Whether a node is torch's attention."""
    return opname(node) == "scaled_dot_product_attention"


def expression(size: Any) -> sympy.Expr:
    """A size as an expression: equal expressions are equal sizes, whatever the symbols are."""
    if isinstance(size, SymInt):
        return size.node.shape_env.simplify(size.node.expr)
    return sympy.sympify(size)


def single(size: Any) -> bool:
    """Whether a size is certainly 1."""
    return bool(expression(size) == 1)


def aligned(dims: Dims, shape: Sequence[Any]) -> Dims:
    """The dims of a tensor of ``shape`` that is broadcast to ``dims``."""
    last = dims[len(dims) - len(shape) :]
    return tuple(() if single(size) else dim for size, dim in zip(shape, last, strict=True))


def quotient(size: sympy.Expr, by: sympy.Expr) -> sympy.Expr | None:
    """``size / by`` where that is a whole number for certain."""
    ratio = sympy.cancel(size / by)
    if ratio.is_number:
        return ratio if ratio.is_integer and ratio >= 1 else None
    whole = sympy.fraction(ratio)[1] == 1 and not ratio.atoms(sympy.Function)
    return ratio if whole else None


def _order(node: Node, rank: int) -> list[int]:
    """Which dim of its source each dim of a permutation is."""
    probe = torch.empty(PRIMES[:rank], device="meta")
    made = node.target(probe, *node.args[1:], **node.kwargs)  # type: ignore[operator]
    return [PRIMES.index(size) for size in made.shape]
