"""Packed attention on GPUs: torch's own varlen kernel forward where it fits, else Triton's.

torch's (``torch.nn.attention.varlen``) runs self-attention of one narrow dtype, as many key heads
as query heads, without windows, bias, soft cap or positions. The Triton kernels run all of those,
and every gradient: torch's gradient needs numbers of its forward pass that an op without state
cannot keep. They count tiles from sizes; torch's kernel relies on ``max_seqlen``.

Unlike the definition, a NaN in a value reaches the queries that see it and those of their tiles,
not every query of its sequence.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from effpass.lowering.gpu.chunks import chunks
from effpass.lowering.gpu.launch import gradients, launch, refusal, traceable
from effpass.ops.op import implements
from effpass.ops.varlen_attention import score_scale, varlen_attention

WIDEST = 128
FAR = 1 << 40  # no window
_NAMES = tuple(varlen_attention.signature.parameters)


def _refuses(*arguments: Any) -> str | None:
    given = dict(zip(_NAMES, arguments, strict=True))
    for name, tensor in (("q", given["q"]), ("v", given["v"])):
        width = tensor.shape[2]
        if width > WIDEST or width == 0:
            return f"{name} has heads of {width} channels; needs 1 to {WIDEST}"
    return refusal(given)


@functools.cache
def _torch_varlen() -> Callable[..., Any] | None:
    """torch's varlen attention, where it is installed and takes a window."""
    import inspect

    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn if "window_size" in inspect.signature(varlen_attn).parameters else None


def fits_torch(given: dict[str, Any]) -> bool:
    """Whether torch's own kernel answers these arguments as the definition does."""
    q, k, v = given["q"], given["k"], given["v"]
    extras = ("cu_seqlens_k", "softcap", "bias", "q_pos")
    return (
        q.device.type == "cuda"
        and q.dtype == k.dtype == v.dtype != torch.float32
        and q.shape[1:] == k.shape[1:] == v.shape[1:]
        and q.shape[2] % 8 == 0
        and all(given[name] is None for name in extras)
        and tuple(given["window"]) == (-1, -1)
        and _torch_varlen() is not None
    )


def _power(number: int) -> int:
    return max(16, 1 << max(number - 1, 0).bit_length())


@dataclass(frozen=True)
class _Call:
    """One call as the kernels read it: tensors by name, limits of the window, sizes."""

    given: dict[str, Any]
    tensors: tuple[Tensor, ...]
    offsets: tuple[Tensor, Tensor]
    sizes: tuple[Any, ...]

    @property
    def meta(self) -> dict[str, Any]:
        """Compile-time arguments of every kernel."""
        q, k, v, bias = (self.given[n] for n in ("q", "k", "v", "bias"))
        half = q.dtype == k.dtype == v.dtype != torch.float32
        return {
            "HALF": half,
            "CAP": self.given["softcap"] is not None,
            "BIAS": 0 if bias is None else bias.dim(),
            "POSITIONS": self.given["q_pos"] is not None,
            "BM": 64 if half else 32,
            "BN": 64 if half else 32,
            "BD": _power(q.shape[2]),
            "BE": _power(v.shape[2]),
        }


def _call(given: dict[str, Any]) -> _Call:
    q, k, v = (given[n] for n in ("q", "k", "v"))
    tensors = (q, k, v, *(q if given[n] is None else given[n].contiguous() for n in _NAMES[11:]))
    offsets = given["cu_seqlens"].contiguous()
    offsets_k = offsets if given["cu_seqlens_k"] is None else given["cu_seqlens_k"].contiguous()
    left, right = (FAR if side < 0 else side for side in given["window"])
    right = min(right, 0) if given["causal"] else right
    cap = 1.0 if given["softcap"] is None else given["softcap"]
    scale = score_scale(q, given["scale"])
    group = q.shape[1] // k.shape[1]
    sizes = (q.shape[0], k.shape[0], group, q.shape[2], v.shape[2], scale, cap, left, right)
    return _Call(given, tensors, (offsets, offsets_k), sizes)


def _tiles(tensor: Tensor, offsets: Tensor, length: int) -> Any:
    return chunks(tensor[None], offsets, length)


def _backward(grad_out: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    from effpass.lowering.gpu.kernels import varlen_attention as kernels

    given = dict(zip(_NAMES, arguments, strict=True))
    call = _call(given)
    (q, k, v), bias, meta = call.tensors[:3], given["bias"], call.meta
    (tokens, heads, _), (tokens_k, heads_k, _) = q.shape, k.shape
    lse = q.new_empty((2, heads, tokens), dtype=torch.float32)
    dq, dk, dv = (torch.empty(each.shape, dtype=each.dtype, device=q.device) for each in (q, k, v))
    dbias = q.new_empty((heads, tokens_k) if bias is not None else (0,), dtype=torch.float32)
    queries = _tiles(q, call.offsets[0], meta["BM"])
    keys = _tiles(k, call.offsets[1], meta["BN"])
    strides = (*q.stride(), *k.stride(), *v.stride(), *grad_out.stride(), heads)
    rest = (*call.offsets, *call.sizes, *strides)
    launch(
        kernels.forward,
        (queries.count, heads),
        *(*call.tensors, grad_out, dq, lse[0], lse[1], queries.table, *rest),
        DELTA=True,
        **meta,
    )
    launch(
        kernels.backward_q,
        (queries.count, heads),
        *(*call.tensors, grad_out, lse[0], lse[1], dq, queries.table, *rest),
        **meta,
    )
    launch(
        kernels.backward_kv,
        (keys.count, heads_k),
        *(*call.tensors, grad_out, lse[0], lse[1], dk, dv, dbias, keys.table, *rest),
        **meta,
    )
    found = {"q": dq, "k": dk, "v": dv}
    if bias is not None:
        found["bias"] = dbias if bias.dim() == 2 else dbias.sum(0)
    return gradients(varlen_attention, grad_out, given, found)


@implements(varlen_attention, target="gpu", backward=_backward, refuses=_refuses, asked_for=True)
def forward(*arguments: Any) -> Tensor:
    """``effpass.ops.varlen_attention`` of CUDA tensors."""
    from effpass.lowering.gpu.kernels import varlen_attention as kernels

    given = dict(zip(_NAMES, arguments, strict=True))
    theirs = _torch_varlen()
    if theirs is not None and fits_torch(given):
        each = [given[n].contiguous() for n in ("q", "k", "v")]
        offsets, longest = given["cu_seqlens"].contiguous(), given["max_seqlen"]
        window = (-1, 0) if given["causal"] else (-1, -1)
        scale = given["scale"]
        return theirs(*each, offsets, offsets, longest, longest, scale=scale, window_size=window)
    call = _call(given)
    q, k, v = call.tensors[:3]
    meta = call.meta
    queries = _tiles(q, call.offsets[0], meta["BM"])
    out = q.new_empty((*q.shape[:2], v.shape[2]))
    strides = (*q.stride(), *k.stride(), *v.stride(), *q.stride(), q.shape[1])
    launch(
        kernels.forward,
        (queries.count, q.shape[1]),
        *(*call.tensors, q, out, out, out, queries.table),
        *(*call.offsets, *call.sizes, *strides),
        DELTA=False,
        **meta,
    )
    return out


traceable(varlen_attention, forward, _backward)
