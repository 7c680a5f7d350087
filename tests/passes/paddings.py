"""Masks (b, t) with padding of every kind, and models with heads that read packed tokens."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def paddings(rows: int, tokens: int) -> Iterator[tuple[str, Tensor]]:
    """Padding on the right, on the left, anywhere; the first row is full where it can be."""
    generator = torch.Generator().manual_seed(tokens)
    columns = torch.arange(tokens)
    lengths = torch.randint(1, tokens, (rows, 1), generator=generator)
    lengths[0] = tokens
    yield "right", (columns < lengths).long()
    yield "left", (columns >= tokens - lengths).long()
    scattered = torch.randint(0, 2, (rows, tokens), generator=generator)
    scattered[:, 0] = 1
    scattered[-1] = columns % 2 == 0
    yield "scattered", scattered


def real(value: Tensor, mask: Tensor) -> Tensor:
    """The rows of real tokens of a value (b, t, ...)."""
    return value[mask.bool()]
