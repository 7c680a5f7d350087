"""Mamba-2's scan in chunks, as matrix products (Dao and Gu 2024, arXiv 2405.21060, section 6).

With cs the running sum of dt A inside a chunk, S what enters it and G the gradient of what leaves:

    y[i] = sum_{j <= i} C[i].B[j] exp(cs[i] - cs[j]) dt[j] x[j] + exp(cs[i]) S C[i]
    leaving = exp(cs[last]) S + sum_j exp(cs[last] - cs[j]) dt[j] x[j] B[j]^T

A chunk is LENGTH tokens of one sequence. cs is kept as two float32 (a sum and what it lost), since
a difference of two large sums is what decays small steps. Operands of a product are in the storage
dtype where x, B and C share a narrow one, else float32 without TF32; sums are float32.
"""

import triton
import triton.language as tl

from effpass.lowering.gpu.kernels.activations import sigmoid, softplus
from effpass.lowering.gpu.kernels.tuning import tuned

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _exp(x):
    return tl.exp2(x * LOG2E)


@triton.jit
def _add_pairs(high1, low1, high2, low2):
    """Sums of two float32 each; what the first loses goes to the second (Knuth's two-sum)."""
    total = high1 + high2
    moved = total - high1
    lost = (high1 - (total - moved)) + (high2 - moved)
    return total, low1 + low2 + lost


@triton.jit
def _product(a, b, like, HALF: tl.constexpr):
    if HALF:
        return tl.dot(a.to(like.dtype.element_ty), b.to(like.dtype.element_ty))
    return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")


