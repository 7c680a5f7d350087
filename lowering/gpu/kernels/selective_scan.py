"""Mamba's selective scan. Decays are exp2 of steps times A log2(e), once in each pass.

``walk`` goes along the tokens of a sequence, the state (states, channels) in registers. Its tile is
(tokens, states, channels): the tokens and a share of the states lie inside a thread, so the
recurrence is one multiply-add a number, in order, as the definition has it, and few lanes share a
sum over states. ``backward`` goes the other way, tile by tile (tokens, channels), one state after
the other: forwards for h from what entered the tile, backwards for its adjoint.

What binds ``walk`` on an H200, read off its machine code; nothing of this is measured. At
1 x 8192 x 4096 with 16 states there are 5.4e8 exponentials, of which 132 processors do 16 a clock:
145 us at 1.755 GHz. x, dt, z and y in bfloat16 are 2.7e8 bytes: 65 us. So exponentials bind. With 8
channels a program there are 512 programs of one warp, for 528 schedulers: the machine is full
without cutting the row, which would cost every exponential twice. A tile of 16 tokens takes a warp
76 special functions (64 decays; softplus and gate), 608 clocks, and about 730 instructions, a clock
each: at most two thirds of the limit, less what a single warp loses while it waits.
"""

import triton
import triton.language as tl

from effpass.lowering.gpu.kernels.activations import sigmoid, softplus
from effpass.lowering.gpu.kernels.carry import combine, row_of, scan_back_before
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


@triton.jit
def _tile(pointer, row, at, d, sb, st, sd, live):
    where = row * sb + at.to(tl.int64)[:, None] * st + d[None, :] * sd
    return tl.load(pointer + where, mask=live, other=0.0).to(tl.float32)


