"""``effpass.pack``: every token in one place, the way back, transformers' collator as a judge."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import DataCollatorWithFlattening, LlamaConfig, LlamaForCausalLM

import effpass
from effpass.rows import POLICIES, Rows
from tests.tolerances import close

IDS = st.lists(st.integers(0, 99), min_size=1, max_size=12)
MANY = st.lists(IDS, max_size=12)
COLLATED = {
    "input_ids", "labels", "position_ids", "seq_idx",
    "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k",
}  # fmt: skip


@pytest.mark.parametrize("policy", POLICIES)
@settings(deadline=None)
@given(sequences=MANY, max_tokens=st.integers(12, 30), pad=st.booleans())
def test_unpacking_gives_back_what_was_packed(
    policy: str, sequences: list[list[int]], max_tokens: int, pad: bool
) -> None:
    rows = effpass.pack(sequences, max_tokens, policy, pad_to_max=pad)
    assert [t.tolist() for t in rows.unpack(row.input_ids for row in rows)] == sequences
    assert sorted(i for row in rows for i in row.indices) == list(range(len(sequences)))
    assert all(row.tokens <= max_tokens for row in rows)
    assert {row.input_ids.shape[1] for row in rows} <= ({max_tokens} if pad else set(range(31)))
    assert rows.tokens == sum(map(len, sequences))
    wide = [torch.randn(1, row.input_ids.shape[1], 3) for row in rows]
    for index, part in enumerate(rows.unpack(wide)):
        assert part.shape == (len(sequences[index]), 3)


@pytest.mark.parametrize("policy", POLICIES)
@settings(deadline=None)
@given(sequences=MANY.filter(bool), data=st.data())
def test_no_label_crosses_a_boundary(
    policy: str, sequences: list[list[int]], data: st.DataObject
) -> None:
    """What a causal loss pairs: the token at t and the label at t + 1, both of one sequence."""
    labelled = data.draw(st.booleans())
    samples = [
        {"input_ids": ids, "labels": [-100 if i % 3 == 0 else i for i in ids]} for ids in sequences
    ]
    rows = effpass.pack(samples if labelled else sequences, 30, policy)
    targets = 0
    for row in rows:
        ids, labels, which = row.input_ids[0], row.labels[0], row.seq_idx[0]
        assert labels[0] == -100
        for t in range(len(ids) - 1):
            if labels[t + 1] != -100:
                assert which[t] == which[t + 1] and labels[t + 1] == ids[t + 1]
                targets += 1
    wanted = sum(not (labelled and i % 3 == 0) for ids in sequences for i in ids[1:])
    assert targets == wanted == rows.target_count


def collated(samples: list[dict[str, Any]], start: int) -> dict[str, Any]:
    options = {"return_flash_attn_kwargs": True, "return_seq_idx": True}
    return DataCollatorWithFlattening(**options, position_ids_start=start)(samples)


@settings(deadline=None, max_examples=50)
@given(sequences=MANY.filter(bool), start=st.integers(0, 2), data=st.data())
def test_rows_are_what_transformers_collates(
    sequences: list[list[int]], start: int, data: st.DataObject
) -> None:
    labelled = data.draw(st.booleans())
    policy = data.draw(st.sampled_from(sorted(POLICIES)))
    samples = [
        {"input_ids": ids, **({"labels": ids[::-1]} if labelled else {})} for ids in sequences
    ]
    for row in effpass.pack(samples, 40, policy, position_start=start):
        theirs, mine = collated([samples[i] for i in row.indices], start), row.kwargs()
        assert set(mine) == set(theirs) == COLLATED
        for name, expected in theirs.items():
            if isinstance(expected, Tensor):
                assert mine[name].dtype == expected.dtype
                assert torch.equal(mine[name], expected), name
            else:
                assert type(mine[name]) is int and mine[name] == expected


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, num_hidden_layers=2, **sizes)).eval()


def test_a_model_takes_rows_and_gives_each_sequence_its_outputs() -> None:
    model, sequences = llama(), [torch.randint(50, (n,)) for n in (7, 3, 12, 1, 5)]
    rows = effpass.pack(sequences, 16)
    with torch.no_grad():
        outputs = [model(**row.kwargs(), use_cache=False) for row in rows]
        alone = [model(input_ids=ids[None], labels=ids[None], use_cache=False) for ids in sequences]
    for mine, theirs in zip(rows.unpack(o.logits for o in outputs), alone, strict=True):
        close(mine, theirs.logits[0], "model_fp32")
    together = sum(o.loss * row.target_count for o, row in zip(outputs, rows, strict=True))
    counts = [len(ids) - 1 for ids in sequences]
    one_by_one = sum(a.loss * n for a, n in zip(alone, counts, strict=True) if n)
    assert sum(counts) == rows.target_count
    close(torch.as_tensor(together), torch.as_tensor(one_by_one), "model_fp32")


def test_sequences_may_be_lists_arrays_tensors_or_dicts() -> None:
    short = np.arange(3, dtype=np.uint16)
    short.flags.writeable = False
    kinds = [[0, 1, 2], (0, 1, 2), range(3), short, torch.arange(3, dtype=torch.int32)]
    rows = effpass.pack(kinds, 15)
    assert rows[0].input_ids.tolist() == [[0, 1, 2] * 5] and rows[0].input_ids.dtype == torch.int64
    dicts = effpass.pack([{"input_ids": ids} for ids in kinds], 15)
    assert torch.equal(dicts[0].input_ids, rows[0].input_ids)
    table = effpass.pack(torch.arange(6).view(2, 3), 6)  # rows of a table are sequences
    assert table[0].lengths == [3, 3]


class Mapped(torch.utils.data.Dataset[dict[str, list[int]]]):
    """A map-style dataset that is no list."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        if index not in range(3):
            raise KeyError(index)
        return {"input_ids": [index] * (index + 1)}


