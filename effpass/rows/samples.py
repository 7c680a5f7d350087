"""One sequence as the user has it: ids alone, or a dict of per-token fields; read and checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Sample = dict[str, Tensor]
INTEGERS = {
    torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.uint16, torch.uint32, torch.uint64,
}  # fmt: skip
IDS, LABELS, MASK = "input_ids", "labels", "attention_mask"
MADE = {  # by the row itself
    "position_ids", "seq_idx", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k",
}  # fmt: skip


def read_sample(value: Any, index: int, fields: Sequence[str] | None = None) -> Sample:
    """``input_ids`` (n,) int64 of sequence ``index``, ``labels`` if given, further ones (n, ...).

    ``value`` is a 1-D list, array or tensor of ids, or a mapping with ``input_ids``. ``fields``
    names the further fields to keep, None for all. A mask of ones says nothing and is left out.
    Raises TypeError or ValueError, naming the sequence, for what is not one value a token, for ids
    that are no integers, for no tokens, and for padding.
    """
    if not isinstance(value, Mapping):
        return {IDS: _integers(value, IDS, index)}
    if IDS not in value:
        raise ValueError(f"expected {IDS!r} in sequence {index}, found the fields {_names(value)}")
    sample = {IDS: _integers(value[IDS], IDS, index)}
    length = len(sample[IDS])
    if LABELS in value:
        labels = _integers(value[LABELS], LABELS, index)
        sample[LABELS] = _one_a_token(labels, LABELS, index, length)
    if MASK in value:
        mask = _tensor(value[MASK], MASK, index)
        _check_mask(_one_a_token(mask, MASK, index, length), index)
    for name in _further(value, index, fields):
        sample[name] = _one_a_token(_tensor(value[name], name, index), name, index, length)
    return sample


def check_alike(sample: Sample, first: Sample, index: int) -> None:
    """Raises ValueError unless a sample has the fields of the first one, of the same shape.

    Without this a sequence without labels would be trained on all its tokens, unasked.
    """
    if set(sample) != set(first):
        raise ValueError(
            f"expected the fields of the first sequence, {_names(first)}, in every sequence, found "
            f"{_names(sample)} in sequence {index}"
        )
    for name, value in sample.items():
        expected, found = tuple(first[name].shape[1:]), tuple(value.shape[1:])
        if found != expected:
            raise ValueError(
                f"expected values of shape {expected} a token in {name!r} of every sequence, as in "
                f"the first, found {found} in sequence {index}"
            )


def check_lengths(lengths: Sequence[int], max_tokens: int) -> None:
    """Raises ValueError naming the first sequence that is empty or longer than a row."""
    for index, length in enumerate(lengths):
        if length < 1:
            raise ValueError(
                f"expected at least 1 token in every sequence, found {length} in sequence {index}: "
                "leave it out"
            )
        if length > max_tokens:
            longer = sum(n > max_tokens for n in lengths)
            raise ValueError(
                f"expected sequences of at most max_tokens = {max_tokens} tokens, found {length} "
                f"in sequence {index} ({longer} of {len(lengths)} are too long): cut them into "
                f"pieces, leave them out, or take max_tokens = {max(lengths)}; nothing is truncated"
            )


def _further(value: Mapping[str, Any], index: int, fields: Sequence[str] | None) -> list[str]:
    further = [name for name in value if name not in (IDS, LABELS, MASK)]
    if isinstance(fields, str):
        raise TypeError(f"expected fields to be a list of names, found {fields!r}")
    made = MADE.intersection(further if fields is None else fields)
    if made:
        raise ValueError(
            f"expected no {_names(made)} in sequence {index}, since the row makes its own, found "
            f"the fields {_names(value)}: name the fields to keep with fields="
        )
    if fields is None:
        return further
    missing = [name for name in fields if name not in further]
    if missing:
        raise ValueError(
            f"expected the fields {_names(fields)} in sequence {index}, found {_names(value)}"
        )
    return list(fields)


def _integers(value: Any, name: str, index: int) -> Tensor:
    tensor = _tensor(value, name, index)
    if tensor.dim() != 1:
        raise ValueError(
            f"expected {name} of sequence {index} to be 1-D, found shape {tuple(tensor.shape)}: "
            "pass a list of sequences, each without a batch dimension"
        )
    if not len(tensor):
        raise ValueError(f"expected {name} of sequence {index} to hold tokens, found none")
    if tensor.dtype not in INTEGERS:
        raise TypeError(f"expected {name} of sequence {index} as integers, found {tensor.dtype}")
    return tensor.long()


def _tensor(value: Any, name: str, index: int) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    try:
        return torch.tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"expected {name} of sequence {index} to hold numbers, one a token, found "
            f"{type(value).__name__} {value!r:.40}: name the per-token fields to keep with fields="
        ) from error


def _one_a_token(value: Tensor, name: str, index: int, length: int) -> Tensor:
    if not value.dim() or len(value) != length:
        raise ValueError(
            f"expected {length} values of {name!r} in sequence {index}, one a token, found shape "
            f"{tuple(value.shape)}: name the per-token fields to keep with fields="
        )
    return value


def _check_mask(mask: Tensor, index: int) -> None:
    if not bool((mask == 1).all()):
        raise ValueError(
            f"expected sequence {index} without padding, found {int((mask != 1).sum())} places of "
            "its attention_mask that are not 1: tokenize with padding=False, or cut the padding off"
        )


def _names(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)) or "none"
