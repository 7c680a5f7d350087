"""``selective_scan`` in ONNX: one ``Scan`` that discretises inside, so that no (t, d, n) is stored.

States lie (b, n, d): the long dim is last, where ONNX Runtime broadcasts whole rows.
"""

from __future__ import annotations

from effpass.lowering.ort.build import (
    Value,
    accumulated,
    cast,
    full,
    ints,
    op,
    scan,
    shape,
    size,
    typed,
)
from effpass.lowering.ort.ragged import ragged
from effpass.lowering.ort.steps import finish, step_sizes


def selective_scan(
    x: Value,
    dt: Value,
    A: Value,
    B: Value,
    C: Value,
    D: Value | None = None,
    z: Value | None = None,
    dt_bias: Value | None = None,
    dt_softplus: bool = False,
    initial_state: Value | None = None,
    cu_seqlens: Value | None = None,
) -> tuple[Value, Value]:
    """Mamba's scan; an absent token has a step of zero."""
    acc, out = accumulated(x.dtype), x.dtype
    places = ragged(cu_seqlens, x)
    xs = cast(x, acc)
    steps = step_sizes(dt, dt_bias, dt_softplus, acc)
    inputs = [steps, op.Mul(steps, xs), cast(B, acc), cast(C, acc)]
    for value, like in zip(inputs, (x, x, B, C), strict=True):
        value.dtype, value.shape = acc, like.shape
    if places is not None:
        inputs = [places.unpack(value, acc) for value in inputs]
    steps, add, Bs, Cs = inputs
    decays = op.Transpose(cast(A, acc), perm=[1, 0])
    if initial_state is None:
        start = full(0.0, shape(size(steps, 0), op.Shape(decays)), acc)
    else:
        start = op.Transpose(cast(initial_state, acc), perm=[0, 2, 1])

    def step(h: Value, dt_t: Value, add_t: Value, B_t: Value, C_t: Value) -> tuple[Value, ...]:
        decay = op.Exp(op.Mul(dt_t, decays))
        after = op.Add(op.Mul(decay, h), op.Mul(add_t, B_t))
        return after, op.MatMul(C_t, after)

    row, column = ints(2), ints(3)
    over = [op.Unsqueeze(v, row) for v in (steps, add)]
    over += [op.Unsqueeze(Bs, column), op.Unsqueeze(Cs, row)]
    over = [typed(value, acc, 4) for value in over]
    start = typed(start, acc)
    final, y = scan(step, [start], over)
    y = op.Squeeze(y, row)
    y = y if places is None else places.pack(y)
    skip = None if D is None else cast(D, acc)
    return finish(y, xs, skip, z, acc, out), op.Transpose(final, perm=[0, 2, 1])
