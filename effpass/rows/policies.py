"""Which sequences share a row: three ways to fill rows of ``max_tokens``, from lengths alone.

Each gives rows as lists of numbers of sequences, every number once. The same lengths give the same
rows; among equal lengths the first comes first; inside a row sequences keep their order. Sets of
lengths are bits of one integer, so the longest that fits (or the tightest row) is one shift away.
"""

from __future__ import annotations

import difflib
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice

WINDOW = 64  # sequences that the greedy policy looks at

Rows = list[list[int]]


def fill(lengths: Sequence[int], max_tokens: int, policy: str, window: int | None) -> Rows:
    """Rows by a policy of POLICIES; ``window`` is for ``greedy``, None for its default.

    Raises ValueError for an unknown policy (naming the nearest) and for a window that is not used,
    or is no positive integer.
    """
    check_policy(policy, window)
    if policy == "greedy":
        return greedy(lengths, max_tokens, WINDOW if window is None else window)
    return POLICIES[policy](lengths, max_tokens)


def check_policy(policy: str, window: int | None) -> None:
    """Raises ValueError for an unknown policy, and for a window that would not be used."""
    if policy not in POLICIES:
        near = difflib.get_close_matches(str(policy), POLICIES, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"expected policy to be one of {', '.join(POLICIES)}, found {policy!r}{hint}"
        )
    if window is not None and policy != "greedy":
        raise ValueError(
            f"expected no window with policy {policy!r}, found {window!r}: only 'greedy' has one"
        )
    if window is not None:
        check_positive("window", window)


def check_positive(name: str, value: int) -> None:
    """Raises ValueError unless ``value`` is an integer above 0."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"expected {name} to be a positive integer, found {value!r}")


def arrival(lengths: Sequence[int], max_tokens: int) -> Rows:
    """In the order given; a row is sealed when the next sequence does not fit (next fit)."""
    rows: Rows = []
    room = 0
    for index, length in enumerate(lengths):
        if length > room:
            rows.append([])
            room = max_tokens
        rows[-1].append(index)
        room -= length
    return rows


def greedy(lengths: Sequence[int], max_tokens: int, window: int = WINDOW) -> Rows:
    """Each row begins with the oldest sequence waiting, then takes the longest that fits.

    ``window`` sequences wait at any time: each that is taken lets the next one in. Beginning with
    the oldest bounds the disorder: a sequence is packed at most ``window`` rows after it was let
    in, and never before more than ``window - 1`` earlier ones. A window of 1 packs in order.
    """
    coming = iter(range(len(lengths)))
    waiting = _Waiting(lengths)
    waiting.let_in(coming, window)
    rows: Rows = []
    while waiting.order:
        index: int | None = waiting.oldest()
        room = max_tokens
        row: list[int] = []
        while index is not None:
            row.append(waiting.take(index))
            room -= lengths[index]
            waiting.let_in(coming, window)
            index = waiting.longest(room)
        rows.append(sorted(row))
    return rows


class _Waiting:
    """Sequences that wait, by age and by length."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = lengths
        self.order: OrderedDict[int, None] = OrderedDict()
        self.by_length: defaultdict[int, OrderedDict[int, None]] = defaultdict(OrderedDict)
        self.present = 0  # bit n: some sequence of length n waits

    def let_in(self, coming: Iterator[int], window: int) -> None:
        for index in islice(coming, window - len(self.order)):
            self.order[index] = self.by_length[self.lengths[index]][index] = None
            self.present |= 1 << self.lengths[index]

    def oldest(self) -> int:
        return next(iter(self.order))

    def longest(self, room: int) -> int | None:
        """The oldest of the longest sequences that fit into ``room``."""
        fitting = self.present & ((1 << room + 1) - 1)
        return next(iter(self.by_length[fitting.bit_length() - 1])) if fitting else None

    def take(self, index: int) -> int:
        same = self.by_length[self.lengths[index]]
        del self.order[index], same[index]
        if not same:
            self.present ^= 1 << self.lengths[index]
        return index


def best_fit(lengths: Sequence[int], max_tokens: int) -> Rows:
    """All sequences from the longest to the shortest, each into the fullest row that holds it.

    Best-fit decreasing; rows are then put in order of their first sequence.
    """
    rows: Rows = []
    by_room: defaultdict[int, deque[int]] = defaultdict(deque)
    rooms = 0  # bit n: some row has room for exactly n more tokens
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        enough = rooms >> length
        if enough:
            room = length + (enough & -enough).bit_length() - 1
            row = by_room[room].popleft()
            if not by_room[room]:
                rooms ^= 1 << room
            rows[row].append(index)
        else:
            room, row = max_tokens, len(rows)
            rows.append([index])
        by_room[room - length].append(row)
        rooms |= 1 << room - length
    return sorted(sorted(row) for row in rows)


POLICIES: dict[str, Callable[..., Rows]] = {
    "arrival": arrival,
    "greedy": greedy,
    "best_fit": best_fit,
}
