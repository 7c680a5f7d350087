"""Packed sequences as a batch: one row a sequence, absent tokens at the end, and back.

Packed inputs (1, T, ...) become (S, L, ...), L the longest sequence: sequences are then apart by
construction, whatever values they hold. Absent tokens read a row of ``fill``, which an op chooses
so that its state holds there.
"""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from effpass.lowering.ort.build import END, Value, cast, full, ints, op, rank, shape, size

INT64 = ir.DataType.INT64


@dataclass(frozen=True)
class Ragged:
    """Where the tokens of each sequence lie.

    ``lengths`` (S,); ``where`` (S, L), the packed index of each token, T where there is none;
    ``back`` (T,), the index of each packed token among the S L places; ``present`` (S, L) booleans.
    """

    lengths: Value
    where: Value
    back: Value
    present: Value
    longest: Value

    @staticmethod
    def of(cu_seqlens: Value, tokens: Value) -> Ragged:
        """From offsets (S + 1,) and the number of tokens (1,)."""
        offsets = op.Cast(cu_seqlens, to=INT64.value)
        starts = op.Slice(offsets, ints(0), ints(-1), ints(0))
        ends = op.Slice(offsets, ints(1), ints(END), ints(0))
        lengths = op.Sub(ends, starts)
        longest = op.Max(op.ReduceMax(lengths, keepdims=1), ints(1))
        zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
        at = op.Range(zero, op.Squeeze(longest), one)
        column = ints(1)
        present = op.Less(op.Unsqueeze(at, ints(0)), op.Unsqueeze(lengths, column))
        where = op.Where(present, op.Add(op.Unsqueeze(starts, column), at), tokens)
        token = op.Range(zero, op.Squeeze(tokens), one)
        passed = op.LessOrEqual(op.Unsqueeze(ends, ints(0)), op.Unsqueeze(token, column))
        row = op.ReduceSum(op.Cast(passed, to=INT64.value), column, keepdims=0)
        back = op.Add(op.Mul(row, longest), op.Sub(token, op.Gather(starts, row, axis=0)))
        return Ragged(lengths, where, back, present, longest)

    def unpack(self, x: Value, dtype: ir.DataType, fill: float = 0.0) -> Value:
        """(1, T, ...) in ``dtype`` -> (S, L, ...), ``fill`` at absent tokens."""
        x = cast(x, dtype)
        row = op.Concat(ints(1), op.Shape(x, start=2), axis=0) if rank(x) > 2 else ints(1)
        flat = op.Concat(op.Squeeze(x, ints(0)), full(fill, row, dtype), axis=0)
        made = op.Gather(flat, self.where, axis=0)
        made.dtype = dtype
        return made

    def pack(self, y: Value) -> Value:
        """(S, L, ...) -> (1, T, ...)."""
        flat = op.Reshape(y, shape(-1, op.Shape(y, start=2)), allowzero=0)
        return op.Unsqueeze(op.Gather(flat, self.back, axis=0), ints(0))


def ragged(cu_seqlens: Value | None, x: Value) -> Ragged | None:
    """The places of packed sequences in ``x`` (1, T, ...); None without ``cu_seqlens``."""
    return None if cu_seqlens is None else Ragged.of(cu_seqlens, size(x, 1))
