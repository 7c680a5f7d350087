"""The short causal depthwise convolution in front of every Mamba-like mixer.

    y[t, c] = act(bias[c] + sum_j weight[c, w-1-j] x[t-j, c]),  j = 0 .. w-1

Tokens before the first are the ``initial_state``, or zero. (Dao, ``causal-conv1d``; Gu and Dao
2023, arXiv 2312.00752, section 3.4.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from effpass.axes.relation import Kind
from effpass.ops.op import SCAN, accumulate_dtype, empty_gradient, op, sequences

ACTIVATIONS = (None, "silu")


def _window(x: Tensor, start: Tensor) -> Tensor:
    """``x`` (b, t, c) behind its state (b, c, w-1)."""
    return torch.cat([start.transpose(1, 2), x], 1)


def _convolve(window: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    width = weight.shape[1]
    tokens = window.shape[1] - width + 1
    y = sum(window[:, j : j + tokens] * weight[:, j] for j in range(width))
    assert isinstance(y, Tensor)
    return y if bias is None else y + bias


def _starts(x: Tensor, weight: Tensor, initial: Tensor | None, count: int) -> Tensor:
    shape = (count, x.shape[2], weight.shape[1] - 1)
    return x.new_zeros(shape) if initial is None else initial.to(x.dtype)


def _backward(
    grad_y: Tensor,
    grad_final_state: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, ...]:
    """The transposed convolution for x and its state, a correlation for the weight."""
    acc, width = accumulate_dtype(x.dtype), weight.shape[1]
    xs, ws = x.to(acc), weight.to(acc)
    grad = grad_y.to(acc)
    dx, dw = torch.zeros_like(xs), torch.zeros_like(ws)
    db = None if bias is None else torch.zeros_like(bias, dtype=acc)
    starts = _starts(xs, ws, initial_state, grad_final_state.shape[0])
    dstart = torch.zeros_like(starts)
    for i, (rows, span) in enumerate(sequences(cu_seqlens, *x.shape[:2])):
        which = rows if cu_seqlens is None else slice(i, i + 1)
        window = _window(xs[rows, span], starts[which])
        dy = grad[rows, span]
        if activation == "silu":
            pre = _convolve(window, ws, bias)
            s = torch.sigmoid(pre)
            dy = dy * (s * (1 + pre * (1 - s)))
        tokens = dy.shape[1]
        dwindow = torch.zeros_like(window)
        for j in range(width):
            dwindow[:, j : j + tokens] += dy * ws[:, j]
            dw[:, j] += (dy * window[:, j : j + tokens]).sum((0, 1))
        dwindow[:, tokens:] += grad_final_state[which].to(acc).transpose(1, 2)
        if db is not None:
            db += dy.sum((0, 1))
        dx[rows, span] = dwindow[:, width - 1 :]
        dstart[which] = dwindow[:, : width - 1].transpose(1, 2)
    grads = (dx, dw, db, dstart, None)
    return tuple(
        empty_gradient(grad_y) if i is None or g is None else g.to(i.dtype)
        for g, i in zip(grads, (x, weight, bias, initial_state, cu_seqlens), strict=True)
    )


def _check(*, sizes: dict[str, Any], activation: str | None, **_: Any) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"causal_conv1d: expected activation to be None or 'silu', found {activation!r}"
        )
    if sizes["w"] < 1:
        raise ValueError("causal_conv1d: expected weight (c, w) with w >= 1, found w = 0")


@op(
    axes="x: b t c; weight: c w; bias: c; initial_state: s c w-1 -> y: b t c; final_state: s c w-1",
    backward=_backward,
    state_dtype=lambda dtype: dtype,
    check=_check,
    kinds={**SCAN, "w": Kind.BOUND, "w-1": Kind.BOUND},
)
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal depthwise convolution along dim 1, channel-last.

    Args: ``x`` (b, t, c); ``weight`` (c, w); ``bias`` (c); ``activation`` None or ``"silu"``;
    ``initial_state`` (b, c, w-1), the tokens before the first, oldest first. With ``cu_seqlens``
    int32 (S + 1,), b is 1 and states are (S, c, w-1): no window reaches across a boundary.

    Returns ``y`` (b, t, c) and ``final_state``, the last w-1 tokens (with those of the initial
    state where there are fewer), both in x's dtype. Raises ValueError on shapes, devices, offsets
    or an unknown activation.
    """
    acc = accumulate_dtype(x.dtype)
    xs, ws = x.to(acc), weight.to(acc)
    runs = sequences(cu_seqlens, *x.shape[:2])
    starts = _starts(xs, ws, initial_state, x.shape[0] if cu_seqlens is None else len(runs))
    y, final = xs.new_zeros(x.shape), torch.empty_like(starts)
    for i, (rows, span) in enumerate(runs):
        which = rows if cu_seqlens is None else slice(i, i + 1)
        window = _window(xs[rows, span], starts[which])
        final[which] = window[:, window.shape[1] - weight.shape[1] + 1 :].transpose(1, 2)
        y[rows, span] = _convolve(window, ws, bias if bias is None else bias.to(acc))
    y = silu(y) if activation == "silu" else y
    return y.to(x.dtype), final.to(x.dtype)
