"""The causal convolution: tiles of (tokens, channels), every tap read where it lies.

Taps of one tile overlap in cache, so memory is read about once. Strides of tokens and channels are
arguments: channel-last and channel-first run the same code, and the compiler reads along whichever
is 1.
"""

import triton
import triton.language as tl

from effpass.lowering.gpu.kernels.activations import sigmoid
from effpass.lowering.gpu.kernels.tuning import tuned


@triton.jit
def _tap(
    x, init, at, begin, live, in_c, c, sxt, sxc, sic, siw, W: tl.constexpr, INIT: tl.constexpr
):
    """x at tokens ``at`` (BT,); before ``begin`` the initial state, or zero."""
    inside = (at >= begin) & live
    where = at.to(tl.int64)[:, None] * sxt + c[None, :] * sxc
    value = tl.load(x + where, mask=inside[:, None] & in_c[None, :], other=0.0).to(tl.float32)
    if INIT:
        if tl.min(at, 0) < begin:  # only the first tile of a sequence
            slot = at - begin + (W - 1)
            old = ((at < begin) & (slot >= 0) & live)[:, None] & in_c[None, :]
            kept = slot[:, None] * siw + c[None, :] * sic
            value += tl.load(init + kept, mask=old, other=0.0).to(tl.float32)
    return value


