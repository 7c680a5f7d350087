"""Which sequences make which row of which rank at which step, for every epoch: from lengths alone.

Nothing but integers goes in and nothing random but the seed and the epoch, so every rank and every
worker makes the same plan by itself, and a resumed run makes it again.
"""

from __future__ import annotations

import heapq
import random
import zlib
from array import array
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from effpass.rows.policies import check_policy, check_positive, fill


@dataclass(frozen=True)
class Epoch:
    """``steps[step][rank]``: the sequences of one row. ``dropped``: those that no row holds."""

    steps: list[list[list[int]]]
    dropped: tuple[int, ...]

    @cached_property
    def checksum(self) -> int:
        """Another one, all but surely, for other steps."""
        return zlib.crc32(repr(self.steps).encode())


@dataclass(frozen=True)
class Plan:
    """How sequences of these ``lengths`` are packed and shared out; ``epoch(n)`` does it.

    With ``shuffle`` each epoch packs the sequences in another order, by ``seed`` and its number,
    and takes its steps in a random order.

    Every rank gets the same number of rows. At every step, and over any steps together, no two
    ranks are further apart than the fullest row from the emptiest: the rows of a step are
    neighbours when all are sorted by tokens, so what the steps differ by adds up to at most that.
    Rows that do not divide among the ranks are cut in two (fullest first, between sequences), so
    that each sequence is used exactly once; with ``drop_last`` the emptiest are dropped instead.
    """

    lengths: tuple[int, ...]
    max_tokens: int
    policy: str = "greedy"
    window: int | None = None
    shuffle: bool = False
    seed: int = 0
    world_size: int = 1
    drop_last: bool = False

    def __post_init__(self) -> None:
        check_positive("max_tokens", self.max_tokens)
        check_policy(self.policy, self.window)
        check_positive("world_size", self.world_size)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ValueError(f"expected seed to be an integer, found {self.seed!r}")

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides the plan, the lengths as their number and a checksum."""
        chosen = {k: v for k, v in vars(self).items() if k != "lengths"}
        checksum = zlib.crc32(array("q", self.lengths).tobytes())
        return {**chosen, "sequences": len(self.lengths), "checksum_of_lengths": checksum}

    def epoch(self, number: int) -> Epoch:
        """The rows of one epoch. Raises ValueError where ranks cannot get equally many."""
        chance = random.Random(f"{self.seed} {number}")
        order = list(range(len(self.lengths)))
        if self.shuffle:
            chance.shuffle(order)
        lengths = [self.lengths[i] for i in order]
        places = fill(lengths, self.max_tokens, self.policy, self.window)
        rows = [[order[place] for place in row] for row in places]
        rows, dropped = self._drop(rows) if self.drop_last else (self._cut(rows), ())
        steps = self._share(rows)
        if self.shuffle:
            chance.shuffle(steps)
        return Epoch(steps, dropped)

    def tokens(self, row: list[int]) -> int:
        """Tokens of the sequences of one row."""
        return sum(self.lengths[index] for index in row)

    def _drop(self, rows: list[list[int]]) -> tuple[list[list[int]], tuple[int, ...]]:
        extra = len(rows) % self.world_size
        if extra == len(rows):
            raise ValueError(
                f"expected at least {self.world_size} rows, one a rank, found {len(rows)}: pass "
                "drop_last=False, fewer ranks, or a smaller max_tokens"
            )
        emptiest = sorted(range(len(rows)), key=lambda r: (self.tokens(rows[r]), -r))[:extra]
        gone = set(emptiest)
        kept = [row for r, row in enumerate(rows) if r not in gone]
        return kept, tuple(sorted(index for r in emptiest for index in rows[r]))

    def _cut(self, rows: list[list[int]]) -> list[list[int]]:
        extra = -len(rows) % self.world_size
        if len(self.lengths) < len(rows) + extra:
            raise ValueError(
                f"expected at least {len(rows) + extra} sequences, to give {self.world_size} ranks "
                f"equally many rows, found {len(self.lengths)} in {len(rows)} rows: pass "
                "drop_last=True, or fewer ranks"
            )
        rows = list(rows)
        heap = [(-self.tokens(row), r) for r, row in enumerate(rows) if len(row) > 1]
        heapq.heapify(heap)
        for _ in range(extra):
            _, r = heapq.heappop(heap)
            at = self._middle(rows[r])
            rows.append(rows[r][at:])
            rows[r] = rows[r][:at]
            for piece in (r, len(rows) - 1):
                if len(rows[piece]) > 1:
                    heapq.heappush(heap, (-self.tokens(rows[piece]), piece))
        return rows

    def _middle(self, row: list[int]) -> int:
        """Where to cut a row of two or more so that its parts are nearest in tokens."""
        total = self.tokens(row)
        return min(range(1, len(row)), key=lambda at: abs(total - 2 * self.tokens(row[:at])))

    def _share(self, rows: list[list[int]]) -> list[list[list[int]]]:
        tokens = [self.tokens(row) for row in rows]
        order = sorted(range(len(rows)), key=lambda r: -tokens[r])
        totals = [0] * self.world_size
        steps: list[tuple[int, list[list[int]]]] = []
        for at in range(0, len(order), self.world_size):
            group = order[at : at + self.world_size]
            ranks = sorted(range(self.world_size), key=totals.__getitem__)
            share = dict(zip(ranks, group, strict=True))  # the fullest row to who has least
            for rank, r in share.items():
                totals[rank] += tokens[r]
            steps.append((min(group), [rows[share[rank]] for rank in range(self.world_size)]))
        return [step for _, step in sorted(steps, key=lambda s: s[0])]
