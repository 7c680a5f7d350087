"""The state-space dual scan of Mamba-2 (Dao and Gu 2024, arXiv 2405.21060, section 2, listing 1).

    dt'[t]  = clamp(softplus(dt[t] + dt_bias), dt_min, dt_max)
    h[t]    = exp(dt'[t] A) h[t-1] + dt'[t] x[t] B[t]^T            (one scalar decay a head)
    y[t]    = (h[t] C[t] + D x[t]) silu(z[t])

Heads share ``B`` and ``C`` in groups: head ``i`` of ``h`` reads group ``i // (h // g)``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from effpass.axes.relation import Kind
from effpass.ops.op import SCAN, accumulate_dtype, empty_gradient, op, sequences
from effpass.ops.step_sizes import step_sizes


def _heads(grouped: Tensor, heads: int) -> Tensor:
    return grouped.repeat_interleave(heads // grouped.shape[2], dim=2)


def _states(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, start: Tensor) -> Iterator[Tensor]:
    """The state (b h p n) after each token."""
    state = start
    for t in range(x.shape[1]):
        update = (dt[:, t, :, None] * x[:, t])[..., None] * B[:, t, :, None, :]
        state = torch.exp(dt[:, t] * A)[..., None, None] * state + update
        yield state


def _backward(
    grad_y: Tensor,
    grad_final_state: Tensor,
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
) -> tuple[Tensor, ...]:
    """The adjoint recurrence g[t] = dy[t] C[t]^T + exp(dt[t+1] A) g[t+1], run backwards in time."""
    acc, heads, groups = accumulate_dtype(x.dtype), x.shape[2], B.shape[2]
    xs, As, grad = x.to(acc), A.to(acc), grad_y.to(acc)
    Bs, Cs = (_heads(v.to(acc), heads) for v in (B, C))
    raw = step_sizes(dt, dt_bias, dt_softplus)
    steps = torch.clamp(raw, dt_min, dt_max)
    dx, ddt, dB, dC = (torch.zeros_like(v) for v in (xs, steps, Bs, Cs))
    dA = torch.zeros_like(As)
    ungated, gate = grad, None if z is None else z.to(acc)
    dz = None if gate is None else torch.zeros_like(gate)
    grad = grad if gate is None else grad * silu(gate)
    starts = grad_final_state.new_zeros(grad_final_state.shape)
    starts = starts if initial_state is None else initial_state.to(acc)
    dstart = torch.zeros_like(starts)
    for i, (rows, span) in enumerate(sequences(cu_seqlens, *x.shape[:2])):
        which = rows if cu_seqlens is None else slice(i, i + 1)
        start = starts[which]
        after = list(_states(xs[rows, span], steps[rows, span], As, Bs[rows, span], start))
        before = [start, *after[:-1]]
        g = grad_final_state[which].to(acc)
        for t in reversed(range(len(after))):
            at = span.start + t
            step, dy = steps[rows, at], grad[rows, at]
            g = g + dy[..., None] * Cs[rows, at, :, None, :]
            decay = torch.exp(step * As)
            gB = (g * Bs[rows, at, :, None, :]).sum(-1)
            dexp = (g * before[t]).sum((-1, -2)) * decay
            dC[rows, at] = (dy[..., None] * after[t]).sum(-2)
            dB[rows, at] = (g * (step[..., None] * xs[rows, at])[..., None]).sum(-2)
            dx[rows, at] = step[..., None] * gB
            ddt[rows, at] = (xs[rows, at] * gB).sum(-1) + dexp * As
            dA += (dexp * step).sum(0)
            g = g * decay[..., None, None]
            if dz is not None:
                y = (after[t] * Cs[rows, at, :, None, :]).sum(-1)
                dz[rows, at] = y if D is None else y + D.to(acc)[:, None] * xs[rows, at]
        dstart[which] = g
    if dz is not None and gate is not None:
        s = torch.sigmoid(gate)
        dz = dz * ungated * (s * (1 + gate * (1 - s)))
    inside = (raw >= dt_min) if dt_max is None else (raw >= dt_min) & (raw <= dt_max)
    ddt = ddt * inside
    if dt_softplus:
        ddt = ddt * torch.sigmoid(dt.to(acc) if dt_bias is None else dt.to(acc) + dt_bias)
    dD = None if D is None else (grad * xs).sum((0, 1, 3))
    if D is not None:
        dx = dx + grad * D.to(acc)[:, None]
    dB, dC = (v.unflatten(2, (groups, -1)).sum(3) for v in (dB, dC))
    grads = (dx, ddt, dA, dB, dC, dD, dz, ddt.sum((0, 1)), dstart, None)
    inputs = (x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens)
    return tuple(
        empty_gradient(grad_y) if i is None or g is None else g.to(i.dtype)
        for g, i in zip(grads, inputs, strict=True)
    )


def _check(*, sizes: dict[str, Any], dt_min: float, dt_max: float | None, **_: Any) -> None:
    if sizes["h"] % sizes["g"]:
        raise ValueError(
            f"ssd_scan: expected the {sizes['h']} heads of x to be a multiple of the "
            f"{sizes['g']} groups of B and C"
        )
    if dt_max is not None and dt_max < dt_min:
        raise ValueError(f"ssd_scan: expected dt_max >= dt_min, found {dt_max} < {dt_min}")


@op(
    axes="x: b t h p; dt: b t h; A: h; B: b t g n; C: b t g n; D: h; z: b t h p; dt_bias: h; "
    "initial_state: s h p n -> y: b t h p; final_state: s h p n",
    backward=_backward,
    check=_check,
    kinds={**SCAN, "h": Kind.BOUND, "g": Kind.BOUND},  # heads belong to groups
)
def ssd_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_min: float = 0.0,
    dt_max: float | None = None,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mamba-2's scan, channel-last.

    Args: ``x``, ``z`` (b, t, h, p); ``dt`` (b, t, h); ``A``, ``D``, ``dt_bias`` (h); ``B``, ``C``
    (b, t, g, n), h a multiple of g; ``initial_state`` (b, h, p, n). ``dt_min`` and ``dt_max`` clamp
    dt after softplus (None: no upper limit). With ``cu_seqlens`` int32 (S + 1,), b is 1 and states
    are (S, h, p, n).

    Returns ``y`` (b, t, h, p) in x's dtype and ``final_state``, at least float32. Raises ValueError
    on shapes, devices, offsets or limits that disagree.
    """
    acc, heads = accumulate_dtype(x.dtype), x.shape[2]
    xs, As = x.to(acc), A.to(acc)
    Bs, Cs = (_heads(v.to(acc), heads) for v in (B, C))
    steps = torch.clamp(step_sizes(dt, dt_bias, dt_softplus), dt_min, dt_max)
    runs = sequences(cu_seqlens, *x.shape[:2])
    count = x.shape[0] if cu_seqlens is None else len(runs)
    shape = (count, heads, x.shape[3], B.shape[3])
    starts = xs.new_zeros(shape) if initial_state is None else initial_state.to(acc)
    y, final = xs.new_zeros(x.shape), torch.empty_like(starts)
    for i, (rows, span) in enumerate(runs):
        which = rows if cu_seqlens is None else slice(i, i + 1)
        state = starts[which]
        states = _states(xs[rows, span], steps[rows, span], As, Bs[rows, span], state)
        for t, state in enumerate(states, span.start):
            y[rows, t] = (state * Cs[rows, t, :, None, :]).sum(-1)
        final[which] = state
    y = y if D is None else y + D.to(acc)[:, None] * xs
    y = y if z is None else y * silu(z.to(acc))
    return y.to(x.dtype), final
