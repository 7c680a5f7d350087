"""Carrying a state from chunk to chunk, forwards or backwards, and the scan that all kernels use.

A chunk maps the state at its start to ``decay * state + local``; maps compose associatively
(Blelloch 1990), so a tile of chunks is scanned at once.
"""

import triton
import triton.language as tl

from effpass.lowering.gpu.kernels.tuning import tuned


@triton.jit
def combine(a1, b1, a2, b2):
    """x -> a1 x + b1, then x -> a2 x + b2."""
    return a1 * a2, a2 * b1 + b2


@triton.jit
def combine_before(a1, b1, c1, d1, a2, b2, c2, d2):
    """The same, and with it c x + d: the value that enters the last of the maps."""
    return a1 * a2, a2 * b1 + b2, c2 * a1, c2 * b1 + d2


@triton.jit
def scan_back(a, b):
    """The scan of (a, b) along dim 0 from the last row to the first.

    A flip inside a thread renames registers; the compiler's own reverse scan exchanges all lanes.
    """
    prefix, sums = tl.associative_scan((tl.flip(a, 0), tl.flip(b, 0)), 0, combine)
    return tl.flip(prefix, 0), tl.flip(sums, 0)


@triton.jit
def scan_back_before(a, b):
    """The same scan, and what enters each row: the sum behind it; nothing enters the last.

    Nothing is -0.0, which the compiler knows to add nothing; 0.0 would make 0.0 of -0.0.
    """
    one = tl.full(a.shape, 1.0, tl.float32)
    none = tl.full(a.shape, -2147483648, tl.int32).to(tl.float32, bitcast=True)
    _prefix, sums, _through, before = tl.associative_scan(
        (tl.flip(a, 0), tl.flip(b, 0), one, none), 0, combine_before
    )
    return tl.flip(sums, 0), tl.flip(before, 0)


@triton.jit
def _either(a, b):
    return a | b


@triton.jit
def row_of(tile, kept):
    """The row (along dim 0) of a tile of float32 where ``kept``, true in one row, is.

    By its bits: where rows lie inside a thread the compiler knows that 0 | x is x, and nothing is
    left to do. It would add all the zeros of a sum.
    """
    bits = tl.where(kept, tile.to(tl.int32, bitcast=True), 0)
    return tl.reduce(bits, 0, _either).to(tl.float32, bitcast=True)


@triton.jit
def last_row(tile, ROWS: tl.constexpr):
    """The last row of a tile (ROWS, n) of float32."""
    return row_of(tile, (tl.arange(0, ROWS) == ROWS - 1)[:, None])


@tuned(
    ("elements", "DECAY"),
    {"BE": 128, "warps": 4},
    {"BE": 64, "warps": 2},
    {"BE": 32, "warps": 1},
    interpreted={"BE": 1024},
)
@triton.jit
def carry(
    local, decay, A, init, ends, starts, first, per_row, elements, inner, outer,
    REVERSE: tl.constexpr, INIT: tl.constexpr, PACKED: tl.constexpr, DECAY: tl.constexpr,
    BC: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """``starts`` (chunks, elements): what enters each chunk; ``ends`` (s, elements): what leaves.

    ``local`` (chunks, elements) is what leaves a chunk that nothing enters. DECAY says what
    ``decay`` is: "element" (chunks, elements), "head" (chunks, elements / inner), or "steps"
    (chunks, inner): the sum of step sizes, where the decay is exp(A sum), elements are (outer,
    inner) and A, ``init`` and ``ends`` are (inner, outer).
    """
    sequence = tl.program_id(0)
    e = tl.multiple_of(tl.program_id(1) * BE + tl.arange(0, BE), 1)  # one element a thread
    in_e = e < elements
    if DECAY == "steps":
        slot = (e % inner) * outer + e // inner
        rate = tl.load(A + slot, mask=in_e, other=0.0).to(tl.float32) * 1.4426950408889634
    else:
        slot = e
    column = e % inner
    if DECAY == "head":
        column = e // inner
    # not all are neighbours, which matters to no load: it keeps a tile's rows inside a thread
    column = tl.max_contiguous(tl.multiple_of(column, 1), BE)
    base = sequence.to(tl.int64) * elements
    state = tl.zeros((BE,), tl.float32)
    if INIT:
        state += tl.load(init + base + slot, mask=in_e, other=0.0).to(tl.float32)
    if PACKED:
        begin = tl.load(first + sequence)
        end = tl.load(first + sequence + 1)
    else:
        begin = sequence * per_row
        end = begin + per_row
    count = end - begin
    edge = begin
    if REVERSE:
        edge = end - 1
    tl.store(starts + edge.to(tl.int64) * elements + e, state, mask=in_e & (count > 0))
    for done in range(0, count, BC):
        k = done + tl.arange(0, BC)
        if REVERSE:
            at = (end - 1 - k).to(tl.int64)
            to = at - 1
        else:
            at = (begin + k).to(tl.int64)
            to = at + 1
        live = (k < count)[:, None] & in_e[None, :]
        b = tl.load(local + at[:, None] * elements + e[None, :], mask=live, other=0.0)
        if DECAY == "steps":
            steps = tl.load(decay + at[:, None] * inner + column[None, :], mask=live, other=0.0)
            a = tl.exp2(steps * rate[None, :])
        elif DECAY == "head":
            heads = elements // inner
            a = tl.load(decay + at[:, None] * heads + column[None, :], mask=live, other=1.0)
        else:
            a = tl.load(decay + at[:, None] * elements + e[None, :], mask=live, other=1.0)
        a, b = tl.associative_scan((a, b), 0, combine)
        after = a * state[None, :] + b
        kept = (k + 1 < count)[:, None] & in_e[None, :]
        tl.store(starts + to[:, None] * elements + e[None, :], after, mask=kept)
        state = last_row(after, BC)
    tl.store(ends + base + slot, state.to(ends.dtype.element_ty), mask=in_e)
