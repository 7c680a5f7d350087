"""Which tokens a program has: one chunk of one sequence."""

import triton
import triton.language as tl


@triton.jit
def span(table, index, per_row, length, tokens, PACKED: tl.constexpr):
    """Of chunk ``index``: its sequence, first token, the token after its last, the first token of
    its sequence, and its row of the batch (int64). ``table`` is that of ``Chunks``; rows that are
    not packed have ``per_row`` chunks of ``length``.
    """
    if PACKED:
        sequence = tl.load(table + index * 4)
        start = tl.load(table + index * 4 + 1)
        end = tl.load(table + index * 4 + 2)
        begin = tl.load(table + index * 4 + 3)
        row = start.to(tl.int64) * 0
    else:
        sequence = (index // per_row).to(tl.int32)
        start = ((index % per_row) * length).to(tl.int32)
        end = tl.minimum(start + length, tokens).to(tl.int32)
        begin = start * 0
        row = sequence.to(tl.int64)
    return sequence, start, end, begin, row