@triton.jit
def steps(
    dt, A, bias, step, sums, decay, table, tokens, per_row, heads, dt_min, dt_max, sdb, sdt, sdh,
    BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, LIMIT: tl.constexpr, PACKED: tl.constexpr,
    LENGTH: tl.constexpr,
):  # fmt: skip
    """dt as used (chunks, h, LENGTH), its sums (chunks, h, 2, LENGTH), exp of the last (chunks, h).

    Tokens that are not there have a step of 0.
    """
    index, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if PACKED:
        start = tl.load(table + index * 4 + 1)
        end = tl.load(table + index * 4 + 2)
        row = start.to(tl.int64) * 0
    else:
        start = (index % per_row).to(tl.int32) * LENGTH
        end = tl.minimum(start + LENGTH, tokens)
        row = (index // per_row).to(tl.int64)
    i = tl.arange(0, LENGTH)
    at = start + i
    where = row * sdb + at.to(tl.int64) * sdt + head * sdh
    used = tl.load(dt + where, mask=at < end, other=0.0).to(tl.float32)
    if BIAS:
        used += tl.load(bias + head).to(tl.float32)
    if SOFTPLUS:
        used = softplus(used)
    used = tl.where(used < dt_min, dt_min, used)
    if LIMIT:
        used = tl.where(used > dt_max, dt_max, used)
    used = tl.where(at < end, used, 0.0)
    a = used * tl.load(A + head).to(tl.float32)
    high, low = tl.associative_scan((a, a * 0.0), 0, _add_pairs)
    base = index * heads + head
    tl.store(step + base * LENGTH + i, used)
    tl.store(sums + base * 2 * LENGTH + i, high)
    tl.store(sums + base * 2 * LENGTH + LENGTH + i, low)
    last = tl.sum(tl.where(i == LENGTH - 1, high + low, 0.0), 0)
    tl.store(decay + base, _exp(last))


@triton.jit
def _sums(sums, base, i, LENGTH: tl.constexpr):
    """Sums at tokens i (LENGTH,), and the last of them, each as two numbers."""
    sums += base * 2 * LENGTH
    return (
        tl.load(sums + i),
        tl.load(sums + LENGTH + i),
        tl.load(sums + LENGTH - 1),
        tl.load(sums + 2 * LENGTH - 1),
    )


@triton.jit
def _rows(pointer, row, at, column, sb, st, sc, live, in_c):
    where = row * sb + at.to(tl.int64)[:, None] * st + column[None, :] * sc
    return tl.load(pointer + where, mask=live[:, None] & in_c[None, :], other=0.0)


@tuned(
    ("groups", "count", "HALF"),
    {"warps": 4, "stages": 2},
    {"warps": 2, "stages": 2},
    {"warps": 8, "stages": 2},
)
@triton.jit
def products(
    B, C, cb, table, tokens, per_row, groups, count, sBb, sBt, sBg, sBn, sCb, sCt, sCg, sCn,
    HALF: tl.constexpr, PACKED: tl.constexpr, LENGTH: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """C[i].B[j] of every chunk and group (chunks, g, LENGTH, LENGTH), float32."""
    index, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if PACKED:
        start = tl.load(table + index * 4 + 1)
        end = tl.load(table + index * 4 + 2)
        row = start.to(tl.int64) * 0
    else:
        start = (index % per_row).to(tl.int32) * LENGTH
        end = tl.minimum(start + LENGTH, tokens)
        row = (index // per_row).to(tl.int64)
    i = tl.arange(0, LENGTH)
    at = start + i
    live = at < end
    made = tl.zeros((LENGTH, LENGTH), tl.float32)
    for first in range(0, count, BN):
        n = first + tl.arange(0, BN)
        c = _rows(C + group * sCg, row, at, n, sCb, sCt, sCn, live, n < count)
        b = _rows(B + group * sBg, row, at, n, sBb, sBt, sBn, live, n < count)
        made += _product(c, tl.trans(b), C, HALF)
    base = (index * groups + group) * LENGTH * LENGTH
    tl.store(cb + base + i[:, None] * LENGTH + i[None, :], made)


@tuned(
    ("heads", "width", "count", "HALF"),
    {"warps": 4, "stages": 2},
    {"warps": 8, "stages": 2},
    {"warps": 2, "stages": 2},
)
@triton.jit
def states(
    x, B, step, sums, local, table, tokens, per_row, heads, groups, width, count,
    sxb, sxt, sxh, sxp, sBb, sBt, sBg, sBn,
    ADJOINT: tl.constexpr, HALF: tl.constexpr, PACKED: tl.constexpr, LENGTH: tl.constexpr,
    BP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """What leaves each chunk (chunks, h, p, n) from nothing.

    ADJOINT: the gradient of what enters it, of dy (given as x) and C (given as B).
    """
    index, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if PACKED:
        start = tl.load(table + index * 4 + 1)
        end = tl.load(table + index * 4 + 2)
        row = start.to(tl.int64) * 0
    else:
        start = (index % per_row).to(tl.int32) * LENGTH
        end = tl.minimum(start + LENGTH, tokens)
        row = (index // per_row).to(tl.int64)
    blocks = (count + BN - 1) // BN
    p = (tl.program_id(2) // blocks) * BP + tl.arange(0, BP)
    n = (tl.program_id(2) % blocks) * BN + tl.arange(0, BN)
    i = tl.arange(0, LENGTH)
    at = start + i
    live = at < end
    base = index * heads + head
    high, low, last, last_low = _sums(sums, base, i, LENGTH)  # type: ignore
    if ADJOINT:
        weight = _exp(high + low)
    else:
        weight = _exp((last - high) + (last_low - low)) * tl.load(step + base * LENGTH + i)
    value = _rows(x + head * sxh, row, at, p, sxb, sxt, sxp, live, p < width).to(tl.float32)
    group = head // (heads // groups)
    b = _rows(B + group * sBg, row, at, n, sBb, sBt, sBn, live, n < count)
    made = _product(tl.trans(value * weight[:, None]), b, B, HALF)
    where = (base * width + p[:, None]) * count + n[None, :]
    tl.store(local + where, made, mask=(p < width)[:, None] & (n < count)[None, :])


@triton.jit
def _decays(high, low, high_j, low_j, causal):
    """exp(cs[i] - cs[j]) where ``causal``, else 0."""
    gap = (high[:, None] - high_j[None, :]) + (low[:, None] - low_j[None, :])
    return tl.where(causal, _exp(tl.where(causal, gap, 0.0)), 0.0)


@tuned(
    ("heads", "width", "count", "HALF"),
    {"warps": 4, "stages": 2},
    {"warps": 8, "stages": 2},
    {"warps": 4, "stages": 1},
)
@triton.jit
def outputs(
    x, C, D, z, cb, step, sums, starts, y, table, tokens, per_row, heads, groups, width, count,
    sxb, sxt, sxh, sxp, sCb, sCt, sCg, sCn, szb, szt, szh, szp,
    SKIP: tl.constexpr, GATE: tl.constexpr, HALF: tl.constexpr, PACKED: tl.constexpr,
    LENGTH: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """y (b, t, h, p) contiguous, from what enters each chunk."""
    index, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if PACKED:
        start = tl.load(table + index * 4 + 1)
        end = tl.load(table + index * 4 + 2)
        row = start.to(tl.int64) * 0
    else:
        start = (index % per_row).to(tl.int32) * LENGTH
        end = tl.minimum(start + LENGTH, tokens)
        row = (index // per_row).to(tl.int64)
    p = tl.program_id(2) * BP + tl.arange(0, BP)
    in_p = p < width
    i = tl.arange(0, LENGTH)
    at = start + i
    live = at < end
    base = index * heads + head
    group = head // (heads // groups)
    high, low, _last, _low = _sums(sums, base, i, LENGTH)  # type: ignore
    made = tl.zeros((LENGTH, BP), tl.float32)
    for first in range(0, count, BN):
        n = first + tl.arange(0, BN)
        c = _rows(C + group * sCg, row, at, n, sCb, sCt, sCn, live, n < count)
        where = (base * width + p[None, :]) * count + n[:, None]
        inside = (n < count)[:, None] & in_p[None, :] & (start < end)
        state = tl.load(starts + where, mask=inside, other=0.0)
        made += _product(c, state, C, HALF)
    made *= _exp(high + low)[:, None]
    causal = i[:, None] >= i[None, :]
    square = (index * groups + group) * LENGTH * LENGTH + i[:, None] * LENGTH + i[None, :]
    weight = tl.load(cb + square) * tl.load(step + base * LENGTH + i)[None, :]
    weight = tl.where(causal, weight * _decays(high, low, high, low, causal), 0.0)
    value = _rows(x + head * sxh, row, at, p, sxb, sxt, sxp, live, in_p)
    wide = value.to(tl.float32)
    bad = ((wide - wide) != 0.0).to(tl.int32)  # in a product, NaN would reach tokens before it
    made += _product(weight, tl.where(bad != 0, 0.0, wide), C, HALF)
    if tl.max(tl.max(bad, 1), 0) > 0:
        made = tl.where(tl.cumsum(bad, 0) > 0, float("nan"), made)
    if SKIP:
        made += tl.load(D + head).to(tl.float32) * wide
    if GATE:
        gate = _rows(z + head * szh, row, at, p, szb, szt, szp, live, in_p).to(tl.float32)
        made *= gate * sigmoid(gate)
    where = ((row * tokens + at)[:, None] * heads + head) * width + p[None, :]
    tl.store(y + where, made.to(y.dtype.element_ty), mask=live[:, None] & in_p[None, :])


@tuned(
    ("heads", "width", "count", "HALF"),
    {"warps": 8, "stages": 1},
    {"warps": 4, "stages": 1},
    {"warps": 8, "stages": 2},
)
@triton.jit
def backward_x(
    x, dt, A, B, C, D, bias, grad, cb, step, sums, starts, leaving, dx, ddt, dA, dD, dbias,
    table, tokens, per_row, heads, groups, width, count, dt_min, dt_max,
    sxb, sxt, sxh, sxp, sdb, sdt, sdh, sBb, sBt, sBg, sBn, sCb, sCt, sCg, sCn, sgb, sgt, sgh, sgp,
    SKIP: tl.constexpr, BIAS: tl.constexpr, SOFTPLUS: tl.constexpr, LIMIT: tl.constexpr,
    HALF: tl.constexpr, PACKED: tl.constexpr, LENGTH: tl.constexpr, BP: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """Of one chunk and head: dx (b, t, h, p), ddt (b, t, h), and its part of dA, dD, dbias
    (chunks, h)."""
    index, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if PACKED:
        start = tl.load(table + index * 4 + 1)
        end = tl.load(table + index * 4 + 2)
        row = start.to(tl.int64) * 0
    else:
        start = (index % per_row).to(tl.int32) * LENGTH
        end = tl.minimum(start + LENGTH, tokens)
        row = (index // per_row).to(tl.int64)
    p = tl.arange(0, BP)
    in_p = p < width
    i = tl.arange(0, LENGTH)
    at = start + i
    live = at < end
    base = index * heads + head
    group = head // (heads // groups)
    high, low, last, last_low = _sums(sums, base, i, LENGTH)  # type: ignore
    used = tl.load(step + base * LENGTH + i)
    value = _rows(x + head * sxh, row, at, p, sxb, sxt, sxp, live, in_p).to(tl.float32)
    dy = _rows(grad + head * sgh, row, at, p, sgb, sgt, sgp, live, in_p).to(tl.float32)
    from_start = tl.zeros((LENGTH, BP), tl.float32)
    to_end = tl.zeros((LENGTH, BP), tl.float32)
    both = tl.zeros((BP,), tl.float32)
    for first in range(0, count, BN):
        n = first + tl.arange(0, BN)
        where = (base * width + p[None, :]) * count + n[:, None]
        inside = (n < count)[:, None] & in_p[None, :] & (start < end)
        state = tl.load(starts + where, mask=inside, other=0.0)
        leaves = tl.load(leaving + where, mask=inside, other=0.0)
        c = _rows(C + group * sCg, row, at, n, sCb, sCt, sCn, live, n < count)
        b = _rows(B + group * sBg, row, at, n, sBb, sBt, sBn, live, n < count)
        from_start += _product(c, state, C, HALF)
        to_end += _product(b, leaves, B, HALF)
        both += tl.sum(state * leaves, 0)
    to_end *= _exp((last - high) + (last_low - low))[:, None]
    # rows j, columns i: what token j gives to token i
    later = i[None, :] >= i[:, None]
    square = (index * groups + group) * LENGTH * LENGTH + i[None, :] * LENGTH + i[:, None]
    gap = (high[None, :] - high[:, None]) + (low[None, :] - low[:, None])
    weight = tl.load(cb + square) * _exp(tl.where(later, gap, 0.0))
    weight = tl.where(later, weight, 0.0)
    fed = to_end + _product(weight, dy, C, HALF)
    dyx = _product(value, tl.trans(dy), C, HALF)
    moved = tl.where(i[None, :] > i[:, None], weight * dyx * used[:, None], 0.0)
    left = used * tl.sum(value * to_end, 1)
    dsums = tl.sum(moved, 0) - tl.sum(moved, 1) - left
    dsums += _exp(high + low) * tl.sum(dy * from_start, 1)
    kept = _exp(last + last_low) * tl.sum(both, 0) + tl.sum(left, 0)
    dsums += tl.where(i == LENGTH - 1, kept, 0.0)
    da = tl.cumsum(dsums, 0, reverse=True)
    dstep = tl.sum(value * fed, 1) + tl.load(A + head).to(tl.float32) * da
    tl.store(dA + base, tl.sum(used * da, 0))
    raw = tl.load(dt + row * sdb + at.to(tl.int64) * sdt + head * sdh, mask=live, other=0.0)
    raw = raw.to(tl.float32)
    if BIAS:
        raw += tl.load(bias + head).to(tl.float32)
    free = raw
    if SOFTPLUS:
        free = softplus(raw)
        dstep *= sigmoid(raw)
    dstep = tl.where(live & (free >= dt_min), dstep, 0.0)
    if LIMIT:
        dstep = tl.where(free <= dt_max, dstep, 0.0)
    if BIAS:
        tl.store(dbias + base, tl.sum(dstep, 0))
    made = fed * used[:, None]
    if SKIP:
        made += tl.load(D + head).to(tl.float32) * dy
        tl.store(dD + base, tl.sum(tl.sum(dy * value, 1), 0))
    lines = (row * tokens + at) * heads + head
    tl.store(ddt + lines, dstep.to(ddt.dtype.element_ty), mask=live)
    where = lines[:, None] * width + p[None, :]
    tl.store(dx + where, made.to(dx.dtype.element_ty), mask=live[:, None] & in_p[None, :])


@tuned(
    ("heads", "width", "count", "HALF"),
    {"warps": 8, "stages": 1},
    {"warps": 4, "stages": 1},
    {"warps": 8, "stages": 2},
)
@triton.jit
def backward_bc(
    x, B, C, grad, step, sums, starts, leaving, dB, dC, table, tokens, per_row, heads, groups,
    width, count, sxb, sxt, sxh, sxp, sBb, sBt, sBg, sBn, sCb, sCt, sCg, sCn, sgb, sgt, sgh, sgp,
    HALF: tl.constexpr, PACKED: tl.constexpr, LENGTH: tl.constexpr, BP: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """dB and dC (b, t, g, n) of one chunk, group and block of states: sums over its heads."""
    index, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if PACKED:
        start = tl.load(table + index * 4 + 1)
        end = tl.load(table + index * 4 + 2)
        row = start.to(tl.int64) * 0
    else:
        start = (index % per_row).to(tl.int32) * LENGTH
        end = tl.minimum(start + LENGTH, tokens)
        row = (index // per_row).to(tl.int64)
    n = tl.program_id(2) * BN + tl.arange(0, BN)
    in_n = n < count
    p = tl.arange(0, BP)
    in_p = p < width
    i = tl.arange(0, LENGTH)
    at = start + i
    live = at < end
    causal = i[:, None] >= i[None, :]
    square = tl.zeros((LENGTH, LENGTH), tl.float32)
    made_b = tl.zeros((LENGTH, BN), tl.float32)
    made_c = tl.zeros((LENGTH, BN), tl.float32)
    each = heads // groups
    for k in range(0, each):
        head = group * each + k
        base = index * heads + head
        high, low, last, last_low = _sums(sums, base, i, LENGTH)  # type: ignore
        used = tl.load(step + base * LENGTH + i)
        value = _rows(x + head * sxh, row, at, p, sxb, sxt, sxp, live, in_p).to(tl.float32)
        dy = _rows(grad + head * sgh, row, at, p, sgb, sgt, sgp, live, in_p).to(tl.float32)
        dyx = _product(dy, tl.trans(value), C, HALF)
        square += tl.where(causal, dyx * _decays(high, low, high, low, causal) * used[None, :], 0.0)
        where = (base * width + p[:, None]) * count + n[None, :]
        inside = in_p[:, None] & in_n[None, :] & (start < end)
        state = tl.load(starts + where, mask=inside, other=0.0)
        leaves = tl.load(leaving + where, mask=inside, other=0.0)
        made_c += _exp(high + low)[:, None] * _product(dy, state, C, HALF)
        weight = _exp((last - high) + (last_low - low)) * used
        made_b += weight[:, None] * _product(value, leaves, B, HALF)
    b = _rows(B + group * sBg, row, at, n, sBb, sBt, sBn, live, in_n)
    c = _rows(C + group * sCg, row, at, n, sCb, sCt, sCn, live, in_n)
    made_c += _product(square, b, B, HALF)
    made_b += _product(tl.trans(square), c, C, HALF)
    where = ((row * tokens + at)[:, None] * groups + group) * count + n[None, :]
    kept = live[:, None] & in_n[None, :]
    tl.store(dB + where, made_b.to(dB.dtype.element_ty), mask=kept)
    tl.store(dC + where, made_c.to(dC.dtype.element_ty), mask=kept)


@tuned(
    ("heads", "width", "count"),
    {"BP": 16, "warps": 4},
    {"BP": 8, "warps": 4},
    {"BP": 32, "warps": 4},
    interpreted={"BP": 64},
)
@triton.jit
def update(
    x, dt, A, B, C, D, z, bias, init, y, final, heads, groups, width, count, dt_min, dt_max,
    sxb, sxh, sxp, sdb, sdh, sBb, sBg, sBn, sCb, sCg, sCn, szb, szh, szp,
    SKIP: tl.constexpr, GATE: tl.constexpr, BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
    LIMIT: tl.constexpr, INIT: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One token of every row and head: y (b, 1, h, p) and the state after it (b, h, p, n)."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(2)
    p = tl.program_id(1) * BP + tl.arange(0, BP)
    n = tl.arange(0, BN)
    in_p, in_n = p < width, n < count
    group = head // (heads // groups)
    used = tl.load(dt + row * sdb + head * sdh).to(tl.float32)
    if BIAS:
        used += tl.load(bias + head).to(tl.float32)
    if SOFTPLUS:
        used = softplus(used)
    used = tl.where(used < dt_min, dt_min, used)
    if LIMIT:
        used = tl.where(used > dt_max, dt_max, used)
    value = tl.load(x + row * sxb + head * sxh + p * sxp, mask=in_p, other=0.0).to(tl.float32)
    b = tl.load(B + row * sBb + group * sBg + n * sBn, mask=in_n, other=0.0).to(tl.float32)
    c = tl.load(C + row * sCb + group * sCg + n * sCn, mask=in_n, other=0.0).to(tl.float32)
    state = (used * value)[:, None] * b[None, :]
    where = ((row * heads + head) * width + p[:, None]) * count + n[None, :]
    both = in_p[:, None] & in_n[None, :]
    if INIT:
        decay = _exp(used * tl.load(A + head).to(tl.float32))
        state += decay * tl.load(init + where, mask=both, other=0.0).to(tl.float32)
    made = tl.sum(state * c[None, :], 1)
    if SKIP:
        made += tl.load(D + head).to(tl.float32) * value
    if GATE:
        gate = tl.load(z + row * szb + head * szh + p * szp, mask=in_p, other=0.0).to(tl.float32)
        made *= gate * sigmoid(gate)
    tl.store(y + (row * heads + head) * width + p, made.to(y.dtype.element_ty), mask=in_p)
    tl.store(final + where, state, mask=both)
