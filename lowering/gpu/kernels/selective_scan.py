"""Mamba's selective scan: every chunk alone, the carry between them, then every chunk again.

``states`` and ``outputs`` walk along the tokens of a chunk with the state (states, channels) of a
block of channels in registers: a thread holds all states of its channels, so that the sum over
states needs no other thread, and one token's B and C serve the whole block. ``backward`` takes a
chunk as a tile (tokens, channels), one state after the other, and scans it forwards for h and
backwards for its adjoint inside each thread. Decays are exp2 of steps times A log2(e).
"""

import triton
import triton.language as tl

from effpass.lowering.gpu.kernels.activations import sigmoid, softplus
from effpass.lowering.gpu.kernels.carry import combine, scan_back_before
from effpass.lowering.gpu.kernels.tuning import tuned

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _step(dt, bias, SOFTPLUS: tl.constexpr):
    raw = dt.to(tl.float32) + bias
    if SOFTPLUS:
        raw = softplus(raw)
    return raw


@triton.jit
def _rates(A, d, n, channels, count):
    """A (d, n) as a tile (states, channels), times log2(e)."""
    mask = (n < count)[:, None] & (d < channels)[None, :]
    return tl.load(A + d[None, :] * count + n[:, None], mask=mask, other=0.0).to(tl.float32) * LOG2E


@triton.jit
def _lanes(block, BD: tl.constexpr):
    """Channels of a block, one a thread: no vector loads, so that states and tokens of a tile lie
    inside a thread, which is what makes sums and scans over them cheap."""
    return tl.multiple_of(block * BD + tl.arange(0, BD), 1)


