"""A normal form of products: a node as ``coefficient * sum over labels of leaf[...] * leaf[...]``.

However a product is written (broadcast multiplications, einsum, matmul, views in between), it has
one form: which tensors are multiplied, and which of their dims run together. Each dim of a node is
a tuple of labels (none for size 1, several where dims were merged). Splitting a merged dim splits
its label everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

aten = torch.ops.aten
CASTS = (
    *(aten.to.dtype, aten.to.device, aten.to.dtype_layout, aten.to.other),
    *(aten._to_copy.default, aten.type_as.default),
)
Dims = tuple[tuple["Label", ...], ...]


class Label:
    """One index. ``parts``, where it was found to be several indices merged, outermost first."""

    def __init__(self, size: Any) -> None:
        self.size = size
        self.parts: tuple[Label, ...] | None = None

    def resolved(self) -> tuple[Label, ...]:
        """The indices that this one is made of now."""
        if self.parts is None:
            return (self,)
        return tuple(r for part in self.parts for r in part.resolved())

    def split(self, sizes: Sequence[Any]) -> tuple[Label, ...]:
        """Makes this label several of the given sizes."""
        self.parts = tuple(Label(size) for size in sizes)
        return self.parts


def resolved(dims: Dims) -> Dims:
    """Dims with every split label replaced by its parts."""
    return tuple(tuple(r for label in dim for r in label.resolved()) for dim in dims)


@dataclass
class Factor:
    """A leaf of a product, with the labels of each of its dims."""

    node: Node
    dims: Dims

    @property
    def labels(self) -> frozenset[Label]:
        """All labels of the leaf."""
        return frozenset(r for dim in self.dims for label in dim for r in label.resolved())


@dataclass
class Product:
    """``coefficient * prod(factors)``, summed over ``summed``."""

    coefficient: float = 1.0
    factors: list[Factor] = field(default_factory=list)
    summed: list[Label] = field(default_factory=list)


def size(value: Any) -> Any:
    """An int, or the expression of a symbolic size."""
    if not isinstance(value, torch.SymInt):
        return value
    expression = value.node.expr
    return int(expression) if expression.is_Integer else expression


def fresh(node: Node) -> Dims:
    """A new label for every dim of a node that is not 1."""
    shape = [size(s) for s in node.meta["val"].shape]
    return tuple(() if s == 1 else (Label(s),) for s in shape)


def expand(node: Node, dims: Dims, stop: Collection[Node] = (), rounding: bool = False) -> Product:
    """The product that ``node``, with these labels, is; nodes in ``stop`` are leaves.

    A cast to a narrower float rounds, and is a leaf too unless ``rounding`` is to be ignored.
    """
    product = Product()
    pending = [(node, dims)]
    while pending:
        node, dims = pending.pop()
        rule = None if node in stop else RULES.get(node.target)
        rule = _same if rounding and rule is _cast and is_float(node) else rule
        parts = None if rule is None else rule(node, resolved(dims), product)
        if parts is None:
            product.factors.append(Factor(node, dims))
        else:
            pending += parts
    for factor in product.factors:
        factor.dims = resolved(factor.dims)
    product.summed = [r for label in product.summed for r in label.resolved()]
    return product


Parts = list[tuple[Node, Dims]]


def shape(node: Any) -> list[Any]:
    """Sizes of a node's value."""
    return [size(s) for s in node.meta["val"].shape]


