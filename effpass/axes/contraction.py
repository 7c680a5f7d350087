"""Contractions: every spelling of a product of two tensors, summed over some axes, as one form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import Tensor
from torch.fx import Node

from effpass.axes.labels import Dim, Dims, Labels, argument, opname, single


@dataclass(frozen=True)
class Contraction:
    """``factor * sum(left * right) + addend_factor * addend``; axes are named by numbers.

    Each of ``left_axes``, ``right_axes`` and ``out_axes`` has one name a dim; what is in both
    operands and not in the result is summed over.
    """

    left: Node
    right: Node
    left_axes: Dim
    right_axes: Dim
    out_axes: Dim
    factor: float = 1.0
    addend: Node | None = None
    addend_factor: float = 1.0

    def labelled(
        self, labels: Labels, out: Dims | None = None, operand: tuple[Node, Dims] | None = None
    ) -> tuple[Dims, Dims, Dims]:
        """Dims of left, right and result, where those of the result or of one operand are known."""
        found: dict[int, Dim] = {}
        if out is not None:
            found |= dict(zip(self.out_axes, out, strict=True))
        if operand is not None:
            axes = self.left_axes if operand[0] is self.left else self.right_axes
            found |= {axis: dim for axis, dim in zip(axes, operand[1], strict=True) if dim}
        both = ((self.left, self.left_axes), (self.right, self.right_axes))
        for node, axes in both:
            for axis, size in zip(axes, node.meta["val"].shape, strict=True):
                if not single(size) and axis not in found:
                    found[axis] = labels.fresh(size)
        left, right = (
            tuple(
                () if single(size) else found[axis]
                for axis, size in zip(axes, node.meta["val"].shape, strict=True)
            )
            for node, axes in both
        )
        return left, right, tuple(found.get(axis, ()) for axis in self.out_axes)


def contraction(node: Node) -> Contraction | None:
    """The product that a node computes; None where it computes something else."""
    rule = RULES.get(opname(node))
    found = rule(node) if rule is not None else None
    if found is None:
        return None
    alone = set(found.left_axes) ^ set(found.right_axes)  # axes of one operand
    return found if alone <= set(found.out_axes) else None


def _matmul(node: Node) -> Contraction | None:
    left, right = argument(node, 0), argument(node, 1)
    if not isinstance(left, Node) or not isinstance(right, Node):
        return None
    a, b = left.meta["val"].dim(), right.meta["val"].dim()
    rows, columns = (-101,) * (a > 1), (-102,) * (b > 1)
    batch = tuple(range(-max(a, b, 2) + 2, 0))  # counted from the right, so that they broadcast
    first = (*batch[len(batch) - max(a - 2, 0) :], *rows, -100)
    second = (*batch[len(batch) - max(b - 2, 0) :], -100, *columns)
    return Contraction(left, right, first, second, (*batch, *rows, *columns))


def _baddbmm(node: Node) -> Contraction | None:
    addend, left, right = (argument(node, i) for i in range(3))
    product = _axes("bik", "bkj", "bij")
    if opname(node) == "addmm":
        product = _axes("ik", "kj", "ij")
    beta, alpha = (cast(Any, node.kwargs.get(name, 1)) for name in ("beta", "alpha"))
    numbers = isinstance(beta, int | float) and isinstance(alpha, int | float)
    nodes = isinstance(addend, Node) and isinstance(left, Node) and isinstance(right, Node)
    if not numbers or not nodes:
        return None
    # a beta of 0 reads nothing, not even NaN
    return Contraction(left, right, *product, alpha, addend if beta else None, beta)


def _einsum(node: Node) -> Contraction | None:
    equation, operands = node.args[:2]
    if not isinstance(equation, str) or not isinstance(operands, Sequence) or len(operands) != 2:
        return None
    left, right = operands
    if not isinstance(left, Node) or not isinstance(right, Node):
        return None
    inputs, arrow, result = equation.replace(" ", "").partition("->")
    names = inputs.split(",")
    ranks = (left.meta["val"].dim(), right.meta["val"].dim())
    dots = [rank - len(s.replace("...", "")) for rank, s in zip(ranks, names, strict=True)]
    widest = max((d for d, s in zip(dots, names, strict=True) if "..." in s), default=0)
    if not arrow:
        once = [c for c in sorted(set(inputs)) if c.isalpha() and inputs.count(c) == 1]
        result = "..." * ("..." in inputs) + "".join(once)
    first, second = (_letters(s, d) for s, d in zip(names, dots, strict=True))
    if len(set(first)) < len(first) or len(set(second)) < len(second):
        return None  # a diagonal
    return Contraction(left, right, first, second, _letters(result, widest))


def _sum(node: Node) -> Contraction | None:
    """``(a * b).sum(dims)``."""
    product, summed, *rest = (*node.args, None)[:4]
    if not isinstance(product, Node) or opname(product) != "mul":
        return None
    left, right = product.args[:2]
    if not isinstance(left, Node) or not isinstance(right, Node) or left is right:
        return None
    if not isinstance(summed, Sequence) or not summed or node.kwargs:
        return None
    rank = product.meta["val"].dim()
    axes = tuple(range(rank))
    gone = {int(d) % rank for d in summed}  # type: ignore[call-overload]
    kept = tuple(rank + d if d in gone else d for d in axes)
    result = kept if rest and rest[0] is True else tuple(d for d in axes if d not in gone)
    first, second = (axes[rank - n.meta["val"].dim() :] for n in (left, right))
    return Contraction(left, right, first, second, result)


def _axes(*names: str) -> tuple[Dim, Dim, Dim]:
    first, second, result = (tuple(map(ord, name)) for name in names)
    return first, second, result


def _letters(names: str, dots: int) -> Dim:
    """One number a dim: letters, and negative ones (counted from the right) for an ellipsis."""
    before, ellipsis, after = names.partition("...")
    batch = range(-dots, 0) if ellipsis else ()
    return (*map(ord, before), *batch, *map(ord, after))


RULES: dict[str, Callable[[Node], Contraction | None]] = {
    "matmul": _matmul,
    "mm": _matmul,
    "bmm": _matmul,
    "baddbmm": _baddbmm,
    "addmm": _baddbmm,
    "einsum": _einsum,
    "sum": _sum,
}


def is_float(node: object) -> bool:
    """Whether a node is a tensor of floating point numbers."""
    value = node.meta.get("val") if isinstance(node, Node) else None
    return isinstance(value, Tensor) and value.is_floating_point()
