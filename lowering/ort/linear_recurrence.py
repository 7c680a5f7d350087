"""``linear_recurrence`` in ONNX: one ``Scan`` over the tokens."""

from __future__ import annotations

from effpass.lowering.ort.build import Value, accumulated, cast, full, op, scan, shape, size, typed
from effpass.lowering.ort.ragged import ragged


def linear_recurrence(
    a: Value, b: Value, initial_state: Value | None = None, cu_seqlens: Value | None = None
) -> tuple[Value, Value]:
    """h[t] = a[t] h[t-1] + b[t]; absent tokens have a decay of 1 and add nothing."""
    acc, out = accumulated(a.dtype), a.dtype
    places = ragged(cu_seqlens, a)
    if places is None:
        decay, add = cast(a, acc), cast(b, acc)
    else:
        decay, add = places.unpack(a, acc, 1.0), places.unpack(b, acc)
    if initial_state is None:
        start = full(0.0, shape(size(add, 0), size(add, 2)), acc)
    else:
        start = cast(initial_state, acc)

    def step(h: Value, a_t: Value, b_t: Value) -> tuple[Value, ...]:
        after = op.Add(op.Mul(a_t, h), b_t)
        return after, op.Identity(after)

    final, h = scan(step, [start], [typed(decay, acc, 3), typed(add, acc, 3)])
    h = h if places is None else places.pack(h)
    return op.Cast(h, to=out.value), op.Identity(final)
