"""What a choice does to tensors of tokens: gather, merge, and back to full length."""

from __future__ import annotations

import torch
from torch import Tensor

from effpass.passes.reduction.choice import Choice


def pick(x: Tensor, at: Tensor) -> Tensor:
    """``x`` (b, N, ...) at positions ``at`` (b, m): (b, m, ...)."""
    rows = torch.arange(x.shape[0], device=x.device)[:, None]
    return x[rows, at]


def pick_shared(x: Tensor, at: Tensor) -> Tensor:
    """``x`` (N, ...), the same for all rows, at positions ``at`` (b, m): (b, m, ...)."""
    return x[at]


def merge(x: Tensor, choice: Choice, merged: Tensor, sizes: Tensor | None = None) -> Tensor:
    """``x`` (b, N, ...) without the leaving tokens: (b, m, ...), in their original order.

    A token into which others are merged becomes their mean ``(f + sum a) / (1 + count)``; with
    ``sizes`` (b, N) the mean weighted by how many tokens each stands for. ``merged`` (b, r) says
    which of the leaving tokens count; the others are dropped. At least float32 inside.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    stay = pick(x, choice.kept)
    rest = (1,) * (x.dim() - 2)
    own = torch.ones_like(choice.kept, dtype=wide) if sizes is None else pick(sizes, choice.kept)
    gone = merged.to(wide) if sizes is None else pick(sizes, choice.leaving) * merged
    target = choice.rank.gather(1, choice.into)
    shape = (*merged.shape, *rest)
    leaving = pick(x, choice.leaving).to(wide) * gone.view(shape)
    # what is not merged may be NaN at padding
    leaving = torch.where(merged.view(shape), leaving, torch.zeros_like(leaving))
    total = _added(stay.to(wide) * own.view(*own.shape, *rest), target, leaving)
    count = own.scatter_add(1, target, gone)
    return (total / count.view(*count.shape, *rest)).to(x.dtype)


def grown(sizes: Tensor, choice: Choice) -> Tensor:
    """How many tokens each kept one stands for (b, m), from how many each stood for (b, N)."""
    gone = pick(sizes, choice.leaving) * choice.residual
    target = choice.rank.gather(1, choice.into)
    return pick(sizes, choice.kept).scatter_add(1, target, gone)


def _added(x: Tensor, at: Tensor, y: Tensor) -> Tensor:
    """``x`` (b, m, ...) with ``y`` (b, r, ...) added at positions ``at`` (b, r)."""
    index = at.view(*at.shape, *(1,) * (x.dim() - 2)).expand(y.shape)
    return x.scatter_add(1, index, y)


def step(choice: Choice, causal: bool) -> Tensor:
    """Which kept token each of the N tokens reads afterwards (b, N).

    Its own; that into which it was merged; else the nearest before it, else the first. With
    ``causal`` never one behind it.
    """
    near = choice.rank.clamp_min(0)
    if causal:
        return near
    target = choice.rank.gather(1, choice.into)
    merged = choice.residual | choice.mixer
    own = near.gather(1, choice.leaving)
    return near.scatter(1, choice.leaving, torch.where(merged, target, own))


def gaps(positions: Tensor) -> Tensor:
    """How many tokens left in front of each of those at ``positions`` (b, m) since the last."""
    before = torch.cat([torch.full_like(positions[:, :1], -1), positions[:, :-1]], 1)
    return positions - before - 1
