"""Masks of attention: steps from scores to what softmax sees, as one bias that is added to them.

Adding is adding. Overwriting a score is not: ``where(mask, fill, s)`` becomes ``s + fill``, which
is the same where the fill leaves no weight beside a visible key, and in a row without visible keys
only if ``s`` is 0 there. So the queries of such rows are zeroed while running, unless the fill is
so low that adding a score to it changes nothing. Rows of -inf alone are NaN, as in softmax.

What can be decided before running is in ``mask_facts``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import Node

from effpass.axes.labels import Dims


@dataclass(frozen=True)
class Operand:
    """A node whose dims are labelled."""

    node: Node
    dims: Dims


@dataclass(frozen=True)
class Added:
    """``scores + factor * value``."""

    value: Operand | float
    factor: float

    def scaled(self, factor: float) -> Added:
        """The step in front of a multiplication."""
        return replace(self, factor=self.factor * factor)


@dataclass(frozen=True)
class Filled:
    """``value`` where the mask is true; with ``inverted``, where it is false (or 0)."""

    mask: Operand
    inverted: bool
    value: float

    def scaled(self, factor: float) -> Filled:
        """The step in front of a multiplication."""
        return replace(self, value=self.value * factor)


@dataclass(frozen=True)
class Floor:
    """No score is lower than ``value``."""

    value: float

    def scaled(self, factor: float) -> Floor:
        """The step in front of a multiplication."""
        return replace(self, value=self.value * factor)


Step = Added | Filled | Floor
Arrange = Callable[[Operand], Tensor]


def operands(steps: Sequence[Step]) -> list[Operand]:
    """The tensors that steps read."""
    found = [
        s.mask if isinstance(s, Filled) else s.value for s in steps if not isinstance(s, Floor)
    ]
    return [operand for operand in found if isinstance(operand, Operand)]


def bias(
    steps: Sequence[Step], arrange: Arrange, like: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """What is added to scores, and where they are overwritten; None for nowhere.

    ``arrange`` brings an operand into (batch, head, query, key); ``like`` has the dtype of a bias
    that is made of numbers.
    """
    total: Tensor | None = None
    filled: Tensor | None = None
    for step in steps:
        if isinstance(step, Floor):
            if total is not None:
                mask = total < step.value
                filled = mask if filled is None else filled | mask
                total = total.clamp(min=fits(step.value, total.dtype))
        elif isinstance(step, Filled):
            mask = _mask(step, arrange)
            filled = mask if filled is None else filled | mask
            before = like.new_zeros(()) if total is None else total
            total = torch.where(mask, fits(step.value, before.dtype), before)
        else:
            assert isinstance(step.value, Operand)
            value = arrange(step.value)
            value = value.to(torch.promote_types(value.dtype, like.dtype))
            value = value if step.factor == 1 else value * step.factor
            total = value if total is None else total + value
    return total, filled


def fits(value: float, dtype: torch.dtype) -> float:
    """``value``, or the nearest that ``dtype`` has of those that are finite; infinity stays."""
    held = torch.finfo(dtype)
    return value if math.isinf(value) else min(max(value, held.min), held.max)


def _mask(step: Filled, arrange: Arrange) -> Tensor:
    value = arrange(step.mask)
    if value.dtype is not torch.bool:
        value = value != 0
    return ~value if step.inverted else value
