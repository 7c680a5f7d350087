"""``causal_conv1d`` in ONNX: ``com.microsoft.CausalConvWithState``, or shifted sums."""

from __future__ import annotations

import onnx_ir as ir

from effpass.lowering.ort.build import (
    END,
    Value,
    accumulated,
    cast,
    contrib,
    full,
    ints,
    op,
    shape,
    silu,
    size,
    typed,
)
from effpass.lowering.ort.ragged import Ragged, ragged

OPERATOR = "CausalConvWithState"
ATTRIBUTES = ("channels_last", "activation")


def causal_conv1d(
    x: Value,
    weight: Value,
    bias: Value | None = None,
    activation: str | None = None,
    initial_state: Value | None = None,
    cu_seqlens: Value | None = None,
    *,
    portable: bool = False,
) -> tuple[Value, Value]:
    """The causal convolution; states are the last w - 1 tokens. ``portable``: ``ai.onnx`` alone."""
    acc, out, width = accumulated(x.dtype), x.dtype, int(weight.shape[1])
    places = ragged(cu_seqlens, x)
    xs = cast(x, acc) if places is None else places.unpack(x, acc)
    kernel = op.Unsqueeze(cast(weight, acc), ints(1))
    add = None if bias is None else cast(bias, acc)
    if initial_state is None:
        start = full(0.0, shape(size(xs, 0), int(x.shape[2]), width - 1), acc)
    else:
        start = cast(initial_state, acc)
    start = typed(op.Transpose(start, perm=[0, 2, 1]), acc)
    if portable or acc != ir.DataType.FLOAT or width == 1:
        y = _summed(op.Concat(start, xs, axis=1), cast(weight, acc), add, size(xs, 1))
        y = silu(y) if activation == "silu" else y
    else:
        y, _ = contrib(
            OPERATOR,
            *(xs, kernel, add, start),
            outputs=2,
            ndim=1,
            channels_last=1,
            activation=activation or "none",
        )
    final = op.Transpose(_last(start, xs, width, places), perm=[0, 2, 1])
    y = y if places is None else places.pack(y)
    return op.Cast(y, to=out.value), op.Cast(final, to=out.value)


def _summed(window: Value, weight: Value, bias: Value | None, tokens: Value) -> Value:
    """(b, w - 1 + t, c) -> (b, t, c): shifted, weighted and summed, one tap after another."""
    y = bias
    for tap in range(int(weight.shape[1])):
        part = op.Slice(window, ints(tap), op.Add(tokens, ints(tap)), ints(1))
        part = op.Mul(part, op.Gather(weight, op.Constant(value_int=tap), axis=1))
        y = part if y is None else op.Add(y, part)
    return y


def _last(start: Value, x: Value, width: int, places: Ragged | None) -> Value:
    """The last w - 1 tokens of each row (b, w - 1, c), of the state where there are fewer."""
    window = op.Concat(start, x, axis=1)
    if places is None:
        first = op.Sub(size(window, 1), ints(width - 1))
        return op.Slice(window, first, ints(END), ints(1))
    zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
    rows, column = op.Range(zero, op.Squeeze(size(window, 0)), one), ints(1)
    first = op.Add(op.Mul(rows, size(window, 1)), places.lengths)
    at = op.Add(op.Unsqueeze(first, column), op.Range(zero, op.Constant(value_int=width - 1), one))
    flat = op.Reshape(window, shape(-1, size(x, 2)), allowzero=0)
    return op.Gather(flat, at, axis=0)
