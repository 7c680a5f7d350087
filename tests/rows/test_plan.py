"""``Plan``: the sequences of every rank at every step, from lengths alone."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from effpass.rows import POLICIES, Plan


@settings(deadline=None, max_examples=200)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=60),
    ranks=st.integers(1, 5),
    policy=st.sampled_from(sorted(POLICIES)),
    shuffle=st.booleans(),
    drop_last=st.booleans(),
    epoch=st.integers(0, 3),
)
def test_ranks_share_the_sequences(
    lengths: list[int], ranks: int, policy: str, shuffle: bool, drop_last: bool, epoch: int
) -> None:
    plan = Plan(tuple(lengths), 12, policy, None, shuffle, 0, ranks, drop_last)
    try:
        found = plan.epoch(epoch)
    except ValueError:
        alone = Plan(tuple(lengths), 12, policy, None, shuffle).epoch(epoch).steps
        short = len(alone) if drop_last else len(lengths) - len(alone)
        assert short < ranks  # too few to share out
        return
    rows = [row for step in found.steps for row in step]
    assert Counter(i for row in rows for i in row) + Counter(found.dropped) == Counter(
        range(len(lengths))
    )
    assert all(len(step) == ranks for step in found.steps)
    assert all(row and plan.tokens(row) <= 12 for row in rows)
    assert drop_last or found.dropped == ()
    tokens = [[plan.tokens(row) for row in step] for step in found.steps]
    widest = max(map(plan.tokens, rows)) - min(map(plan.tokens, rows))
    for last in range(len(tokens)):
        totals = [sum(rank) for rank in zip(*tokens[: last + 1], strict=True)]
        assert max(totals) - min(totals) <= widest  # the guarantee, after every step


def test_rows_are_cut_between_sequences_fullest_first() -> None:
    steps = Plan((2, 2, 4, 3), 4, "arrival", world_size=2).epoch(0).steps
    assert steps == [[[1], [0]], [[2], [3]]]
    # in rows of 8, 9 and 9 tokens: the second is the fullest of more than one, cut in its middle
    steps = Plan((5, 3, 2, 2, 3, 2, 9), 9, "arrival", world_size=2).epoch(0).steps
    assert sorted(row for step in steps for row in step) == [[0, 1], [2, 3], [4, 5], [6]]


def test_steps_are_shuffled() -> None:
    """Else the leftovers, which fill no row, would come last in every epoch."""
    places = set()
    plan = Plan((3,) * 25, 6, "greedy", None, True)
    for epoch in range(10):
        steps = plan.epoch(epoch).steps
        (place,) = [at for at, (row,) in enumerate(steps) if len(row) == 1]
        places.add(place)
    assert len(places) > 5