def test_a_map_style_dataset_is_packed() -> None:
    (row,) = effpass.pack(Mapped(), 6, "arrival")
    assert row.input_ids.tolist() == [[0, 1, 1, 2, 2, 2]]


def test_packing_copies() -> None:
    ids = torch.arange(4)
    row = effpass.pack([{"input_ids": ids, "labels": ids}], 4)[0]
    assert ids.tolist() == [0, 1, 2, 3]
    row.input_ids.zero_()
    assert ids.tolist() == [0, 1, 2, 3]


def test_fields_come_along() -> None:
    sample = {"input_ids": [1, 2], "kind": [0.5, 1.5], "place": np.ones((2, 3)), "text": "ab"}
    row = effpass.pack([sample] * 2, 5, fields=["kind", "place"], pad_to_max=True)[0]
    assert row.fields["kind"].tolist() == [[0.5, 1.5, 0.5, 1.5, 0.0]]
    assert row.fields["place"].shape == (1, 5, 3) and set(row.fields) == {"kind", "place"}
    with pytest.raises(TypeError, match=r"text of sequence 0 .* found str 'ab': .* fields="):
        effpass.pack([sample], 5)


def test_padding_is_a_sequence_of_its_own() -> None:
    rows = effpass.pack([[1, 2, 3], [4, 5]], 8, pad_to_max=True, pad_token_id=9, position_start=2)
    (row,) = rows
    assert row.input_ids.tolist() == [[1, 2, 3, 4, 5, 9, 9, 9]]
    assert row.position_ids.tolist() == [[2, 3, 4, 2, 3, 2, 3, 4]]
    assert row.cu_seqlens.tolist() == [0, 3, 5, 8] and row.max_seqlen == 3
    assert row.labels.tolist() == [[-100, 2, 3, -100, 5, -100, -100, -100]]
    assert row.padding == 3 and row.tokens == 5 and row.lengths == [3, 2]
    assert row.indices == (0, 1) and row.target_count == 3
    assert rows.padding_rate == 3 / 8 == effpass.pack([[1, 2, 3], [4, 5]], 8).padding_rate


def test_rows_are_a_list_that_tells_what_is_empty() -> None:
    rows = effpass.pack([[1] * 6, [1] * 5, [1] * 4], 10, "arrival")
    assert len(rows) == 2 and [row.tokens for row in rows] == [6, 9] and rows[-1] is rows[1]
    assert rows.padding_rate == 0.25 and list(rows[:1]) == [rows[0]]
    assert repr(rows) == "<2 rows of at most 10 tokens, 15 tokens in all, 25.00% left empty>"
    nothing = effpass.pack([], 10)
    assert (len(nothing), nothing.padding_rate, nothing.unpack([])) == (0, 0.0, [])
    assert isinstance(nothing, Rows)