@triton.jit
def _pre(
    x, weight, bias, init, at, begin, live, in_c, c, sxt, sxc, sic, siw,
    W: tl.constexpr, INIT: tl.constexpr, BIAS: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The convolution at tokens ``at``, before the activation, in float32."""
    made = tl.zeros((BT, BC), tl.float32)
    if BIAS:
        made += tl.load(bias + c, mask=in_c, other=0.0).to(tl.float32)[None, :]
    for j in tl.static_range(W):
        w = tl.load(weight + c * W + (W - 1 - j), mask=in_c, other=0.0).to(tl.float32)
        tap = _tap(x, init, at - j, begin, live, in_c, c, sxt, sxc, sic, siw, W, INIT)
        made += w[None, :] * tap
    return made


@tuned(
    ("channels", "sxc", "W"),
    {"BC": 64, "warps": 4},
    {"BC": 128, "warps": 4},
    {"BC": 32, "warps": 2},
)
@triton.jit
def forward(
    x, weight, bias, init, y, table, tokens, per_row, channels, sxb, sxt, sxc,
    W: tl.constexpr, INIT: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr,
    PACKED: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """y (b, t, c) contiguous; one program a chunk of BT tokens and BC channels."""
    if PACKED:
        sequence = tl.load(table + tl.program_id(0) * 4)
        start = tl.load(table + tl.program_id(0) * 4 + 1)
        end = tl.load(table + tl.program_id(0) * 4 + 2)
        begin = tl.load(table + tl.program_id(0) * 4 + 3)
        row = start.to(tl.int64) * 0
    else:
        start = (tl.program_id(0) % per_row).to(tl.int32) * BT
        end = tl.minimum(start + BT, tokens)
        row = (tl.program_id(0) // per_row).to(tl.int64)
        sequence = (tl.program_id(0) // per_row).to(tl.int32)
        begin = start * 0
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    in_c = c < channels
    at = start + tl.arange(0, BT)
    live = at < end
    init += sequence.to(tl.int64) * channels * (W - 1)
    made = _pre(
        x + row * sxb, weight, bias, init, at, begin, live, in_c, c, sxt, sxc, W - 1, 1,
        W, INIT, BIAS, BT, BC,
    )  # fmt: skip
    if SILU:
        made = made * sigmoid(made)
    where = (row * tokens + at)[:, None] * channels + c[None, :]
    tl.store(y + where, made.to(y.dtype.element_ty), mask=live[:, None] & in_c[None, :])


@triton.jit
def final_state(
    x, init, final, offsets, tokens, channels, sxb, sxt, sxc,
    W: tl.constexpr, INIT: tl.constexpr, PACKED: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The last W - 1 tokens (s, c, W - 1); one program a sequence and BC channels."""
    sequence = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    in_c = c < channels
    if PACKED:
        begin = tl.minimum(tl.maximum(tl.load(offsets + sequence), 0), tokens)
        end = tl.minimum(tl.maximum(tl.load(offsets + sequence + 1), begin), tokens)
    else:
        begin = tokens * 0
        end = tokens
    if not PACKED:
        x += sequence * sxb
    k = tl.arange(0, BW)
    live = k < W - 1
    init += sequence * channels * (W - 1)
    value = _tap(x, init, end - (W - 1) + k, begin, live, in_c, c, sxt, sxc, W - 1, 1, W, INIT)
    where = (sequence * channels + c)[None, :] * (W - 1) + k[:, None]
    tl.store(final + where, value.to(final.dtype.element_ty), mask=live[:, None] & in_c[None, :])


@tuned(
    ("channels", "sxc", "W"),
    {"BC": 64, "warps": 4},
    {"BC": 128, "warps": 4},
    {"BC": 32, "warps": 2},
)
@triton.jit
def gradient_before(
    x, weight, bias, init, grad, before, table, tokens, per_row, channels,
    sxb, sxt, sxc, sgb, sgt, sgc,
    W: tl.constexpr, INIT: tl.constexpr, BIAS: tl.constexpr, PACKED: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The gradient before the SiLU (b, t, c), float32; one program a chunk of BT tokens."""
    if PACKED:
        sequence = tl.load(table + tl.program_id(0) * 4)
        start = tl.load(table + tl.program_id(0) * 4 + 1)
        end = tl.load(table + tl.program_id(0) * 4 + 2)
        begin = tl.load(table + tl.program_id(0) * 4 + 3)
        row = start.to(tl.int64) * 0
    else:
        start = (tl.program_id(0) % per_row).to(tl.int32) * BT
        end = tl.minimum(start + BT, tokens)
        row = (tl.program_id(0) // per_row).to(tl.int64)
        sequence = (tl.program_id(0) // per_row).to(tl.int32)
        begin = start * 0
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    in_c = c < channels
    at = start + tl.arange(0, BT)
    live = at < end
    init += sequence.to(tl.int64) * channels * (W - 1)
    pre = _pre(
        x + row * sxb, weight, bias, init, at, begin, live, in_c, c, sxt, sxc, W - 1, 1,
        W, INIT, BIAS, BT, BC,
    )  # fmt: skip
    s = sigmoid(pre)
    kept = live[:, None] & in_c[None, :]
    where = row * sgb + at.to(tl.int64)[:, None] * sgt + c[None, :] * sgc
    dy = tl.load(grad + where, mask=kept, other=0.0).to(tl.float32)
    made = dy * (s * (1.0 + pre * (1.0 - s)))
    tl.store(before + (row * tokens + at)[:, None] * channels + c[None, :], made, mask=kept)


@triton.jit
def _ahead(grad, at, seen, in_c, c, sgt, sgc):
    where = at.to(tl.int64)[:, None] * sgt + c[None, :] * sgc
    return tl.load(grad + where, mask=seen[:, None] & in_c[None, :], other=0.0).to(tl.float32)


@tuned(
    ("channels", "sxc", "W"),
    {"BC": 64, "warps": 4},
    {"BC": 128, "warps": 4},
    {"BC": 32, "warps": 2},
)
@triton.jit
def backward(
    x, weight, init, grad, grad_final, dx, dweight, dbias, table, offsets, tokens, per_row,
    channels, sxb, sxt, sxc, sgb, sgt, sgc,
    W: tl.constexpr, INIT: tl.constexpr, BIAS: tl.constexpr, PACKED: tl.constexpr,
    LENGTH: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    """dx (b, t, c), and of this chunk dweight (chunks, c, W) and dbias (chunks, c).

    ``grad`` is the gradient before the activation.
    """
    index = tl.program_id(0)
    if PACKED:
        sequence = tl.load(table + index * 4)
        start = tl.load(table + index * 4 + 1)
        end = tl.load(table + index * 4 + 2)
        begin = tl.load(table + index * 4 + 3)
        row = start.to(tl.int64) * 0
    else:
        start = (index % per_row).to(tl.int32) * LENGTH
        end = tl.minimum(start + LENGTH, tokens)
        row = (index // per_row).to(tl.int64)
        sequence = (index // per_row).to(tl.int32)
        begin = start * 0
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    in_c = c < channels
    stop = tokens
    if PACKED:
        stop = tl.minimum(tl.maximum(tl.load(offsets + sequence + 1), begin), tokens)
    x += row * sxb
    grad += row * sgb
    init += sequence.to(tl.int64) * channels * (W - 1)
    grad_final += sequence.to(tl.int64) * channels * (W - 1)
    taps = tl.arange(0, BW)
    dw = tl.zeros((BW, BC), tl.float32)
    db = tl.zeros((BC,), tl.float32)
    for tile in range(0, LENGTH, BT):
        at = start + tile + tl.arange(0, BT)
        live = at < end
        made = tl.zeros((BT, BC), tl.float32)
        for j in tl.static_range(W):
            dpre = _ahead(grad, at + j, live & (at + j < stop), in_c, c, sgt, sgc)
            w = tl.load(weight + c * W + (W - 1 - j), mask=in_c, other=0.0).to(tl.float32)
            made += w[None, :] * dpre
            if j == 0:
                db += tl.sum(dpre, 0)
                for k in tl.static_range(W):
                    tap = _tap(x, init, at - k, begin, live, in_c, c, sxt, sxc, W - 1, 1, W, INIT)
                    part = tl.sum(dpre * tap, 0)
                    dw += tl.where((taps == W - 1 - k)[:, None], part[None, :], 0.0)
        slot = at - stop + (W - 1)
        kept = (live & (slot >= 0))[:, None] & in_c[None, :]
        where = c[None, :] * (W - 1) + slot[:, None]
        made += tl.load(grad_final + where, mask=kept, other=0.0).to(tl.float32)
        where = (row * tokens + at)[:, None] * channels + c[None, :]
        tl.store(dx + where, made.to(dx.dtype.element_ty), mask=live[:, None] & in_c[None, :])
    base = index.to(tl.int64) * channels + c
    tl.store(
        dweight + base[None, :] * W + taps[:, None], dw, mask=(taps < W)[:, None] & in_c[None, :]
    )
    if BIAS:
        tl.store(dbias + base, db, mask=in_c)


@triton.jit
def backward_init(
    weight, grad, grad_final, dinit, offsets, tokens, channels, sgb, sgt, sgc,
    W: tl.constexpr, PACKED: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """The gradient of the initial state (s, c, W - 1), which the first W - 1 tokens read."""
    sequence = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    in_c = c < channels
    if PACKED:
        begin = tl.minimum(tl.maximum(tl.load(offsets + sequence), 0), tokens)
        end = tl.minimum(tl.maximum(tl.load(offsets + sequence + 1), begin), tokens)
    else:
        begin = tokens * 0
        end = tokens
    if not PACKED:
        grad += sequence * sgb
    k = tl.arange(0, BW)
    live = k < W - 1
    at = begin - (W - 1) + k
    made = tl.zeros((BW, BC), tl.float32)
    for j in tl.static_range(W):
        seen = live & (at + j >= begin) & (at + j < end)
        dpre = _ahead(grad, at + j, seen, in_c, c, sgt, sgc)
        w = tl.load(weight + c * W + (W - 1 - j), mask=in_c, other=0.0).to(tl.float32)
        made += w[None, :] * dpre
    slot = at - end + (W - 1)
    kept = (live & (slot >= 0) & (slot < W - 1))[:, None] & in_c[None, :]
    where = (sequence * channels + c)[None, :] * (W - 1)
    made += tl.load(grad_final + where + slot[:, None], mask=kept, other=0.0).to(tl.float32)
    tl.store(dinit + where + k[:, None], made, mask=live[:, None] & in_c[None, :])


@tuned(
    ("channels", "W"),
    {"BC": 128, "warps": 4},
    {"BC": 64, "warps": 2},
    {"BC": 256, "warps": 4},
)
@triton.jit
def update(
    x, weight, bias, init, y, final, channels, sxb, sxc,
    W: tl.constexpr, INIT: tl.constexpr, BIAS: tl.constexpr, SILU: tl.constexpr, BW: tl.constexpr,
    BC: tl.constexpr,
):  # fmt: skip
    """One token of every row: y (b, 1, c) and the last W - 1 tokens after it (b, c, W - 1)."""
    row = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    k = tl.arange(0, BW)
    in_c = c < channels
    taps = in_c[:, None] & (k < W)[None, :]
    before = in_c[:, None] & (k < W - 1)[None, :]
    where = (row * channels + c)[:, None] * (W - 1) + k[None, :]
    token = tl.load(x + row * sxb + c * sxc, mask=in_c, other=0.0).to(tl.float32)
    window = tl.where((k == W - 1)[None, :], token[:, None], 0.0)
    if INIT:
        window += tl.load(init + where, mask=before, other=0.0).to(tl.float32)
    w = tl.load(weight + c[:, None] * W + k[None, :], mask=taps, other=0.0).to(tl.float32)
    made = tl.sum(window * w, 1)
    if BIAS:
        made += tl.load(bias + c, mask=in_c, other=0.0).to(tl.float32)
    if SILU:
        made = made * sigmoid(made)
    tl.store(y + row * channels + c, made.to(y.dtype.element_ty), mask=in_c)
    moved = in_c[:, None] & ((k > 0) & (k < W))[None, :]
    tl.store(final + where - 1, window.to(final.dtype.element_ty), mask=moved)
