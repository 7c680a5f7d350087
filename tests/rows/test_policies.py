"""The policies: every sequence in one row, no row too full, and what each policy promises."""

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effpass.rows.lengths import LONGEST, MAX_TOKENS, MEAN, SHORTEST, sample_lengths
from effpass.rows.packed import padding_rate
from effpass.rows.policies import POLICIES, arrival, best_fit, fill, greedy

FIRST = [1216, 892, 368, 239, 460, 354]
LENGTHS = st.lists(st.integers(1, 20), max_size=60)


def rate(lengths: Sequence[int], policy: str, window: int | None = None) -> float:
    rows = fill(lengths, MAX_TOKENS, policy, window)
    return padding_rate(sum(lengths), len(rows), MAX_TOKENS)


@pytest.mark.parametrize("policy", POLICIES)
@settings(deadline=None)
@given(lengths=LENGTHS, max_tokens=st.integers(20, 50))
def test_rows_hold_every_sequence_once(policy: str, lengths: list[int], max_tokens: int) -> None:
    rows = fill(lengths, max_tokens, policy, None)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    assert all(row and row == sorted(row) for row in rows)
    assert all(sum(lengths[i] for i in row) <= max_tokens for row in rows)
    assert fill(list(lengths), max_tokens, policy, None) == rows


@settings(deadline=None)
@given(lengths=LENGTHS, max_tokens=st.integers(20, 50))
def test_arrival_keeps_the_order_and_seals_no_row_early(
    lengths: list[int], max_tokens: int
) -> None:
    rows = arrival(lengths, max_tokens)
    assert [i for row in rows for i in row] == list(range(len(lengths)))
    for row, after in pairwise(rows):
        assert sum(lengths[i] for i in [*row, after[0]]) > max_tokens
    assert greedy(lengths, max_tokens, window=1) == rows


@settings(deadline=None)
@given(lengths=LENGTHS, max_tokens=st.integers(20, 50), window=st.integers(1, 12))
def test_greedy_bounds_the_disorder(lengths: list[int], max_tokens: int, window: int) -> None:
    packed: set[int] = set()
    let_in = {i: 0 for i in range(window)}  # sequence: the row that was filled then
    rows = greedy(lengths, max_tokens, window)
    for number, row in enumerate(rows):
        assert row[0] == min(set(range(len(lengths))) - packed)  # begins with the oldest
        for index in row:
            assert number - let_in.setdefault(index, number) <= window
        packed |= set(row)
        seen = range(min(len(packed) + window, len(lengths)))  # let in by now
        for index in seen:
            let_in.setdefault(index, number)
        assert max(row) < len(packed) + window - 1
        waiting = [i for i in seen if i not in packed]
        room = max_tokens - sum(lengths[i] for i in row)
        assert all(lengths[i] > room for i in waiting)  # nothing that waited would have fit


def test_greedy_takes_the_longest_that_fits() -> None:
    lengths = [4, 3, 5, 6, 3, 1]
    assert greedy(lengths, 10, window=6) == [[0, 3], [1, 2, 5], [4]]
    assert greedy(lengths, 10, window=2) == [[0, 2], [1, 3, 5], [4]]
    assert greedy([2, 2, 2], 4, window=3) == [[0, 1], [2]]  # of equals the first


def test_best_fit_takes_the_fullest_row() -> None:
    # by length 7, 6, 3, 2, 2: 3 goes to 7 (fuller than 6), 2 and 2 to 6
    assert best_fit([2, 7, 2, 6, 3], 10) == [[0, 2, 3], [1, 4]]
    assert best_fit([5, 5, 5, 5], 10) == [[0, 1], [2, 3]]
    assert best_fit([10, 1], 10) == [[0], [1]]


@settings(deadline=None)
@given(lengths=LENGTHS.filter(bool), max_tokens=st.integers(20, 50))
def test_best_fit_leaves_no_two_rows_that_fit_together(lengths: list[int], max_tokens: int) -> None:
    loads = sorted(sum(lengths[i] for i in row) for row in best_fit(lengths, max_tokens))
    assert len(loads) < 2 or loads[0] + loads[1] > max_tokens


def test_lengths_are_those_of_the_paper() -> None:
    lengths = sample_lengths(20_000, seed=0)
    assert min(lengths) == SHORTEST and max(lengths) == LONGEST
    assert abs(sum(lengths) / len(lengths) - MEAN) < 0.01 * MEAN
    assert lengths[:100] == sample_lengths(100, seed=0) != sample_lengths(100, seed=1)
    assert lengths[:6] == FIRST


@pytest.mark.parametrize("seed", range(3))
def test_greedy_wastes_less_than_one_percent(seed: int) -> None:
    lengths = sample_lengths(10_000, seed)
    assert 0 <= rate(lengths, "best_fit") < rate(lengths, "greedy") < 0.01
    assert rate(lengths, "greedy", 16) < 0.01
    assert rate(lengths, "arrival") > 0.1
