"""The selective scan on GPUs: D, the gate, dt's bias and softplus inside; fp32 states.

Every dtype of float32, bfloat16 and float16 may be mixed, with any strides. Forward is one walk
along each sequence; backward the same walk again, which keeps a state in TILE tokens, and one walk
back. Where sequences and channels are too few to fill the machine, sequences are cut into chunks of
CHUNK tokens, whose states are carried first. Never is there a state a token in memory. Sums over
tokens and channels are added in a fixed order, so results repeat bit by bit. One token without
``cu_seqlens`` is one launch of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effpass.lowering.gpu.chunks import Chunks, chunks, whole
from effpass.lowering.gpu.launch import gradients, launch, refusal, tiled, traceable
from effpass.ops.op import implements
from effpass.ops.selective_scan import selective_scan

CHUNK, TILE = 128, 8
NARROW, WIDE = 8, 16  # channels of a program, forward and backward
PROGRAMS = 264  # of NARROW channels: half of an H200's schedulers
MOST_STATES = 128
_NAMES = tuple(selective_scan.signature.parameters)


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
        tiled(split.count, channels, "BD"),
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
        tiled(split.sequences, channels * count, "BE"),
        *(local, sums, A, ends if init is None else init.contiguous(), ends, starts),
        *(split.first, split.per_row, channels * count, channels, count),
        REVERSE=reverse,
        INIT=init is not None,
        PACKED=split.packed,
        DECAY="steps",
        BC=16,
    )
    return starts


def _split(given: dict[str, Any], channels: Any) -> tuple[Chunks, bool]:
    """Whole sequences (True) where these fill the machine, else chunks of them (False).

    Chunks cost every exponential once more. Sizes that are not known while compiling count as
    large: nothing is asked about them.
    """
    x, cu_seqlens = given["x"], given["cu_seqlens"]
    split = whole(x, cu_seqlens)
    programs = split.count * _blocks(channels, NARROW)
    few = isinstance(programs, int) and programs < PROGRAMS
    if few and isinstance(split.tokens, int) and split.tokens > CHUNK:
        return chunks(x, cu_seqlens, CHUNK), False
    return split, True


def _blocks(channels: Any, width: int) -> Any:
    return (channels + width - 1) // width


def _walk(
    split: Chunks,
    given: dict[str, Any],
    ready: dict[str, Tensor],
    starts: Tensor | None,
    y: Tensor,
    final: Tensor,
    edges: Tensor | None,
) -> None:
    """y, and final where chunks are whole sequences; or edges, the states in front of tiles.

    ``starts``: what enters each chunk; None where that is ``initial_state``.
    """
    from effpass.lowering.gpu.kernels import selective_scan as kernels

    x, dt, A, B, C, D, z, bias = (ready[n] for n in selective_scan.tensor_names[:8])
    channels, count = A.shape
    enter = ready["initial_state"] if starts is None else starts
    given_start = "sequences" if given["initial_state"] is not None else ""
    launch(
        kernels.walk,
        tiled(split.count, channels, "BD"),
        *(x, dt, A, B, C, D, z, bias, enter, y, final, y if edges is None else edges),
        *(split.table, split.tokens, split.per_row, split.length, channels, count),
        *(*x.stride(), *dt.stride(), *B.stride(), *C.stride(), *z.stride()),
        SKIP=given["D"] is not None,
        **_flags(given),
        START=given_start if starts is None else "chunks",
        FINAL=starts is None and edges is None,
        EDGE=0 if edges is None else TILE,
        PACKED=split.packed,
        BN=_power(count),
    )


def _backward(grad_y: Tensor, grad_final_state: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    from effpass.lowering.gpu.kernels import selective_scan as kernels

    given = dict(zip(_NAMES, arguments, strict=True))
    ready, f32 = _ready(given), torch.float32
    x, dt, A, B, C, D, z, bias = (ready[n] for n in selective_scan.tensor_names[:8])
    (batch, tokens, channels), count = x.shape, A.shape[1]
    split, unbroken = _split(given, channels)
    entering, starts = None, None
    if unbroken:
        leaving = grad_final_state.transpose(1, 2).float().contiguous()
    else:
        local, sums, adjoint = _states(split, given, ready, grad_y)
        final = x.new_empty((split.sequences, channels, count), dtype=f32)
        entering = torch.empty_like(final)
        starts = _carried(split, local, sums, A, given["initial_state"], final, False)
        leaving = _carried(split, adjoint, sums, A, grad_final_state, entering, True)
    slots = tokens // TILE + split.sequences if split.packed else batch * _blocks(tokens, TILE)
    edges = x.new_empty((slots, count, channels), dtype=f32)
    _walk(split, given, ready, starts, x, edges, edges)
    dx, ddt, dz = (torch.empty(v.shape, dtype=v.dtype, device=v.device) for v in (x, dt, z))
    dstart, dA = torch.empty_like(leaving), torch.empty_like(leaving)
    side = x.new_empty((2, split.count, channels), dtype=f32)
    blocks = _blocks(channels, WIDE)
    sums = x.new_empty((2, blocks, batch, tokens, count), dtype=f32)
    launch(
        kernels.backward,
        (split.count, blocks),
        *(x, dt, A, B, C, D, z, bias, grad_y, edges, leaving, dstart),
        *(dx, ddt, dz, dA, sums[0], sums[1], side[0], side[1], split.table),
        *(split.tokens, split.per_row, split.length, channels, count, batch * tokens),
        *(*x.stride(), *dt.stride(), *B.stride(), *C.stride(), *z.stride(), *grad_y.stride()),
        SKIP=given["D"] is not None,
        **_flags(given),
        PACKED=split.packed,
        BT=TILE,
        BN=_power(count),
        BL=min(4, _power(count)),
        BW=WIDE // NARROW,
        BD=WIDE,
        num_warps=WIDE // NARROW * min(8, max(1, _power(count) // 16)),
    )
    found = {"x": dx, "dt": ddt, "A": dA.sum(0).t(), "B": sums[0].sum(0), "C": sums[1].sum(0)}
    found |= {"z": dz, "initial_state": dstart.transpose(1, 2) if entering is None else entering}
    for name, summed in (("D", side[0]), ("dt_bias", side[1])):
        if given[name] is not None:
            found[name] = summed.sum(0)
    return gradients(selective_scan, grad_y, given, found)


@implements(selective_scan, target="gpu", backward=_backward, refuses=_refuses, asked_for=True)
def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """``effpass.ops.selective_scan`` of CUDA tensors, with the same arguments and results."""
    given = dict(zip(_NAMES, arguments, strict=True))
    ready, init = _ready(given), given["initial_state"]
    x, A = ready["x"], ready["A"]
    channels, count = A.shape
    if isinstance(x.shape[1], int) and x.shape[1] == 1 and given["cu_seqlens"] is None:
        return _update(given, ready)
    (split, unbroken), starts = _split(given, channels), None
    final = x.new_empty((split.sequences, channels, count), dtype=torch.float32)
    if not unbroken:
        local, sums, _ = _states(split, given, ready, None)
        starts = _carried(split, local, sums, A, init, final, False)
    y = x.new_empty(x.shape)
    _walk(split, given, ready, starts, y, final, None)
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
        tiled(batch, channels, "BD"),
        *(x, dt, A, B, C, D, z, bias, ready["initial_state"], y, final, channels, count),
        *strides,
        SKIP=given["D"] is not None,
        **_flags(given),
        INIT=given["initial_state"] is not None,
        BN=_power(count),
    )
    return y, final


traceable(selective_scan, forward, _backward)
