"""``PackedDataset``: epochs, workers, ranks and resuming; no sequence lost, none given twice."""

import copy
import json
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

import effpass
from effpass.rows import POLICIES, Row
from effpass.rows.lengths import sample_lengths

# one or two cores are enough for three workers that do nearly nothing
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")
SEQUENCES = [[i] * n for i, n in enumerate(sample_lengths(40))]
MAX = 2048


def packed(**options: Any) -> effpass.PackedDataset:
    return effpass.PackedDataset(SEQUENCES, MAX, **{"shuffle": True, **options})


def seen(rows: Any) -> list[tuple[int, ...]]:
    return [row.indices for row in rows]


def loader(dataset: effpass.PackedDataset, workers: int, **options: Any) -> DataLoader[Row]:
    return DataLoader(dataset, batch_size=None, num_workers=workers, **options)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("shuffle", [True, False])
def test_an_epoch_gives_every_sequence_once(policy: str, shuffle: bool) -> None:
    dataset = packed(policy=policy, shuffle=shuffle)
    rows = list(dataset)
    assert sorted(i for row in rows for i in row.indices) == list(range(len(SEQUENCES)))
    assert len(rows) == len(dataset) and dataset.dropped == ()
    for row in rows:
        assert [part[0].item() for part in row.unpack(row.input_ids)] == list(row.indices)
        assert [len(SEQUENCES[i]) for i in row.indices] == row.lengths
    assert [(row.epoch, row.step) for row in rows] == [(0, s) for s in range(len(rows))]
    assert dataset.padding_rate == 1 - sum(map(len, SEQUENCES)) / (len(rows) * MAX)


def test_without_shuffling_rows_are_those_of_pack() -> None:
    for policy in POLICIES:
        rows = effpass.pack(SEQUENCES, MAX, policy)
        assert seen(packed(policy=policy, shuffle=False)) == seen(rows)


def test_epochs_differ_and_repeat() -> None:
    dataset = packed()
    first = seen(dataset)
    assert seen(dataset) == first
    dataset.set_epoch(1)
    second = seen(dataset)
    assert second != first and dataset.epoch == 1
    dataset.set_epoch(0)
    assert seen(dataset) == first
    assert seen(packed(seed=1)) != first


@pytest.mark.parametrize("workers", [0, 2, 3])
@pytest.mark.parametrize("persistent", [False, True])
def test_workers_share_the_rows_in_their_order(workers: int, persistent: bool) -> None:
    dataset = packed()
    rows = loader(dataset, workers, persistent_workers=persistent and workers > 0)
    for epoch in (0, 1, 2):
        dataset.set_epoch(epoch)
        expected = packed()
        expected.set_epoch(epoch)
        assert seen(rows) == seen(expected)


@pytest.mark.parametrize("start", ["spawn", "forkserver"])
def test_workers_may_be_started_in_any_way(start: str) -> None:
    dataset = packed()
    rows = loader(dataset, 1, multiprocessing_context=start, persistent_workers=True)
    assert seen(rows) == seen(packed())
    dataset.set_epoch(3)
    assert {row.epoch for row in rows} == {3}
    with pytest.raises(RuntimeError, match="row that was used last"):
        dataset.state_dict()


def test_workers_give_arguments_of_models() -> None:
    for kwargs in loader(packed(), 2, collate_fn=Row.kwargs):
        assert kwargs["input_ids"].shape == kwargs["labels"].shape
        assert kwargs["cu_seq_lens_q"][-1] == kwargs["input_ids"].shape[1]


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=30),
    policy=st.sampled_from(sorted(POLICIES)),
    shuffle=st.booleans(),
    data=st.data(),
)
def test_a_resumed_run_gives_what_was_left(
    lengths: list[int], policy: str, shuffle: bool, data: st.DataObject
) -> None:
    ranks = data.draw(st.integers(1, 3))
    options = {"shuffle": shuffle, "world_size": ranks, "rank": ranks - 1}

    def fresh() -> effpass.PackedDataset:
        return effpass.PackedDataset([[1] * n for n in lengths], 10, policy, **options)

    try:
        for epoch in range(4):
            fresh().plan.epoch(epoch)
    except ValueError:  # fewer sequences than the ranks need
        assume(ranks == 1)

    def run(dataset: effpass.PackedDataset) -> list[tuple[int | None, tuple[int, ...]]]:
        found = []
        for epoch in range(dataset.epoch, 3):
            dataset.set_epoch(epoch)
            found += [(row.epoch, row.indices) for row in dataset]
        return found

    whole = run(fresh())
    stop = data.draw(st.integers(0, len(whole) - 1))
    stopped, used, state = fresh(), [], fresh().state_dict()
    while len(used) < stop:
        stopped.set_epoch(stopped.epoch + bool(used))
        for row in stopped:
            used.append((row.epoch, row.indices))
            state = stopped.state_dict()
            assert state == stopped.state_dict(row)
            if len(used) == stop:
                break
    resumed = fresh()
    resumed.load_state_dict(json.loads(json.dumps(state)))
    assert used + run(resumed) == whole


