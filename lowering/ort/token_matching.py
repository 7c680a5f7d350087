"""``token_matching`` in ONNX: the most similar destination of every source token.

The table of all similarities is made at once, where the op itself goes tile by tile.
"""

from __future__ import annotations

import onnx_ir as ir

from effpass.lowering.ort.build import (
    Value,
    accumulated,
    cast,
    full,
    ints,
    op,
    rank,
    shape,
    typed,
)

SMALLEST = 1e-12  # a norm below this is taken for this: a vector of zeros is similar to nothing


def token_matching(
    a: Value, b: Value, open: Value, a_at: Value, b_at: Value, later: bool
) -> tuple[Value, Value]:
    """Indices (b, s) and similarities (b, s) of the best of ``b`` (b, t, d) for ``a`` (b, s, d)."""
    acc = accumulated(a.dtype)
    a, a_at = _one_more(a, a.dtype, 0.0), _one_more(a_at, ir.DataType.INT64, 0)
    targets = op.Transpose(_unit(cast(b, acc), acc), perm=[0, 2, 1])
    similar = op.MatMul(_unit(cast(a, acc), acc), targets)
    closed = op.Or(op.Not(op.Unsqueeze(open, ints(1))), op.IsNaN(similar))
    if later:
        behind = op.LessOrEqual(op.Unsqueeze(b_at, ints(1)), op.Unsqueeze(a_at, ints(2)))
        closed = op.Or(closed, behind)
    similar = op.Where(closed, full(float("-inf"), shape(1), acc), similar)
    best = op.ReduceMax(similar, ints(-1), keepdims=0)
    index = op.ArgMax(similar, axis=-1, keepdims=0, select_last_index=0)
    return op.Slice(index, ints(0), ints(-1), ints(1)), op.Slice(best, ints(0), ints(-1), ints(1))


def _one_more(x: Value, dtype: ir.DataType, number: float) -> Value:
    """(b, s, ...) -> (b, s + 1, ...): the runtime has no maximum over no sources."""
    rest = () if rank(x) == 2 else (op.Shape(x, start=2),)
    extra = full(number, shape(op.Shape(x, end=1), 1, *rest), dtype)
    return typed(op.Concat(x, extra, axis=1), dtype)


def _unit(x: Value, acc: ir.DataType) -> Value:
    norm = op.ReduceL2(x, ints(-1), keepdims=1)
    return op.Div(x, op.Max(norm, cast(op.Constant(value_float=SMALLEST), acc)))
