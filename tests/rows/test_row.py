"""One row: its boundaries agree or are refused, it gives what models take, and it unpacks."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

import effpass
from effpass.rows import Row, check_row

LENGTHS = [3, 5, 1]


def row(**options: Any) -> Row:
    return effpass.pack([list(range(10, 10 + n)) for n in LENGTHS], 10, "arrival", **options)[0]


def boundaries() -> dict[str, Any]:
    """What check_row takes, all in agreement."""
    mine = row()
    return {
        "position_ids": mine.position_ids,
        "cu_seqlens": mine.cu_seqlens,
        "max_seqlen": 5,
        "seq_idx": mine.seq_idx,
        "labels": mine.labels,
    }


def edited(tensor: Tensor, at: int, value: int) -> Tensor:
    changed = tensor.clone()
    changed[..., at] = value
    return changed


def test_what_a_row_says() -> None:
    mine = row()
    assert mine.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 3, 4, 0]]
    assert mine.seq_idx.tolist() == [[0, 0, 0, 1, 1, 1, 1, 1, 2]]
    assert mine.cu_seqlens.tolist() == [0, 3, 8, 9] and mine.max_seqlen == 5
    assert mine.labels.tolist() == [[-100, 11, 12, -100, 11, 12, 13, 14, -100]]
    assert mine.lengths == LENGTHS and mine.indices == (0, 1, 2)
    assert mine.tokens == 9 and mine.target_count == 6 and mine.padding == 0
    assert (mine.epoch, mine.step) == (None, None)


def test_agreement_is_accepted() -> None:
    check_row(**boundaries())
    check_row(**{**boundaries(), "max_seqlen": 9})  # more is slower, not wrong
    check_row(row().position_ids[0], row().cu_seqlens)
    check_row(row(position_start=2).position_ids, row().cu_seqlens, position_start=2)


@pytest.mark.parametrize(
    ("name", "at", "value", "said"),
    [
        ("position_ids", 3, 3, "position 3 at token 3, where cu_seqlens put token 0 of sequence 1"),
        ("position_ids", 8, 5, "position 5 at token 8, .* sequence 2, position 0"),
        ("position_ids", 0, 1, "position 1 at token 1, .* position 2"),
        ("cu_seqlens", 1, 4, "position 0 at token 3, .* token 3 of sequence 0, position 3"),
        ("cu_seqlens", 0, 1, "from 0 to 9, .* found from 1 to 9"),
        ("cu_seqlens", 3, 8, "found from 0 to 8"),
        ("cu_seqlens", 2, 3, "to increase, found 3 then 3 for sequence 1"),
        ("cu_seqlens", 2, 10, "to increase, found 10 then 9 for sequence 2"),
        ("seq_idx", 8, 1, "found 1 at token 8, which is of sequence 2"),
        ("labels", 3, 10, "label -100 at the first token of every sequence, found 10 at token 3"),
    ],
)
def test_disagreement_is_refused(name: str, at: int, value: int, said: str) -> None:
    wrong = boundaries()
    wrong[name] = edited(wrong[name], at, value)
    with pytest.raises(ValueError, match=said):
        check_row(**wrong)
    if name in ("position_ids", "cu_seqlens", "seq_idx", "labels"):
        with pytest.raises(ValueError, match=said):
            dataclasses.replace(row(), **{name: wrong[name]})


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("position_ids", torch.zeros(2, 9), r"one packed row, \(1, T\), found \(2, 9\)"),
        ("position_ids", torch.zeros(()), r"one packed row, \(1, T\), found \(\)"),
        ("position_ids", torch.zeros(1, 0).int(), "from 0 to 0"),
        ("cu_seqlens", torch.tensor([0, 3, 8, 9]), "int32 .* found torch.int64"),
        ("cu_seqlens", torch.zeros(1, 4).int(), r"found torch.int32 of shape \(1, 4\)"),
        ("cu_seqlens", torch.zeros(1).int(), r"of shape \(1,\)"),
        ("max_seqlen", 4, "at least 5, .* found 4: attention would leave tokens out"),
        ("seq_idx", torch.zeros(9).int(), r"seq_idx of shape \(1, 9\)"),
        ("labels", torch.zeros(1, 8), r"labels of shape \(1, 9\), as position_ids, found \(1, 8\)"),
        ("position_start", 2, "position 0 at token 0, .* position 2"),
    ],
)
def test_wrong_shapes_are_refused(name: str, value: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        check_row(**{**boundaries(), name: value})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"input_ids": torch.zeros(1, 9)}, "input_ids as torch.int64, found torch.float32"),
        ({"seq_idx": torch.zeros(1, 9).long()}, "seq_idx as torch.int32, found torch.int64"),
        (
            {"input_ids": torch.zeros(1, 8).long()},
            r"input_ids of shape \(1, 9\), .* found \(1, 8\)",
        ),
        ({"fields": {"kind": torch.zeros(1, 8)}}, r"kind of shape \(1, 9\)"),
        ({"indices": (0, 1)}, "cu_seqlens of 2 sequences, as indices and padding tell, found 3"),
        ({"padding": 1}, "cu_seqlens of 4 sequences"),
        ({"padding": 2, "indices": (0, 1)}, "expected 2 tokens of padding, found 1"),
    ],
)
def test_a_row_whose_parts_disagree_is_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        dataclasses.replace(row(), **change)


def test_unpacking_one_row() -> None:
    output = torch.randn(1, 9, 4)
    parts = row().unpack(output)
    assert [len(part) for part in parts] == LENGTHS
    assert torch.equal(torch.cat(parts), output[0])
    assert parts[0].data_ptr() == output.data_ptr()  # a view
    for wrong in (output[:, :8], output[0], output.expand(2, 9, 4)):
        with pytest.raises(ValueError, match=r"shape \(1, 9, \.\.\.\), one place a token"):
            row().unpack(wrong)
    with pytest.raises(TypeError, match=r"found list: pass one tensor of it, for example \.logits"):
        row().unpack([output])  # type: ignore[arg-type]


def test_further_fields_are_asked_for() -> None:
    sample = {"input_ids": [1, 2], "token_type_ids": [0, 1]}
    (mine,) = effpass.pack([sample, sample], 4)
    assert "token_type_ids" not in mine.kwargs()
    assert mine.kwargs("token_type_ids")["token_type_ids"].tolist() == [[0, 1, 0, 1]]
    with pytest.raises(ValueError, match=r"expected fields .* 'token_type_ids', found 'kind'"):
        mine.kwargs("kind")
    with pytest.raises(ValueError, match="none, found 'kind'"):
        row().kwargs("kind")


def test_moving_a_row_moves_all_of_it() -> None:
    sample = {"input_ids": [1, 2], "kind": [0, 1]}
    mine = effpass.pack([sample, sample], 4)[0]
    moved = mine.to("meta")
    tensors = [v for v in (*vars(moved).values(), *moved.fields.values()) if isinstance(v, Tensor)]
    assert len(tensors) == 6 and all(t.is_meta for t in tensors)
    assert moved.indices == mine.indices and not mine.input_ids.is_meta
    assert not mine.fields["kind"].is_meta
