"""Token matching on GPUs, for ReduceTokens: the similarities tile by tile, none of them kept.

Of one narrow dtype, products of tokens are exact and their sums float32; otherwise products are
float32 in full. Cosines are taken after the sums, so two that differ by rounding may change places
with the definition's; equal tokens have equal cosines, and the first of them is taken.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensorMode

from effpass.lowering.gpu.launch import decompose, launch, refusal, tiled
from effpass.ops.op import Lowering
from effpass.ops.token_matching import no_gradient, shapes, token_matching


def forward(
    a: Tensor, b: Tensor, open: Tensor, a_at: Tensor, b_at: Tensor, later: bool
) -> tuple[Tensor, Tensor]:
    """``effpass.ops.token_matching`` of CUDA tensors, with the same arguments and results."""
    from effpass.lowering.gpu.kernels.token_matching import best

    index, similar = shapes(a, b, open, a_at, b_at, later)
    batch, sources, width = a.shape
    narrow = a.dtype == b.dtype != torch.float32
    launch(
        best,
        tiled(batch, sources, "BM"),
        *(a, b, open.contiguous(), a_at.contiguous(), b_at.contiguous(), similar, index),
        *(sources, b.shape[1], width, *a.stride(), *b.stride()),
        LATER=later,
        HALF=narrow,
        BD=64 if narrow else 32,
    )
    return index, similar


def _refuses(*arguments: Any) -> str | None:
    given = dict(zip(token_matching.signature.parameters, arguments, strict=True))
    if given["a"].shape[2] == 0:
        return "a has no channels; needs at least 1"
    return refusal(given)


def _register() -> None:
    op = torch.library.custom_op("effpass_gpu::token_matching", forward, mutates_args=())
    op.register_fake(shapes)
    traced = functools.partial(decompose, forward, len(token_matching.signature.parameters), ())
    op.register_torch_dispatch(FunctionalTensorMode, traced)
    overload = torch.ops.effpass_gpu.token_matching.default
    made = Lowering("gpu", forward, no_gradient, _refuses, overload, asked_for=True)
    token_matching.lowerings.insert(0, made)


_register()
