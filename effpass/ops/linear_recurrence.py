"""A first-order linear recurrence, h[t] = a[t] h[t-1] + b[t], elementwise over channels.

The common core of RG-LRU (De et al. 2024, arXiv 2402.19427, eq. 4), minGRU (Feng et al. 2024, arXiv
2410.01201) and constant-decay blocks. A zero ``a`` starts a new sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor

from effpass.ops.op import accumulate_dtype, empty_gradient, op, sequences


def _backward(
    grad_h: Tensor,
    grad_final_state: Tensor,
    a: Tensor,
    b: Tensor,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> tuple[Tensor, ...]:
    """The same recurrence backwards: g[t] = dh[t] + a[t+1] g[t+1]; da[t] = g[t] h[t-1]."""
    acc = accumulate_dtype(a.dtype)
    decay, grad = a.to(acc), grad_h.to(acc)
    starts = grad_final_state.new_zeros(grad_final_state.shape)
    starts = starts if initial_state is None else initial_state.to(acc)
    da, db, dstart = torch.zeros_like(decay), torch.zeros_like(decay), torch.zeros_like(starts)
    for i, (rows, span) in enumerate(sequences(cu_seqlens, *a.shape[:2])):
        which = rows if cu_seqlens is None else slice(i, i + 1)
        before = [starts[which]]
        for t in range(span.start, span.stop):
            before.append(decay[rows, t] * before[-1] + b[rows, t])
        g = grad_final_state[which].to(acc)
        for t in reversed(range(span.start, span.stop)):
            g = g + grad[rows, t]
            db[rows, t] = g
            da[rows, t] = g * before[t - span.start]
            g = g * decay[rows, t]
        dstart[which] = g
    nothing = empty_gradient(grad_h)
    return (
        da.to(a.dtype),
        db.to(b.dtype),
        nothing if initial_state is None else dstart.to(initial_state.dtype),
        nothing.clone(),
    )


@op(
    axes="a: b t d; b: b t d; initial_state: s d -> h: b t d; final_state: s d",
    backward=_backward,
)
def linear_recurrence(
    a: Tensor,
    b: Tensor,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """h[t] = a[t] h[t-1] + b[t] along dim 1.

    Args: ``a``, ``b`` (b, t, d); ``initial_state`` (b, d), zero when None. With ``cu_seqlens``
    int32 (S + 1,), the batch is 1 and states are (S, d).

    Returns ``h`` (b, t, d) in a's dtype and ``final_state``, at least float32. Raises ValueError on
    shapes, devices or offsets that disagree.
    """
    acc = accumulate_dtype(a.dtype)
    decay, add = a.to(acc), b.to(acc)
    runs = sequences(cu_seqlens, *a.shape[:2])
    count = a.shape[0] if cu_seqlens is None else len(runs)
    starts = add.new_zeros(count, a.shape[2]) if initial_state is None else initial_state.to(acc)
    h, final = add.new_zeros(a.shape), torch.empty_like(starts)
    for i, (rows, span) in enumerate(runs):
        which = rows if cu_seqlens is None else slice(i, i + 1)
        state = starts[which]
        for t in range(span.start, span.stop):
            state = decay[rows, t] * state + add[rows, t]
            h[rows, t] = state
        final[which] = state
    return h.to(a.dtype), final
