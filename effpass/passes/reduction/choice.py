"""Which tokens leave: UTRC (arXiv 2410.14725, section 4) and its rivals, as static-shape functions.

Everything is a function of tensors of fixed size: sorts, gathers and scatters. Of ``n`` tokens that
may leave, ``n // 2`` at most do, whatever the method, so that all reduce alike.

- ``utrc``: the ``n // 2`` lowest scores are sources, the others destinations; edges sorted by
  cosine similarity; on the mixer branch the share ``q`` with the lowest scores is only pruned.
- ``tome`` (arXiv 2210.09461): every second token is a source, merged into the most similar of the
  others; scores do not matter. ``pumer`` (arXiv 2305.17530, modality-aware merging) matches alike,
  inside one modality, which is all there is here; only its mean is not weighted.
- ``evit`` (arXiv 2202.07800): the lowest scores leave; ``random``: any; ``prefix``: every second
  token from the front. Nothing is merged.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from effpass.ops.token_matching import closest

METHODS = ("utrc", "evit", "tome", "pumer", "random", "prefix")
MERGING = ("utrc", "tome", "pumer")
UNSCORED = ("tome", "pumer", "random", "prefix")
ALTERNATE = ("tome", "pumer")  # every second token is a source
PADDING, REAL, PROTECTED = 0, 1, 2  # the classes of tokens, in the order in which they leave


@dataclass(frozen=True)
class Choice:
    """What becomes of the ``N`` tokens of each row; ``m`` stay, ``r = N - m`` leave.

    ``kept`` (b, m): positions, ascending. ``rank`` (b, N): how many kept tokens are before or at a
    position, less one; -1 in front of the first. ``leaving``, ``into`` (b, r): positions, and that
    of each one's destination. ``residual``, ``mixer`` (b, r): whether it is merged there.
    """

    kept: Tensor
    rank: Tensor
    leaving: Tensor
    into: Tensor
    residual: Tensor
    mixer: Tensor


@dataclass(frozen=True)
class Rule:
    """How tokens are chosen: the fields of ReduceTokens that matter here."""

    method: str
    q: float = 0.5
    protect_first: int = 0
    protect_last: int = 1
    causal: bool = False
    seed: int = 0

    @property
    def protected(self) -> int:
        """How many tokens of a sequence are protected, if it has as many."""
        return self.protect_first + self.protect_last

    def sources(self, free: Any) -> Any:
        """How many of the ``free`` tokens, which may leave, are sources."""
        return free - free // 2 if self.method in ALTERNATE else free // 2

    def pruned(self, leaving: Any) -> Any:
        """How many of the leaving tokens are only pruned on the mixer branch: ``floor(q r)``."""
        if self.method != "utrc":
            return 0
        share = Fraction(str(self.q))
        return leaving * share.numerator // share.denominator


def classes(real: Tensor, first: int, last: int) -> Tensor:
    """PADDING, REAL or PROTECTED for each token of ``real`` (b, N), booleans."""
    before = real.long().cumsum(1)
    behind = before[:, -1:] - before
    ends = (before <= first) | (behind < last)
    return torch.where(real, torch.where(ends, PROTECTED, REAL), PADDING)


def choose(
    rule: Rule, score: Tensor | None, metric: Tensor | None, kinds: Tensor, kept: Any
) -> Choice:
    """The choice of one anchor.

    ``score`` (b, N), of those methods that have one; ``metric`` (b, N, d) is what similarity is
    taken of; ``kinds`` (b, N) as ``classes`` makes them; ``kept`` is how many tokens stay.
    """
    leaving = kinds.shape[1] - kept
    free = kinds.shape[1] - min_(kinds.shape[1], rule.protected)
    order = _order(rule, None if score is None else score.detach(), kinds)
    if rule.method not in MERGING or metric is None:
        gone = order[:, :leaving].sort(1).values
        never = torch.zeros_like(gone, dtype=torch.bool)
        return choice_of(kinds, kept, gone, gone, never, never)
    edges = _edges(rule, order, rule.sources(free), metric.detach(), kinds, leaving)
    gone, into, similar = edges
    merged = (similar != -torch.inf) & (similar != torch.inf)
    mixer = merged
    if rule.method == "utrc" and score is not None:
        low = lexicographic(at(kinds, gone), at(score.detach(), gone), gone)
        low = low[:, : rule.pruned(leaving)]
        mixer = merged.scatter(1, low, torch.zeros_like(low, dtype=torch.bool))
    return choice_of(kinds, kept, gone, into, merged, mixer)


def _edges(
    rule: Rule, order: Tensor, sources: Any, metric: Tensor, kinds: Tensor, leaving: Any
) -> tuple[Tensor, Tensor, Tensor]:
    """The best edges: their sources, destinations and similarities, inf for padding."""
    a_at = order[:, :sources].sort(1).values
    b_at = order[:, sources:].sort(1).values
    open = at(kinds, b_at) == REAL
    rows = torch.arange(metric.shape[0], device=metric.device)[:, None]
    index, similar = closest(metric[rows, a_at], metric[rows, b_at], open, a_at, b_at, rule.causal)
    similar = torch.where(at(kinds, a_at) == PADDING, torch.inf, similar)
    best = similar.argsort(dim=1, descending=True, stable=True)[:, :leaving]
    into = torch.cat([b_at, order[:, :1]], 1)  # where there is no destination, something to read
    return at(a_at, best), at(at(into, index), best), at(similar, best)


def _order(rule: Rule, score: Tensor | None, kinds: Tensor) -> Tensor:
    """Positions (b, N) in the order in which tokens leave: padding, then by the method's rule."""
    if rule.method in (*ALTERNATE, "prefix"):
        place = (kinds == REAL).long().cumsum(1) - 1
        score = torch.where(kinds == REAL, place % 2, 0)
    elif rule.method == "random":
        rows, tokens = (torch.arange(n, device=kinds.device) for n in kinds.shape)
        score = hashed(tokens, rows[:, None], rule.seed)
    assert score is not None, f"{rule.method} needs a score"
    return lexicographic(kinds, score)


