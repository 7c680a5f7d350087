"""The most similar partner of each token, tile by tile: no matrix of similarities is kept."""

import triton
import triton.language as tl

from effpass.lowering.gpu.kernels.tuning import tuned


@triton.jit
def _part(pointer, at, d, st, sd, live, width):
    where = at.to(tl.int64)[:, None] * st + d[None, :] * sd
    return tl.load(pointer + where, mask=live[:, None] & (d < width)[None, :], other=0.0)


@triton.jit
def _unit(pointer, at, st, sd, live, width, BN: tl.constexpr, BD: tl.constexpr):
    """1 / length of tokens ``at``, which is at least 1e-12."""
    total = tl.zeros((BN,), tl.float32)
    for first in range(0, width, BD):
        value = _part(pointer, at, first + tl.arange(0, BD), st, sd, live, width).to(tl.float32)
        total += tl.sum(value * value, 1)
    length = tl.sqrt(total)
    return 1.0 / tl.where(length < 1e-12, 1e-12, length)


@tuned(
    ("width", "LATER", "HALF"),
    {"BM": 64, "BN": 64, "warps": 4, "stages": 2},
    {"BM": 128, "BN": 64, "warps": 8, "stages": 2},
    {"BM": 32, "BN": 64, "warps": 4, "stages": 2},
)
@triton.jit
def best(
    a, b, open, a_at, b_at, score, index, count_a, count_b, width, sab, sat, sad, sbb, sbt, sbd,
    LATER: tl.constexpr, HALF: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """score and index (b, s): the largest cosine of each a[s] with an open b[t], and its first t.

    -inf and 0 where none is open; with LATER only those count that stand behind the source.
    """
    row = tl.program_id(0).to(tl.int64)
    a += row * sab
    b += row * sbb
    at = tl.program_id(1) * BM + tl.arange(0, BM)
    live = at < count_a
    place = tl.load(a_at + row * count_a + at, mask=live, other=0)
    most = tl.full((BM,), float("-inf"), tl.float32)
    found = tl.zeros((BM,), tl.int64)
    length = _unit(a, at, sat, sad, live, width, BM, BD)
    for first in range(0, count_b, BN):
        other = first + tl.arange(0, BN)
        live_b = other < count_b
        made = tl.zeros((BM, BN), tl.float32)
        for start in range(0, width, BD):
            d = start + tl.arange(0, BD)
            x = _part(a, at, d, sat, sad, live, width)
            y = _part(b, other, d, sbt, sbd, live_b, width)
            if HALF:
                made = tl.dot(x, tl.trans(y), made)
            else:
                y = tl.trans(y.to(tl.float32))
                made = tl.dot(x.to(tl.float32), y, made, input_precision="ieee")
        made *= length[:, None] * _unit(b, other, sbt, sbd, live_b, width, BN, BD)[None, :]
        side = row * count_b + other
        seen = (tl.load(open + side, mask=live_b, other=0) != 0)[None, :] & (made == made)
        if LATER:
            seen &= tl.load(b_at + side, mask=live_b, other=0)[None, :] > place[:, None]
        made = tl.where(seen, made, float("-inf"))
        top = tl.max(made, 1)
        # the first of equal ones
        at_top = tl.min(tl.where(made == top[:, None], other[None, :], 2147483647), 1)
        better = top > most
        found = tl.where(better, at_top.to(tl.int64), found)
        most = tl.where(better, top, most)
    side = row * count_a + at
    tl.store(score + side, most, mask=live)
    tl.store(index + side, found, mask=live)
