"""Builds the call of ``causal_conv1d`` that taps stand for, channel-last, from any layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn.functional import pad

from effpass.patterns.taps.shifted import Coefficient, Factor
from effpass.patterns.taps.taps import Leaf, Taps

TIME = -1  # among dims of the leaf: the tokens


@dataclass(frozen=True)
class Plan:
    """Calling it with the tensors of ``inputs`` gives the convolution, in the old layout.

    ``roles`` are, for each dim of the output, the dim of the leaf, TIME, or None where it is new.
    """

    leaf: Leaf
    taps: Taps
    inputs: tuple[Node, ...]
    roles: tuple[int | None, ...]
    dtype: torch.dtype

    def __call__(self, *given: Tensor) -> list[Tensor]:
        values = dict(zip(self.inputs, given, strict=True))
        x = values[self.leaf.x]
        dims = [d for d in range(x.dim()) if d != self.leaf.time]
        channels = [d for d in dims if d in self.taps.channels]
        rows = [d for d in dims if d not in channels]
        work = torch.float64 if x.dtype is torch.float64 else self.dtype
        wide = x if x.dtype == work else x.to(work)
        order = [*rows, *([] if self.leaf.time is None else [self.leaf.time]), *channels]
        tokens = _permuted(wide, order)
        if self.leaf.time is None:
            tokens = tokens.unsqueeze(len(rows))
        tokens = _grouped(tokens, len(rows), len(channels))
        sizes = [x.shape[d] for d in channels]
        weight = self._weight(values, channels, sizes, wide)
        bias = self._sum(self.taps.bias, values, channels, sizes, wide) if self.taps.bias else None
        state = self._state(values, rows, channels, weight)
        y, _ = torch.ops.effpass.causal_conv1d(tokens, weight, bias, self.taps.activation, state)
        if (len(rows), len(channels)) != (1, 1):
            count = tokens.shape[1]
            y = y.reshape([*(x.shape[d] for d in rows), count, *sizes])
        return [_placed(y, [*rows, TIME, *channels], self.roles)]

    def _state(
        self, values: dict[Node, Tensor], rows: list[int], channels: list[int], weight: Tensor
    ) -> Tensor | None:
        if self.leaf.state is None:
            return None
        roles = self.leaf.roles
        dim = roles.index(None)
        state = _permuted(
            values[self.leaf.state], [*(roles.index(d) for d in (*rows, *channels)), dim]
        )
        if len(rows) != 1:
            state = state.flatten(0, len(rows) - 1) if rows else state.unsqueeze(0)
        state = state.flatten(1, -2) if len(channels) > 1 else state
        wanted, kept = weight.shape[1] - 1, state.shape[2]
        if kept > wanted:
            return state.narrow(2, kept - wanted, wanted)
        return pad(state, [wanted - kept, 0]) if kept < wanted else state

    def _weight(
        self, values: dict[Node, Tensor], channels: list[int], sizes: Sequence[Any], like: Tensor
    ) -> Tensor:
        lags = [self.taps.lags[lag] for lag in reversed(range(self.taps.width))]
        whole = _one_tensor(lags, channels)
        if whole is not None and values[whole[0].node].is_floating_point():
            return _taken(values[whole[0].node], *whole, len(lags), channels)
        return torch.stack([self._sum(each, values, channels, sizes, like) for each in lags], -1)

    def _sum(
        self,
        terms: Sequence[Coefficient],
        values: dict[Node, Tensor],
        channels: list[int],
        sizes: Sequence[Any],
        like: Tensor,
    ) -> Tensor:
        """The sum of coefficients as a tensor of one entry a channel."""
        total: Tensor | None = None
        for term in terms:
            part: Tensor | None = None
            for factor in term.factors:
                tensor = _over(values[factor.node], factor, channels)
                part = tensor if part is None else part * tensor
            if part is None:
                part = like.new_full((1,) * len(channels), term.scale)
            elif term.scale != 1:
                part = part * term.scale
            total = part if total is None else total + part
        assert total is not None
        total = total if total.is_floating_point() else total.to(like.dtype)
        if tuple(total.shape) != tuple(sizes):
            total = total.expand(list(sizes))
        return total.flatten() if len(channels) != 1 else total


def _taken(
    weight: Tensor, factor: Factor, along: int, first: int, width: int, channels: list[int]
) -> Tensor:
    """The (c, w) part of a tensor that holds all taps along one dim."""
    if first or weight.shape[along] != width:
        weight = weight.narrow(along, first, width)
    picks = list(factor.picks)
    order = [*(next(i for i, p in enumerate(picks) if p.dim == d) for d in channels), along]
    for i in reversed([i for i in range(len(picks)) if i not in order]):
        weight = weight.select(i, picks[i].start)
        order = [d - (d > i) for d in order]
    weight = _permuted(weight, order)
    return weight.flatten(0, -2) if len(channels) > 1 else weight


def _one_tensor(
    lags: Sequence[Sequence[Coefficient]], channels: list[int]
) -> tuple[Factor, int, int] | None:
    """The tensor that holds all taps in order along one dim, that dim, and the first entry."""
    factors = []
    for each in lags:
        if len(each) != 1 or each[0].scale != 1 or len(each[0].factors) != 1:
            return None
        factors.append(each[0].factors[0])
    first = factors[0]
    if len({f.node for f in factors}) != 1 or {p.dim for p in first.picks} - {None} != set(
        channels
    ):
        return None
    moving = [i for i in range(len(first.picks)) if len({f.picks[i] for f in factors}) > 1]
    if len(moving) != 1:
        return None
    along = moving[0]
    starts = [f.picks[along].start for f in factors]
    if starts != list(range(starts[0], starts[0] + len(starts))):
        return None
    return first, along, starts[0]


def _over(tensor: Tensor, factor: Factor, channels: list[int]) -> Tensor:
    """A factor's tensor with one dim a channel dim, of size 1 where it does not change."""
    for i in reversed(range(len(factor.picks))):
        if factor.picks[i].dim is None:
            tensor = tensor.select(i, factor.picks[i].start)
    dims = [p.dim for p in factor.picks if p.dim is not None]
    tensor = _permuted(tensor, [dims.index(d) for d in channels if d in dims])
    for i, d in enumerate(channels):
        if d not in dims:
            tensor = tensor.unsqueeze(i)
    return tensor


def _grouped(tokens: Tensor, rows: int, channels: int) -> Tensor:
    """(rows..., t, channels...) as (b, t, c)."""
    if channels > 1:
        tokens = tokens.flatten(rows + 1)
    if rows == 1:
        return tokens
    return tokens.flatten(0, rows - 1) if rows else tokens.unsqueeze(0)


def _placed(y: Tensor, have: list[int], wanted: Sequence[int | None]) -> Tensor:
    """Dims ``have`` in the order ``wanted``; those that are gone have size 1."""
    for i in reversed(range(len(have))):
        if have[i] not in wanted:
            y = y.select(i, 0)
    left = [d for d in have if d in wanted]
    y = _permuted(y, [left.index(d) for d in wanted if d is not None])
    for i, d in enumerate(wanted):
        if d is None:
            y = y.unsqueeze(i)
    return y


def _permuted(tensor: Tensor, order: Sequence[int]) -> Tensor:
    """A transpose where that is enough: two of them cancel."""
    moved = [i for i, d in enumerate(order) if i != d]
    if not moved:
        return tensor
    return tensor.transpose(*moved) if len(moved) == 2 else tensor.permute(list(order))
