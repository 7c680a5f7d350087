"""Boundaries of a batch, from whichever fields tell them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from effpass.passes.boundaries.offsets import offsets

lengths = st.lists(st.integers(1, 9), min_size=1, max_size=7)


def fields(sizes: list[int], start: int = 0) -> dict[str, torch.Tensor]:
    positions = torch.cat([torch.arange(start, start + n) for n in sizes])[None]
    numbers = torch.arange(len(sizes), dtype=torch.int32)
    seq_idx = numbers.repeat_interleave(torch.tensor(sizes))[None]
    ends = torch.tensor([0, *torch.tensor(sizes).cumsum(0)], dtype=torch.int32)
    return {"cu_seqlens": ends, "seq_idx": seq_idx, "position_ids": positions}


@given(lengths, st.sets(st.sampled_from(["cu_seqlens", "seq_idx", "position_ids"]), min_size=1))
def test_any_fields_tell_the_same(sizes: list[int], told: set[str]) -> None:
    every = fields(sizes)
    found = offsets({name: every[name] for name in every if name in told}, sum(sizes))
    if len(sizes) == 1:
        assert found is None
    else:
        assert found is not None and found.dtype == torch.int32
        assert found.tolist() == every["cu_seqlens"].tolist()


@given(lengths, st.integers(2, 5))
def test_positions_may_start_anywhere(sizes: list[int], start: int) -> None:
    found = offsets({"position_ids": fields(sizes, start)["position_ids"]}, None)
    expected = fields(sizes)["cu_seqlens"].tolist()
    assert (expected if found is None else found.tolist()) == expected


def test_sequences_of_one_token() -> None:
    """Positions 0 0 0: each is a sequence of its own."""
    found = offsets({"position_ids": torch.zeros(1, 3, dtype=torch.long)}, 3)
    assert found is not None and found.tolist() == [0, 1, 2, 3]


def test_rows_that_are_not_packed() -> None:
    positions = torch.arange(4).expand(3, 4)
    assert offsets({"position_ids": positions}, 4) is None
    assert offsets({"seq_idx": torch.zeros(3, 4, dtype=torch.int32)}, 4) is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cu_seqlens": torch.tensor([0, 2, 4], dtype=torch.int32)}, "from 0 to 5"),
        ({"cu_seqlens": torch.tensor([0, 3, 2, 5], dtype=torch.int32)}, "to increase"),
        ({"cu_seqlens": torch.tensor([0, 3, 5], dtype=torch.int32)}, "to agree"),
        ({"seq_idx": torch.tensor([[0, 1, 1, 1, 1]], dtype=torch.int32)}, "to agree"),
        ({"position_ids": torch.tensor([[0, 1, 2, 3, 4]])}, "to agree"),
    ],
)
def test_what_disagrees(change: dict[str, torch.Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        offsets(fields([2, 3]) | change, 5)


def test_offsets_alone_must_reach_the_end() -> None:
    with pytest.raises(ValueError, match="from 0 to 9"):
        offsets({"cu_seqlens": torch.tensor([0, 5], dtype=torch.int32)}, 9)


def test_several_packed_rows() -> None:
    with pytest.raises(ValueError, match="one packed row"):
        offsets({"position_ids": torch.tensor([[0, 1, 2], [0, 0, 1]])}, 3)
