"""Mamba-2's scan on GPUs: matrix products inside chunks, a carried state between them.

Storage of every tensor may be float32, bfloat16 or float16 with any strides. Steps, decays, sums
and states are float32. Where x, B and C share a narrow dtype, operands of the products are rounded
to it, as mamba_ssm does; otherwise products are float32 in full (no TF32), which is slow. Sums are
added in a fixed order. One token without ``cu_seqlens`` is one launch of its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from effpass.lowering.gpu.chunks import Chunks, chunks
from effpass.lowering.gpu.launch import gradients, launch, refusal, tiled, traceable
from effpass.ops.op import implements
from effpass.ops.ssd_scan import ssd_scan

CHUNK = 64  # half of it in float32, whose products take registers
WIDEST, MOST_STATES = 128, 256
_NAMES = tuple(ssd_scan.signature.parameters)


def _refuses(*arguments: Any) -> str | None:
    given = dict(zip(_NAMES, arguments, strict=True))
    heads, width = given["x"].shape[2:]
    count = given["B"].shape[3]
    if heads == 0:
        return "x has no heads; needs at least 1"
    if width == 0 or width > WIDEST:
        return f"x has heads of {width} channels; needs 1 to {WIDEST}"
    if count == 0 or count > MOST_STATES:
        return f"B has {count} states; needs 1 to {MOST_STATES}"
    return refusal(given)


def _power(number: int, least: int = 16) -> int:
    return max(least, 1 << max(number - 1, 0).bit_length())


@dataclass(frozen=True)
class _Call:
    """One call: tensors by name as the kernels read them, sizes, and what holds of all kernels."""

    given: dict[str, Any]
    ready: dict[str, Tensor]
    split: Chunks
    heads: int
    groups: int
    width: int
    count: int

    @property
    def sizes(self) -> tuple[int, ...]:
        return (
            self.split.tokens,
            self.split.per_row,
            self.heads,
            self.groups,
            self.width,
            self.count,
        )

    @property
    def state_shape(self) -> tuple[int, ...]:
        return (self.split.sequences, self.heads, self.width, self.count)

    def meta(self, *names: str) -> dict[str, Any]:
        """The named compile-time arguments."""
        given = self.given
        half = {given[n].dtype for n in ("x", "B", "C")}
        every = {
            "SKIP": given["D"] is not None,
            "GATE": given["z"] is not None,
            "BIAS": given["dt_bias"] is not None,
            "SOFTPLUS": given["dt_softplus"],
            "LIMIT": given["dt_max"] is not None,
            "HALF": len(half) == 1 and torch.float32 not in half,
            "PACKED": self.split.packed,
            "LENGTH": self.split.length,
            "BP": _power(self.width),
            "BN": min(64, _power(self.count)),
        }
        return {name: every[name] for name in names}

    def empty(self, *shape: int) -> Tensor:
        """Room for float32 numbers."""
        return self.ready["x"].new_empty(shape, dtype=torch.float32)

    @property
    def limits(self) -> tuple[float, float]:
        high = self.given["dt_max"]
        return self.given["dt_min"], 0.0 if high is None else high


def _call(arguments: tuple[Any, ...]) -> _Call:
    given = dict(zip(_NAMES, arguments, strict=True))
    plain = ("A", "D", "dt_bias", "initial_state")
    x = given["x"]
    ready = {
        n: x if given[n] is None else given[n].contiguous() if n in plain else given[n]
        for n in ssd_scan.tensor_names
    }
    narrow = x.dtype != torch.float32 and x.dtype == given["B"].dtype == given["C"].dtype
    split = chunks(x, given["cu_seqlens"], CHUNK if narrow else CHUNK // 2)
    groups, count = given["B"].shape[2:]
    return _Call(given, ready, split, x.shape[2], groups, x.shape[3], count)


def _steps(call: _Call) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Steps, their sums, decays of whole chunks, and C[i].B[j]: what every kernel after reads."""
    from effpass.lowering.gpu.kernels import ssd_scan as kernels

    ready, split = call.ready, call.split
    length, dt, B, C = split.length, ready["dt"], ready["B"], ready["C"]
    step = call.empty(split.count, call.heads, length)
    sums = call.empty(split.count, call.heads, 2, length)
    decay = call.empty(split.count, call.heads)
    launch(
        kernels.steps,
        (split.count, call.heads),
        *(dt, ready["A"], ready["dt_bias"], step, sums, decay, split.table),
        *(split.tokens, split.per_row, call.heads, *call.limits, *dt.stride()),
        **call.meta("BIAS", "SOFTPLUS", "LIMIT", "PACKED", "LENGTH"),
        num_warps=1,
    )
    cb = call.empty(split.count, call.groups, length, length)
    launch(
        kernels.products,
        (split.count, call.groups),
        *(B, C, cb, split.table, split.tokens, split.per_row, call.groups, call.count),
        *(*B.stride(), *C.stride()),
        **call.meta("HALF", "PACKED", "LENGTH", "BN"),
    )
    return step, sums, decay, cb