@triton.jit
def _once(tile):
    """The same tile (rows, columns), computed once.

    Lanes that share a channel or a token need its numbers, each of them. The compiler would move
    the exchange between lanes in front of whatever can be computed again, a softplus too; it does
    not move it across a sum, here of one number.
    """
    return tl.sum(tile[None, :, :], 0)


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
    ("channels", "count", "EDGE"),
    {"BD": 8, "ROOM": 2048, "STAGES": 3, "warps": 1},
    {"BD": 8, "ROOM": 2048, "STAGES": 1, "warps": 1},
    {"BD": 16, "ROOM": 2048, "STAGES": 3, "warps": 1},
    {"BD": 32, "ROOM": 4096, "STAGES": 3, "warps": 1},
    interpreted={"BD": 32, "ROOM": 1 << 16, "STAGES": 1},
)
@triton.jit(do_not_specialize=["length", "sxt", "sdt", "szt"])
def walk(
    x, dt, A, B, C, D, z, bias, starts, y, final, edges, table, tokens, per_row, length, channels,
    count, sxb, sxt, sxd, sdb, sdt, sdd, sBb, sBt, sBn, sCb, sCt, sCn, szb, szt, szd,
    SKIP: tl.constexpr, GATE: tl.constexpr, BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
    START: tl.constexpr, FINAL: tl.constexpr, EDGE: tl.constexpr, PACKED: tl.constexpr,
    BN: tl.constexpr, BD: tl.constexpr, ROOM: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y (b, t, d) contiguous and, with FINAL, the state (s, d, n) behind the last token.

    With EDGE the state in front of every EDGE tokens (slots, n, d) instead of y: of token ``at`` in
    sequence s, slot s ceil(tokens / EDGE) + at // EDGE in plain rows, at // EDGE + s in packed
    ones. START: what enters is nothing (""), ``starts`` (s, d, n) ("sequences") or (chunks, n, d)
    ("chunks"). ROOM / (BN BD) tokens, at most 16
    or EDGE, are a tile.
    """
    MOST: tl.constexpr = EDGE if EDGE else 16  # type: ignore
    BT: tl.constexpr = MOST if ROOM // (BN * BD) > MOST else ROOM // (BN * BD)
    index = tl.program_id(0)
    if PACKED:
        sequence = tl.load(table + index * 4)
        start = tl.load(table + index * 4 + 1)
        end = tl.load(table + index * 4 + 2)
        row = start.to(tl.int64) * 0
    else:
        sequence = (index // per_row).to(tl.int32)
        start = ((index % per_row) * length).to(tl.int32)
        end = tl.minimum(start + length, tokens).to(tl.int32)
        row = sequence.to(tl.int64)
    d = tl.program_id(1) * BD + tl.arange(0, BD)
    n = tl.arange(0, BN)
    in_d = d < channels
    in_n = n < count
    kept = in_n[:, None] & in_d[None, :]
    side = n[:, None] * channels + d[None, :]
    across = d[None, :] * count + n[:, None]
    rates = tl.load(A + across, mask=kept, other=0.0).to(tl.float32) * LOG2E
    state = tl.zeros((BN, BD), tl.float32)
    if START == "sequences":
        begin = sequence.to(tl.int64) * count * channels
        state += tl.load(starts + begin + across, mask=kept, other=0.0).to(tl.float32)
    if START == "chunks":
        begin = index.to(tl.int64) * count * channels
        state += tl.load(starts + begin + side, mask=kept, other=0.0)
    shift = tl.zeros((BD,), tl.float32)
    skip = tl.zeros((BD,), tl.float32)
    if BIAS:
        shift += tl.load(bias + d, mask=in_d, other=0.0).to(tl.float32)
    if SKIP and not EDGE:
        skip += tl.load(D + d, mask=in_d, other=0.0).to(tl.float32)
    i = tl.arange(0, BT)
    for tile in tl.range(start, end, BT, num_stages=STAGES):
        if EDGE:
            if (tile - start) % EDGE == 0:
                slot = tile // EDGE + sequence
                if not PACKED:
                    slot = sequence * ((tokens + EDGE - 1) // EDGE) + tile // EDGE
                tl.store(edges + slot.to(tl.int64) * count * channels + side, state, mask=kept)
        at = tile + i
        in_t = at < end
        live = in_t[:, None] & in_d[None, :]
        step = _step(_tile(dt, row, at, d, sdb, sdt, sdd, live), shift[None, :], SOFTPLUS)
        step = _once(tl.where(live, step, 0.0))
        value = _tile(x, row, at, d, sxb, sxt, sxd, live)
        b = _once(_tile(B, row, at, n, sBb, sBt, sBn, in_t[:, None] & in_n[None, :]))
        decay = tl.exp2(step[:, None, :] * rates[None, :, :])
        added = (step * value)[:, None, :] * b[:, :, None]
        added = tl.where((i == 0)[:, None, None], decay * state[None, :, :] + added, added)
        _decay, states = tl.associative_scan((decay, added), 0, combine)
        state = row_of(states, (i == BT - 1)[:, None, None])
        if not EDGE:
            c = _once(_tile(C, row, at, n, sCb, sCt, sCn, in_t[:, None] & in_n[None, :]))
            made = tl.sum(states * c[:, :, None], 1)
            if SKIP:
                made += skip[None, :] * value
            if GATE:
                gate = _tile(z, row, at, d, szb, szt, szd, live)
                made *= gate * sigmoid(gate)
            where = (row * tokens + at)[:, None] * channels + d[None, :]
            tl.store(y + where, made.to(y.dtype.element_ty), mask=live)
    if FINAL:
        where = sequence.to(tl.int64) * count * channels + across
        tl.store(final + where, state, mask=kept)


@triton.jit
def _channels(tile, BT: tl.constexpr, BW: tl.constexpr, BD: tl.constexpr):
    """(BT, channels) as (BT, 1, BW, 1, BD / BW): BW groups of channels, one a warp."""
    return tl.reshape(tile, (BT, BW, BD // BW))[:, None, :, None, :]


@triton.jit
def _by_state(tile, BT: tl.constexpr, BN: tl.constexpr, BL: tl.constexpr):
    """(BT, states) as (BT, BN / BL, 1, BL, 1): BL neighbours in lanes."""
    return tl.reshape(tile, (BT, BN // BL, BL))[:, :, None, :, None]


@triton.jit
def _over_states(tile, BT: tl.constexpr, BD: tl.constexpr):
    """Sums over states: (BT, channels)."""
    return tl.reshape(tl.sum(tl.sum(tile, 1), 2), (BT, BD))


@triton.jit
def _over_channels(tile, BT: tl.constexpr, BN: tl.constexpr):
    """Sums over channels: (BT, states)."""
    return tl.reshape(tl.sum(tl.sum(tile, 4), 2), (BT, BN))


@triton.jit(do_not_specialize=["length", "sxt", "sdt", "szt", "sgt"])
def backward(
    x, dt, A, B, C, D, z, bias, grad, edges, leaving, entering, dx, ddt, dz, dA, dB, dC, dD, dbias,
    table, tokens, per_row, length, channels, count, rows,
    sxb, sxt, sxd, sdb, sdt, sdd, sBb, sBt, sBn, sCb, sCt, sCn, szb, szt, szd, sgb, sgt, sgd,
    SKIP: tl.constexpr, GATE: tl.constexpr, BIAS: tl.constexpr, SOFTPLUS: tl.constexpr,
    PACKED: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr, BL: tl.constexpr, BW: tl.constexpr,
    BD: tl.constexpr,
):  # fmt: skip
    """All gradients of one chunk and BD channels, tile by tile of BT tokens, the last one first.

    ``edges`` (slots, n, d): the state in front of each tile, where ``walk`` puts it. ``leaving``,
    ``entering`` (chunks, n, d): the gradient of what leaves a chunk, given, and of what enters it.
    dx, ddt, dz (b, t, d); summed later: dA (chunks, n, d), dD and dbias (chunks, d), dB and dC
    (blocks of channels, b t, n); ``rows`` is b t. A tile is (tokens, states / BL, BW, BL, BD / BW):
    a warp has the channels of one group, its lanes BL states of each.
    """
    index = tl.program_id(0)
    if PACKED:
        sequence = tl.load(table + index * 4)
        start = tl.load(table + index * 4 + 1)
        end = tl.load(table + index * 4 + 2)
        row = start.to(tl.int64) * 0
    else:
        sequence = (index // per_row).to(tl.int32)
        start = ((index % per_row) * length).to(tl.int32)
        end = tl.minimum(start + length, tokens).to(tl.int32)
        row = sequence.to(tl.int64)
    block = tl.program_id(1)
    d = block * BD + tl.arange(0, BD)
    n = tl.arange(0, BN)
    in_d, in_n = d < channels, n < count
    i = tl.arange(0, BT)
    # states and channels as axes 1 to 4 of a tile have them
    deep = tl.reshape(n, (BN // BL, BL))[:, None, :, None]
    wide = tl.reshape(d, (BW, BD // BW))[None, :, None, :]
    kept = (deep < count) & (wide < channels)
    side = deep * channels + wide
    edge = index.to(tl.int64) * count * channels
    rates = tl.load(A + wide * count + deep, mask=kept, other=0.0).to(tl.float32)
    passed = tl.load(leaving + edge + side, mask=kept, other=0.0)
    shift = tl.zeros((BD,), tl.float32)
    skip = tl.zeros((BD,), tl.float32)
    if BIAS:
        shift += tl.load(bias + d, mask=in_d, other=0.0).to(tl.float32)
    if SKIP:
        skip += tl.load(D + d, mask=in_d, other=0.0).to(tl.float32)
    made_A = tl.zeros((BN // BL, BW, BL, BD // BW), tl.float32)
    made_skip = tl.zeros((BD,), tl.float32)
    made_bias = tl.zeros((BD,), tl.float32)
    tiles = (tl.maximum(end - start, 0) + BT - 1) // BT
    for done in range(0, tiles):
        tile = start + (tiles - 1 - done) * BT
        slot = tile // BT + sequence
        if not PACKED:
            slot = sequence * ((tokens + BT - 1) // BT) + tile // BT
        enters = tl.load(edges + slot.to(tl.int64) * count * channels + side, mask=kept, other=0.0)
        at = tile + i
        in_t = at < end
        live = in_t[:, None] & in_d[None, :]
        known = in_t[:, None] & in_n[None, :]
        raw = _tile(dt, row, at, d, sdb, sdt, sdd, live) + shift[None, :]
        step = raw
        if SOFTPLUS:
            step = softplus(raw)
        step = _once(tl.where(live, step, 0.0))
        value = _tile(x, row, at, d, sxb, sxt, sxd, live)
        given = _tile(grad, row, at, d, sgb, sgt, sgd, live)
        dy = given
        if GATE:
            gate = _tile(z, row, at, d, szb, szt, szd, live)
            s = sigmoid(gate)
            dy *= gate * s
        dy = _once(dy)
        b = _by_state(_once(_tile(B, row, at, n, sBb, sBt, sBn, known)), BT, BN, BL)
        c = _by_state(_once(_tile(C, row, at, n, sCb, sCt, sCn, known)), BT, BN, BL)
        steps = _channels(step, BT, BW, BD)
        fed = _channels(step * value, BT, BW, BD)
        asked = _channels(dy, BT, BW, BD)
        decay = tl.exp2(steps * (rates * LOG2E)[None, :, :, :, :])
        added = fed * b
        first = (i == 0)[:, None, None, None, None]
        held = tl.where(first, decay * enters[None, :, :, :, :] + added, added)
        _decay, state = tl.associative_scan((decay, held), 0, combine)
        dC_here = _over_channels(asked * state, BT, BN)
        if GATE:
            made = _over_states(state * c, BT, BD)
        last = (i == BT - 1)[:, None, None, None, None]
        wanted = tl.where(last, asked * c + passed[None, :, :, :, :], asked * c)
        back, behind = scan_back_before(decay, decay * wanted)
        passed = row_of(back, first)
        g = wanted + behind
        through = g * (state - added)
        made_A += tl.sum(through * steps, 0)
        fed_grad = _over_states(g * b, BT, BD)
        step_grad = _over_states(through * rates[None, :, :, :, :], BT, BD)
        dB_here = _over_channels(g * fed, BT, BN)
        lines = row * tokens + at
        sums = ((block.to(tl.int64) * rows + lines) * count)[:, None] + n[None, :]
        tl.store(dB + sums, dB_here, mask=known)
        tl.store(dC + sums, dC_here, mask=known)
        value_grad = step * fed_grad + dy * skip[None, :]
        step_grad += value * fed_grad
        if SOFTPLUS:
            step_grad *= sigmoid(raw)
        step_grad = tl.where(live, step_grad, 0.0)
        made_skip += tl.sum(dy * value, 0)
        made_bias += tl.sum(step_grad, 0)
        where = lines[:, None] * channels + d[None, :]
        tl.store(dx + where, value_grad.to(dx.dtype.element_ty), mask=live)
        tl.store(ddt + where, step_grad.to(ddt.dtype.element_ty), mask=live)
        if GATE:
            made += skip[None, :] * value
            gate_grad = given * made * (s * (1.0 + gate * (1.0 - s)))
            tl.store(dz + where, gate_grad.to(dz.dtype.element_ty), mask=live)
    tl.store(entering + edge + side, passed, mask=kept)
    tl.store(dA + edge + side, made_A, mask=kept)
    sums = index.to(tl.int64) * channels + d
    if SKIP:
        tl.store(dD + sums, made_skip, mask=in_d)
    if BIAS:
        tl.store(dbias + sums, made_bias, mask=in_d)


@tuned(
    ("channels", "count"),
    {"BD": 64, "warps": 4},
    {"BD": 32, "warps": 4},
    {"BD": 16, "warps": 2},
)
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
