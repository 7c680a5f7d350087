"""Which tokens of a packed row leave: every sequence chooses as it would alone.

A packed row is several sequences end to end, ``cu_seqlens`` (S + 1,) their offsets. Nothing loops
over them here: sorts are by sequence first, so that each sequence's part of a sorted row is where
the sequence was, and the rank inside it is the place less the offset. All sizes are static.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from effpass.passes.reduction.choice import (
    ALTERNATE,
    MERGING,
    PROTECTED,
    REAL,
    Choice,
    Rule,
    at,
    choice_of,
    hashed,
    lexicographic,
)
from effpass.passes.reduction.closest_within import closest_within


@dataclass(frozen=True)
class Segments:
    """Of each of the N tokens of a row, all (N,): its sequence, its place in it, and its length."""

    number: Tensor
    place: Tensor
    length: Tensor

    @staticmethod
    def of(cu_seqlens: Tensor, tokens: Any) -> Segments:
        """Of sequences with these offsets (S + 1,); sequences may be empty."""
        offsets = cu_seqlens.long()
        places = torch.arange(tokens, device=offsets.device)
        number = torch.bucketize(places, offsets[1:].contiguous(), right=True)
        start = offsets[number]
        return Segments(number, places - start, offsets[number + 1] - start)


@dataclass(frozen=True)
class Offsets:
    """Where sequences begin before and behind an anchor: int32 (S + 1,) each.

    ``host`` (S + 1,) int64 on the CPU: those before, so that nothing waits for a device.
    """

    before: Tensor
    behind: Tensor
    host: Tensor


def choose_packed(
    rule: Rule, score: Tensor | None, metric: Tensor | None, row: Segments, ends: Offsets, kept: Any
) -> Choice:
    """The choice of one anchor for a packed row, as ``choice.choose`` makes it of each sequence.

    ``score`` (1, N) and ``metric`` (1, N, d) as there; ``kept``: how many tokens of all sequences
    stay, as ``ends`` say. All tokens are real.
    """
    kinds = _classes(rule, row)
    number, place = row.number[None], row.place[None]
    order = lexicographic(number, kinds, _key(rule, score, kinds, row))
    count = (ends.before.diff() - ends.behind.diff()).long()  # of each sequence, how many leave
    leaves, leaving = place < count[number], kinds.shape[1] - kept
    if rule.method not in MERGING or metric is None:
        gone = _first(order, leaves, leaving).sort(1).values
        never = torch.zeros_like(gone, dtype=torch.bool)
        return _settled(choice_of(kinds, kept, gone, gone, never, never), row, ends)
    sources = place < rule.sources((row.length - rule.protected).clamp_min(0))[None]
    from_here = torch.zeros_like(sources).scatter(1, order, sources)
    alternate = rule.method in ALTERNATE
    into, similar = closest_within(
        metric.detach(), order, kinds == REAL, ends.host, rule.protected, alternate, rule.causal
    )
    best = similar.argsort(dim=1, descending=True, stable=True)
    for key in (~from_here, number):
        best = at(best, at(key.long(), best).argsort(dim=1, stable=True))
    gone = _first(best, leaves, leaving)
    merged = at(similar, gone) != -torch.inf
    mixer = merged
    if rule.method == "utrc" and score is not None:
        mixer = merged & ~_pruned(rule, score.detach(), gone, number, count, ends)
    return _settled(choice_of(kinds, kept, gone, at(into, gone), merged, mixer), row, ends)


def gaps_packed(positions: Tensor, cu_seqlens: Tensor, first: Tensor) -> Tensor:
    """How many tokens of its sequence left in front of each at ``positions`` (1, m) since the last.

    ``cu_seqlens`` and ``first`` (S + 1,): offsets among these tokens, and among all.
    """
    row = Segments.of(cu_seqlens, positions.shape[1])
    before = torch.cat([positions[:, :1], positions[:, :-1]], 1)
    before = torch.where(row.place == 0, first.long()[row.number] - 1, before)
    return positions - before - 1


def first_seen(
    q: Tensor, k: Tensor, scale: float, cu_seqlens: Tensor, positions: Tensor, right: int
) -> Tensor:
    """What the first query of each sequence gives to each of its keys (1, N), as ``of_first``.

    ``q`` (N, h, d), ``k`` (N, hk, d); ``right``: how far a query sees, -1 without a limit, in
    ``positions`` (1, N). One row of each sequence's attention matrix is computed.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    row, starts = Segments.of(cu_seqlens, q.shape[0]), cu_seqlens.long()
    own = starts[row.number]
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1).to(wide)
    scores = (q[own].to(wide) * scale * k).sum(-1)
    if right >= 0:
        far = positions[0] - positions[0][own] > right
        scores = scores.masked_fill(far[:, None], -torch.inf)
    index = row.number[:, None].expand_as(scores)
    slots = scores.new_full((cu_seqlens.shape[0] - 1, scores.shape[1]), -torch.inf)
    peak = slots.scatter_reduce(0, index, scores, "amax")
    weights = (scores - peak.gather(0, index)).exp()
    total = torch.zeros_like(slots).scatter_add(0, index, weights)
    return (weights / total.gather(0, index)).mean(1)[None]


def _classes(rule: Rule, row: Segments) -> Tensor:
    """REAL or PROTECTED (1, N): the ends of every sequence are protected."""
    behind = row.length - 1 - row.place
    ends = (row.place < rule.protect_first) | (behind < rule.protect_last)
    return torch.where(ends, PROTECTED, REAL)[None]


def _key(rule: Rule, score: Tensor | None, kinds: Tensor, row: Segments) -> Tensor:
    """What tokens of one sequence are sorted by: as if their row were the first of a batch."""
    if rule.method in (*ALTERNATE, "prefix"):
        place = row.place[None] - rule.protect_first
        return torch.where(kinds == REAL, place % 2, 0)
    if rule.method == "random":
        return hashed(row.place[None], 0, rule.seed)
    assert score is not None, f"{rule.method} needs a score"
    return score.detach()


def _pruned(
    rule: Rule, score: Tensor, gone: Tensor, number: Tensor, count: Tensor, ends: Offsets
) -> Tensor:
    """(1, r): which leaving tokens score lowest in their sequence, ``floor(q r)`` of each."""
    of = at(number, gone)
    low = lexicographic(of, at(score, gone), gone)
    places = torch.arange(gone.shape[1], device=gone.device)
    rank = places - (ends.before - ends.behind).long()[of]
    return torch.zeros_like(gone, dtype=torch.bool).scatter(1, low, rank < rule.pruned(count[of]))


def _first(x: Tensor, chosen: Tensor, count: Any) -> Tensor:
    """The ``count`` entries of ``x`` (1, N) that are ``chosen`` (1, N), in their order."""
    slots = torch.where(chosen, chosen.long().cumsum(1) - 1, count)
    return x.new_zeros(1, count + 1).scatter(1, slots, x)[:, :count]


def _settled(choice: Choice, row: Segments, ends: Offsets) -> Choice:
    """A token in front of the first that stays reads that of its own sequence."""
    first = ends.behind.long()[row.number]
    return replace(choice, rank=torch.maximum(choice.rank, first))
