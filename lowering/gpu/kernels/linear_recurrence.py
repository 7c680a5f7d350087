"""The linear recurrence, h[t] = a[t] h[t-1] + b[t]: tiles of tokens scanned inside each thread.

A tile is (tokens, channels) with neighbouring threads on neighbouring channels, so a scan along
tokens needs no other thread.
"""

import triton
import triton.language as tl

from effpass.lowering.gpu.kernels.carry import combine, last_row, scan_back
from effpass.lowering.gpu.kernels.tuning import tuned


@triton.jit
def _load(pointer, at, d, stride, stride_d, mask, OTHER: tl.constexpr):
    where = at.to(tl.int64)[:, None] * stride + d[None, :] * stride_d
    return tl.load(pointer + where, mask=mask, other=OTHER).to(tl.float32)


@tuned(
    ("channels",),
    {"BD": 128, "warps": 4},
    {"BD": 64, "warps": 2},
    {"BD": 32, "warps": 1},
)
@triton.jit(do_not_specialize=["sat", "sbt", "sgt"])
def states(
    a, b, grad, local, decay, adjoint, table, tokens, per_row, channels,
    sab, sat, sac, sbb, sbt, sbc, sgb, sgt, sgc,
    ADJOINT: tl.constexpr, PACKED: tl.constexpr, LENGTH: tl.constexpr, BT: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """What leaves each chunk from nothing, its product of decays, and the adjoint's like."""
    index = tl.program_id(0)
    if PACKED:
        start = tl.load(table + index * 4 + 1)
        end = tl.load(table + index * 4 + 2)
        row = start.to(tl.int64) * 0
    else:
        start = (index % per_row).to(tl.int32) * LENGTH
        end = tl.minimum(start + LENGTH, tokens)
        row = (index // per_row).to(tl.int64)
    d = tl.multiple_of(tl.program_id(1) * BD + tl.arange(0, BD), 1)  # one channel a thread
    in_d = d < channels
    a += row * sab
    b += row * sbb
    grad += row * sgb
    state = tl.zeros((BD,), tl.float32)
    product = state + 1.0
    back = tl.zeros((BD,), tl.float32)
    for tile in range(0, LENGTH, BT):
        at = start + tile + tl.arange(0, BT)
        live = (at < end)[:, None] & in_d[None, :]
        prefix, sums = tl.associative_scan(
            (_load(a, at, d, sat, sac, live, 1.0), _load(b, at, d, sbt, sbc, live, 0.0)), 0, combine
        )
        if ADJOINT:
            dh = _load(grad, at, d, sgt, sgc, live, 0.0)
            back += product * tl.sum(tl.where(live, prefix * dh, 0.0), 0)
        state = last_row(prefix * state[None, :] + sums, BT)
        product = product * last_row(prefix, BT)
    where = index.to(tl.int64) * channels + d
    tl.store(local + where, state, mask=in_d)
    tl.store(decay + where, product, mask=in_d)
    if ADJOINT:
        tl.store(adjoint + where, back, mask=in_d)


@tuned(
    ("channels",),
    {"BD": 128, "warps": 4},
    {"BD": 64, "warps": 2},
    {"BD": 32, "warps": 1},
)
@triton.jit(do_not_specialize=["sat", "sbt"])
def outputs(
    a, b, starts, h, table, tokens, per_row, channels, sab, sat, sac, sbb, sbt, sbc,
    PACKED: tl.constexpr, LENGTH: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """h (b, t, d) contiguous, from what enters each chunk."""
    index = tl.program_id(0)
    if PACKED:
        start = tl.load(table + index * 4 + 1)
        end = tl.load(table + index * 4 + 2)
        row = start.to(tl.int64) * 0
    else:
        start = (index % per_row).to(tl.int32) * LENGTH
        end = tl.minimum(start + LENGTH, tokens)
        row = (index // per_row).to(tl.int64)
    d = tl.multiple_of(tl.program_id(1) * BD + tl.arange(0, BD), 1)  # one channel a thread
    in_d = d < channels
    a += row * sab
    b += row * sbb
    state = tl.load(starts + index.to(tl.int64) * channels + d, mask=in_d, other=0.0)
    for tile in range(0, LENGTH, BT):
        at = start + tile + tl.arange(0, BT)
        live = (at < end)[:, None] & in_d[None, :]
        prefix, sums = tl.associative_scan(
            (_load(a, at, d, sat, sac, live, 1.0), _load(b, at, d, sbt, sbc, live, 0.0)), 0, combine
        )
        made = prefix * state[None, :] + sums
        where = (row * tokens + at)[:, None] * channels + d[None, :]
        tl.store(h + where, made.to(h.dtype.element_ty), mask=live)
        state = last_row(made, BT)


@tuned(
    ("channels",),
    {"BD": 128, "warps": 4},
    {"BD": 64, "warps": 2},
    {"BD": 32, "warps": 1},
)
@triton.jit(do_not_specialize=["sat", "sbt", "sgt"])
def backward(
    a, b, grad, starts, leaving, da, db, table, tokens, per_row, channels,
    sab, sat, sac, sbb, sbt, sbc, sgb, sgt, sgc,
    PACKED: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """g[t] = dh[t] + a[t+1] g[t+1]; db = g, da = g h[t-1]; a chunk is one tile of BT tokens."""
    index = tl.program_id(0)
    if PACKED:
        start = tl.load(table + index * 4 + 1)
        end = tl.load(table + index * 4 + 2)
        row = start.to(tl.int64) * 0
    else:
        start = (index % per_row).to(tl.int32) * BT
        end = tl.minimum(start + BT, tokens)
        row = (index // per_row).to(tl.int64)
    d = tl.multiple_of(tl.program_id(1) * BD + tl.arange(0, BD), 1)  # one channel a thread
    in_d = d < channels
    a += row * sab
    at = start + tl.arange(0, BT)
    live = (at < end)[:, None] & in_d[None, :]
    edge = index.to(tl.int64) * channels + d
    enters = tl.load(starts + edge, mask=in_d, other=0.0)
    leaves = tl.load(leaving + edge, mask=in_d, other=0.0)
    seen = (at > start)[:, None] & live
    before, sums = tl.associative_scan(
        (
            _load(a, at - 1, d, sat, sac, seen, 1.0),
            _load(b + row * sbb, at - 1, d, sbt, sbc, seen, 0.0),
        ),
        0,
        combine,
    )
    held = before * enters[None, :] + sums
    seen = (at + 1 < end)[:, None] & live
    after, back = scan_back(
        _load(a, at + 1, d, sat, sac, seen, 1.0),
        _load(grad + row * sgb, at, d, sgt, sgc, live, 0.0),
    )
    g = after * leaves[None, :] + back
    where = (row * tokens + at)[:, None] * channels + d[None, :]
    tl.store(db + where, g.to(db.dtype.element_ty), mask=live)
    tl.store(da + where, (g * held).to(da.dtype.element_ty), mask=live)