@pytest.mark.parametrize("before", [0, 2])
@pytest.mark.parametrize("after", [0, 2])
def test_resuming_with_workers(before: int, after: int) -> None:
    whole = seen(packed())
    dataset = packed()
    for step, row in enumerate(loader(dataset, before)):
        if step == 4:
            state = dataset.state_dict(row)
            break
    resumed = packed()
    resumed.load_state_dict(state)
    resumed.set_epoch(state["epoch"])  # as in a loop over epochs: changes nothing
    rows = loader(resumed, after)
    assert seen(rows) == whole[5:]
    with pytest.raises(RuntimeError, match=r"resumed at step 5 and is finished.*set_epoch\(1\)"):
        next(iter(resumed))
    resumed.set_epoch(1)
    assert len(seen(rows)) == len(resumed)


def test_an_epoch_that_was_resumed_may_be_repeated() -> None:
    *_, before, _ = packed()
    resumed = packed()
    resumed.load_state_dict(packed().state_dict(before))
    assert len(seen(resumed)) == 1
    resumed.set_epoch(0)
    assert seen(resumed) == seen(packed())


def test_one_worker_refuses_half_an_epoch(monkeypatch: pytest.MonkeyPatch) -> None:
    """In this process, since torch takes ten seconds to stop workers that raised."""
    *_, before, last = packed()
    resumed = packed()
    resumed.load_state_dict(packed().state_dict(before))
    for number in (0, 1):  # the second begins when the first is through
        info = SimpleNamespace(id=number, num_workers=2)
        monkeypatch.setattr("effpass.rows.dataset.get_worker_info", lambda info=info: info)
        assert seen(resumed) == [last.indices][number:]
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="is finished"):
        next(iter(resumed))


def test_the_state_after_an_epoch_is_the_next() -> None:
    dataset = packed()
    *_, last = dataset
    state = dataset.state_dict()
    assert (state["epoch"], state["step"]) == (1, 0) and state == dataset.state_dict(last)
    dataset.set_epoch(1)
    assert dataset.state_dict() == state
    resumed = packed()
    resumed.load_state_dict(state)
    assert resumed.epoch == 1 and seen(resumed) == seen(dataset)


def test_a_new_pass_begins_again() -> None:
    dataset = packed()
    rows, count = iter(dataset), len(dataset)
    assert [next(rows).step, next(rows).step] == [0, 1]
    assert dataset.state_dict()["step"] == 2
    iter(dataset)
    assert dataset.state_dict()["step"] == 0
    elsewhere = packed()
    elsewhere.set_epoch(1)
    *_, before, last = elsewhere
    dataset.load_state_dict(elsewhere.state_dict(before))
    assert len(list(rows)) == count - 2  # the old pass ends, the new one is untouched
    assert seen(dataset) == [last.indices]


def test_workers_are_ahead_so_the_state_needs_the_row() -> None:
    dataset = packed()
    rows = iter(loader(dataset, 2))
    first = next(rows)
    with pytest.raises(RuntimeError, match=r"used last: .* call state_dict\(row\)"):
        dataset.state_dict()
    assert dataset.state_dict(first)["step"] == 1
    assert len(list(rows)) == len(dataset) - 1
    dataset.set_epoch(1)
    assert dataset.state_dict()["epoch"] == 1  # known again: nothing was read yet
    with pytest.raises(ValueError, match="row of a PackedDataset"):
        dataset.state_dict(effpass.pack([[1]], 1)[0])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"seed": 1}, "found seed 0 .here 1."),
        ({"policy": "arrival"}, "policy 'greedy' .here 'arrival'."),
        ({"window": 8}, "window None .here 8."),
        ({"world_size": 2}, "world_size 1 .here 2."),
        ({"shuffle": False, "drop_last": True}, "shuffle True .* drop_last False .here True."),
    ],
)
def test_the_state_of_other_rows_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        packed(**options).load_state_dict(packed().state_dict())


def test_the_state_of_other_sequences_is_refused() -> None:
    state = packed().state_dict()
    others = effpass.PackedDataset([*SEQUENCES[1:], SEQUENCES[0]], MAX, shuffle=True)
    with pytest.raises(ValueError, match="checksum_of_lengths"):
        others.load_state_dict(state)
    with pytest.raises(ValueError, match="seed None"):
        packed().load_state_dict({"epoch": 0, "step": 0})
    for wrong in ({"checksum_of_rows": 0}, {"step": 10**6}, {"step": -1}):
        with pytest.raises(ValueError, match="packs in another way"):
            packed().load_state_dict({**state, **wrong})


