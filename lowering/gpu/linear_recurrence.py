"""The linear recurrence on GPUs, in three launches: chunks alone, the carry between them, all of h.

Storage of a and b may be float32, bfloat16 or float16 with any strides; arithmetic and states are
float32. The backward pass keeps one state in 32 tokens and recomputes the others.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effpass.lowering.gpu.chunks import Chunks, chunks
from effpass.lowering.gpu.launch import gradients, launch, refusal, tiled, traceable
from effpass.ops.linear_recurrence import linear_recurrence
from effpass.ops.op import implements

_NAMES = tuple(linear_recurrence.signature.parameters)


def _refuses(*arguments: Any) -> str | None:
    given = dict(zip(_NAMES, arguments, strict=True))
    if given["a"].shape[2] == 0:
        return "a has no channels; needs at least 1"
    return refusal(given)


def _carried(
    split: Chunks,
    local: Tensor,
    decay: Tensor,
    init: Tensor | None,
    ends: Tensor,
    reverse: bool,
) -> Tensor:
    """What enters each chunk (chunks, d); ``ends`` (s, d) becomes what leaves the last."""
    from effpass.lowering.gpu.kernels.carry import carry

    starts, channels = torch.empty_like(local), local.shape[1]
    launch(
        carry,
        tiled(split.sequences, channels, "BE"),
        *(local, decay, local, ends if init is None else init.contiguous(), ends, starts),
        *(split.first, split.per_row, channels, 1, 1),
        REVERSE=reverse,
        INIT=init is not None,
        PACKED=split.packed,
        DECAY="element",
        BC=16,
    )
    return starts


def _states(
    split: Chunks, a: Tensor, b: Tensor, grad: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """What leaves each chunk from nothing, its product of decays, and the adjoint's like."""
    from effpass.lowering.gpu.kernels import linear_recurrence as kernels

    channels, dh = a.shape[2], a if grad is None else grad
    local = a.new_empty((split.count, channels), dtype=torch.float32)
    decay = torch.empty_like(local)
    adjoint = decay if grad is None else torch.empty_like(local)
    launch(
        kernels.states,
        tiled(split.count, channels, "BD"),
        *(a, b, dh, local, decay, adjoint, split.table, split.tokens, split.per_row, channels),
        *(*a.stride(), *b.stride(), *dh.stride()),
        ADJOINT=grad is not None,
        PACKED=split.packed,
        LENGTH=split.length,
        BT=min(32, split.length),
    )
    return local, decay, adjoint


def _backward(
    grad_h: Tensor,
    grad_final_state: Tensor,
    a: Tensor,
    b: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, ...]:
    from effpass.lowering.gpu.kernels import linear_recurrence as kernels

    given = dict(zip(_NAMES, (a, b, initial_state, cu_seqlens), strict=True))
    split, channels = chunks(a, cu_seqlens, 32), a.shape[2]
    local, decay, adjoint = _states(split, a, b, grad_h)
    final = a.new_empty((split.sequences, channels), dtype=torch.float32)
    starts = _carried(split, local, decay, initial_state, final, False)
    dstart = torch.empty_like(final)
    leaving = _carried(split, adjoint, decay, grad_final_state, dstart, True)
    da, db = a.new_empty(a.shape), b.new_empty(b.shape)
    launch(
        kernels.backward,
        tiled(split.count, channels, "BD"),
        *(a, b, grad_h, starts, leaving, da, db, split.table),
        *(split.tokens, split.per_row, channels),
        *(*a.stride(), *b.stride(), *grad_h.stride()),
        PACKED=split.packed,
        BT=32,
    )
    found = {"a": da, "b": db, "initial_state": dstart}
    return gradients(linear_recurrence, grad_h, given, found)


@implements(linear_recurrence, target="gpu", backward=_backward, refuses=_refuses, asked_for=True)
def forward(
    a: Tensor, b: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``linear_recurrence``; h contiguous in a's dtype, final_state float32."""
    from effpass.lowering.gpu.kernels import linear_recurrence as kernels

    split, channels = chunks(a, cu_seqlens, 128), a.shape[2]
    local, decay, _ = _states(split, a, b, None)
    final = a.new_empty((split.sequences, channels), dtype=torch.float32)
    starts = _carried(split, local, decay, initial_state, final, False)
    h = a.new_empty(a.shape)
    launch(
        kernels.outputs,
        tiled(split.count, channels, "BD"),
        *(a, b, starts, h, split.table, split.tokens, split.per_row, channels),
        *(*a.stride(), *b.stride()),
        PACKED=split.packed,
        LENGTH=split.length,
        BT=32,
    )
    return h, final


traceable(linear_recurrence, forward, _backward)
