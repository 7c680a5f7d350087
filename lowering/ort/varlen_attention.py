"""``varlen_attention`` in ONNX: sequences as rows of a batch, masked, with plain products.

Every sequence is a row, so none sees another whatever it holds; a query that sees no key gives 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from effpass.lowering.ort.build import Value, accumulated, cast, ints, op, rank, shape, size, typed
from effpass.lowering.ort.ragged import Ragged

LOWEST = -1e30  # a score that counts for nothing, and stays finite where all are such


def varlen_attention(
    q: Value,
    k: Value,
    v: Value,
    cu_seqlens: Value,
    max_seqlen: int,
    cu_seqlens_k: Value | None = None,
    max_seqlen_k: int | None = None,
    causal: bool = False,
    window: Sequence[int] = (-1, -1),
    scale: float | None = None,
    softcap: float | None = None,
    bias: Value | None = None,
    q_pos: Value | None = None,
    k_pos: Value | None = None,
) -> Value:
    """Attention inside each packed sequence; see the op for what each argument means."""
    acc, out = accumulated(q.dtype), q.dtype
    heads, groups, width = int(q.shape[1]), int(k.shape[1]), int(q.shape[2])
    of_q = Ragged.of(cu_seqlens, size(q, 0))
    of_k = of_q if cu_seqlens_k is None else Ragged.of(cu_seqlens_k, size(k, 0))
    factor = width**-0.5 if scale is None else scale
    # (S, L, h, d) -> (S, hk, h / hk, L, d)
    queries = _grouped(_rows(of_q, q, acc), heads, groups)
    keys = _grouped(_rows(of_k, k, acc), groups, groups)
    values = _grouped(_rows(of_k, v, acc), groups, groups)
    scores = op.MatMul(queries, op.Transpose(keys, perm=[0, 1, 2, 4, 3]))
    scores = op.Mul(scores, _number(factor, acc))
    if softcap is not None:
        cap = _number(softcap, acc)
        scores = op.Mul(cap, op.Tanh(op.Div(scores, cap)))
    if bias is not None:
        scores = op.Add(scores, _bias(of_k, bias, heads, groups, acc))
    seen = _seen(of_q, of_k, causal, window, q_pos, k_pos)
    seen = op.Unsqueeze(seen, ints(1, 2))
    scores = op.Where(seen, scores, _number(LOWEST, acc))
    weights = op.Where(seen, op.Softmax(scores, axis=-1), _number(0.0, acc))
    made = op.MatMul(weights, values)
    made = op.Transpose(made, perm=[0, 3, 1, 2, 4])
    packed = of_q.pack(op.Reshape(made, shape(op.Shape(made, end=2), heads, -1), allowzero=0))
    return op.Cast(op.Squeeze(packed, ints(0)), to=out.value)


def _number(value: float, dtype: ir.DataType) -> Value:
    return cast(op.Constant(value_float=float(value)), dtype)


def _rows(places: Ragged, x: Value, acc: ir.DataType) -> Value:
    """(t, ...) -> (S, L, ...)."""
    row = op.Unsqueeze(x, ints(0))
    row.dtype, row.shape = x.dtype, ir.Shape([1, *x.shape])
    return places.unpack(row, acc)


def _grouped(x: Value, heads: int, groups: int) -> Value:
    """(S, L, h, d) -> (S, hk, h / hk, L, d): query head i reads key head i // (h / hk)."""
    dims = shape(op.Shape(x, end=2), groups, heads // groups, op.Shape(x, start=3))
    return op.Transpose(op.Reshape(x, dims, allowzero=0), perm=[0, 2, 3, 1, 4])


def _bias(of_k: Ragged, bias: Value, heads: int, groups: int, acc: ir.DataType) -> Value:
    """(tk,) or (h, tk) -> (S, 1 or hk, 1 or h / hk, 1, L)."""
    if rank(bias) == 1:
        return op.Unsqueeze(_rows(of_k, bias, acc), ints(1, 2, 3))
    columns = op.Transpose(bias, perm=[1, 0])
    columns.dtype, columns.shape = bias.dtype, ir.Shape([bias.shape[1], bias.shape[0]])
    by_head = _rows(of_k, columns, acc)
    dims = shape(op.Shape(by_head, end=2), groups, heads // groups)
    by_head = op.Transpose(op.Reshape(by_head, dims, allowzero=0), perm=[0, 2, 3, 1])
    return op.Unsqueeze(by_head, ints(3))


def _seen(
    of_q: Ragged,
    of_k: Ragged,
    causal: bool,
    window: Sequence[int],
    q_pos: Value | None,
    k_pos: Value | None,
) -> Value:
    """(S, L, Lk) booleans: which key each query sees."""
    seen = op.Unsqueeze(of_k.present, ints(1))
    left, right = window
    right = 0 if causal and right < 0 else min(0, right) if causal else right
    if left < 0 and right < 0:
        return op.And(seen, op.Unsqueeze(of_q.present, ints(2)))
    if q_pos is None or k_pos is None:
        shift = op.Unsqueeze(op.Sub(of_k.lengths, of_q.lengths), ints(1))
        q_at, k_at = op.Add(_index(of_q), shift), _index(of_k)
    else:
        q_at, k_at = _positions(of_q, q_pos), _positions(of_k, k_pos)
    ahead = op.Sub(op.Unsqueeze(k_at, ints(1)), op.Unsqueeze(q_at, ints(2)))
    if left >= 0:
        seen = op.And(seen, op.GreaterOrEqual(ahead, op.Constant(value_int=-left)))
    if right >= 0:
        seen = op.And(seen, op.LessOrEqual(ahead, op.Constant(value_int=right)))
    return seen


def _index(places: Ragged) -> Value:
    """(1, L): the index of each token in its sequence."""
    zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
    return op.Unsqueeze(op.Range(zero, op.Squeeze(places.longest), one), ints(0))


def _positions(places: Ragged, positions: Value) -> Value:
    """(t,) int64 -> (S, L)."""
    row = op.Unsqueeze(positions, ints(0))
    row.dtype, row.shape = ir.DataType.INT64, ir.Shape([1, *positions.shape])
    return typed(places.unpack(row, ir.DataType.INT64), ir.DataType.INT64)
