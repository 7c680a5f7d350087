"""``pack``: sequences into rows without padding, and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from effpass.rows.policies import check_policy, check_positive, fill
from effpass.rows.row import IGNORED, Row
from effpass.rows.samples import IDS, LABELS, Sample, check_alike, check_lengths, read_sample


class Rows(Sequence[Row]):
    """Packed rows, as a list; ``unpack`` takes outputs back to the sequences they came from."""

    def __init__(self, rows: Sequence[Row], max_tokens: int) -> None:
        self._rows, self.max_tokens = tuple(rows), max_tokens

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | Sequence[Row]:
        return self._rows[index]

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        return (
            f"<{len(self)} rows of at most {self.max_tokens} tokens, {self.tokens} tokens in all, "
            f"{self.padding_rate:.2%} left empty>"
        )

    @property
    def tokens(self) -> int:
        """Tokens of all sequences."""
        return sum(row.tokens for row in self)

    @property
    def target_count(self) -> int:
        """Labels that a loss counts, in all rows."""
        return sum(row.target_count for row in self)

    @property
    def padding_rate(self) -> float:
        """The share of rows * max_tokens that holds no token; 0 of no rows."""
        return padding_rate(self.tokens, len(self), self.max_tokens)

    def unpack(self, outputs: Iterable[Tensor]) -> list[Tensor]:
        """Outputs (1, T, ...), one a row, as one (length, ...) a sequence, in their first order.

        They are views. Raises ValueError for another number of outputs or another shape.
        """
        outputs = list(outputs)
        if len(outputs) != len(self):
            raise ValueError(
                f"expected {len(self)} outputs, one a row, found {len(outputs)}: to unpack a "
                "single row use row.unpack(output)"
            )
        found: dict[int, Tensor] = {}
        for row, output in zip(self, outputs, strict=True):
            found.update(zip(row.indices, row.unpack(output), strict=True))
        return [found[index] for index in range(len(found))]


def pack(
    sequences: Any,
    max_tokens: int,
    policy: str = "greedy",
    *,
    window: int | None = None,
    position_start: int = 0,
    fields: Sequence[str] | None = None,
    pad_to_max: bool = False,
    pad_token_id: int = 0,
) -> Rows:
    """Packs sequences end to end into rows of at most ``max_tokens`` tokens; nothing is truncated.

    ``sequences``: a list or a map-style dataset of 1-D integer lists, arrays or tensors, or of
    dicts with ``input_ids`` and, for each token, ``labels`` and further fields (``fields`` names
    those to keep, None for all). ``policy``: ``"arrival"`` keeps the order, ``"greedy"`` looks
    ahead among ``window`` sequences (64), ``"best_fit"`` among all. ``position_start``: the
    position of first tokens (RoBERTa's is 2). ``pad_to_max`` fills rows up with ``pad_token_id``,
    for models that need one size; no other row has padding. Rows are made on the CPU.

    Raises ValueError, naming the sequence, for one that is empty, longer than ``max_tokens``,
    padded, or without the fields of the first; TypeError for what is no sequence of integers.
    """
    check_positive("max_tokens", max_tokens)
    check_policy(policy, window)
    samples = _samples(sequences, fields)
    lengths = [len(sample[IDS]) for sample in samples]
    check_lengths(lengths, max_tokens)
    rows = [
        make_row(
            [samples[index] for index in indices],
            indices,
            position_start=position_start,
            padding=max_tokens - sum(lengths[i] for i in indices) if pad_to_max else 0,
            pad_token_id=pad_token_id,
        )
        for indices in fill(lengths, max_tokens, policy, window)
    ]
    return Rows(rows, max_tokens)


def padding_rate(tokens: int, rows: int, max_tokens: int) -> float:
    """The share of ``rows`` of ``max_tokens`` places that ``tokens`` tokens leave empty."""
    return 1 - tokens / (rows * max_tokens) if rows else 0.0


def check_indexable(sequences: Any) -> None:
    """Raises TypeError for what has no length and no places: an iterator, a dict of columns."""
    indexable = hasattr(sequences, "__len__") and hasattr(sequences, "__getitem__")
    if not indexable or isinstance(sequences, Mapping | str | bytes):
        raise TypeError(
            "expected a list of sequences or a map-style dataset, found "
            f"{type(sequences).__name__}: of an iterator make a list first"
        )


def make_row(
    samples: Sequence[Sample],
    indices: Sequence[int],
    *,
    position_start: int = 0,
    padding: int = 0,
    pad_token_id: int = 0,
    epoch: int | None = None,
    step: int | None = None,
) -> Row:
    """One row of samples with equal fields, and of ``padding`` tokens after them."""
    parts = list(samples)
    if padding:
        parts.append(_padding(samples[0], padding, pad_token_id))
    lengths = torch.tensor([len(part[IDS]) for part in parts])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    which = torch.arange(len(parts)).repeat_interleave(lengths)
    labels = torch.cat([part.get(LABELS, part[IDS]) for part in parts])
    labels[offsets[:-1]] = IGNORED
    if padding:
        labels[-padding:] = IGNORED
    further = [name for name in samples[0] if name not in (IDS, LABELS)]
    return Row(
        input_ids=torch.cat([part[IDS] for part in parts])[None],
        position_ids=(position_start + torch.arange(len(which)) - offsets[which])[None],
        cu_seqlens=offsets.int(),
        max_seqlen=int(lengths.max()),
        seq_idx=which.int()[None],
        labels=labels[None],
        indices=tuple(indices),
        fields={name: torch.cat([part[name] for part in parts])[None] for name in further},
        padding=padding,
        epoch=epoch,
        step=step,
    )


def _padding(like: Sample, length: int, pad_token_id: int) -> Sample:
    """A sequence of padding: zeros in every field but the ids."""
    zeros = {name: value.new_zeros(length, *value.shape[1:]) for name, value in like.items()}
    return {**zeros, IDS: torch.full((length,), pad_token_id)}


def _samples(sequences: Any, fields: Sequence[str] | None) -> list[Sample]:
    check_indexable(sequences)
    samples = [read_sample(sequences[i], i, fields) for i in range(len(sequences))]
    for index, sample in enumerate(samples):
        check_alike(sample, samples[0], index)
    return samples
