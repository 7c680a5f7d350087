"""The selective scan on CPUs: hands tensors to ``selective_scan.cpp``.

Every dtype of float32, bfloat16 and float16 may be mixed; arithmetic and states are float32. The
large tensors (x, dt, z, their gradients, y) are read and written where they lie, B and C once as
float32. Time is linear in tokens; backward keeps one state in 16 tokens and recomputes the others.
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
from effpass.ops.op import empty_gradient, implements
from effpass.ops.selective_scan import selective_scan

_ROWS = ("x", "dt", "B", "C", "z")
_PLAIN = ("A", "D", "dt_bias", "initial_state")
_LARGE = ("x", "dt", "z")  # gradients in the argument's dtype
_SUMS = ("A", "B", "C", "D", "dt_bias", "initial_state")  # gradients in float32 first
_NAMES = tuple(selective_scan.signature.parameters)


class _Scan(ctypes.Structure):
    _fields_ = (
        *((name, Rows) for name in _ROWS),
        *((name, ctypes.c_void_p) for name in _PLAIN),
        ("softplus", ctypes.c_int64),
        ("sequences", Sequences),
        *((name, ctypes.c_int64) for name in ("channels", "states", "threads")),
    )


class _ForwardOut(ctypes.Structure):
    _fields_ = (("y", Rows), ("final_state", ctypes.c_void_p))


class _BackwardOut(ctypes.Structure):
    _fields_ = (
        ("grad_y", Rows),
        ("grad_final", ctypes.c_void_p),
        *((name, Rows) for name in _LARGE),
        *((name, ctypes.c_void_p) for name in _SUMS),
    )


def _ready(given: dict[str, Any]) -> dict[str, Any]:
    """The tensors of a call by name, as the kernel can read them; the caller keeps them alive."""
    ready = {name: plain(given[name]) for name in _PLAIN}
    for name in _ROWS:
        tensor = given[name]
        if tensor is not None:
            tensor = adjacent(tensor.float() if name in "BC" else tensor)
        ready[name] = tensor
    cu_seqlens = given["cu_seqlens"]
    ready["cu_seqlens"] = None if cu_seqlens is None else cu_seqlens.contiguous()
    return ready


def _scan(ready: dict[str, Any], softplus: bool) -> _Scan:
    batch, tokens, channels = ready["x"].shape
    states = ready["A"].shape[1]
    return _Scan(
        *(rows(ready[name]) for name in _ROWS),
        *(pointer(ready[name]) for name in _PLAIN),
        softplus,
        sequences("selective_scan", ready["cu_seqlens"], batch, tokens),
        channels,
        states,
        threads(batch * tokens * channels * states),
    )


def _refuses(*arguments: Any) -> str | None:
    return refusal("selective_scan", dict(zip(_NAMES, arguments, strict=True)))


def _backward(grad_y: Tensor, grad_final_state: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    given = dict(zip(_NAMES, arguments, strict=True))
    ready = _ready(given)
    scan = _scan(ready, given["dt_softplus"])
    wanted = {n: given[n] for n in _LARGE + _SUMS if given[n] is not None}
    found = {n: a.new_empty(a.shape, dtype=_kept(n, a)) for n, a in wanted.items()}
    grad, grad_final = adjacent(grad_y), plain(grad_final_state)
    out = _BackwardOut(
        rows(grad),
        pointer(grad_final),
        *(rows(found.get(name)) for name in _LARGE),
        *(pointer(found.get(name)) for name in _SUMS),
    )
    load("selective_scan").selective_scan_backward(ctypes.byref(scan), ctypes.byref(out))
    return tuple(
        found[n].to(given[n].dtype) if n in found else empty_gradient(grad_y)
        for n in selective_scan.tensor_names
    )


def _kept(name: str, argument: Tensor) -> torch.dtype:
    """The dtype in which the kernel writes the gradient of an argument."""
    return argument.dtype if name in _LARGE else torch.float32


@implements(
    selective_scan,
    target="cpu",
    backward=_backward,
    refuses=_refuses,
    prepare=lambda: start("selective_scan"),
)
def forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``effpass.ops.selective_scan`` of CPU tensors, with the same arguments and results."""
    arguments = (x, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, cu_seqlens)
    ready = _ready(dict(zip(_NAMES, arguments, strict=True)))
    scan = _scan(ready, dt_softplus)
    y = x.new_empty(x.shape)
    final = x.new_empty((scan.sequences.count, *A.shape), dtype=torch.float32)
    out = _ForwardOut(rows(y), pointer(final))
    load("selective_scan").selective_scan_forward(ctypes.byref(scan), ctypes.byref(out))
    return y, final
