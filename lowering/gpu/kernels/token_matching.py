"""The most similar partner of each token, tile by tile: no matrix of similarities is kept."""

import triton
import triton.language as tl


@triton.jit
def _unit(pointer, at, st, sd, live, width, BN: tl.constexpr, BD: tl.constexpr):
    """1 / length of tokens ``at``; 0 for a token of zeros."""
    total = tl.zeros((BN,), tl.float32)
    for first in range(0, width, BD):
        d = first + tl.arange(0, BD)
        where = at.to(tl.int64)[:, None] * st + d[None, :] * sd
        value = tl.load(pointer + where, mask=live[:, None] & (d < width)[None, :], other=0.0)
        total += tl.sum(value.to(tl.float32) * value.to(tl.float32), 1)
    return tl.where(total > 0.0, 1.0 / tl.sqrt(tl.where(total > 0.0, total, 1.0)), 0.0)


@triton.jit
def best(
    a, b, score, index, count_a, count_b, width, sab, sat, sad, sbb, sbt, sbd,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """score and index (b, m): the largest cosine of each a[m] with b[k], and its first k."""
    row = tl.program_id(0).to(tl.int64)
    a += row * sab
    b += row * sbb
    at = tl.program_id(1) * BM + tl.arange(0, BM)
    live = at < count_a
    most = tl.full((BM,), float("-inf"), tl.float32)
    found = tl.zeros((BM,), tl.int64)
    length = _unit(a, at, sat, sad, live, width, BM, BD)
    for first in range(0, count_b, BN):
        other = first + tl.arange(0, BN)
        live_b = other < count_b
        made = tl.zeros((BM, BN), tl.float32)
        for start in range(0, width, BD):
            d = start + tl.arange(0, BD)
            in_d = (d < width)[None, :]
            where = at.to(tl.int64)[:, None] * sat + d[None, :] * sad
            x = tl.load(a + where, mask=live[:, None] & in_d, other=0.0).to(tl.float32)
            where = other.to(tl.int64)[:, None] * sbt + d[None, :] * sbd
            y = tl.load(b + where, mask=live_b[:, None] & in_d, other=0.0).to(tl.float32)
            made += tl.dot(x, tl.trans(y), input_precision="ieee")
        made *= length[:, None] * _unit(b, other, sbt, sbd, live_b, width, BN, BD)[None, :]
        made = tl.where(live_b[None, :], made, float("-inf"))
        top = tl.max(made, 1)
        # the first of equal ones
        place = tl.min(tl.where(made == top[:, None], other[None, :], 2147483647), 1)
        better = top > most
        found = tl.where(better, place.to(tl.int64), found)
        most = tl.where(better, top, most)
    side = row * count_a + at
    tl.store(score + side, most, mask=live)
    tl.store(index + side, found, mask=live)
