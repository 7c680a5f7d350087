"""The selective scan of Mamba (Gu and Dao 2023, arXiv 2312.00752, eq. 2a and section 3.2).

    h[t] = exp(dt[t] A) h[t-1] + dt[t] B[t] x[t]        y[t] = (C[t] h[t] + D x[t]) silu(z[t])

``dt`` passes through ``+ dt_bias`` and softplus first when asked. A zero ``dt`` leaves the state as
it was: "this token is absent".
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import silu

from effpass.ops.op import accumulate_dtype, empty_gradient, op, sequences
from effpass.ops.step_sizes import step_sizes


def _states(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, start: Tensor) -> Iterator[Tensor]:
    """The state (b d n) after each token."""
    state = start
    for t in range(x.shape[1]):
        decay = torch.exp(dt[:, t, :, None] * A)
        state = decay * state + (dt[:, t] * x[:, t])[:, :, None] * B[:, t, None, :]
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
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, ...]:
    """The adjoint recurrence g[t] = C[t] dy[t] + exp(dt[t+1] A) g[t+1], run backwards in time."""
    acc = accumulate_dtype(x.dtype)
    xs, As, Bs, Cs, grad = (v.to(acc) for v in (x, A, B, C, grad_y))
    steps = step_sizes(dt, dt_bias, dt_softplus)
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
            g = g + grad[rows, at, :, None] * Cs[rows, at, None, :]
            decay = torch.exp(steps[rows, at, :, None] * As)
            gB = (g * Bs[rows, at, None, :]).sum(-1)
            dexp = g * decay * before[t]
            dC[rows, at] = (grad[rows, at, :, None] * after[t]).sum(1)
            dB[rows, at] = (g * (steps[rows, at] * xs[rows, at])[:, :, None]).sum(1)
            dx[rows, at] = steps[rows, at] * gB
            ddt[rows, at] = xs[rows, at] * gB + (dexp * As).sum(-1)
            dA += (dexp * steps[rows, at, :, None]).sum(0)
            g = g * decay
            if dz is not None:
                y = (after[t] * Cs[rows, at, None, :]).sum(-1)
                dz[rows, at] = y if D is None else y + D.to(acc) * xs[rows, at]
        dstart[which] = g
    if dz is not None and gate is not None:
        s = torch.sigmoid(gate)
        dz = dz * ungated * (s * (1 + gate * (1 - s)))
    if dt_softplus:
        raw = dt.to(acc) if dt_bias is None else dt.to(acc) + dt_bias
        ddt = ddt * torch.sigmoid(raw)
    dD = None if D is None else (grad * xs).sum((0, 1))
    if D is not None:
        dx = dx + grad * D.to(acc)
    grads = (dx, ddt, dA, dB, dC, dD, dz, ddt.sum((0, 1)), dstart, None)
    inputs = (x, dt, A, B, C, D, z, dt_bias, initial_state, cu_seqlens)
    return tuple(
        empty_gradient(grad_y) if i is None or g is None else g.to(i.dtype)
        for g, i in zip(grads, inputs, strict=True)
    )


@op(
    axes="x: b t d; dt: b t d; A: d n; B: b t n; C: b t n; D: d; z: b t d; dt_bias: d; "
    "initial_state: s d n -> y: b t d; final_state: s d n",
    backward=_backward,
)
def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Mamba's selective scan, channel-last.

    Args: ``x``, ``dt``, ``z`` (b, t, d); ``A`` (d, n), negative in a stable model; ``B``, ``C``
    (b, t, n); ``D``, ``dt_bias`` (d); ``initial_state`` (b, d, n). With ``cu_seqlens`` int32
    (S + 1,), b is 1 and states are (S, d, n): no state crosses a boundary.

    Returns ``y`` (b, t, d) in x's dtype and ``final_state`` (b or S, d, n), at least float32. The
    arithmetic is at least float32. Raises ValueError on shapes, devices or offsets that disagree.
    """
    acc = accumulate_dtype(x.dtype)
    xs, As, Bs, Cs = (v.to(acc) for v in (x, A, B, C))
    steps = step_sizes(dt, dt_bias, dt_softplus)
    runs = sequences(cu_seqlens, *x.shape[:2])
    count = x.shape[0] if cu_seqlens is None else len(runs)
    starts = xs.new_zeros(count, *A.shape) if initial_state is None else initial_state.to(acc)
    y, final = xs.new_zeros(x.shape), torch.empty_like(starts)
    for i, (rows, span) in enumerate(runs):
        which = rows if cu_seqlens is None else slice(i, i + 1)
        state = starts[which]
        states = _states(xs[rows, span], steps[rows, span], As, Bs[rows, span], state)
        for t, state in enumerate(states, span.start):
            y[rows, t] = (state * Cs[rows, t, None, :]).sum(-1)
        final[which] = state
    y = y if D is None else y + D.to(acc) * xs
    y = y if z is None else y * silu(z.to(acc))
    return y.to(x.dtype), final
