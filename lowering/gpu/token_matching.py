"""Which token of one half is most like each token of the other, by cosine, on a GPU.

For token reduction. No op stands for it yet: a plain function of tensors, without a gradient (an
index has none).
"""

from __future__ import annotations

import torch
from torch import Tensor

from effpass.lowering.gpu.launch import launch, refusal


def best_matches(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """For each token of ``a`` (batch, m, d), the most similar one of ``b`` (batch, k, d).

    Returns the cosine (batch, m), float32, and the index into ``b`` (batch, m), int64; of equal
    ones the first. A token of zeros has cosine 0 with all. Memory beside the results: none. Raises
    ValueError on shapes that disagree, an empty ``b``, or tensors that no kernel takes.
    """
    reason = refusal({"a": a, "b": b})
    if reason is not None:
        raise ValueError(f"best_matches: {reason}")
    if a.dim() != 3 or b.dim() != 3 or a.shape[::2] != b.shape[::2] or b.shape[1] == 0:
        raise ValueError(
            "best_matches: expected a (batch, m, d) and b (batch, k, d) with k >= 1, found "
            f"{tuple(a.shape)} and {tuple(b.shape)}"
        )
    from effpass.lowering.gpu.kernels.token_matching import best

    batch, count, width = a.shape
    score = a.new_empty((batch, count), dtype=torch.float32)
    index = a.new_empty((batch, count), dtype=torch.int64)
    launch(
        best,
        (batch, (count + 63) // 64),
        *(a, b, score, index, count, b.shape[1], width, *a.stride(), *b.stride()),
        BM=64,
        BN=64,
        BD=64,
    )
    return score, index
