"""Intervals of time: what every element of a tensor is, in terms of two tensors a and b.

An element is one of

    A[i..j]         the product of a_i .. a_j
    W(l, m, h)      the sum over k = l .. m of b_k times the product of a_{k+1} .. a_h
    one, zero       the empty product and the empty sum
    unknown         anything else

at one position of the other dims (batch, channels). h[t] = a[t] h[t-1] + b[t] from zero is
W(0, t, t). Only these rules combine elements, so what they derive is proven:

    A[i..j] A[j+1..k] = A[i..k]
    A[h+1..j] W(l, m, h) = W(l, m, j)
    W(l, m, h) + W(m+1, n, h) = W(l, n, h)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

BITS = 20  # of each field; longer sequences are not looked at
FIELD = (1 << BITS) - 1
UNKNOWN, ZERO, ONE = -1, 0, 1 << 60
PRODUCT, SUM = 2, 3  # kinds, in the bits above the fields
TIME, FREE = "time", "free"


class Atom(NamedTuple):
    """A factor of a dim: a piece of time, or positions ``stride * (0 .. size-1)`` of a named dim.

    A FREE one holds the same values at every position.
    """

    name: str
    stride: int
    size: int


Dim = tuple[Atom, ...]


@dataclass(frozen=True)
class Value:
    """A tensor: the factors of each dim, outermost first, and the elements along its times.

    ``codes`` is int64 with one dim a TIME atom, in the order of the dims. No atom has size 1.
    """

    dims: tuple[Dim, ...]
    codes: Tensor

    @property
    def shape(self) -> list[int]:
        """The sizes of the tensor."""
        return [_size(dim) for dim in self.dims]


def products(times: Tensor) -> Tensor:
    """The codes of a_t."""
    return (PRODUCT << 60) | (times << 2 * BITS) | times


def sums(first: Tensor, last: Tensor, upto: Tensor) -> Tensor:
    """The codes of W(first, last, upto)."""
    return (SUM << 60) | (first << 2 * BITS) | (last << BITS) | upto


def fields(codes: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Kind, first, last and upto."""
    return codes >> 60, (codes >> 2 * BITS) & FIELD, (codes >> BITS) & FIELD, codes & FIELD


def constant(code: int, shape: Sequence[int]) -> Value:
    """The same element everywhere."""
    dims = tuple((Atom(FREE, 0, n),) if n != 1 else () for n in shape)
    return Value(dims, torch.tensor(code))


def multiplied(left: Value, right: Value) -> Value | None:
    """The elementwise product, broadcast; None where the other dims do not correspond."""
    return combined(product, left, right)


def added(left: Value, right: Value) -> Value | None:
    """The elementwise sum, broadcast."""
    return combined(total, left, right)


def product(x: Tensor, y: Tensor) -> Tensor:
    """The codes of products, by the rules above."""
    (kx, ix, mx, jx), (ky, iy, my, jy) = fields(x), fields(y)
    found = torch.full_like(kx, UNKNOWN)
    both = (kx == PRODUCT) & (ky == PRODUCT)
    span = (PRODUCT << 60) | (torch.minimum(ix, iy) << 2 * BITS) | torch.maximum(jx, jy)
    found = torch.where(both & ((jx + 1 == iy) | (jy + 1 == ix)), span, found)
    found = torch.where((kx == PRODUCT) & (ky == SUM) & (ix == jy + 1), sums(iy, my, jx), found)
    found = torch.where((ky == PRODUCT) & (kx == SUM) & (iy == jx + 1), sums(ix, mx, jy), found)
    found = torch.where(((x == ZERO) & (y >= 0)) | ((y == ZERO) & (x >= 0)), ZERO, found)
    return torch.where(x == ONE, y, torch.where(y == ONE, x, found))


def total(x: Tensor, y: Tensor) -> Tensor:
    """The codes of sums, by the rules above."""
    (kx, ix, mx, jx), (ky, iy, my, jy) = fields(x), fields(y)
    both = (kx == SUM) & (ky == SUM) & (jx == jy)
    found = torch.full_like(kx, UNKNOWN)
    found = torch.where(both & (mx + 1 == iy), sums(ix, my, jx), found)
    found = torch.where(both & (my + 1 == ix), sums(iy, mx, jx), found)
    return torch.where(x == ZERO, y, torch.where(y == ZERO, x, found))