def regroup(dims: Dims, sizes: Sequence[Any]) -> Dims | None:
    """Labels for a tensor of ``sizes`` that is a reshape of one labelled ``dims``; None: no."""
    if 0 in sizes:
        return None
    atoms = [label for dim in dims for label in dim]
    made: list[tuple[Label, ...]] = []
    at = 0
    for wanted in sizes:
        group: list[Label] = []
        while wanted != 1:
            if at == len(atoms):
                return None
            atom = atoms[at]
            if atom.size == wanted or _divides(atom.size, wanted):
                wanted = 1 if atom.size == wanted else wanted // atom.size
                group.append(atom)
                at += 1
            elif _divides(wanted, atom.size):
                atoms[at : at + 1] = atom.split((wanted, atom.size // wanted))
            else:
                return None
        made.append(tuple(group))
    return tuple(made) if at == len(atoms) else None


def _divides(a: Any, b: Any) -> bool:
    if isinstance(a, int) and isinstance(b, int):
        return b % a == 0
    return bool((b / a).is_integer) if not isinstance(b, int) else False


def is_float(node: Node) -> bool:
    """A floating tensor, made of one."""
    values = (node.meta["val"], *(n.meta["val"] for n in node.all_input_nodes[:1]))
    return all(isinstance(v, Tensor) and v.is_floating_point() for v in values)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, Node) and isinstance(value.meta.get("val"), Tensor)


def _broadcast(node: Node, dims: Dims) -> Dims:
    """Labels of an operand that broadcasts to ``dims``."""
    sizes = shape(node)
    own = dims[len(dims) - len(sizes) :]
    return tuple(() if s == 1 else d for s, d in zip(sizes, own, strict=True))


def _multiply(node: Node, dims: Dims, product: Product) -> Parts | None:
    parts = []
    for value in node.args[:2]:
        if _is_tensor(value):
            parts.append((value, _broadcast(value, dims)))  # type: ignore[arg-type]
        elif isinstance(value, int | float):
            product.coefficient *= value
        else:
            return None
    return parts  # type: ignore[return-value]


def _divide(node: Node, dims: Dims, product: Product) -> Parts | None:
    args: Any = node.args
    if not isinstance(args[1], int | float) or len(args) > 2 or node.kwargs:
        return None
    product.coefficient /= args[1]
    return [(args[0], dims)]


def _negate(node: Node, dims: Dims, product: Product) -> Parts:
    product.coefficient = -product.coefficient
    return [(node.args[0], dims)]  # type: ignore[list-item]


def _same(node: Node, dims: Dims, product: Product) -> Parts:
    return [(node.args[0], dims)]  # type: ignore[list-item]


def _cast(node: Node, dims: Dims, product: Product) -> Parts | None:
    """A cast to a wider float; a narrower one rounds, and is a leaf."""
    source = node.args[0]
    before, after = source.meta["val"].dtype, node.meta["val"].dtype  # type: ignore[union-attr]
    if before.is_floating_point and torch.promote_types(before, after) == after:
        return [(source, dims)]  # type: ignore[list-item]
    return None


def _view(node: Node, dims: Dims, product: Product) -> Parts | None:
    source: Node = node.args[0]  # type: ignore[assignment]
    regrouped = regroup(dims, shape(source))
    return None if regrouped is None else [(source, regrouped)]


def _reorder(order: Callable[[Node, int], Sequence[int]]) -> Callable[..., Parts]:
    """Dim i of the node is dim ``order[i]`` of its source."""

    def rule(node: Node, dims: Dims, product: Product) -> Parts:
        source: Node = node.args[0]  # type: ignore[assignment]
        where = [d % len(dims) for d in order(node, len(dims))]
        return [(source, tuple(dims[where.index(d)] for d in range(len(dims))))]

    return rule


def _swapped(node: Node, rank: int) -> list[int]:
    order = list(range(rank))
    a, b = (int(d) % rank for d in node.args[1:3])  # type: ignore[call-overload]
    order[a], order[b] = b, a
    return order


def _flipped(rank: int) -> list[int]:
    return [*range(rank - 2), rank - 1, rank - 2] if rank > 1 else [0]


def _moved(node: Node, rank: int) -> list[int]:
    source, target = node.args[1:3]
    source = [source] if isinstance(source, int) else source
    target = [target] if isinstance(target, int) else target
    placed = {t % rank: s % rank for s, t in zip(source, target, strict=True)}  # type: ignore[arg-type,union-attr]
    rest = iter(d for d in range(rank) if d not in placed.values())
    return [placed[d] if d in placed else next(rest) for d in range(rank)]


def _expand(node: Node, dims: Dims, product: Product) -> Parts | None:
    source: Node = node.args[0]  # type: ignore[assignment]
    return [(source, _broadcast(source, dims))]


def _repeat(node: Node, dims: Dims, product: Product) -> Parts | None:
    """Tiling of dims of size 1, and copies in front: ``repeat`` as ``expand``."""
    source: Node = node.args[0]  # type: ignore[assignment]
    sizes = shape(source)
    counts = list(node.args[1])[len(dims) - len(sizes) :]  # type: ignore[arg-type]
    if any(c != 1 and s != 1 for c, s in zip(counts, sizes, strict=True)):
        return None
    return [(source, _broadcast(source, dims))]


def _repeat_interleave(node: Node, dims: Dims, product: Product) -> Parts | None:
    source: Node = node.args[0]  # type: ignore[assignment]
    if len(node.args) < 3 or not isinstance(node.args[1], int) or node.args[2] is None:
        return None
    dim, count = int(node.args[2]) % len(dims), node.args[1]  # type: ignore[call-overload]
    sizes = shape(source)
    split = regroup((dims[dim],), (sizes[dim], count))
    return None if split is None else [(source, (*dims[:dim], split[0], *dims[dim + 1 :]))]


def _sum(node: Node, dims: Dims, product: Product) -> Parts | None:
    source: Node = node.args[0]  # type: ignore[assignment]
    sizes = shape(source)
    given = node.args[1] if len(node.args) > 1 else None
    if given is None or node.kwargs.get("dtype") is not None:
        return None
    over = {d % len(sizes) for d in ([given] if isinstance(given, int) else given)}  # type: ignore[union-attr]
    keep = len(node.args) > 2 and node.args[2]
    rest = iter(dims if not keep else [d for i, d in enumerate(dims) if i not in over])
    made = []
    for i, s in enumerate(sizes):
        if i not in over:
            made.append(next(rest))
            continue
        label = Label(s)
        product.summed += [label] if s != 1 else []
        made.append((label,) if s != 1 else ())
    return [(source, tuple(made))]


def _matmul(node: Node, dims: Dims, product: Product) -> Parts | None:
    left, right = node.args[:2]
    ls, rs = shape(left), shape(right)
    inner: tuple[Label, ...] = ()
    if ls[-1] != 1:
        inner = (Label(ls[-1]),)
        product.summed += inner
    tail = list(dims)
    column = (tail.pop(),) if len(rs) > 1 else ()
    row = (tail.pop(),) if len(ls) > 1 else ()
    batch = tuple(tail)
    lefts = (*_pad(batch, ls[:-2]), *row, inner)
    rights = (*_pad(batch, rs[:-2]), inner, *column)
    return [(left, lefts), (right, rights)]  # type: ignore[list-item]


def _pad(batch: Dims, sizes: Sequence[Any]) -> Dims:
    own = batch[len(batch) - len(sizes) :] if sizes else ()
    return tuple(() if s == 1 else d for s, d in zip(sizes, own, strict=True))


def _einsum(node: Node, dims: Dims, product: Product) -> Parts | None:
    equation, operands = node.args[:2]
    terms, arrow, result = str(equation).replace(" ", "").partition("->")
    inputs = terms.split(",")
    if not arrow or "." in terms or any(len(set(t)) != len(t) for t in (*inputs, result)):
        return None
    named: dict[str, tuple[Label, ...]] = dict(zip(result, dims, strict=True))
    parts: Parts = []
    for term, operand in zip(inputs, operands, strict=True):  # type: ignore[arg-type]
        for letter, s in zip(term, shape(operand), strict=True):
            if letter not in named:
                label = Label(s)
                named[letter] = (label,) if s != 1 else ()
                product.summed += named[letter]
    for term, operand in zip(inputs, operands, strict=True):  # type: ignore[arg-type]
        sizes = shape(operand)
        labels = tuple(() if s == 1 else named[c] for c, s in zip(term, sizes, strict=True))
        parts.append((operand, labels))  # type: ignore[arg-type]
    return parts


VIEWS: dict[Any, Callable[[Node, Dims, Product], Parts | None]] = {
    **dict.fromkeys((aten.clone.default, aten.contiguous.default, aten.alias.default), _same),
    **dict.fromkeys(
        (
            *(aten.view.default, aten.reshape.default, aten._unsafe_view.default),
            *(aten.unsqueeze.default, aten.squeeze.default, aten.squeeze.dim, aten.squeeze.dims),
            *(aten.flatten.using_ints, aten.unflatten.int, aten.view_as.default),
        ),
        _view,
    ),
    **dict.fromkeys(
        (aten.transpose.int, aten.swapaxes.default, aten.swapdims.default), _reorder(_swapped)
    ),
    aten.permute.default: _reorder(lambda node, rank: list(node.args[1])),  # type: ignore[arg-type]
    **dict.fromkeys((aten.movedim.int, aten.movedim.intlist), _reorder(_moved)),
    **dict.fromkeys((aten.t.default, aten.mT.default), _reorder(lambda node, rank: _flipped(rank))),
}
RULES: dict[Any, Callable[[Node, Dims, Product], Parts | None]] = {
    **VIEWS,
    **dict.fromkeys((aten.mul.Tensor, aten.mul.Scalar, aten.multiply.Tensor), _multiply),
    aten.div.Tensor: _divide,
    aten.neg.default: _negate,
    **dict.fromkeys(CASTS, _cast),
    **dict.fromkeys(
        (aten.expand.default, aten.expand_as.default, aten.broadcast_to.default), _expand
    ),
    aten.repeat.default: _repeat,
    aten.repeat_interleave.self_int: _repeat_interleave,
    aten.sum.dim_IntList: _sum,
    **dict.fromkeys(
        (aten.matmul.default, aten.bmm.default, aten.mm.default, aten.mv.default), _matmul
    ),
    aten.einsum.default: _einsum,
}
