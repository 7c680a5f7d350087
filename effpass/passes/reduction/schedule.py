"""After which blocks tokens leave, and how many, so that a wanted share of the work is saved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial

from effpass.passes.reduction.flops import Cost

DEEP = 40  # blocks from which on the paper's rule is used as it stands
CHECKED = 256  # tokens at which a ratio must be reachable, where the captured length is shorter


def auto(blocks: int) -> tuple[int, ...]:
    """The anchors of ``layers="auto"`` for a stack of so many blocks, counted from 0.

    UTRC reduces after blocks 12, 17, ..., 42 of 64 and 10, 15, ..., 35 of 48: from the 10th block
    or three sixteenths of the depth on, every 5 blocks, up to 73 % of it. Shallow stacks, which it
    does not treat, begin at three sixteenths, too, and step by an eighth of the depth, rounded up.
    The last block is never an anchor: nothing comes behind it.
    """
    deep = blocks >= DEEP
    first = max(10, 3 * blocks // 16) if deep else 3 * blocks // 16
    step = 5 if deep else min(5, -(-blocks // 8))
    last = min(blocks * 73 // 100, blocks - 2)
    return tuple(range(first, last + 1, step))


def lengths(tokens: int, keep: float, anchors: int, protected: int) -> tuple[int, ...]:
    """Tokens in front of the first anchor and behind each: ``N - min(N - ceil(N keep), n // 2)``.

    ``n`` is how many of the N tokens are not protected.
    """
    share, found = Fraction(str(keep)), [tokens]
    for _ in range(anchors):
        now = found[-1]
        kept = -(-now * share.numerator // share.denominator)
        found.append(now - min(now - kept, max(0, now - protected) // 2))
    return tuple(found)


def reachable(cost: Cost, tokens: int, anchors: Sequence[int], protected: int) -> float:
    """The largest share that can be saved: half of the tokens leave at every anchor."""
    return cost.saved(lengths(tokens, 0.0, len(anchors), protected), anchors)


def solve(
    cost: Cost, ratio: float, tokens: int, anchors: Sequence[int], protected: int
) -> tuple[int, ...]:
    """Lengths, with one keep ratio for all anchors, that save the share nearest to ``ratio``.

    Where so few tokens cannot save it, as much as they can.
    """
    if tokens <= protected:
        return (tokens,) * (len(anchors) + 1)
    made: Callable[[float], tuple[int, ...]] = partial(
        lengths, tokens, anchors=len(anchors), protected=protected
    )
    low, high = 0.0, 1.0  # keep ratios that save too much, and too little
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if cost.saved(made(middle), anchors) > ratio else (low, middle)
    found = (made(low), made(high))
    return min(found, key=lambda each: abs(cost.saved(each, anchors) - ratio))
