"""For every source token its most similar destination, one tile of the similarities at a time."""

from __future__ import annotations

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