def combined(rule: Callable[..., Tensor], *values: Value) -> Value | None:
    """``rule`` on the codes of broadcast values; None where their dims do not correspond."""
    aligned = _aligned(values)
    return None if aligned is None else Value(aligned[0], rule(*aligned[1]))


def joined(parts: Sequence[Value], dim: int) -> Value | None:
    """``cat`` along ``dim``."""
    fronted = [_fronted(part, dim) for part in parts]
    known = [value for value in fronted if value is not None]
    aligned = _aligned(known, lead=1) if len(known) == len(fronted) else None
    if aligned is None:
        return None
    dims, codes = aligned
    return _back(dims, torch.cat(codes), dim)


def along(value: Value, dim: int, change: Callable[[Tensor], Tensor]) -> Value | None:
    """``change`` of the codes with time in front, where ``dim`` is nothing but time."""
    fronted = _fronted(value, dim)
    return None if fronted is None else _back(fronted.dims, change(fronted.codes), dim)


def scattered(
    base: Value, part: Value, dim: int, write: Callable[[Tensor, Tensor], Tensor]
) -> Value | None:
    """``write(base, part)`` on codes with time in front: what ``slice_scatter`` does to them."""
    fronted = [_fronted(base, dim), _fronted(part, dim)]
    known = [value for value in fronted if value is not None]
    aligned = _aligned(known, lead=1) if len(known) == 2 else None
    if aligned is None:
        return None
    dims, (whole, piece) = aligned
    return _back(dims, write(whole, piece), dim)


def permuted(value: Value, order: Sequence[int]) -> Value:
    """The dims in another order."""
    axes = [_axes(value.dims, dim) for dim in order]
    codes = value.codes.permute([axis for each in axes for axis in each])
    return Value(tuple(value.dims[dim] for dim in order), codes)


def expanded(value: Value, shape: Sequence[int]) -> Value | None:
    """``expand``: dims of size 1, and new ones in front, hold the same at every position."""
    aligned = _aligned([value, constant(ZERO, shape)])
    return None if aligned is None else Value(aligned[0], aligned[1][0])


def reshaped(value: Value, shape: Sequence[int]) -> Value | None:
    """``view``: the same elements in row-major order; None where a dim would be cut unevenly."""
    if math.prod(shape) == 0:
        sizes = [n for n in shape if n == 0]
        none = [(Atom(TIME if n == 0 else FREE, 0, n),) if n != 1 else () for n in shape]
        return Value(tuple(none), value.codes.new_empty(sizes))
    merged = _merged(Value((tuple(a for dim in value.dims for a in dim),), value.codes))
    left, codes, axis = list(merged.dims[0]), merged.codes, 0
    dims: list[Dim] = []
    for size in shape:
        taken: list[Atom] = []
        while size > 1:
            atom = left.pop(0)
            if atom.size > size:
                inner, rest = divmod(atom.size, size)
                if rest:
                    return None
                left.insert(0, atom._replace(size=inner))
                atom = Atom(atom.name, atom.stride * inner, size)
                if atom.name == TIME:
                    codes = codes.unflatten(axis, (size, inner))
            if size % atom.size:
                return None
            size //= atom.size
            taken.append(atom)
            axis += atom.name == TIME
        dims.append(tuple(taken))
    return Value(tuple(dims), codes)


def _merged(value: Value) -> Value:
    """Neighbouring atoms of a dim that are one piece become one."""
    dims, codes, axis = [], value.codes, 0
    for dim in value.dims:
        made: list[Atom] = []
        for atom in dim:
            last = made[-1] if made else None
            if last is not None and last.name == atom.name and _continues(last, atom):
                made[-1] = Atom(atom.name, atom.stride, last.size * atom.size)
                if atom.name == TIME:
                    codes = codes.flatten(axis - 1, axis)
                continue
            made.append(atom)
            axis += atom.name == TIME
        dims.append(tuple(made))
    return Value(tuple(dims), codes)


