"""How adapters call the ops: the few spellings that several libraries share.

Everything here is traced by Dynamo, so the ops are called as registered (one graph node each) and
no branch depends on a tensor's values.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

import effpass.ops
import effpass.ops.packed_row  # noqa: F401


def is_silu(activation: str | None) -> bool:
    """Whether causal_conv1d can apply this activation: none, or SiLU under either name."""
    return activation is None or activation in ("silu", "swish")


def limits(dt_limit: tuple[float, float]) -> tuple[float, float | None]:
    """``(dt_min, dt_max)`` as ssd_scan takes them: None, or a finite number (not ``-inf``)."""
    low, high = dt_limit  # -inf has no literal in generated code
    return (low if low > -1e38 else -1e38), (None if high == math.inf else high)


def tied(dt: Tensor, A: Tensor, D: Tensor | None, dt_bias: Tensor | None) -> bool:
    """Whether every channel of a head provably reads the same number: an expand, not a copy."""
    given = [v for v in (dt, D, dt_bias) if v is not None]
    alike = all(v.shape[-1] == 1 or v.stride(-1) == 0 for v in given)
    return alike and all(A.shape[dim] == 1 or A.stride(dim) == 0 for dim in (-1, -2))


def _flip(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.transpose(1, 2)


def scan_tokens_last(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """selective_scan on ``x``, ``dt``, ``z`` (b, d, t), ``B``, ``C`` (b, n, t): y (b, d, t)."""
    y, state = torch.ops.effpass.selective_scan.default(
        *(x.transpose(1, 2), dt.transpose(1, 2), A, B.transpose(1, 2), C.transpose(1, 2)),
        *(D, _flip(z), dt_bias, dt_softplus, None, None),
    )
    return y.transpose(1, 2), state


def _token(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor[:, None]


def scan_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
) -> Tensor:
    """One token of selective_scan: y (b, d); ``state`` (b, d, n) is written in place."""
    y, after = torch.ops.effpass.selective_scan.default(
        *(x[:, None], dt[:, None], A, B[:, None], C[:, None]),
        *(D, _token(z), dt_bias, dt_softplus, state, None),
    )
    state.copy_(after)
    return y[:, 0]


def ssd_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
) -> Tensor:
    """One token of ssd_scan, from ``tied`` arguments; writes ``state`` (b, h, p, n) in place."""
    D, dt_bias = (None if v is None else v[:, 0] for v in (D, dt_bias))
    low, high = limits((-math.inf, math.inf))
    y, after = torch.ops.effpass.ssd_scan.default(
        *(x[:, None], dt[:, None, :, 0], A[:, 0, 0], B[:, None], C[:, None]),
        *(D, _token(z), dt_bias, dt_softplus, low, high, state, None),
    )
    state.copy_(after)
    return y[:, 0]


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, start: Tensor | None
) -> tuple[Tensor, Tensor]:
    """causal_conv1d on ``x`` (b, c, t), ``start`` (b, c, w-1): y (b, c, t), the state after."""
    y, state = torch.ops.effpass.causal_conv1d.default(
        x.transpose(1, 2), weight, bias, None if activation is None else "silu", start, None
    )
    return y.transpose(1, 2), state


def conv_step(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None
) -> Tensor:
    """A convolution that goes on from ``conv_state`` (b, c, >= w-1), which is written in place."""
    kept = conv_state.shape[-1]
    start = conv_state[..., kept - weight.shape[-1] + 1 :]
    y, _ = convolve(x, weight, bias, activation, start)
    window = torch.cat([conv_state, x], -1).to(weight.dtype)
    conv_state.copy_(window[..., window.shape[-1] - kept :])
    return y