def _states(call: _Call, x: Tensor, B: Tensor, step: Tensor, sums: Tensor, adjoint: bool) -> Tensor:
    """What leaves each chunk from nothing, or the gradient of what enters it."""
    from effpass.lowering.gpu.kernels import ssd_scan as kernels

    split, meta = call.split, call.meta("HALF", "PACKED", "LENGTH", "BP", "BN")
    meta["BP"] = min(64, meta["BP"])
    local = call.empty(split.count, call.heads, call.width, call.count)
    blocks = -(-call.width // meta["BP"]) * -(-call.count // meta["BN"])
    launch(
        kernels.states,
        (split.count, call.heads, blocks),
        *(x, B, step, sums, local, split.table, *call.sizes, *x.stride(), *B.stride()),
        ADJOINT=adjoint,
        **meta,
    )
    return local


def _carried(
    call: _Call, local: Tensor, decay: Tensor, init: Tensor | None, ends: Tensor, reverse: bool
) -> Tensor:
    """What enters each chunk (chunks, h, p, n); ``ends`` becomes what leaves the last."""
    from effpass.lowering.gpu.kernels.carry import carry

    starts, inner = torch.empty_like(local), call.width * call.count
    elements = call.heads * inner
    launch(
        carry,
        tiled(call.split.sequences, elements, "BE"),
        *(local, decay, local, ends if init is None else init.contiguous(), ends, starts),
        *(call.split.first, call.split.per_row, elements, inner, 1),
        REVERSE=reverse,
        INIT=init is not None,
        PACKED=call.split.packed,
        DECAY="head",
        BC=16,
    )
    return starts


def _outputs(
    call: _Call, step: Tensor, sums: Tensor, cb: Tensor, starts: Tensor, y: Tensor, gate: bool
) -> None:
    """Writes y; without the gate where ``gate`` is False."""
    from effpass.lowering.gpu.kernels import ssd_scan as kernels

    x, C, D, z = (call.ready[n] for n in ("x", "C", "D", "z"))
    meta = call.meta("SKIP", "GATE", "HALF", "PACKED", "LENGTH", "BP", "BN")
    meta |= {"BP": min(64, meta["BP"]), "GATE": meta["GATE"] and gate}
    launch(
        kernels.outputs,
        (call.split.count, call.heads, -(-call.width // meta["BP"])),
        *(x, C, D, z, cb, step, sums, starts, y, call.split.table, *call.sizes),
        *(*x.stride(), *C.stride(), *z.stride()),
        **meta,
    )


def _backward(grad_y: Tensor, grad_final_state: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    call = _call(arguments)
    given, ready = call.given, call.ready
    x, C = ready["x"], ready["C"]
    step, sums, decay, cb = _steps(call)
    local = _states(call, x, ready["B"], step, sums, False)
    final, dstart = call.empty(*call.state_shape), call.empty(*call.state_shape)
    starts = _carried(call, local, decay, given["initial_state"], final, False)
    found: dict[str, Tensor] = {"initial_state": dstart}
    if given["z"] is not None:
        y = call.empty(*x.shape)
        _outputs(call, step, sums, cb, starts, y, False)
        gate, grad = given["z"].float(), grad_y.float()
        s = torch.sigmoid(gate)
        found["z"] = grad * y * (s * (1 + gate * (1 - s)))
        grad_y = grad * gate * s
    local = _states(call, grad_y, C, step, sums, True)
    leaving = _carried(call, local, decay, grad_final_state, dstart, True)
    found |= _inner(call, grad_y, step, sums, cb, starts, leaving)
    side = found.pop("side").sum(1)
    for name, each in zip(("A", "D", "dt_bias"), side, strict=True):
        if given[name] is not None:
            found[name] = each
    return gradients(ssd_scan, x, given, found)


def _inner(
    call: _Call,
    dy: Tensor,
    step: Tensor,
    sums: Tensor,
    cb: Tensor,
    starts: Tensor,
    leaving: Tensor,
) -> dict[str, Tensor]:
    """Gradients inside chunks by name; "side" is those of A, D and dt_bias by chunk."""
    from effpass.lowering.gpu.kernels import ssd_scan as kernels

    ready, split = call.ready, call.split
    x, dt, A, B, C, D, bias = (ready[n] for n in ("x", "dt", "A", "B", "C", "D", "dt_bias"))
    dx, ddt, dB, dC = (torch.empty(v.shape, dtype=v.dtype, device=v.device) for v in (x, dt, B, C))
    side = call.empty(3, split.count, call.heads)
    strides = (*B.stride(), *C.stride(), *dy.stride())
    tiles = call.meta("HALF", "PACKED", "LENGTH", "BP", "BN")
    launch(
        kernels.backward_x,
        (split.count, call.heads),
        *(x, dt, A, B, C, D, bias, dy, cb, step, sums, starts, leaving, dx, ddt),
        *(side[0], side[1], side[2], split.table, *call.sizes, *call.limits),
        *(*x.stride(), *dt.stride(), *strides),
        **call.meta("SKIP", "BIAS", "SOFTPLUS", "LIMIT"),
        **tiles,
    )
    launch(
        kernels.backward_bc,
        (split.count, call.groups, -(-call.count // tiles["BN"])),
        *(x, B, C, dy, step, sums, starts, leaving, dB, dC, split.table, *call.sizes),
        *(*x.stride(), *strides),
        **tiles,
    )
    return {"x": dx, "dt": ddt, "B": dB, "C": dC, "side": side}


@implements(ssd_scan, target="gpu", backward=_backward, refuses=_refuses, asked_for=True)
def forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """``effpass.ops.ssd_scan`` of CUDA tensors; y contiguous in x's dtype, final_state float32."""
    call = _call(arguments)
    x = call.ready["x"]
    if isinstance(x.shape[1], int) and x.shape[1] == 1 and call.given["cu_seqlens"] is None:
        return _update(call)
    step, sums, decay, cb = _steps(call)
    local = _states(call, x, call.ready["B"], step, sums, False)
    y, final = x.new_empty(x.shape), call.empty(*call.state_shape)
    starts = _carried(call, local, decay, call.given["initial_state"], final, False)
    _outputs(call, step, sums, cb, starts, y, True)
    return y, final


def _update(call: _Call) -> tuple[Tensor, Tensor]:
    """One token a row, as a decoder runs."""
    from effpass.lowering.gpu.kernels import ssd_scan as kernels

    names = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state")
    x, dt, A, B, C, D, z, bias, init = (call.ready[n] for n in names)
    y, final = x.new_empty(x.shape), call.empty(*call.state_shape)
    strides = [s for v in (x, dt, B, C, z) for s in (v.stride(0), *v.stride()[2:])]
    launch(
        kernels.update,
        tiled(x.shape[0], call.width, "BP", call.heads),
        *(x, dt, A, B, C, D, z, bias, init, y, final, *call.sizes[2:], *call.limits),
        *strides,
        **call.meta("SKIP", "GATE", "BIAS", "SOFTPLUS", "LIMIT"),
        INIT=call.given["initial_state"] is not None,
        BN=_power(call.count),
    )
    return y, final


traceable(ssd_scan, forward, _backward)