def _continues(outer: Atom, inner: Atom) -> bool:
    return outer.name in (TIME, FREE) or outer.stride == inner.stride * inner.size


def _size(dim: Dim) -> int:
    return math.prod(atom.size for atom in dim)


def _axes(dims: Sequence[Dim], dim: int) -> list[int]:
    """The axes of the codes that belong to ``dim``."""
    before = sum(atom.name == TIME for each in dims[:dim] for atom in each)
    return list(range(before, before + sum(atom.name == TIME for atom in dims[dim])))


def _fronted(value: Value, dim: int) -> Value | None:
    """The value without ``dim``, whose time leads the codes; None where it is not only time."""
    if dim >= len(value.dims):  # a number
        return None
    whole = _merged(value)
    atoms, dims = whole.dims[dim], (*whole.dims[:dim], (), *whole.dims[dim + 1 :])
    names = {atom.name for atom in atoms}
    if names <= {FREE}:
        return Value(dims, whole.codes.expand(_size(atoms), *whole.codes.shape))
    if names != {TIME}:
        return None
    return Value(dims, whole.codes.movedim(_axes(whole.dims, dim)[0], 0))


def _back(dims: tuple[Dim, ...], codes: Tensor, dim: int) -> Value:
    """Undoes ``_fronted`` after its codes have changed."""
    if codes.shape[0] == 1:
        return Value(dims, codes[0])
    axis = sum(len(_axes(dims, before)) for before in range(dim))
    atoms = (Atom(TIME, 0, codes.shape[0]),)
    return Value((*dims[:dim], atoms, *dims[dim + 1 :]), codes.movedim(0, axis))


def _aligned(values: Sequence[Value], lead: int = 0) -> tuple[tuple[Dim, ...], list[Tensor]] | None:
    """Dims that all values broadcast to, and their codes there, behind ``lead`` other axes."""
    merged = [_merged(v) if not lead else v for v in values]
    rank = max(len(value.dims) for value in merged)
    padded = [((),) * (rank - len(value.dims)) + value.dims for value in merged]
    dims: list[Dim] = []
    for column in zip(*padded, strict=True):
        dim = _common(column)
        if dim is None:
            return None
        dims.append(dim)
    if _crossed(dims):
        return None
    codes = [_placed(v.codes, own, dims, lead) for v, own in zip(merged, padded, strict=True)]
    return tuple(dims), codes


def _common(column: Sequence[Dim]) -> Dim | None:
    """What one dim of several broadcast values is, or None where they differ."""
    wide = [dim for dim in column if dim]
    if not wide or len({_size(dim) for dim in wide}) > 1:
        return None if wide else ()
    shaped = [dim for dim in wide if [atom.name for atom in dim] != [FREE]] or wide[:1]
    made: list[Atom] = []
    if len({tuple(atom.size for atom in dim) for dim in shaped}) > 1:
        return None
    for atoms in zip(*shaped, strict=True):
        kinds = {atom for atom in atoms if atom.name != FREE} or {atoms[0]}
        if len(kinds) > 1:
            return None
        made.append(kinds.pop())
    return tuple(made)


def _crossed(dims: Sequence[Dim]) -> bool:
    """Whether one position of a named dim runs along two dims, as in an outer product."""
    named = [atom for dim in dims for atom in dim if atom.name not in (TIME, FREE)]
    ends = [(atom.name, atom.stride, atom.stride * atom.size) for atom in sorted(named)]
    return any(x == y and end > start for (x, _, end), (y, start, _) in pairwise(ends))


def _placed(codes: Tensor, own: Sequence[Dim], dims: Sequence[Dim], lead: int) -> Tensor:
    """Codes with an axis for every TIME atom of ``dims``."""
    axis, sizes = lead, list(codes.shape[:lead])
    for mine, dim in zip(own, dims, strict=True):
        names = [atom.name for atom in mine] if len(mine) == len(dim) else [FREE] * len(dim)
        for name, atom in zip(names, dim, strict=True):
            if atom.name == TIME:
                codes = codes if name == TIME else codes.unsqueeze(axis)
                sizes.append(atom.size)
                axis += 1
    return codes.expand(sizes)
