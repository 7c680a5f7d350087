"""One token at a time, as a decoder runs: each op as a few pointwise operations and a small sum.

These bodies are traced into the graph (``splice``), where the compiler fuses them with their
neighbours; a kernel call would cost more than the arithmetic. They answer only a length that is
statically 1.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from effpass.ops import causal_conv1d, implements, linear_recurrence, selective_scan, ssd_scan
from effpass.ops.op import accumulate_dtype
from effpass.ops.step_sizes import step_sizes


def _refuses(x: Tensor, *rest: Any) -> str | None:
    tokens = x.shape[1]
    if not isinstance(tokens, int) or tokens != 1:
        return f"needs a length that is always 1, found {tokens}"
    if rest[-1] is not None:
        return "does not take cu_seqlens"
    return None


def _finish(y: Tensor, skip: Tensor | None, z: Tensor | None, dtype: torch.dtype) -> Tensor:
    y = y if skip is None else y + skip
    y = y if z is None else y * silu(z.to(y.dtype))
    return y.to(dtype)


@implements(selective_scan, target="step", refuses=_refuses, splice=True)
def _selective_scan(
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
    acc = accumulate_dtype(x.dtype)
    xs, As, Bs, Cs = (v.to(acc) for v in (x[:, 0], A, B[:, 0], C[:, 0]))
    step = step_sizes(dt[:, 0], dt_bias, dt_softplus)
    state = (step * xs)[:, :, None] * Bs[:, None, :]
    if initial_state is not None:
        state = state + torch.exp(step[:, :, None] * As) * initial_state.to(acc)
    y = (state * Cs[:, None, :]).sum(-1)
    skip = None if D is None else D.to(acc) * xs
    y = _finish(y, skip, None if z is None else z[:, 0], x.dtype)
    return y[:, None], state


@implements(ssd_scan, target="step", refuses=_refuses, splice=True)
def _ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    acc, heads = accumulate_dtype(x.dtype), x.shape[2]
    xs, As = x[:, 0].to(acc), A.to(acc)
    # (b g n) -> (b h 1 n): each group serves a run of heads
    Bs, Cs = (v[:, 0].to(acc).repeat_interleave(heads // v.shape[2], 1)[:, :, None] for v in (B, C))
    step = torch.clamp(step_sizes(dt[:, 0], dt_bias, dt_softplus), dt_min, dt_max)
    state = (step[:, :, None] * xs)[..., None] * Bs
    if initial_state is not None:
        state = state + torch.exp(step * As)[:, :, None, None] * initial_state.to(acc)
    y = (state * Cs).sum(-1)
    skip = None if D is None else D.to(acc)[:, None] * xs
    y = _finish(y, skip, None if z is None else z[:, 0], x.dtype)
    return y[:, None], state


@implements(linear_recurrence, target="step", refuses=_refuses, splice=True)
def _linear_recurrence(
    a: Tensor, b: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> tuple[Tensor, Tensor]:
    acc = accumulate_dtype(a.dtype)
    state = b[:, 0].to(acc)
    if initial_state is not None:
        state = state + a[:, 0].to(acc) * initial_state.to(acc)
    else:
        state = state + 0 * a[:, 0].to(
            acc
        )  # a NaN in ``a`` reaches the state, as in the definition
    return state.to(a.dtype)[:, None], state.clone()


@implements(causal_conv1d, target="step", refuses=_refuses, splice=True)
def _causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, Tensor]:
    acc, width = accumulate_dtype(x.dtype), weight.shape[1]
    token = x[:, 0, :, None].to(acc)
    if initial_state is None:
        before = token.new_zeros(x.shape[0], x.shape[2], width - 1)
    else:
        before = initial_state.to(acc)
    window = torch.cat([before, token], 2)
    y = (window * weight.to(acc)).sum(-1)
    y = y if bias is None else y + bias.to(acc)
    y = silu(y) if activation == "silu" else y
    return y.to(x.dtype)[:, None], window[:, :, 1:].to(x.dtype).clone()
