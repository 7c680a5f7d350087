"""Packed attention without the matrix of weights (Dao 2023, FlashAttention-2, arXiv 2307.08691).

A program takes a tile of queries (or of keys) of one sequence and walks over the keys (or queries)
that can see it. Scores, sums and weights are float32; operands of products are in the storage dtype
where q, k and v share a narrow one, else float32 without TF32. Tiles that causality or a window
hides whole are skipped, where positions are indices.
"""

import triton
import triton.language as tl

from effpass.lowering.gpu.kernels.activations import sigmoid
from effpass.lowering.gpu.kernels.tuning import tuned

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _product(a, b, like, HALF: tl.constexpr):
    if HALF:
        return tl.dot(a.to(like.dtype.element_ty), b.to(like.dtype.element_ty))
    return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")


@triton.jit
def _tile(pointer, at, head, st, sh, sd, live, d, width):
    where = at.to(tl.int64)[:, None] * st + head * sh + d[None, :] * sd
    return tl.load(pointer + where, mask=live[:, None] & (d < width)[None, :], other=0.0)


@triton.jit
def _places(positions, at, live, first, POSITIONS: tl.constexpr):
    """Where tokens stand, int64."""
    if POSITIONS:
        return tl.load(positions + at, mask=live, other=0)
    return (at - first).to(tl.int64)


