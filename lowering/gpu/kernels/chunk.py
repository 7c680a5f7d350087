"""What every kernel asks first: which tokens are mine."""

import triton
import triton.language as tl


@triton.jit
def chunk_of(table, index, tokens, per_row, LENGTH: tl.constexpr, PACKED: tl.constexpr):
    """Sequence, row of the batch, first token, token after the last, first of the sequence."""
    if PACKED:
        sequence = tl.load(table + index * 4)
        start = tl.load(table + index * 4 + 1)
        end = tl.load(table + index * 4 + 2)
        begin = tl.load(table + index * 4 + 3)
        row = sequence * 0
    else:
        sequence = index // per_row
        row = sequence
        start = (index % per_row) * LENGTH
        end = tl.minimum(start + LENGTH, tokens)
        begin = row * 0
    return sequence, row.to(tl.int64), start, end, begin


@triton.jit
def chunks_of(first, sequence, per_row, PACKED: tl.constexpr):
    """The first chunk of a sequence and the one after its last."""
    if PACKED:
        start = tl.load(first + sequence)
        end = tl.load(first + sequence + 1)
    else:
        start = sequence * per_row
        end = start + per_row
    return start, end


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) without overflow."""
    return 1.0 / (1.0 + tl.exp2(-x * 1.4426950408889634))


@triton.jit
def softplus(x):
    """log(1 + exp(x)); x itself beyond 20, as torch has it."""
    small = tl.exp2(tl.where(x > 20.0, 20.0, x) * 1.4426950408889634)  # NaN stays NaN
    # log1p: log(1 + e) * e / ((1 + e) - 1), exact to an ulp for small e
    u = 1.0 + small
    lost = u - 1.0
    made = tl.where(lost == 0.0, small, tl.log(u) * (small / tl.where(lost == 0.0, 1.0, lost)))
    return tl.where(x > 20.0, x, made)