@tuned(
    ("channels", "count", "ADJOINT"),
    {"BD": 128, "warps": 4},
    {"BD": 64, "warps": 2},
    {"BD": 32, "warps": 1},
)
@triton.jit
def states(
    x, dt, A, B, C, z, bias, grad, local, sums, adjoint, table, tokens, per_row, channels, count,
    sxb, sxt, sxd, sdb, sdt, sdd, sBb, sBt, sBn, sCb, sCt, sCn, szb, szt, szd, sgb, sgt, sgd,
    ADJOINT: tl.constexpr, GATE: tl.constexpr, BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
    PACKED: tl.constexpr, LENGTH: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """What leaves each chunk (chunks, n, d) from nothing, its sum of steps, the adjoint's like."""
    index = tl.program_id(0)
    if PACKED:
        start = tl.load(table + index * 4 + 1)
        end = tl.load(table + index * 4 + 2)
        row = start.to(tl.int64) * 0
    else:
        start = (index % per_row).to(tl.int32) * LENGTH
        end = tl.minimum(start + LENGTH, tokens)
        row = (index // per_row).to(tl.int64)
    d = _lanes(tl.program_id(1), BD)
    n = tl.arange(0, BN)
    in_d = d < channels
    in_n = n < count
    first = start.to(tl.int64)
    x += row * sxb + first * sxt + d * sxd
    dt += row * sdb + first * sdt + d * sdd
    B += row * sBb + first * sBt + n * sBn
    C += row * sCb + first * sCt + n * sCn
    z += row * szb + first * szt + d * szd
    grad += row * sgb + first * sgt + d * sgd
    rates = _rates(A, d, n, channels, count)
    shift = tl.zeros((BD,), tl.float32)
    if BIAS:
        shift += tl.load(bias + d, mask=in_d, other=0.0).to(tl.float32)
    state = tl.zeros((BN, BD), tl.float32)
    back = tl.zeros((BN, BD), tl.float32)
    product = state + 1.0
    total = tl.zeros((BD,), tl.float32)
    for _ in range(start, end):
        step = _step(tl.load(dt, mask=in_d, other=0.0), shift, SOFTPLUS)
        fed = step * tl.load(x, mask=in_d, other=0.0).to(tl.float32)
        decay = tl.exp2(step[None, :] * rates)
        b = tl.load(B, mask=in_n, other=0.0).to(tl.float32)
        state = decay * state + b[:, None] * fed[None, :]
        total += step
        if ADJOINT:
            g = tl.load(grad, mask=in_d, other=0.0).to(tl.float32)
            if GATE:
                gate = tl.load(z, mask=in_d, other=0.0).to(tl.float32)
                g *= gate * sigmoid(gate)
            c = tl.load(C, mask=in_n, other=0.0).to(tl.float32)
            product *= decay
            back += product * (c[:, None] * g[None, :])
        x += sxt
        dt += sdt
        B += sBt
        C += sCt
        z += szt
        grad += sgt
    where = index.to(tl.int64) * count * channels + n[:, None] * channels + d[None, :]
    kept = in_n[:, None] & in_d[None, :]
    tl.store(local + where, state, mask=kept)
    tl.store(sums + index.to(tl.int64) * channels + d, total, mask=in_d)
    if ADJOINT:
        tl.store(adjoint + where, back, mask=kept)


@tuned(
    ("channels", "count"),
    {"BD": 128, "warps": 4},
    {"BD": 64, "warps": 2},
    {"BD": 32, "warps": 1},
)
@triton.jit
def outputs(
    x, dt, A, B, C, D, z, bias, starts, y, table, tokens, per_row, channels, count,
    sxb, sxt, sxd, sdb, sdt, sdd, sBb, sBt, sBn, sCb, sCt, sCn, szb, szt, szd,
    SKIP: tl.constexpr, GATE: tl.constexpr, BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
    PACKED: tl.constexpr, LENGTH: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """y (b, t, d) contiguous, from what enters each chunk (chunks, n, d)."""
    index = tl.program_id(0)
    if PACKED:
        start = tl.load(table + index * 4 + 1)
        end = tl.load(table + index * 4 + 2)
        row = start.to(tl.int64) * 0
    else:
        start = (index % per_row).to(tl.int32) * LENGTH
        end = tl.minimum(start + LENGTH, tokens)
        row = (index // per_row).to(tl.int64)
    d = _lanes(tl.program_id(1), BD)
    n = tl.arange(0, BN)
    in_d = d < channels
    in_n = n < count
    first = start.to(tl.int64)
    x += row * sxb + first * sxt + d * sxd
    dt += row * sdb + first * sdt + d * sdd
    B += row * sBb + first * sBt + n * sBn
    C += row * sCb + first * sCt + n * sCn
    z += row * szb + first * szt + d * szd
    y += (row * tokens + first) * channels + d
    rates = _rates(A, d, n, channels, count)
    shift = tl.zeros((BD,), tl.float32)
    skip = tl.zeros((BD,), tl.float32)
    if BIAS:
        shift += tl.load(bias + d, mask=in_d, other=0.0).to(tl.float32)
    if SKIP:
        skip += tl.load(D + d, mask=in_d, other=0.0).to(tl.float32)
    where = index.to(tl.int64) * count * channels + n[:, None] * channels + d[None, :]
    state = tl.load(starts + where, mask=in_n[:, None] & in_d[None, :], other=0.0)
    for _ in range(start, end):
        step = _step(tl.load(dt, mask=in_d, other=0.0), shift, SOFTPLUS)
        value = tl.load(x, mask=in_d, other=0.0).to(tl.float32)
        b = tl.load(B, mask=in_n, other=0.0).to(tl.float32)
        c = tl.load(C, mask=in_n, other=0.0).to(tl.float32)
        state = tl.exp2(step[None, :] * rates) * state + b[:, None] * (step * value)[None, :]
        made = tl.sum(state * c[:, None], 0)
        if SKIP:
            made += skip * value
        if GATE:
            gate = tl.load(z, mask=in_d, other=0.0).to(tl.float32)
            made *= gate * sigmoid(gate)
        tl.store(y, made.to(y.dtype.element_ty), mask=in_d)
        x += sxt
        dt += sdt
        B += sBt
        C += sCt
        z += szt
        y += channels


@triton.jit
def _tile(pointer, row, at, d, sb, st, sd, live):
    where = row * sb + at.to(tl.int64)[:, None] * st + d[None, :] * sd
    return tl.load(pointer + where, mask=live, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["sxt", "sdt", "szt", "sgt"])
def backward(
    x, dt, A, B, C, D, z, bias, grad, starts, leaving,
    dx, ddt, dz, dA, dB, dC, dD, dbias, table, tokens, per_row, channels, count, rows,
    sxb, sxt, sxd, sdb, sdt, sdd, sBb, sBt, sBn, sCb, sCt, sCn, szb, szt, szd, sgb, sgt, sgd,
    SKIP: tl.constexpr, GATE: tl.constexpr, BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
    PACKED: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """All gradients of one chunk of BT tokens and BD channels.

    dx, ddt, dz (b, t, d); what is summed later: dA (chunks, n, d), dD and dbias (chunks, d), dB and
    dC (blocks of channels, b t, n); ``rows`` is b t.
    """
    index = tl.program_id(0)
    if PACKED:
        start = tl.load(table + index * 4 + 1)
        end = tl.load(table + index * 4 + 2)
        row = start.to(tl.int64) * 0
    else:
        start = (index % per_row).to(tl.int32) * BT
        end = tl.minimum(start + BT, tokens)
        row = (index // per_row).to(tl.int64)
    block = tl.program_id(1)
    d = _lanes(block, BD)
    in_d = d < channels
    at = start + tl.arange(0, BT)
    in_t = at < end
    live = in_t[:, None] & in_d[None, :]
    shift = tl.zeros((BD,), tl.float32)
    if BIAS:
        shift += tl.load(bias + d, mask=in_d, other=0.0).to(tl.float32)
    step = _step(_tile(dt, row, at, d, sdb, sdt, sdd, live), shift[None, :], SOFTPLUS)
    step = tl.where(live, step, 0.0)
    fed = step * _tile(x, row, at, d, sxb, sxt, sxd, live)
    dy = _tile(grad, row, at, d, sgb, sgt, sgd, live)
    made = tl.zeros((BT, BD), tl.float32)
    if GATE:
        gate = _tile(z, row, at, d, szb, szt, szd, live)
        dy *= gate * sigmoid(gate)
    fed_grad = tl.zeros((BT, BD), tl.float32)
    step_grad = tl.zeros((BT, BD), tl.float32)
    lines = row * tokens + at
    B += row * sBb + at.to(tl.int64) * sBt
    C += row * sCb + at.to(tl.int64) * sCt
    edge = index.to(tl.int64) * count * channels + d
    sums = (block.to(tl.int64) * rows + lines) * count
    held = in_d & (start < end)  # nothing enters a chunk that is left over
    for n in range(0, count):
        rate = tl.load(A + d * count + n, mask=in_d, other=0.0).to(tl.float32)
        b = tl.load(B + n * sBn, mask=in_t, other=0.0).to(tl.float32)
        c = tl.load(C + n * sCn, mask=in_t, other=0.0).to(tl.float32)
        enters = tl.load(starts + edge + n * channels, mask=held, other=0.0)
        leaves = tl.load(leaving + edge + n * channels, mask=held, other=0.0)
        decay = tl.exp2(step * (rate * LOG2E)[None, :])
        added = fed * b[:, None]
        prefix, total = tl.associative_scan((decay, added), 0, combine)
        state = prefix * enters[None, :] + total
        asked = dy * c[:, None]
        after, back = scan_back_before(decay, decay * asked, BT, BD)
        g = asked + after * leaves[None, :] + back
        through = g * (state - added)
        fed_grad += g * b[:, None]
        step_grad += through * rate[None, :]
        tl.store(dA + edge + n * channels, tl.sum(through * step, 0), mask=in_d)
        tl.store(dB + sums + n, tl.sum(g * fed, 1), mask=in_t)
        tl.store(dC + sums + n, tl.sum(dy * state, 1), mask=in_t)
        if GATE:
            made += state * c[:, None]
    value = _tile(x, row, at, d, sxb, sxt, sxd, live)  # again: registers are scarce in the loop
    value_grad = step * fed_grad
    step_grad += value * fed_grad
    if SOFTPLUS:
        step_grad *= sigmoid(_tile(dt, row, at, d, sdb, sdt, sdd, live) + shift[None, :])
    step_grad = tl.where(live, step_grad, 0.0)
    side = index.to(tl.int64) * channels + d
    if SKIP:
        skip = tl.load(D + d, mask=in_d, other=0.0).to(tl.float32)[None, :]
        value_grad += dy * skip
        tl.store(dD + side, tl.sum(dy * value, 0), mask=in_d)
    if BIAS:
        tl.store(dbias + side, tl.sum(step_grad, 0), mask=in_d)
    where = lines[:, None] * channels + d[None, :]
    tl.store(dx + where, value_grad.to(dx.dtype.element_ty), mask=live)
    tl.store(ddt + where, step_grad.to(ddt.dtype.element_ty), mask=live)
    if GATE:
        if SKIP:
            made += skip * value
        gate = _tile(z, row, at, d, szb, szt, szd, live)
        s = sigmoid(gate)
        given = _tile(grad, row, at, d, sgb, sgt, sgd, live)
        gate_grad = given * made * (s * (1.0 + gate * (1.0 - s)))
        tl.store(dz + where, gate_grad.to(dz.dtype.element_ty), mask=live)


@triton.jit
def update(
    x, dt, A, B, C, D, z, bias, init, y, final, channels, count,
    sxb, sxd, sdb, sdd, sBb, sBn, sCb, sCn, szb, szd,
    SKIP: tl.constexpr, GATE: tl.constexpr, BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
    INIT: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """One token of every row: y (b, 1, d) and the state after it (b, d, n)."""
    row = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    n = tl.arange(0, BN)
    in_d = d < channels
    in_n = n < count
    both = in_d[:, None] & in_n[None, :]
    shift = tl.zeros((BD,), tl.float32)
    if BIAS:
        shift += tl.load(bias + d, mask=in_d, other=0.0).to(tl.float32)
    step = _step(tl.load(dt + row * sdb + d * sdd, mask=in_d, other=0.0), shift, SOFTPLUS)
    value = tl.load(x + row * sxb + d * sxd, mask=in_d, other=0.0).to(tl.float32)
    b = tl.load(B + row * sBb + n * sBn, mask=in_n, other=0.0).to(tl.float32)
    c = tl.load(C + row * sCb + n * sCn, mask=in_n, other=0.0).to(tl.float32)
    where = d[:, None] * count + n[None, :]
    state = (step * value)[:, None] * b[None, :]
    if INIT:
        rates = tl.load(A + where, mask=both, other=0.0).to(tl.float32) * LOG2E
        old = tl.load(init + row * channels * count + where, mask=both, other=0.0).to(tl.float32)
        state += tl.exp2(step[:, None] * rates) * old
    made = tl.sum(state * c[None, :], 1)
    if SKIP:
        made += tl.load(D + d, mask=in_d, other=0.0).to(tl.float32) * value
    if GATE:
        gate = tl.load(z + row * szb + d * szd, mask=in_d, other=0.0).to(tl.float32)
        made *= gate * sigmoid(gate)
    tl.store(y + row * channels + d, made.to(y.dtype.element_ty), mask=in_d)
    tl.store(final + row * channels * count + where, state, mask=both)
