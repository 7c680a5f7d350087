"""Dims as products of factors, each of which knows which dims of which tensors run along it.

Forward through views and products: a reshape merges and splits factors, an elementwise operation
lays the factors of its operands over each other. What was ever laid over each other is one *class*:
the head dims of five tensors, or the steps of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple


class Unreadable(Exception):
    """The dims of a value cannot be followed here; the text says why."""


class Key(NamedTuple):
    """Part of dim ``dim`` of tensor number ``tensor``: ``size`` indices, each ``stride`` apart.

    ``cut`` is 0 where the dim is whole; a dim that was padded or sliced is cut number so many.
    """

    tensor: int
    dim: int
    cut: int
    stride: int
    size: int


class Factor(NamedTuple):
    """``size`` indices, along which the ``sources`` run; none for a broadcast."""

    size: int
    sources: frozenset[Key] = frozenset()


Dim = tuple[Factor, ...]
Dims = tuple[Dim, ...]


class Classes:
    """Which keys run along each other (union-find)."""

    def __init__(self) -> None:
        self._parents: dict[Key, Key] = {}

    def __iter__(self) -> Iterator[Key]:
        return iter(self._parents)

    def of(self, key: Key) -> Key:
        """The class of a key, as one of its members."""
        self._parents.setdefault(key, key)
        while self._parents[key] != key:
            self._parents[key] = self._parents[self._parents[key]]
            key = self._parents[key]
        return key

    def join(self, keys: Iterable[Key]) -> None:
        """These run along each other."""
        first: Key | None = None
        for key in keys:
            root = self.of(key)
            if first is None:
                first = root
            self._parents[root] = first


def of_tensor(tensor: int, shape: Sequence[int]) -> Dims:
    """The dims of tensor number ``tensor`` itself."""
    return tuple(
        (Factor(size, frozenset({Key(tensor, dim, 0, 1, size)})),) if size != 1 else ()
        for dim, size in enumerate(shape)
    )


def of_shape(shape: Sequence[int]) -> Dims:
    """Dims along which nothing runs."""
    return tuple((Factor(size),) if size != 1 else () for size in shape)


def count(dim: Dim) -> int:
    """The size of a dim."""
    return dim[0].size if len(dim) == 1 else math.prod(factor.size for factor in dim)


def sources(dim: Dim) -> frozenset[Key]:
    """All that runs along a dim."""
    return frozenset().union(*(factor.sources for factor in dim))


def split(factor: Factor, inner: int) -> tuple[Factor, Factor]:
    """An outer and an inner factor, the inner one of size ``inner``. Raises Unreadable."""
    if factor.size % inner:
        raise Unreadable(f"{factor.size} indices are not split into {inner}")
    outer = factor.size // inner
    return (
        Factor(
            outer,
            frozenset(k._replace(stride=k.stride * inner, size=outer) for k in factor.sources),
        ),
        Factor(inner, frozenset(k._replace(size=inner) for k in factor.sources)),
    )


def recut(dim: Dim, size: int, cut: int) -> Dim:
    """The dim padded or sliced to ``size``, cut number ``cut``."""
    if size == 1:
        return ()
    return (Factor(size, frozenset(Key(k.tensor, k.dim, cut, 1, size) for k in sources(dim))),)


def regroup(dims: Dims, shape: Sequence[int]) -> Dims:
    """The dims after a reshape to ``shape``. Raises Unreadable."""
    pending = [factor for dim in dims for factor in dim]
    made: list[Dim] = []
    for missing in shape:
        dim: list[Factor] = []
        while missing != 1:
            if not pending or not missing:
                raise Unreadable("the sizes of a reshape do not fit")
            factor = pending.pop(0)
            if factor.size > missing:
                factor, inner = split(factor, factor.size // missing)
                pending.insert(0, inner)
            if missing % factor.size:
                raise Unreadable(f"{missing} indices are not groups of {factor.size}")
            missing //= factor.size
            dim.append(factor)
        made.append(tuple(dim))
    if pending:
        raise Unreadable("the sizes of a reshape do not fit")
    return tuple(made)


def overlaid(dims: Iterable[Dim], classes: Classes) -> Dim:
    """One dim of the operands of an elementwise operation. Raises Unreadable."""
    found: Dim = ()
    for dim in dims:
        found = tuple(_laid_over(found, dim, classes)) if found and dim else found or dim
    return found


def broadcast(operands: Sequence[Dims], classes: Classes) -> Dims:
    """The dims of an elementwise operation. Raises Unreadable."""
    rank = max(len(dims) for dims in operands)
    padded = [((),) * (rank - len(dims)) + dims for dims in operands]
    return tuple(overlaid(column, classes) for column in zip(*padded, strict=True))


def _laid_over(a: Dim, b: Dim, classes: Classes) -> Iterator[Factor]:
    left, right = list(a), list(b)
    while left and right:
        first, second = left.pop(0), right.pop(0)
        if first.size > second.size:
            first, rest = split(first, first.size // second.size)
            left.insert(0, rest)
        elif second.size > first.size:
            second, rest = split(second, second.size // first.size)
            right.insert(0, rest)
        both = first.sources | second.sources
        classes.join(both)
        yield Factor(first.size, both)
    if left or right:
        raise Unreadable(f"{count(a)} indices along {count(b)}")