@triton.jit
def _scores(
    q, k, bias, at_k, head, live_k, tokens_k, q_at, k_at, like, scale, softcap, left, right,
    HALF: tl.constexpr, CAP: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """Scores (queries, keys), the tanh of the soft cap, and which pairs see each other."""
    s = _product(q, tl.trans(k), like, HALF) * scale
    capped = s
    if CAP:
        capped = 2.0 * sigmoid(2.0 * s / softcap) - 1.0
        s = softcap * capped
    if BIAS == 1:
        s += tl.load(bias + at_k, mask=live_k, other=0.0).to(tl.float32)[None, :]
    if BIAS == 2:
        where = bias + head.to(tl.int64) * tokens_k + at_k
        s += tl.load(where, mask=live_k, other=0.0).to(tl.float32)[None, :]
    ahead = k_at[None, :] - q_at[:, None]
    seen = live_k[None, :] & (ahead >= -left) & (ahead <= right)
    return s, capped, seen


@triton.jit
def _keys(start, end, begin, shift, begin_k, end_k, left, right, BN: tl.constexpr,
          POSITIONS: tl.constexpr):  # fmt: skip
    """The keys that queries start to end may see, from a multiple of BN on."""
    if POSITIONS:
        return begin_k, end_k
    first = tl.maximum(begin_k, begin_k + (start - begin + shift).to(tl.int64) - left)
    last = tl.minimum(end_k, begin_k + (end - begin + shift).to(tl.int64) + right)
    first = begin_k + (first - begin_k) // BN * BN
    return first.to(tl.int32), tl.maximum(last, first).to(tl.int32)


@tuned(
    ("heads", "group", "width", "width_v", "HALF"),
    {"warps": 4, "stages": 2},
    {"warps": 8, "stages": 2},
    {"warps": 4, "stages": 3},
)
@triton.jit
def forward(
    q, k, v, bias, q_pos, k_pos, grad, out, lse, delta, table, offsets, offsets_k,
    tokens, tokens_k, group, width, width_v, scale, softcap, left, right,
    sqt, sqh, sqd, skt, skh, skd, svt, svh, svd, sgt, sgh, sgd, heads,
    DELTA: tl.constexpr, HALF: tl.constexpr, CAP: tl.constexpr, BIAS: tl.constexpr,
    POSITIONS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    BE: tl.constexpr,
):  # fmt: skip
    """out (t, h, e); or, with DELTA, the log of the sum of weights and sum dout out, (h, t)."""
    head = tl.program_id(1)
    sequence = tl.load(table + tl.program_id(0) * 4)
    start = tl.load(table + tl.program_id(0) * 4 + 1)
    end = tl.load(table + tl.program_id(0) * 4 + 2)
    begin = tl.load(table + tl.program_id(0) * 4 + 3)
    begin_q = tl.minimum(tl.maximum(tl.load(offsets + sequence), 0), tokens)
    end_q = tl.minimum(tl.maximum(tl.load(offsets + sequence + 1), begin_q), tokens)
    begin_k = tl.minimum(tl.maximum(tl.load(offsets_k + sequence), 0), tokens_k)
    end_k = tl.minimum(tl.maximum(tl.load(offsets_k + sequence + 1), begin_k), tokens_k)
    shift = (end_k - begin_k) - (end_q - begin_q)
    d, e = tl.arange(0, BD), tl.arange(0, BE)
    at = start + tl.arange(0, BM)
    live = at < end
    q_tile = _tile(q, at, head, sqt, sqh, sqd, live, d, width)
    q_at = _places(q_pos, at, live, begin - shift, POSITIONS)
    most = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    made = tl.zeros((BM, BE), tl.float32)
    first, last = _keys(start, end, begin, shift, begin_k, end_k, left, right, BN, POSITIONS)
    for tile in range(first, last, BN):
        at_k = tile + tl.arange(0, BN)
        live_k = at_k < end_k
        k_at = _places(k_pos, at_k, live_k, begin_k, POSITIONS)
        k_tile = _tile(k, at_k, head // group, skt, skh, skd, live_k, d, width)
        s, _capped, seen = _scores(
            q_tile, k_tile, bias, at_k, head, live_k, tokens_k, q_at, k_at, q, scale, softcap,
            left, right, HALF, CAP, BIAS,
        )  # fmt: skip
        s = tl.where(seen, s, float("-inf"))
        above = tl.maximum(most, tl.max(s, 1))
        safe = tl.where(above == float("-inf"), 0.0, above)
        weight = tl.exp2((s - safe[:, None]) * LOG2E)
        fade = tl.exp2((most - safe) * LOG2E)
        total = total * fade + tl.sum(weight, 1)
        v_tile = _tile(v, at_k, head // group, svt, svh, svd, live_k, e, width_v)
        made = made * fade[:, None] + _product(weight, v_tile, v, HALF)
        most = above
    none = total == 0.0
    made = made / tl.where(none, 1.0, total)[:, None]
    if DELTA:
        dy = _tile(grad, at, head, sgt, sgh, sgd, live, e, width_v).to(tl.float32)
        side = head.to(tl.int64) * tokens + at
        # where no key is seen, exp(score - infinity) is no weight
        log = tl.where(none, float("inf"), most + tl.log(tl.where(none, 1.0, total)))
        tl.store(lse + side, log, mask=live)
        tl.store(delta + side, tl.sum(dy * made, 1), mask=live)
    else:
        where = (at.to(tl.int64)[:, None] * heads + head) * width_v + e[None, :]
        tl.store(
            out + where, made.to(out.dtype.element_ty), mask=live[:, None] & (e < width_v)[None, :]
        )


@tuned(
    ("heads", "group", "width", "width_v", "HALF"),
    {"warps": 4, "stages": 2},
    {"warps": 8, "stages": 2},
    {"warps": 4, "stages": 1},
)
@triton.jit
def backward_q(
    q, k, v, bias, q_pos, k_pos, grad, lse, delta, dq, table, offsets, offsets_k,
    tokens, tokens_k, group, width, width_v, scale, softcap, left, right,
    sqt, sqh, sqd, skt, skh, skd, svt, svh, svd, sgt, sgh, sgd, heads,
    HALF: tl.constexpr, CAP: tl.constexpr, BIAS: tl.constexpr, POSITIONS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """dq (t, h, d) of one tile of queries."""
    head = tl.program_id(1)
    sequence = tl.load(table + tl.program_id(0) * 4)
    start = tl.load(table + tl.program_id(0) * 4 + 1)
    end = tl.load(table + tl.program_id(0) * 4 + 2)
    begin = tl.load(table + tl.program_id(0) * 4 + 3)
    begin_q = tl.minimum(tl.maximum(tl.load(offsets + sequence), 0), tokens)
    end_q = tl.minimum(tl.maximum(tl.load(offsets + sequence + 1), begin_q), tokens)
    begin_k = tl.minimum(tl.maximum(tl.load(offsets_k + sequence), 0), tokens_k)
    end_k = tl.minimum(tl.maximum(tl.load(offsets_k + sequence + 1), begin_k), tokens_k)
    shift = (end_k - begin_k) - (end_q - begin_q)
    d, e = tl.arange(0, BD), tl.arange(0, BE)
    at = start + tl.arange(0, BM)
    live = at < end
    q_tile = _tile(q, at, head, sqt, sqh, sqd, live, d, width)
    dy = _tile(grad, at, head, sgt, sgh, sgd, live, e, width_v)
    q_at = _places(q_pos, at, live, begin - shift, POSITIONS)
    side = head.to(tl.int64) * tokens + at
    log = tl.load(lse + side, mask=live, other=float("inf"))
    mean = tl.load(delta + side, mask=live, other=0.0)
    made = tl.zeros((BM, BD), tl.float32)
    first, last = _keys(start, end, begin, shift, begin_k, end_k, left, right, BN, POSITIONS)
    for tile in range(first, last, BN):
        at_k = tile + tl.arange(0, BN)
        live_k = at_k < end_k
        k_at = _places(k_pos, at_k, live_k, begin_k, POSITIONS)
        k_tile = _tile(k, at_k, head // group, skt, skh, skd, live_k, d, width)
        v_tile = _tile(v, at_k, head // group, svt, svh, svd, live_k, e, width_v)
        s, capped, seen = _scores(
            q_tile, k_tile, bias, at_k, head, live_k, tokens_k, q_at, k_at, q, scale, softcap,
            left, right, HALF, CAP, BIAS,
        )  # fmt: skip
        weight = tl.where(seen, tl.exp2((s - log[:, None]) * LOG2E), 0.0)
        ds = weight * (_product(dy, tl.trans(v_tile), q, HALF) - mean[:, None])
        if CAP:
            ds *= 1.0 - capped * capped
        made += _product(ds, k_tile, q, HALF)
    where = (at.to(tl.int64)[:, None] * heads + head) * width + d[None, :]
    kept = live[:, None] & (d < width)[None, :]
    tl.store(dq + where, (made * scale).to(dq.dtype.element_ty), mask=kept)


@tuned(
    ("heads", "group", "width", "width_v", "HALF"),
    {"warps": 4, "stages": 2},
    {"warps": 8, "stages": 2},
    {"warps": 4, "stages": 1},
)
@triton.jit
def backward_kv(
    q, k, v, bias, q_pos, k_pos, grad, lse, delta, dk, dv, dbias, table, offsets, offsets_k,
    tokens, tokens_k, group, width, width_v, scale, softcap, left, right,
    sqt, sqh, sqd, skt, skh, skd, svt, svh, svd, sgt, sgh, sgd, heads,
    HALF: tl.constexpr, CAP: tl.constexpr, BIAS: tl.constexpr, POSITIONS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """dk (tk, hk, d) and dv (tk, hk, e) of one tile of keys, over all its query heads; dbias
    (h, tk)."""
    head_k = tl.program_id(1)
    sequence = tl.load(table + tl.program_id(0) * 4)
    start = tl.load(table + tl.program_id(0) * 4 + 1)
    end = tl.load(table + tl.program_id(0) * 4 + 2)
    begin = tl.load(table + tl.program_id(0) * 4 + 3)
    begin_q = tl.minimum(tl.maximum(tl.load(offsets + sequence), 0), tokens)
    end_q = tl.minimum(tl.maximum(tl.load(offsets + sequence + 1), begin_q), tokens)
    begin_k = tl.minimum(tl.maximum(tl.load(offsets_k + sequence), 0), tokens_k)
    end_k = tl.minimum(tl.maximum(tl.load(offsets_k + sequence + 1), begin_k), tokens_k)
    shift = (end_k - begin_k) - (end_q - begin_q)
    d, e = tl.arange(0, BD), tl.arange(0, BE)
    at_k = start + tl.arange(0, BN)
    live_k = at_k < end
    k_tile = _tile(k, at_k, head_k, skt, skh, skd, live_k, d, width)
    v_tile = _tile(v, at_k, head_k, svt, svh, svd, live_k, e, width_v)
    k_at = _places(k_pos, at_k, live_k, begin_k, POSITIONS)
    made_k = tl.zeros((BN, BD), tl.float32)
    made_v = tl.zeros((BN, BE), tl.float32)
    # a query at p sees keys p - left to p + right: a key is seen from key - right to key + left
    first, last = _keys(start, end, begin, -shift, begin_q, end_q, right, left, BM, POSITIONS)
    for g in range(0, group):
        head = head_k * group + g
        add = tl.zeros((BN,), tl.float32)
        for tile in range(first, last, BM):
            at = tile + tl.arange(0, BM)
            live = at < end_q
            q_at = _places(q_pos, at, live, begin_q - shift, POSITIONS)
            q_tile = _tile(q, at, head, sqt, sqh, sqd, live, d, width)
            dy = _tile(grad, at, head, sgt, sgh, sgd, live, e, width_v)
            side = head.to(tl.int64) * tokens + at
            log = tl.load(lse + side, mask=live, other=float("inf"))
            mean = tl.load(delta + side, mask=live, other=0.0)
            s, capped, seen = _scores(
                q_tile, k_tile, bias, at_k, head, live_k, tokens_k, q_at, k_at, q, scale, softcap,
                left, right, HALF, CAP, BIAS,
            )  # fmt: skip
            weight = tl.where(seen, tl.exp2((s - log[:, None]) * LOG2E), 0.0)
            made_v += _product(tl.trans(weight), dy, q, HALF)
            ds = weight * (_product(dy, tl.trans(v_tile), q, HALF) - mean[:, None])
            add += tl.sum(ds, 0)
            if CAP:
                ds *= 1.0 - capped * capped
            made_k += _product(tl.trans(ds), q_tile, q, HALF)
        if BIAS > 0:
            tl.store(dbias + head.to(tl.int64) * tokens_k + at_k, add, mask=live_k)
    lines = at_k.to(tl.int64)[:, None] * (heads // group) + head_k
    kept = live_k[:, None] & (d < width)[None, :]
    tl.store(dk + lines * width + d[None, :], (made_k * scale).to(dk.dtype.element_ty), mask=kept)
    kept = live_k[:, None] & (e < width_v)[None, :]
    tl.store(dv + lines * width_v + e[None, :], made_v.to(dv.dtype.element_ty), mask=kept)
