"""The sequences of one packed row laid out three ways: the same tokens, the same loss.

``packed`` keeps the row, ``padded`` makes a batch padded to the longest, ``single`` a batch of each
sequence. What a training step learns from is the same; what it computes is not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from effpass.rows import Row
from effpass.rows.row import IGNORED


@dataclass(frozen=True)
class Batch:
    """Arguments of one call of the model, and the labels (b, t) of what it returns."""

    inputs: dict[str, Any]
    labels: Tensor

    @property
    def computed(self) -> int:
        """Tokens that the model computes on, padding among them."""
        return self.labels.numel()


def packed(row: Row) -> list[Batch]:
    """The row as it is, with its boundaries."""
    inputs = row.kwargs()
    return [Batch(inputs, inputs.pop("labels"))]


def padded(row: Row) -> list[Batch]:
    """One batch (sequences, longest), padded behind."""
    ids = pad_sequence(row.unpack(row.input_ids), batch_first=True)
    labels = pad_sequence(row.unpack(row.labels), batch_first=True, padding_value=IGNORED)
    lengths = torch.tensor(row.lengths, device=ids.device)
    mask = torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]
    return [Batch({"input_ids": ids, "attention_mask": mask.long()}, labels)]


def single(row: Row) -> list[Batch]:
    """A batch (1, length) of each sequence."""
    pairs = zip(row.unpack(row.input_ids), row.unpack(row.labels), strict=True)
    return [Batch({"input_ids": ids[None]}, labels[None]) for ids, labels in pairs]


LAYOUTS: dict[str, Callable[[Row], list[Batch]]] = {
    "packed": packed,
    "padded": padded,
    "single": single,
}


def summed_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy (nats) of logits (b, t, v), summed over targets: token t predicts label t+1."""
    return cross_entropy(
        logits[:, :-1].flatten(0, 1).float(),
        labels[:, 1:].flatten(),
        ignore_index=IGNORED,
        reduction="sum",
    )