def test_ranks_read_their_rows() -> None:
    ranks = [packed(rank=rank, world_size=3) for rank in range(3)]
    given_rows = [
        seen(loader(dataset, workers)) for dataset, workers in zip(ranks, (0, 1, 2), strict=True)
    ]
    assert {len(rows) for rows in given_rows} == {len(ranks[0])}
    steps = [list(step) for step in zip(*given_rows, strict=True)]
    assert steps == [[tuple(row) for row in step] for step in ranks[0].plan.epoch(0).steps]
    first, second = (next(iter(dataset)) for dataset in ranks[:2])
    assert ranks[0].state_dict(first) == ranks[1].state_dict(second)  # one state serves all


def test_dropped_sequences_are_told() -> None:
    dataset = effpass.PackedDataset([[1] * 4] * 5 + [[1]], 4, world_size=4, drop_last=True)
    assert len(dataset) == 1 and len(dataset.dropped) == 2 and 5 in dataset.dropped
    assert packed(drop_last=True).dropped == ()  # one rank: nothing to divide


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"world_size": 4}, "at least 8 sequences, to give 4 ranks .* found 5 in 5 rows: pass dr"),
        ({"world_size": 6, "drop_last": True}, "at least 6 rows, one a rank, found 5"),
    ],
)
def test_too_few_rows_for_the_ranks(options: dict[str, Any], said: str) -> None:
    dataset = effpass.PackedDataset([[1] * 4] * 5, 4, **options)
    with pytest.raises(ValueError, match=said):
        list(dataset)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"max_tokens": 3}, "at most max_tokens = 3 tokens, found 4 in sequence 1"),
        ({"lengths": [1, 9]}, "at most max_tokens = 8 tokens, found 9 in sequence 1"),
        ({"lengths": [1]}, "expected 2 lengths, found 1"),
        ({"rank": 1}, "rank to be of 0 to 0, found 1"),
        ({"world_size": 0}, "world_size to be a positive integer, found 0"),
        ({"seed": 0.5}, "seed to be an integer, found 0.5"),
        ({"policy": "bestfit"}, "found 'bestfit'; did you mean 'best_fit'"),
        ({"dataset": []}, "dataset of at least one sequence, found none"),
        ({"dataset": [[1], []]}, "sequence 1 to hold tokens, found none"),
    ],
)
def test_what_cannot_be_packed_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        effpass.PackedDataset(**{"dataset": [[1], [1] * 4], "max_tokens": 8, **change})


def test_a_dataset_that_gives_something_else_is_refused() -> None:
    dataset = effpass.PackedDataset([[1], [1] * 4], 8, lengths=[1, 3])
    with pytest.raises(ValueError, match=r"expected 3 tokens in sequence 1, .* found 4"):
        list(dataset)
    mixed = [{"input_ids": [1], "labels": [1]}, {"input_ids": [1]}]
    with pytest.raises(ValueError, match="in sequence 1"):
        effpass.PackedDataset(mixed, 1)
    with pytest.raises(ValueError, match="found input_ids in sequence 1"):
        list(effpass.PackedDataset(mixed, 1, lengths=[1, 1]))  # not in one row with the first
    for epoch in (-1, 0.5, True):
        with pytest.raises(ValueError, match="epoch to be an integer from 0 on"):
            dataset.set_epoch(epoch)  # type: ignore[arg-type]


def test_known_lengths_spare_reading() -> None:
    class Counted(list[list[int]]):
        reads = 0

        def __getitem__(self, index: Any) -> Any:
            self.reads += 1
            return super().__getitem__(index)

    counted = Counted([[1] * 2] * 9)
    dataset = effpass.PackedDataset(counted, 6, lengths=torch.tensor([2] * 9))
    assert len(dataset) == 3 and counted.reads == 1
    next(iter(dataset))
    assert counted.reads == 4


def test_rows_are_padded_when_asked() -> None:
    rows = list(packed(pad_to_max=True, pad_token_id=7, position_start=2))
    assert {row.input_ids.shape for row in rows} == {(1, MAX)}
    assert any(row.padding for row in rows)
    assert all((row.input_ids[0, row.tokens :] == 7).all() for row in rows)
    assert all(row.position_ids[0, 0] == 2 for row in rows)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda d: pickle.loads(pickle.dumps(d))])
def test_a_copy_goes_on_by_itself(copied: Any) -> None:
    dataset = packed()
    dataset.set_epoch(1)
    twin = copied(dataset)
    twin.set_epoch(2)
    assert (dataset.epoch, twin.epoch) == (1, 2)
    rows = loader(twin, 1, persistent_workers=True)
    assert {row.epoch for row in rows} == {2}
    twin.set_epoch(3)  # seen by the worker that is there already
    assert {row.epoch for row in rows} == {3}