@pytest.mark.parametrize(
    ("sequences", "said"),
    [
        ([[1], [1] * 9, [1] * 10], "at most max_tokens = 8 tokens, found 9 in sequence 1 .2 of 3"),
        ([[1], [1] * 9, [1] * 10], "take max_tokens = 10; nothing is truncated"),
        ([[1], []], "input_ids of sequence 1 to hold tokens, found none"),
        ([[1], torch.ones(1, 2).long()], r"sequence 1 to be 1-D, found shape \(1, 2\)"),
        ([1, 2], r"sequence 0 to be 1-D, found shape \(\): pass a list of sequences"),
        ([{"ids": [1]}], "expected 'input_ids' in sequence 0, found the fields ids"),
        ([{"input_ids": [1], "labels": [1]}, {"input_ids": [1]}], "found input_ids in sequence 1"),
        ([{"input_ids": [1]}, {"input_ids": [1], "labels": [1]}], "input_ids, labels in sequence"),
        ([{"input_ids": [1, 2], "labels": [1]}], r"2 values of 'labels' in sequence 0.*\(1,\)"),
        ([{"input_ids": [1, 2], "kind": 3}], r"2 values of 'kind' .* shape \(\): name the .*field"),
        ([{"input_ids": [1, 2], "position_ids": [0, 1]}], "no position_ids in sequence 0, since"),
        ([{"input_ids": [1, 0], "attention_mask": [1, 0]}], "0 without padding, found 1 places"),
        (
            [{"input_ids": [1], "kind": [[1, 2]]}, {"input_ids": [1], "kind": [[1]]}],
            r"values of shape \(2,\) a token in 'kind' .* found \(1,\) in sequence 1",
        ),
    ],
)
def test_what_cannot_be_packed_is_refused(sequences: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        effpass.pack(sequences, 8)


@pytest.mark.parametrize(
    ("sequences", "said"),
    [
        ([[1.5, 2.0]], "input_ids of sequence 0 as integers, found torch.float32"),
        ([[True, False]], "found torch.bool"),
        (["ab"], "to hold numbers, one a token, found str 'ab'"),
        ([[[1], [1, 2]]], "to hold numbers, one a token, found list"),
        ({"input_ids": [[1]]}, "expected a list of sequences or a map-style dataset, found dict"),
        (iter([[1]]), "found list_iterator: of an iterator make a list first"),
    ],
)
def test_what_is_no_sequence_of_integers_is_refused(sequences: Any, said: str) -> None:
    with pytest.raises(TypeError, match=said):
        effpass.pack(sequences, 8)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"policy": "gredy"}, "one of arrival, greedy, best_fit, found 'gredy'.*mean 'greedy'"),
        ({"policy": None}, "one of arrival, greedy, best_fit, found None$"),
        ({"policy": "best_fit", "window": 4}, "no window with policy 'best_fit', found 4"),
        ({"window": 0}, "window to be a positive integer, found 0"),
        ({"max_tokens": 0}, "max_tokens to be a positive integer, found 0"),
        ({"max_tokens": 8.0}, "max_tokens to be a positive integer, found 8.0"),
        ({"max_tokens": True}, "found True"),
        ({"position_start": 0.5}, "position_ids as torch.int64, found torch.float32: .*start"),
        ({"pad_token_id": 0.5, "pad_to_max": True}, "input_ids as torch.int64, found torch.fl"),
        ({"fields": ["kind"]}, "the fields kind in sequence 0, found input_ids"),
    ],
)
def test_unknown_options_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        effpass.pack([{"input_ids": [1]}], **{"max_tokens": 8, **options})


def test_fields_is_a_list() -> None:
    with pytest.raises(TypeError, match="fields to be a list of names, found 'kind'"):
        effpass.pack([{"input_ids": [1], "kind": [1]}], 8, fields="kind")


def test_unpacking_wants_one_output_a_row() -> None:
    rows = effpass.pack([[1], [2]], 1)
    with pytest.raises(ValueError, match="expected 2 outputs, one a row, found 1"):
        rows.unpack([torch.zeros(1, 1)])
