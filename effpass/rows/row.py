"""One packed row: sequences end to end, and everything that tells where each begins.

The boundaries are told four times, because kernels and models ask in different ways: positions that
restart, offsets, the length of the longest sequence, and the number of each token's sequence.
``check_row`` says whether they tell the same.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

IGNORED = -100  # a label that no loss counts
_DTYPES = {
    "input_ids": torch.int64,
    "position_ids": torch.int64,
    "labels": torch.int64,
    "seq_idx": torch.int32,
}


@dataclass(frozen=True, eq=False)
class Row:
    """Sequences end to end: T tokens of S sequences.

    ``input_ids``, ``position_ids``, ``labels``: int64 (1, T); positions restart at each sequence.
    The label of a sequence's first token is -100: the loss of a causal model shifts labels by one,
    and this is the one that would be predicted from the sequence before. ``cu_seqlens``: int32
    (S + 1,), where each sequence begins, then T. ``max_seqlen``: length of the longest.
    ``seq_idx``: int32 (1, T), the sequence of each token. ``indices``: the number that each
    sequence had in what was packed. ``fields``: whatever else they hold a token, (1, T, ...).
    ``padding``: tokens at the end that fill the row up; they are a sequence of their own, the last,
    which has no number in ``indices``. ``epoch``, ``step``: the row's place in a PackedDataset.
    Raises ValueError unless the boundaries agree (``check_row``).
    """

    input_ids: Tensor
    position_ids: Tensor
    cu_seqlens: Tensor
    max_seqlen: int
    seq_idx: Tensor
    labels: Tensor
    indices: tuple[int, ...]
    fields: Mapping[str, Tensor] = field(default_factory=dict)
    padding: int = 0
    epoch: int | None = None
    step: int | None = None

    def __post_init__(self) -> None:
        for name, dtype in _DTYPES.items():
            found = getattr(self, name).dtype
            if found != dtype:
                raise ValueError(
                    f"expected {name} as {dtype}, found {found}: give integers to effpass.pack, "
                    "position_start and pad_token_id too"
                )
        per_token = {"input_ids": self.input_ids, "labels": self.labels, **self.fields}
        expected = (1, self.position_ids.numel())
        for name, value in per_token.items():
            if tuple(value.shape[:2]) != expected:
                raise ValueError(
                    f"expected {name} of shape {expected}, as position_ids, "
                    f"found {tuple(value.shape)}: make rows with effpass.pack"
                )
        check_row(
            self.position_ids,
            self.cu_seqlens,
            max_seqlen=self.max_seqlen,
            seq_idx=self.seq_idx,
            labels=self.labels,
        )
        _check_count(self)

    @property
    def lengths(self) -> list[int]:
        """The length of each sequence, padding left out."""
        return self.cu_seqlens.diff().tolist()[: len(self.indices)]

    @property
    def tokens(self) -> int:
        """Tokens that are not padding."""
        return self.input_ids.shape[1] - self.padding

    @property
    def target_count(self) -> int:
        """Labels that a loss counts; their sum over all ranks normalises a loss."""
        return int((self.labels != IGNORED).sum())

    def kwargs(self, *fields: str) -> dict[str, Any]:
        """Arguments for ``model(**row.kwargs())``: those of ``DataCollatorWithFlattening``.

        ``fields`` names further per-token fields that the model takes. Raises ValueError for one
        that the row does not hold.
        """
        missing = [name for name in fields if name not in self.fields]
        if missing:
            raise ValueError(
                f"expected fields of the sequences, {_names(self.fields)}, found {_names(missing)}"
            )
        return {
            "input_ids": self.input_ids,
            "labels": self.labels,
            "position_ids": self.position_ids,
            "seq_idx": self.seq_idx,
            "cu_seq_lens_q": self.cu_seqlens,
            "cu_seq_lens_k": self.cu_seqlens,
            "max_length_q": self.max_seqlen,
            "max_length_k": self.max_seqlen,
            **{name: self.fields[name] for name in fields},
        }

    def unpack(self, output: Tensor) -> list[Tensor]:
        """Cuts an output (1, T, ...) into one view (length, ...) a sequence, in the row's order.

        Padding is left out. Raises ValueError for another shape, TypeError for what is no tensor.
        """
        if not isinstance(output, Tensor):
            raise TypeError(
                f"expected an output as a tensor (1, {self.input_ids.shape[1]}, ...), found "
                f"{type(output).__name__}: pass one tensor of it, for example .logits"
            )
        if output.shape[:2] != self.input_ids.shape:
            raise ValueError(
                f"expected an output of shape (1, {self.input_ids.shape[1]}, ...), one place a "
                f"token of the row, found {tuple(output.shape)}"
            )
        return list(output[0, : self.tokens].split(self.lengths))

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Row:
        """The same row on another device."""
        return self._mapped(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Row:
        """The same row in pinned memory; ``DataLoader(pin_memory=True)`` calls this."""
        return self._mapped(lambda t: t.pin_memory())

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> Row:
        row = copy.copy(self)  # not checked again: reading values would wait for the device
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                object.__setattr__(row, name, change(value))
        fields = {name: change(value) for name, value in self.fields.items()}
        object.__setattr__(row, "fields", fields)
        return row


def check_row(
    position_ids: Tensor,
    cu_seqlens: Tensor,
    *,
    max_seqlen: int | None = None,
    seq_idx: Tensor | None = None,
    labels: Tensor | None = None,
    position_start: int | None = None,
) -> None:
    """Raises ValueError, naming the first place, unless all tell the same boundaries.

    ``position_ids`` (1, T) or (T,) count up from one start in every sequence: from
    ``position_start``, by default whatever the first token has. ``cu_seqlens`` is int32 (S + 1,),
    from 0 to T, with no empty sequence. ``max_seqlen`` is at least the longest length. ``seq_idx``,
    of the shape of ``position_ids``, numbers the sequences from 0. ``labels``, of that shape, are
    -100 at every first token. Reads values, so on an accelerator it waits for the device.
    """
    shape = tuple(position_ids.shape)
    if len(shape) not in (1, 2) or (len(shape) == 2 and shape[0] != 1):
        raise ValueError(
            f"expected position_ids of one packed row, (1, T), found {shape}: "
            "with more rows in a batch there are no cu_seqlens to agree with"
        )
    positions = position_ids.detach().cpu().reshape(-1)
    offsets = _offsets(cu_seqlens, len(positions))
    lengths = offsets.diff()
    which = torch.arange(len(lengths)).repeat_interleave(lengths)
    start = int(positions[0]) if position_start is None else position_start
    expected = start + torch.arange(len(positions)) - offsets[which]
    at = _first(positions != expected)
    if at is not None:
        raise ValueError(
            "expected position_ids and cu_seqlens to agree, found position "
            f"{int(positions[at])} at token {at}, where cu_seqlens put token "
            f"{int(at - offsets[which[at]])} of sequence {int(which[at])}, position "
            f"{int(expected[at])}: make both from the same lengths"
        )
    if max_seqlen is not None and max_seqlen < int(lengths.max()):
        raise ValueError(
            f"expected max_seqlen of at least {int(lengths.max())}, the longest sequence of "
            f"cu_seqlens, found {max_seqlen}: attention would leave tokens out"
        )
    if seq_idx is not None:
        _check_seq_idx(seq_idx, shape, which)
    if labels is not None:
        _check_labels(labels, shape, offsets)


def _offsets(cu_seqlens: Tensor, tokens: int) -> Tensor:
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or len(cu_seqlens) < 2:
        raise ValueError(
            "expected cu_seqlens to be int32 of shape (sequences + 1,), found "
            f"{cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}"
        )
    offsets = cu_seqlens.detach().cpu().long()
    if offsets[0] != 0 or offsets[-1] != tokens:
        raise ValueError(
            f"expected cu_seqlens from 0 to {tokens}, the number of tokens of position_ids, found "
            f"from {int(offsets[0])} to {int(offsets[-1])}"
        )
    at = _first(offsets.diff() <= 0)
    if at is not None:
        raise ValueError(
            f"expected cu_seqlens to increase, found {int(offsets[at])} then "
            f"{int(offsets[at + 1])} for sequence {at}: leave empty sequences out"
        )
    return offsets


def _check_seq_idx(seq_idx: Tensor, shape: tuple[int, ...], which: Tensor) -> None:
    if tuple(seq_idx.shape) != shape:
        raise ValueError(
            f"expected seq_idx of shape {shape}, as position_ids, found {tuple(seq_idx.shape)}"
        )
    found = seq_idx.detach().cpu().reshape(-1)
    at = _first(found != which)
    if at is not None:
        raise ValueError(
            f"expected seq_idx and cu_seqlens to agree, found {int(found[at])} at token {at}, "
            f"which is of sequence {int(which[at])} by cu_seqlens: make both from the same lengths"
        )


def _check_labels(labels: Tensor, shape: tuple[int, ...], offsets: Tensor) -> None:
    if tuple(labels.shape) != shape:
        raise ValueError(
            f"expected labels of shape {shape}, as position_ids, found {tuple(labels.shape)}"
        )
    firsts = labels.detach().cpu().reshape(-1)[offsets[:-1]]
    at = _first(firsts != IGNORED)
    if at is not None:
        raise ValueError(
            f"expected label {IGNORED} at the first token of every sequence, found "
            f"{int(firsts[at])} at token {int(offsets[at])}: it would be predicted from the "
            "sequence before"
        )


def _check_count(row: Row) -> None:
    sequences = len(row.indices) + (row.padding > 0)
    if len(row.cu_seqlens) != sequences + 1:
        raise ValueError(
            f"expected cu_seqlens of {sequences} sequences, as indices and padding tell, found "
            f"{len(row.cu_seqlens) - 1}"
        )
    last = int(row.cu_seqlens[-1] - row.cu_seqlens[-2])
    if row.padding and last != row.padding:
        raise ValueError(f"expected {row.padding} tokens of padding, found {last} in cu_seqlens")


def _first(wrong: Tensor) -> int | None:
    places = wrong.nonzero()
    return int(places[0]) if len(places) else None


def _names(names: Mapping[str, Any] | list[str]) -> str:
    return ", ".join(map(repr, names)) or "none"