def lexicographic(*keys: Tensor) -> Tensor:
    """Indices (b, N) that sort by the first key, equal ones by the next one, at last by place."""
    order = torch.arange(keys[0].shape[1], device=keys[0].device).expand_as(keys[0])
    for key in reversed(keys):
        order = at(order, at(key, order).argsort(dim=1, stable=True))
    return order


def hashed(places: Tensor, rows: Tensor | int, seed: int) -> Tensor:
    """Numbers that look random, the same in every run: a multiplicative hash of places in rows."""
    x = places + 7919 * rows + 104729 * seed + 1
    for factor in (73244475, 73244475, 1):
        x = (((x >> 16) ^ x) * factor) & 0xFFFFFFFF
    return x


def choice_of(
    kinds: Tensor, kept: Any, gone: Tensor, into: Tensor, residual: Tensor, mixer: Tensor
) -> Choice:
    """The choice by which the tokens ``gone`` (b, r) leave ``kinds`` (b, N)."""
    stays = torch.ones_like(kinds).scatter(1, gone, 0)
    rank = stays.cumsum(1) - 1
    places = torch.arange(kinds.shape[1], device=kinds.device).expand_as(kinds)
    # those that leave are written to one slot too many, which is cut off
    slots = torch.where(stays == 1, rank, kept)
    filled = kinds.new_zeros(kinds.shape[0], kept + 1).scatter(1, slots, places)
    return Choice(filled[:, :kept], rank, gone, into, residual, mixer)


def at(x: Tensor, index: Tensor) -> Tensor:
    """``x`` (b, N) at places ``index`` (b, m)."""
    return x.gather(1, index)


def min_(a: Any, b: int) -> Any:
    """The smaller of a size, perhaps a symbol, and a number."""
    return min(a, b) if isinstance(a, int) else torch.sym_min(a, b)
