"""Calls ``ssd_scan`` on tensors whose dims lie in any order, and lays its results out likewise."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from effpass.patterns.chunks.ssd_roles import TIME, Axes, Axis, Roles

LOWEST = -1e38  # step sizes are not clamped; -inf has no literal in generated code
CHUNK = 64
Group = tuple[Axis, ...]
Scan = Callable[..., tuple[Tensor, Tensor]]


def as_op(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, start: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y and the final state, by ``ssd_scan``."""
    return torch.ops.effpass.ssd_scan(
        x, dt, A, B, C, None, None, None, False, LOWEST, None, start, None
    )


def in_chunks(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, start: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The same by products of matrices, a chunk at a time: faster on float64, for proofs."""
    B, C = (v.repeat_interleave(x.shape[2] // v.shape[2], 2) for v in (B, C))
    state = x.new_zeros(x.shape[0], *x.shape[2:], B.shape[3]) if start is None else start
    ys = []
    for t in range(0, x.shape[1], CHUNK):
        xs, steps, b, c = (v[:, t : t + CHUNK] for v in (x, dt, B, C))
        total = (steps * A).cumsum(1)
        later = torch.ones(total.shape[1], total.shape[1]).triu(1).bool()[..., None]
        decay = (total[:, :, None] - total[:, None]).masked_fill(later, -math.inf).exp()
        scores = torch.einsum("blhn,bshn->blsh", c, b) * decay
        driven = xs * steps[..., None]
        y = torch.einsum("blsh,bshp->blhp", scores, driven)
        ys.append(y + torch.einsum("blhn,bhpn->blhp", c * total.exp()[..., None], state))
        kept = b * (total[:, -1:] - total).exp()[..., None]
        state = state * total[:, -1].exp()[..., None, None]
        state = state + torch.einsum("bshn,bshp->bhpn", kept, driven)
    return torch.cat(ys, 1), state


@dataclass(frozen=True)
class Call:
    """How a region is written as the op.

    ``results`` are the axes of y and, if asked for, of the final state, with their dtypes. ``rate``
    is multiplied into A, ``reads`` into C, ``writes`` into B. ``scan(x, dt, A, B, C, start)`` is
    the op.
    """

    roles: Roles
    results: tuple[tuple[Axes, torch.dtype], ...]
    rate: float = 1.0
    reads: float = 1.0
    writes: float = 1.0
    scan: Scan = as_op

    def __call__(self, *values: Any) -> list[Tensor]:
        """y and perhaps the final state, of the tensors in the order of ``roles.nodes``."""
        r = self.roles
        given = dict(zip(r.nodes, values, strict=True))
        known = _sizes({name: (given[name], r.axes[name]) for name in r.nodes})
        time, heads = (TIME,), (*r.groups, *r.heads)

        def laid(name: str, *groups: Group) -> Tensor:
            return arrange(given[name], r.axes[name], groups, known)

        x = as_dtype(laid("x", r.batch, time, heads, r.p), self.results[0][1])
        dt = laid("dt", r.batch, time, heads) if "dt" in given else x.new_ones(x.shape[:3])
        A = laid("A", heads) if "A" in given else dt.new_ones(dt.shape[2])
        B, C = (laid(name, r.batch, time, r.groups, r.n) for name in ("B", "C"))
        start = laid("start", r.batch, heads, r.p, r.n) if "start" in given else None
        A, B, C = _times(A, self.rate), _times(B, self.writes), _times(C, self.reads)
        y, state = self.scan(x, dt, A, B, C, start)
        found = [self._result(y, (r.batch, time, heads, r.p), 0, known)]
        if len(self.results) > 1:
            found.append(self._result(state, (r.batch, heads, r.p, r.n), 1, known))
        return found

    def _result(
        self, value: Tensor, groups: Sequence[Group], which: int, known: Mapping[Axis, Any]
    ) -> Tensor:
        axes, dtype = self.results[which]
        return as_dtype(scatter(value, groups, axes, known), dtype)


def as_dtype(value: Tensor, dtype: torch.dtype) -> Tensor:
    """``value`` as ``dtype``; a proof's float64 stays."""
    return value if value.dtype in (dtype, torch.float64) else value.to(dtype)


def _times(value: Tensor, factor: float) -> Tensor:
    return value if factor == 1.0 else value * factor


def _sizes(tensors: Mapping[str, tuple[Tensor, Axes]]) -> dict[Axis, Any]:
    """The size of every axis, from dims that are one axis where there is one."""
    known: dict[Axis, Any] = {}
    for tensor, axes in tensors.values():
        for at, dim in enumerate(axes):
            known |= {a: s for a, s in dim if a not in known and a != TIME}
            if len(dim) == 1 and dim[0][0] != TIME:
                known[dim[0][0]] = tensor.shape[at]
    x, axes = tensors["x"]
    pairs = [(at, axis, size) for at, dim in enumerate(axes) for axis, size in dim]
    known[TIME] = prod(
        x.shape[at] if len(axes[at]) == 1 else size for at, axis, size in pairs if axis == TIME
    )
    return known


def arrange(
    tensor: Tensor, axes: Axes, groups: Sequence[Group], known: Mapping[Axis, Any]
) -> Tensor:
    """The tensor with one dim a group of axes, expanded along those that it lacks."""
    units: list[Group] = []
    shape: list[Any] = []
    for size, dim in zip(tensor.shape, axes, strict=True):
        runs = _runs(dim, groups)
        units += [unit for unit, _ in runs]
        shape += [size] if len(runs) == 1 else [part for _, part in runs]
    order, pieces, full, merged = [], [], [], []
    for group in groups:
        here = [i for axis in group for i, unit in enumerate(units) if unit[0] == axis]
        held = {axis for i in here for axis in units[i]}
        sizes = {units[i][0]: [shape[j] for j in here if units[j] == units[i]] for i in here}
        sizes |= {axis: [known[axis]] for axis in group if axis not in held}
        wanted = [axis for axis in group if axis in sizes]
        order += here
        full += [size for axis in wanted for size in sizes[axis]]
        pieces += [size if axis in held else 1 for axis in wanted for size in sizes[axis]]
        merged.append(prod(size for axis in wanted for size in sizes[axis]))
    tensor = permuted(reshaped(tensor, shape), order)
    tensor = reshaped(tensor, pieces)
    tensor = tensor if pieces == full else tensor.expand(full)
    return reshaped(tensor, merged)


def _runs(dim: tuple[tuple[Axis, int], ...], groups: Sequence[Group]) -> list[tuple[Group, int]]:
    """The axes of a dim, those that stay neighbours together, and the sizes."""
    found: list[tuple[Group, int]] = []
    for axis, size in dim:
        longer = (*found[-1][0], axis) if found else ()
        if longer and any(longer == g[i : i + len(longer)] for g in groups for i in range(len(g))):
            found[-1] = (longer, found[-1][1] * size)
        else:
            found.append(((axis,), size))
    return found


def reshaped(tensor: Tensor, shape: Sequence[Any]) -> Tensor:
    """The tensor in another shape; itself where it has it."""
    return tensor if list(tensor.shape) == list(shape) else tensor.reshape(shape)


def permuted(tensor: Tensor, order: Sequence[int]) -> Tensor:
    """The tensor with its dims in another order; itself where they are."""
    return tensor if list(order) == sorted(order) else tensor.permute(*order)


def scatter(
    value: Tensor, groups: Sequence[Group], axes: Axes, known: Mapping[Axis, Any]
) -> Tensor:
    """The way back: a tensor of groups of axes, as one whose dims are ``axes``.

    Where those have more tokens than there are, the last are zeros.
    """
    times = [size for dim in axes for axis, size in dim if axis == TIME]
    as_is = [tuple(axis for axis, _ in dim) for dim in axes] == list(groups)
    if as_is and all(count == value.shape[groups.index((TIME,))] for count in times):
        return value
    own: list[Axis] = []
    shape: list[Any] = []
    for at, group in enumerate(groups):
        if group == (TIME,) and times:
            missing = prod(times) - value.shape[at]
            if missing:
                value = pad(value, [0, 0] * (value.dim() - at - 1) + [0, missing])
            times = times if len(times) > 1 else [value.shape[at]]
            own, shape = own + [TIME] * len(times), shape + times
        else:
            own, shape = [*own, *group], [*shape, *(known[axis] for axis in group)]
    value = reshaped(value, shape)
    places = {axis: [i for i, a in enumerate(own) if a == axis] for axis in own}
    value = permuted(value, [places[axis].pop(0) for dim in axes for axis, _ in dim])
    sizes = iter(value.shape)
    return reshaped(value, [prod(next(sizes) for _ in dim) for dim in axes])
