"""``ssd_scan`` in ONNX: ``com.microsoft.LinearAttention`` where the runtime has it, or a ``Scan``.

The scan is linear attention with a gate: queries C, keys B, values dt x, decays dt A in log space
(Dao and Gu 2024, arXiv 2405.21060, section 4); its state is ours, transposed.
"""

from __future__ import annotations

import onnx_ir as ir

from effpass.lowering.ort.build import (
    Value,
    accumulated,
    cast,
    contrib,
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

OPERATOR = "LinearAttention"


def ssd_scan(
    x: Value,
    dt: Value,
    A: Value,
    B: Value,
    C: Value,
    D: Value | None = None,
    z: Value | None = None,
    dt_bias: Value | None = None,
    dt_softplus: bool = False,
    dt_min: float = 0.0,
    dt_max: float | None = None,
    initial_state: Value | None = None,
    cu_seqlens: Value | None = None,
    *,
    portable: bool = False,
) -> tuple[Value, Value]:
    """Mamba-2's scan; an absent token has a step of zero. ``portable``: ``ai.onnx`` alone."""
    acc, out, heads = accumulated(x.dtype), x.dtype, int(x.shape[2])
    places = ragged(cu_seqlens, x)
    xs = cast(x, acc)
    steps = step_sizes(dt, dt_bias, dt_softplus, acc)
    low = cast(op.Constant(value_float=float(dt_min)), acc)
    high = None if dt_max is None else cast(op.Constant(value_float=float(dt_max)), acc)
    steps = op.Clip(steps, low, high)
    add = op.Mul(op.Unsqueeze(steps, ints(3)), xs)
    inputs = [steps, add, cast(B, acc), cast(C, acc)]
    for value, like in zip(inputs, (dt, x, B, C), strict=True):
        value.dtype, value.shape = acc, like.shape
    if places is not None:
        inputs = [places.unpack(value, acc) for value in inputs]
    steps, add, Bs, Cs = inputs
    Bs, Cs = (_heads(v, int(B.shape[2]), heads) for v in (Bs, Cs))
    decays = typed(op.Mul(steps, cast(A, acc)), acc)
    states = (heads, int(x.shape[3]), int(B.shape[3]))
    start = None if initial_state is None else cast(initial_state, acc)
    if portable or acc != ir.DataType.FLOAT:
        y, final = _scanned(decays, add, Bs, Cs, start, states, acc)
    else:
        y, final = _attention(decays, add, Bs, Cs, start, states)
    y = y if places is None else places.pack(y)
    skip = None if D is None else op.Unsqueeze(cast(D, acc), ints(1))
    return finish(y, xs, skip, z, acc, out), final


def _heads(grouped: Value, groups: int, heads: int) -> Value:
    """(b, t, g, n) -> (b, t, h, n): each group serves a run of heads."""
    if groups == heads:
        return grouped
    wide = op.Unsqueeze(grouped, ints(3))
    ones = ints(1, 1, 1, heads // groups, 1)
    kept = shape(op.Shape(grouped, end=2), heads, op.Shape(grouped, start=3))
    return op.Reshape(op.Expand(wide, ones), kept, allowzero=0)


def _attention(
    decays: Value,
    add: Value,
    B: Value,
    C: Value,
    start: Value | None,
    states: tuple[int, int, int],
) -> tuple[Value, Value]:
    heads, width, _ = states
    flat = shape(op.Shape(add, end=2), -1)
    query, key, value = (op.Reshape(v, flat, allowzero=0) for v in (C, B, add))
    past = None if start is None else op.Transpose(start, perm=[0, 1, 3, 2])
    y, present = contrib(
        OPERATOR,
        *(query, key, value, past, decays),
        outputs=2,
        q_num_heads=heads,
        kv_num_heads=heads,
        update_rule="gated",
        scale=1.0,
    )
    y = op.Reshape(y, shape(op.Shape(add, end=2), heads, width), allowzero=0)
    return y, op.Transpose(present, perm=[0, 1, 3, 2])


def _scanned(
    decays: Value,
    add: Value,
    B: Value,
    C: Value,
    start: Value | None,
    states: tuple[int, int, int],
    acc: ir.DataType,
) -> tuple[Value, Value]:
    """States lie (b, h, n, p)."""
    heads, width, count = states
    if start is None:
        start = full(0.0, shape(size(add, 0), heads, count, width), acc)
    else:
        start = op.Transpose(start, perm=[0, 1, 3, 2])

    def step(h: Value, decay_t: Value, add_t: Value, B_t: Value, C_t: Value) -> tuple[Value, ...]:
        after = op.Add(op.Mul(decay_t, h), op.Mul(B_t, add_t))
        return after, op.MatMul(C_t, after)

    row, column = ints(3), ints(4)
    decay = op.Unsqueeze(op.Exp(decays), ints(3, 4))
    over = [decay, op.Unsqueeze(add, row), op.Unsqueeze(B, column), op.Unsqueeze(C, row)]
    over = [typed(value, acc, 5) for value in over]
    start = typed(start, acc)
    final, y = scan(step, [start], over)
    return op.Squeeze(y, row), op.Transpose(final, perm=[0, 1, 3, 2])
