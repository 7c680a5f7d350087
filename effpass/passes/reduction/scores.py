"""How much a token matters: one number (b, N), at least float32, from what a block computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effpass.ops.step_sizes import step_sizes

SCORES = ("clip_y", "y", "l1", "l2", "deviation", "dt_norm", "hidden_norm", "cls")


def of_output(name: str, y: Tensor) -> Tensor:
    """Of a mixer's output ``y`` (b, N, ...): its mean over channels, clipped (UTRC, eq. 5) or not.

    ``clip_y``: mean of ``max(0, y)``; ``y``: mean; ``l1``: mean of ``|y|``; ``l2`` and
    ``hidden_norm``: root of the sum of squares.
    """
    wide = _wide(y)
    if name == "clip_y":
        return wide.clamp_min(0).mean(-1)
    if name == "y":
        return wide.mean(-1)
    return wide.abs().mean(-1) if name == "l1" else torch.linalg.vector_norm(wide, dim=-1)


def of_deviation(y: Tensor, real: Tensor) -> Tensor:
    """How far a mixer's output ``y`` (b, N, ...) is from its mean over the row's ``real`` tokens.

    The norm of the difference (b, N). Ours: tokens that are like most others tell the least.
    """
    wide = _wide(y)
    # summed in float64: a packed row sums in another order, and must rank its tokens alike
    total = torch.where(real[..., None], wide, 0).sum(1, keepdim=True, dtype=torch.float64)
    mean = (total / real.sum(1).clamp_min(1)[:, None, None]).to(wide.dtype)
    return torch.linalg.vector_norm(wide - mean, dim=-1)


def of_deviation_within(y: Tensor, number: Tensor, sequences: Any) -> Tensor:
    """The same for a packed row, ``y`` (1, N, ...), from the mean of each token's sequence.

    ``number`` (N,): the sequence of each token; ``sequences``: how many there are.
    """
    wide = _wide(y)[0]
    total = wide.new_zeros(sequences, wide.shape[1], dtype=torch.float64)
    total = total.index_add(0, number, wide.to(torch.float64))
    count = torch.zeros_like(total[:, 0]).index_add(0, number, torch.ones_like(number).to(total))
    mean = (total / count.clamp_min(1)[:, None]).to(wide.dtype)
    return torch.linalg.vector_norm(wide - mean[number], dim=-1)[None]


def _wide(y: Tensor) -> Tensor:
    return y.flatten(2).to(torch.promote_types(y.dtype, torch.float32))


def of_steps(
    dt: Tensor,
    dt_bias: Tensor | None,
    positive: bool,
    low: float | None = None,
    high: float | None = None,
) -> Tensor:
    """The norm of a scan's step sizes (b, N, d): how much a token writes (DeciMamba).

    arXiv 2406.14528, section 4. ``positive``: softplus is still to be taken; ``low``, ``high``:
    what the scan clamps them to.
    """
    steps = step_sizes(dt, dt_bias, positive)
    if low is not None or high is not None:
        steps = steps.clamp(low, high)
    return torch.linalg.vector_norm(steps, dim=-1)


def of_first(q: Tensor, k: Tensor, scale: float, open: Tensor | None) -> Tensor:
    """What the first query gives to every key, the mean over heads (EViT).

    arXiv 2202.07800, eq. 3. ``q``, ``k`` (b, h, N, d); ``open``: the mask of the first query,
    booleans or what is added to scores, broadcast to (b, h, 1, N). One row of the attention matrix
    is computed, not the matrix.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q[:, :, :1].to(wide) * scale) @ k.to(wide).transpose(2, 3)
    if open is not None:
        scores = (
            scores.masked_fill(~open, -torch.inf) if open.dtype == torch.bool else scores + open
        )
    return scores.softmax(-1).mean(1)[:, 0]
