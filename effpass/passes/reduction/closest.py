"""For every source token its most similar destination, one tile of the similarities at a time."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

TILE = 256  # sources a tile: a tile is (TILE, destinations), never (sources, destinations)


@torch.library.custom_op("effpass_tokens::closest", mutates_args=())
def closest(
    a: Tensor, b: Tensor, open: Tensor, a_at: Tensor, b_at: Tensor, later: bool
) -> tuple[Tensor, Tensor]:
    """The most cosine-similar row of ``b`` for each row of ``a``; ties go to the earlier one.

    ``a`` (b, s, d) and ``b`` (b, t, d): sources and destinations, at positions ``a_at`` (b, s) and
    ``b_at`` (b, t). Only destinations with ``open`` (b, t) true count, with ``later`` only those
    behind the source. Answers indices int64 (b, s) and similarities (b, s), at least float32:
    -inf and index 0 where no destination counts. A vector of zeros is similar to nothing: 0. Where
    a vector holds NaN the similarity is NaN, and the index 0.
    """
    return _closest(a, b, open, a_at, b_at, later)


@closest.register_fake
def _(
    a: Tensor, b: Tensor, open: Tensor, a_at: Tensor, b_at: Tensor, later: bool
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(a.dtype, torch.float32)
    return a.new_empty(a.shape[:2], dtype=torch.int64), a.new_empty(a.shape[:2], dtype=wide)


@torch.library.custom_op("effpass_tokens::closest_within", mutates_args=())
def closest_within(
    metric: Tensor, order: Tensor, open: Tensor, offsets: Tensor, protected: int, alternate: bool,
    later: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``closest`` inside each sequence of a packed row, each with the numbers it has alone.

    ``metric`` (1, N, d); ``order`` (1, N): tokens by sequence, sources of each first, the
    ``protected`` ones last; ``open`` (1, N): which tokens count as destinations; ``offsets``
    (S + 1,) on the CPU: where sequences begin. Half of the tokens that are not protected are
    sources, with ``alternate`` rounded up. Answers of every token, were it a source, int64 (1, N)
    positions of destinations, and similarities (1, N), at least float32; its own and -inf for all
    that are not sources.
    """
    wide = torch.promote_types(metric.dtype, torch.float32)
    into = torch.arange(order.shape[1], device=order.device)[None]
    similar = torch.full(order.shape, -torch.inf, dtype=wide, device=metric.device)
    for start, end in pairwise(offsets.tolist()):
        free = max(0, end - start - protected)
        middle = start + (free - free // 2 if alternate else free // 2)
        if middle in (start, end):
            continue
        a_at, b_at = order[:, start:middle].sort(1).values, order[:, middle:end].sort(1).values
        args = (metric[:, a_at[0]], metric[:, b_at[0]], open[:, b_at[0]], a_at, b_at, later)
        index, similar[:, a_at[0]] = _closest(*args)
        into[:, a_at[0]] = b_at.gather(1, index)
    return into, similar


@closest_within.register_fake
def _(
    metric: Tensor, order: Tensor, open: Tensor, offsets: Tensor, protected: int, alternate: bool,
    later: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    wide = torch.promote_types(metric.dtype, torch.float32)
    return torch.empty_like(order), metric.new_empty(order.shape, dtype=wide)


def _closest(
    a: Tensor, b: Tensor, open: Tensor, a_at: Tensor, b_at: Tensor, later: bool
) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(a.dtype, torch.float32)
    targets = _unit(b.to(wide)).transpose(1, 2)
    index = torch.zeros(a.shape[:2], dtype=torch.int64, device=a.device)
    best = torch.full(a.shape[:2], -torch.inf, dtype=wide, device=a.device)
    if not a.shape[1] or not b.shape[1]:
        return index, best
    count = torch.arange(b.shape[1], device=a.device)
    for start in range(0, a.shape[1], TILE):
        tile = slice(start, start + TILE)
        similar = _unit(a[:, tile].to(wide)) @ targets
        closed = ~open[:, None]
        if later:
            closed = closed | (b_at[:, None] <= a_at[:, tile, None])
        similar = similar.masked_fill(closed, -torch.inf)
        best[:, tile] = similar.amax(-1)
        first = torch.where(similar == best[:, tile, None], count, b.shape[1]).amin(-1)
        none = (best[:, tile] == -torch.inf) | best[:, tile].isnan()
        index[:, tile] = torch.where(none, 0, first)
    return index, best


def _unit(x: Tensor) -> Tensor:
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(1e-12)
