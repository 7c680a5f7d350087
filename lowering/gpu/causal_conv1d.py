"""The causal convolution on GPUs.

Every dtype of float32, bfloat16 and float16 may be mixed; arithmetic is float32. x and its gradient
are read where they lie, channel-last or channel-first; sums over tokens (weight, bias) are added in
a fixed order, so results repeat bit by bit. One token without ``cu_seqlens`` is one launch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from effpass.lowering.gpu.chunks import chunks
from effpass.lowering.gpu.launch import gradients, launch, refusal, tiled, traceable
from effpass.ops.causal_conv1d import causal_conv1d
from effpass.ops.op import implements

WIDEST = 16
_NAMES = tuple(causal_conv1d.signature.parameters)


def _refuses(*arguments: Any) -> str | None:
    given = dict(zip(_NAMES, arguments, strict=True))
    width = given["weight"].shape[1]
    if width > WIDEST:
        return f"weight has {width} taps; needs at most {WIDEST}"
    if given["x"].shape[2] == 0:
        return "x has no channels; needs at least 1"
    return refusal(given)


def _blocks(channels: int) -> int:
    return (channels + 63) // 64


def _power(number: int) -> int:
    return 1 << max(number - 1, 0).bit_length()


def _backward(grad_y: Tensor, grad_final_state: Tensor, *arguments: Any) -> tuple[Tensor, ...]:
    from effpass.lowering.gpu.kernels import causal_conv1d as kernels

    given = dict(zip(_NAMES, arguments, strict=True))
    x, cu_seqlens = given["x"], given["cu_seqlens"]
    weight, bias, init, flags = _ready(given)
    channels, width = weight.shape
    split = chunks(x, cu_seqlens, 128)
    offsets = weight if cu_seqlens is None else cu_seqlens.contiguous()
    dx, f32 = x.new_empty(x.shape), torch.float32
    dweight = x.new_empty((split.count, channels, width), dtype=f32)
    dbias = x.new_empty((split.count, channels) if flags["BIAS"] else (0,), dtype=f32)
    final = grad_final_state.contiguous()
    if flags.pop("SILU"):
        grad_y = _before(given, weight, bias, init, flags, grad_y)
    launch(
        kernels.backward,
        tiled(split.count, channels, "BC"),
        *(x, weight, init, grad_y, final, dx, dweight, dbias, split.table, offsets),
        *(split.tokens, split.per_row, channels, *x.stride(), *grad_y.stride()),
        **flags,
        W=width,
        LENGTH=split.length,
        BT=32,
        BW=_power(width),
    )
    found = {"x": dx, "weight": dweight.sum(0)}
    if flags["BIAS"]:
        found["bias"] = dbias.sum(0)
    if flags["INIT"]:
        found["initial_state"] = x.new_empty(init.shape, dtype=f32)
        launch(
            kernels.backward_init,
            (split.sequences if width > 1 else 0, _blocks(channels)),
            *(weight, grad_y, final, found["initial_state"], offsets),
            *(split.tokens, channels, *grad_y.stride()),
            PACKED=flags["PACKED"],
            W=width,
            BW=_power(width),
            BC=64,
        )
    return gradients(causal_conv1d, grad_y, given, found)


def _before(
    given: dict[str, Any],
    weight: Tensor,
    bias: Tensor,
    init: Tensor,
    flags: dict[str, bool],
    grad: Tensor,
) -> Tensor:
    """The gradient before the SiLU (b, t, c), float32."""
    from effpass.lowering.gpu.kernels import causal_conv1d as kernels

    x = given["x"]
    split, (channels, width) = chunks(x, given["cu_seqlens"], 32), weight.shape
    made = x.new_empty(x.shape, dtype=torch.float32)
    launch(
        kernels.gradient_before,
        tiled(split.count, channels, "BC"),
        *(x, weight, bias, init, grad, made, split.table),
        *(split.tokens, split.per_row, channels, *x.stride(), *grad.stride()),
        **flags,
        W=width,
        BT=32,
    )
    return made


def _ready(given: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor, dict[str, bool]]:
    """Weight, bias and initial state as the kernels read them, and which of them there are."""
    weight, bias, init = (given[n] for n in ("weight", "bias", "initial_state"))
    weight = weight.contiguous()
    flags = {
        "INIT": init is not None,
        "BIAS": bias is not None,
        "SILU": given["activation"] == "silu",
        "PACKED": given["cu_seqlens"] is not None,
    }
    bias = weight if bias is None else bias.contiguous()
    return weight, bias, weight if init is None else init.contiguous(), flags


@implements(causal_conv1d, target="gpu", backward=_backward, refuses=_refuses, asked_for=True)
def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """``effpass.ops.causal_conv1d`` of CUDA tensors, with the same arguments and results."""
    from effpass.lowering.gpu.kernels import causal_conv1d as kernels

    arguments = (x, weight, bias, activation, initial_state, cu_seqlens)
    weight, bias, init, flags = _ready(dict(zip(_NAMES, arguments, strict=True)))
    channels, width = weight.shape
    if isinstance(x.shape[1], int) and x.shape[1] == 1 and cu_seqlens is None:
        return _update(x, weight, bias, init, flags)
    split = chunks(x, cu_seqlens, 32)
    y = x.new_empty(x.shape)
    final = x.new_empty((split.sequences, channels, width - 1))
    launch(
        kernels.forward,
        tiled(split.count, channels, "BC"),
        *(x, weight, bias, init, y, split.table, split.tokens, split.per_row, channels),
        *x.stride(),
        **flags,
        W=width,
        BT=32,
    )
    launch(
        kernels.final_state,
        (split.sequences if width > 1 else 0, _blocks(channels)),
        *(x, init, final, weight if cu_seqlens is None else cu_seqlens.contiguous()),
        *(split.tokens, channels, *x.stride()),
        W=width,
        INIT=flags["INIT"],
        PACKED=flags["PACKED"],
        BW=_power(width - 1),
        BC=64,
    )
    return y, final


def _update(
    x: Tensor, weight: Tensor, bias: Tensor, init: Tensor, flags: dict[str, bool]
) -> tuple[Tensor, Tensor]:
    """One token a row, as a decoder runs."""
    from effpass.lowering.gpu.kernels import causal_conv1d as kernels

    (batch, _, channels), width = x.shape, weight.shape[1]
    y, final = x.new_empty(x.shape), x.new_empty((batch, channels, width - 1))
    launch(
        kernels.update,
        tiled(batch, channels, "BC"),
        *(x, weight, bias, init, y, final, channels, x.stride(0), x.stride(2)),
        **{name: flags[name] for name in ("INIT", "BIAS", "SILU")},
        W=width,
        BW=_power(width),
    )
    return y, final


traceable(causal_conv1d, forward, _backward)
