"""The causal convolution on CPUs: hands tensors to ``causal_conv1d.cpp``.

Every dtype of float32, bfloat16 and float16 may be mixed; arithmetic is float32. x, y and their
gradients are read and written where they lie; only an x whose channels are not adjacent is copied.
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
from effpass.ops.causal_conv1d import causal_conv1d
from effpass.ops.op import empty_gradient, implements

_PLAIN = ("weight", "bias", "initial_state")
_NAMES = tuple(causal_conv1d.signature.parameters)


class _Conv(ctypes.Structure):
    _fields_ = (
        ("x", Rows),
        *((name, ctypes.c_void_p) for name in _PLAIN),
        ("silu", ctypes.c_int64),
        ("sequences", Sequences),
        *((name, ctypes.c_int64) for name in ("channels", "width", "threads")),
    )


class _ForwardOut(ctypes.Structure):
    _fields_ = (("y", Rows), ("final_state", Rows))


class _BackwardOut(ctypes.Structure):
    _fields_ = (
        ("grad_y", Rows),
        ("grad_final", ctypes.c_void_p),
        ("dx", Rows),
        *((name, ctypes.c_void_p) for name in _PLAIN),
    )


def _ready(given: dict[str, Any]) -> dict[str, Any]:
    """The tensors of a call by name, as the kernel can read them; the caller keeps them alive."""
    cu_seqlens = given["cu_seqlens"]
    return {
        "x": adjacent(given["x"]),
        **{name: plain(given[name]) for name in _PLAIN},
        "cu_seqlens": None if cu_seqlens is None else cu_seqlens.contiguous(),
    }


def _conv(ready: dict[str, Any], activation: str | None) -> _Conv:
    batch, tokens, channels = ready["x"].shape
    width = ready["weight"].shape[1]
    return _Conv(
        rows(ready["x"]),
        *(pointer(ready[name]) for name in _PLAIN),
        activation == "silu",
        sequences("causal_conv1d", ready["cu_seqlens"], batch, tokens),
        channels,
        width,
        threads(batch * tokens * channels * (width + 4)),
    )


def _refuses(*arguments: Any) -> str | None:
    return refusal("causal_conv1d", dict(zip(_NAMES, arguments, strict=True)))


def _backward(grad_y: Tensor, grad_final_state: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    given = dict(zip(_NAMES, arguments, strict=True))
    ready = _ready(given)
    conv = _conv(ready, given["activation"])
    x = given["x"]
    found = {
        n: a.new_empty(a.shape, dtype=torch.float32) for n in _PLAIN if (a := given[n]) is not None
    }
    found["x"] = x.new_empty(x.shape)
    grad, grad_final = adjacent(grad_y), plain(grad_final_state)
    out = _BackwardOut(
        rows(grad),
        pointer(grad_final),
        rows(found["x"]),
        *(pointer(found.get(name)) for name in _PLAIN),
    )
    load("causal_conv1d").causal_conv1d_backward(ctypes.byref(conv), ctypes.byref(out))
    return tuple(
        found[n].to(given[n].dtype) if n in found else empty_gradient(grad_y)
        for n in causal_conv1d.tensor_names
    )


@implements(
    causal_conv1d,
    target="cpu",
    backward=_backward,
    refuses=_refuses,
    prepare=lambda: start("causal_conv1d"),
)
def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``effpass.ops.causal_conv1d`` of CPU tensors, with the same arguments and results."""
    arguments = (x, weight, bias, activation, initial_state, cu_seqlens)
    ready = _ready(dict(zip(_NAMES, arguments, strict=True)))
    conv = _conv(ready, activation)
    y = x.new_empty(x.shape)
    final = x.new_empty((conv.sequences.count, weight.shape[0], weight.shape[1] - 1))
    out = _ForwardOut(rows(y), rows(final))
    load("causal_conv1d").causal_conv1d_forward(ctypes.byref(conv), ctypes.byref(out))
    return y, final
