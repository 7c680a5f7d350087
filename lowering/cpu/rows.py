"""How tensors are handed to the C++ kernels: a pointer, a storage type and two strides.

Mirrors ``Rows`` and ``Sequences`` of ``vec.h``, field by field. A kernel does not keep a tensor
alive: its caller does, by holding it in a name until the kernel returns.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from effpass.lowering.cpu.build import unavailable
from effpass.ops.op import check_cu_seqlens

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # vec.h's Storage
SMALL_WORK = 1 << 15  # below this many inner steps, waking threads costs more than it saves


class Rows(ctypes.Structure):
    """A (batch, token, channel) tensor with channel stride 1; strides in elements."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("storage", ctypes.c_int64),
        ("batch_stride", ctypes.c_int64),
        ("token_stride", ctypes.c_int64),
    )


class Sequences(ctypes.Structure):
    """Offsets of packed sequences (or null), their number, and the tokens of a row."""

    _fields_ = (
        ("offsets", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("tokens", ctypes.c_int64),
    )


def rows(tensor: Tensor | None) -> Rows:
    """``tensor`` (b, t, c) for a kernel; its channels must be adjacent (see ``adjacent``)."""
    if tensor is None:
        return Rows(None, 0, 0, 0)
    batch, token, _ = tensor.stride()
    return Rows(tensor.data_ptr(), DTYPES[tensor.dtype], batch, token)


def adjacent(tensor: Tensor) -> Tensor:
    """``tensor``, copied only when elements of its last dimension do not lie side by side."""
    if tensor.stride(-1) == 1 or tensor.shape[-1] <= 1:
        return tensor
    return tensor.contiguous()


def plain(tensor: Tensor | None) -> Tensor | None:
    """A contiguous float32 copy of a small tensor, or itself when it is one."""
    return None if tensor is None else tensor.float().contiguous()


def pointer(tensor: Tensor | None) -> int | None:
    """Address of the first element; None for None."""
    return None if tensor is None else tensor.data_ptr()


def sequences(op: str, cu_seqlens: Tensor | None, batch: int, tokens: int) -> Sequences:
    """Where the sequences lie; ValueError when the offsets would lead a kernel astray."""
    if cu_seqlens is None:
        return Sequences(None, batch, tokens)
    check_cu_seqlens(op, cu_seqlens, batch, tokens)
    return Sequences(cu_seqlens.data_ptr(), cu_seqlens.shape[0] - 1, tokens)


def threads(work: int) -> int:
    """Threads for ``work`` inner steps: torch's number, or one when there is little to do."""
    return 1 if work < SMALL_WORK else torch.get_num_threads()


def refusal(kernel: str, arguments: Mapping[str, Any]) -> str | None:
    """Why ``kernel`` cannot take the tensors (perhaps fake) among the arguments, or None."""
    for name, tensor in arguments.items():
        if not isinstance(tensor, Tensor):
            continue
        if tensor.device.type != "cpu":
            return f"{name} is on {tensor.device}; needs cpu"
        if name != "cu_seqlens" and tensor.dtype not in DTYPES:
            found = str(tensor.dtype).removeprefix("torch.")
            return f"{name} is {found}; needs float32, bfloat16 or float16"
    return unavailable(kernel)
