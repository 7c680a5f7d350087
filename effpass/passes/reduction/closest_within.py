"""For every source token of a packed row its most similar destination in its own sequence."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from effpass.ops.token_matching import closest


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
        index, similar[:, a_at[0]] = closest(*args)
        into[:, a_at[0]] = b_at.gather(1, index)
    return into, similar


@closest_within.register_fake
def _(
    metric: Tensor, order: Tensor, open: Tensor, offsets: Tensor, protected: int, alternate: bool,
    later: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    wide = torch.promote_types(metric.dtype, torch.float32)
    return torch.empty_like(order), metric.new_empty(order.shape, dtype=wide)
