"""The selective scan on GPUs: D, the gate, dt's bias and softplus inside; fp32 states.

Every dtype of float32, bfloat16 and float16 may be mixed, with any strides. Memory beside inputs
and outputs: a state in CHUNK tokens forward, in TILE tokens backward, never one a token. Sums over
tokens and channels are added in a fixed order, so results repeat bit by bit. One token without
``cu_seqlens`` is one launch of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effpass.lowering.gpu.chunks import Chunks, chunks
from effpass.lowering.gpu.launch import gradients, launch, refusal, traceable
from effpass.ops.op import implements
from effpass.ops.selective_scan import selective_scan

CHUNK, TILE = 128, 16
MOST_STATES = 128
_NAMES = tuple(selective_scan.signature.parameters)
_BLOCK = 128


def _refuses(*arguments: Any) -> str | None:
    given = dict(zip(_NAMES, arguments, strict=True))
    channels, count = given["A"].shape
    if count > MOST_STATES or count == 0:
        return f"A has {count} states; needs 1 to {MOST_STATES}"
    if channels == 0:
        return "x has no channels; needs at least 1"
    return refusal(given)


def _power(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()


def _flags(given: dict[str, Any]) -> dict[str, bool]:
    return {
        "GATE": given["z"] is not None,
        "BIAS": given["dt_bias"] is not None,
        "SOFTPLUS": given["dt_softplus"],
    }


def _ready(given: dict[str, Any]) -> dict[str, Tensor]:
    """Tensors by name as the kernels read them; x stands in for those that are not there."""
    plain = ("A", "D", "dt_bias", "initial_state")
    return {
        n: given["x"] if given[n] is None else given[n].contiguous() if n in plain else given[n]
        for n in selective_scan.tensor_names
    }


def _states(
    split: Chunks, given: dict[str, Any], ready: dict[str, Tensor], grad: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    from effpass.lowering.gpu.kernels import selective_scan as kernels

    channels, count = ready["A"].shape
    local = ready["x"].new_empty((split.count, count, channels), dtype=torch.float32)
    sums = ready["x"].new_empty((split.count, channels), dtype=torch.float32)
    adjoint = local if grad is None else torch.empty_like(local)
    dy = ready["x"] if grad is None else grad
    x, dt, A, B, C, z, bias = (ready[n] for n in ("x", "dt", "A", "B", "C", "z", "dt_bias"))
    launch(
        kernels.states,
        _grid(split, channels),
        *(x, dt, A, B, C, z, bias, dy, local, sums, adjoint, split.table),
        *(split.tokens, split.per_row, channels, count),
        *(*x.stride(), *dt.stride(), *B.stride(), *C.stride(), *z.stride(), *dy.stride()),
        ADJOINT=grad is not None,
        **_flags(given),
        PACKED=split.packed,
        LENGTH=split.length,
        BN=_power(count),
    )
    return local, sums, adjoint


def _grid(split: Chunks, channels: int) -> Any:
    """One program a chunk and block of channels, the block as tuned."""
    if split.count == 0:
        return (0, 1)
    return lambda meta: (split.count, (channels + meta["BD"] - 1) // meta["BD"])


def _carried(
    split: Chunks,
    local: Tensor,
    sums: Tensor,
    A: Tensor,
    init: Tensor | None,
    ends: Tensor,
    reverse: bool,
) -> Tensor:
    """What enters each chunk (chunks, n, d); ``ends`` (s, d, n) becomes what leaves the last."""
    from effpass.lowering.gpu.kernels.carry import carry

    starts, (channels, count) = torch.empty_like(local), A.shape
    launch(
        carry,
        (split.sequences, (channels * count + _BLOCK - 1) // _BLOCK),
        *(local, sums, A, ends if init is None else init.contiguous(), ends, starts),
        *(split.first, split.per_row, channels * count, channels, count),
        REVERSE=reverse,
        INIT=init is not None,
        PACKED=split.packed,
        DECAY="steps",
        BC=16,
        BE=_BLOCK,
    )
    return starts


def _backward(grad_y: Tensor, grad_final_state: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    from effpass.lowering.gpu.kernels import selective_scan as kernels

    given = dict(zip(_NAMES, arguments, strict=True))
    ready, f32 = _ready(given), torch.float32
    x, dt, A, B, C, D, z, bias = (ready[n] for n in selective_scan.tensor_names[:8])
    (batch, tokens, channels), count = x.shape, A.shape[1]
    split, block = chunks(x, given["cu_seqlens"], TILE), 64
    local, sums, adjoint = _states(split, given, ready, grad_y)
    final = x.new_empty((split.sequences, channels, count), dtype=f32)
    dstart = torch.empty_like(final)
    starts = _carried(split, local, sums, A, given["initial_state"], final, False)
    leaving = _carried(split, adjoint, sums, A, grad_final_state, dstart, True)
    dx, ddt, dz = (torch.empty(v.shape, dtype=v.dtype, device=v.device) for v in (x, dt, z))
    side = x.new_empty((2, split.count, channels), dtype=f32)
    blocks = (channels + block - 1) // block
    wide = x.new_empty((2, blocks, batch, tokens, count), dtype=f32)
    launch(
        kernels.backward,
        (split.count, blocks),
        *(x, dt, A, B, C, D, z, bias, grad_y, starts, leaving),
        *(dx, ddt, dz, local, wide[0], wide[1], side[0], side[1], split.table),
        *(split.tokens, split.per_row, channels, count, batch * tokens),
        *(*x.stride(), *dt.stride(), *B.stride(), *C.stride(), *z.stride(), *grad_y.stride()),
        SKIP=given["D"] is not None,
        **_flags(given),
        PACKED=split.packed,
        BT=TILE,
        BD=block,
        num_warps=2,
    )
    found = {"x": dx, "dt": ddt, "A": local.sum(0).t(), "B": wide[0].sum(0), "C": wide[1].sum(0)}
    found |= {"z": dz, "initial_state": dstart}
    for name, summed in (("D", side[0]), ("dt_bias", side[1])):
        if given[name] is not None:
            found[name] = summed.sum(0)
    return gradients(selective_scan, grad_y, given, found)


@implements(selective_scan, target="gpu", backward=_backward, refuses=_refuses, asked_for=True)
def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """``effpass.ops.selective_scan`` of CUDA tensors, with the same arguments and results."""
    from effpass.lowering.gpu.kernels import selective_scan as kernels

    given = dict(zip(_NAMES, arguments, strict=True))
    ready, init = _ready(given), given["initial_state"]
    x, dt, A, B, C, D, z, bias = (ready[n] for n in selective_scan.tensor_names[:8])
    channels, count = A.shape
    if isinstance(x.shape[1], int) and x.shape[1] == 1 and given["cu_seqlens"] is None:
        return _update(given, ready)
    split = chunks(x, given["cu_seqlens"], CHUNK)
    local, sums, _ = _states(split, given, ready, None)
    final = x.new_empty((split.sequences, channels, count), dtype=torch.float32)
    starts = _carried(split, local, sums, A, init, final, False)
    y = x.new_empty(x.shape)
    launch(
        kernels.outputs,
        _grid(split, channels),
        *(x, dt, A, B, C, D, z, bias, starts, y, split.table),
        *(split.tokens, split.per_row, channels, count),
        *(*x.stride(), *dt.stride(), *B.stride(), *C.stride(), *z.stride()),
        SKIP=given["D"] is not None,
        **_flags(given),
        PACKED=split.packed,
        LENGTH=split.length,
        BN=_power(count),
    )
    return y, final


def _update(given: dict[str, Any], ready: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """One token a row, as a decoder runs."""
    from effpass.lowering.gpu.kernels import selective_scan as kernels

    x, dt, A, B, C, D, z, bias = (ready[n] for n in selective_scan.tensor_names[:8])
    (batch, _, channels), count = x.shape, A.shape[1]
    y, final = x.new_empty(x.shape), x.new_empty((batch, channels, count), dtype=torch.float32)
    strides = [s for v in (x, dt, B, C, z) for s in (v.stride(0), v.stride(2))]
    launch(
        kernels.update,
        (batch, (channels + 63) // 64),
        *(x, dt, A, B, C, D, z, bias, ready["initial_state"], y, final, channels, count),
        *strides,
        SKIP=given["D"] is not None,
        **_flags(given),
        INIT=given["initial_state"] is not None,
        BN=_power(count),
        BD=64,
    )
    return y, final


traceable(selective_scan, forward, _backward)
