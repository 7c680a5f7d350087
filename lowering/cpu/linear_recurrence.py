"""The linear recurrence on CPUs: hands tensors to ``linear_recurrence.cpp``.

Storage of a and b may be float32, bfloat16 or float16; batch and token strides are free. Arithmetic
and states are float32.
"""

from __future__ import annotations

import ctypes
from typing import Any

import torch
from torch import Tensor

from effpass.lowering.cpu.build import load, start
from effpass.lowering.cpu.rows import (
    Rows,
    Sequences,
    adjacent,
    plain,
    pointer,
    refusal,
    rows,
    sequences,
    threads,
)
from effpass.ops.linear_recurrence import linear_recurrence
from effpass.ops.op import empty_gradient, implements


class _Recurrence(ctypes.Structure):
    _fields_ = (
        *(("a", Rows), ("b", Rows), ("start", ctypes.c_void_p), ("sequences", Sequences)),
        *(("channels", ctypes.c_int64), ("threads", ctypes.c_int64)),
    )


class _ForwardOut(ctypes.Structure):
    _fields_ = (("h", Rows), ("final_state", ctypes.c_void_p))


class _BackwardOut(ctypes.Structure):
    _fields_ = (
        *((name, Rows) for name in ("dh", "da", "db")),
        *((name, ctypes.c_void_p) for name in ("dfinal_state", "dstart")),
    )


class _Call:
    """The arguments of one call as the kernels read them; holds the tensors they point into."""

    def __init__(
        self, a: Tensor, b: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None
    ) -> None:
        batch, tokens, channels = a.shape
        self.offsets = None if cu_seqlens is None else cu_seqlens.contiguous()
        seqs = sequences("linear_recurrence", self.offsets, batch, tokens)
        self.state_shape = (seqs.count, channels)
        self.held = (adjacent(a), adjacent(b), plain(initial_state))
        self.recurrence = _Recurrence(
            *(rows(self.held[0]), rows(self.held[1]), pointer(self.held[2]), seqs),
            *(channels, threads(a.numel())),
        )


def _refuses(*args: Any) -> str | None:
    given = dict(zip(linear_recurrence.signature.parameters, args, strict=True))
    return refusal("linear_recurrence", given)


def _backward(
    grad_h: Tensor,
    grad_final_state: Tensor,
    a: Tensor,
    b: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, ...]:
    call = _Call(a, b, initial_state, cu_seqlens)
    da, db = (v.new_empty(v.shape) for v in (a, b))
    dstart = None if initial_state is None else a.new_empty(call.state_shape, dtype=torch.float32)
    dh, dfinal = adjacent(grad_h), grad_final_state.float().contiguous()
    out = _BackwardOut(rows(dh), rows(da), rows(db), pointer(dfinal), pointer(dstart))
    kernel = load("linear_recurrence").linear_recurrence_backward
    kernel(ctypes.byref(call.recurrence), ctypes.byref(out))
    nothing = empty_gradient(grad_h)
    if initial_state is None or dstart is None:
        return da, db, nothing, nothing.clone()
    return da, db, dstart.to(initial_state.dtype), nothing


@implements(
    linear_recurrence,
    target="cpu",
    backward=_backward,
    refuses=_refuses,
    prepare=lambda: start("linear_recurrence"),
)
def forward(
    a: Tensor, b: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    """``linear_recurrence``; h contiguous in a's dtype, final_state float32."""
    call = _Call(a, b, initial_state, cu_seqlens)
    h, final_state = a.new_empty(a.shape), a.new_empty(call.state_shape, dtype=torch.float32)
    out = _ForwardOut(rows(h), final_state.data_ptr())
    kernel = load("linear_recurrence").linear_recurrence_forward
    kernel(ctypes.byref(call.recurrence), ctypes.byref(out))
    return h, final_state
