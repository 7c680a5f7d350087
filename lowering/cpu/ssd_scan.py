"""Mamba-2's scan on CPUs: hands tensors to ``ssd_scan.cpp``, which multiplies matrices in chunks.

Storage of x, dt, B, C and z may be float32, bfloat16 or float16, each its own; batch and token
strides are free, so slices of a fused projection are read where they lie. Arithmetic and states are
float32.
"""

from __future__ import annotations

import ctypes
import math
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
from effpass.ops.op import empty_gradient, implements
from effpass.ops.ssd_scan import ssd_scan


class _Scan(ctypes.Structure):
    _fields_ = (
        *((name, Rows) for name in ("x", "dt", "B", "C", "z")),
        *((name, ctypes.c_void_p) for name in ("A", "D", "dt_bias", "start")),
        ("sequences", Sequences),
        *((name, ctypes.c_int64) for name in ("heads", "groups", "p", "n", "softplus", "threads")),
        *((name, ctypes.c_float) for name in ("dt_min", "dt_max")),
    )


class _ForwardOut(ctypes.Structure):
    _fields_ = (("y", Rows), ("final_state", ctypes.c_void_p))


class _BackwardOut(ctypes.Structure):
    _fields_ = (
        *((name, Rows) for name in ("dy", "dx", "ddt", "dB", "dC", "dz")),
        *((n, ctypes.c_void_p) for n in ("dfinal_state", "dstart", "dA", "dD", "ddt_bias")),
    )


class _Call:
    """The arguments of one call as the kernels read them; holds the tensors they point into."""

    def __init__(self, *args: Any) -> None:
        x, dt, A, B, C, D, z, dt_bias, softplus, dt_min, dt_max, start, cu_seqlens = args
        batch, tokens, heads, p = x.shape
        groups, n = B.shape[2:]
        self.offsets = None if cu_seqlens is None else cu_seqlens.contiguous()
        seqs = sequences("ssd_scan", self.offsets, batch, tokens)
        self.state_shape = (seqs.count, heads, p, n)
        self.held = [_flat(x), adjacent(dt), _flat(B), _flat(C), None if z is None else _flat(z)]
        self.small = [plain(v) for v in (A, D, dt_bias, start)]
        self.scan = _Scan(
            *(rows(v) for v in self.held),
            *(pointer(v) for v in self.small),
            seqs,
            *(heads, groups, p, n, softplus, threads(x.numel() * n)),
            *(dt_min, math.inf if dt_max is None else dt_max),
        )


def _flat(tensor: Tensor) -> Tensor:
    """(b, t, h, p) as (b, t, h * p); copied only when heads do not lie end to end."""
    return adjacent(tensor.flatten(2))


def _refuses(*args: Any) -> str | None:
    given = dict(zip(ssd_scan.signature.parameters, args, strict=True))
    if given["x"].shape[2] == 0:
        return "x has no heads; needs at least 1"
    return refusal("ssd_scan", given)


def _backward(grad_y: Tensor, grad_final_state: Tensor, *args: Any) -> tuple[Tensor, ...]:
    call = _Call(*args)
    x, dt, A, B, C, D, z, dt_bias, _, _, _, start, cu_seqlens = args
    dx, ddt, dB, dC = (v.new_empty(v.shape) for v in (x, dt, B, C))
    dz = None if z is None else z.new_empty(z.shape)
    dstart = None if start is None else x.new_empty(call.state_shape, dtype=torch.float32)
    sums = x.new_empty((3, *call.state_shape[:2]), dtype=torch.float32)
    dy, dfinal = _flat(grad_y), grad_final_state.float().contiguous()
    out = _BackwardOut(
        *(rows(v) for v in (dy, _flat(dx), ddt, _flat(dB), _flat(dC))),
        rows(None if dz is None else _flat(dz)),
        *(pointer(dfinal), pointer(dstart), *(v.data_ptr() for v in sums)),
    )
    load("ssd_scan").ssd_scan_backward(ctypes.byref(call.scan), ctypes.byref(out))
    dA, dD, dbias = sums.sum(1)
    grads = (dx, ddt, dA, dB, dC, dD, dz, dbias, dstart, None)
    inputs = (x, dt, A, B, C, D, z, dt_bias, start, cu_seqlens)
    return tuple(
        empty_gradient(grad_y) if v is None or g is None else g.to(v.dtype)
        for g, v in zip(grads, inputs, strict=True)
    )


@implements(
    ssd_scan,
    target="cpu",
    backward=_backward,
    refuses=_refuses,
    prepare=lambda: start("ssd_scan"),
)
def forward(*args: Any) -> tuple[Tensor, Tensor]:
    """``ssd_scan`` with its arguments in order; y contiguous in x's dtype, final_state float32."""
    call, x = _Call(*args), args[0]
    y, final_state = x.new_empty(x.shape), x.new_empty(call.state_shape, dtype=torch.float32)
    out = _ForwardOut(rows(y.flatten(2)), final_state.data_ptr())
    load("ssd_scan").ssd_scan_forward(ctypes.byref(call.scan), ctypes.byref(out))
    return y, final_state
