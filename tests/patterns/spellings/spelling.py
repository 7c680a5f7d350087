"""What a test model is: a whole small module, its inputs, and the op hidden in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Make = Callable[[], nn.Module]
Inputs = Callable[[int], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Spelling:
    """One way to write an op, inside a module.

    ``make`` seeds itself; the module is float32 and can be trained. ``inputs`` maps a length, a
    multiple of ``multiple``, to seeded inputs. ``op`` is the most specific op that computes it,
    found ``count`` times. ``reference(module, *inputs)`` gives the module's outputs by that op.
    """

    name: str
    make: Make
    inputs: Inputs
    op: str
    count: int = 1
    multiple: int = 1
    reference: Callable[..., Any] | None = None


@dataclass(frozen=True)
class NearMiss:
    """A module that looks like an op and is not, ``why`` in one line; from length 5 on.

    ``mistaken(module, *inputs)`` gives the outputs that a careless match would put in place.
    ``around``: an op of shifted, flipped, permuted or masked tensors would be right, if not wanted.
    """

    name: str
    make: Make
    inputs: Inputs
    why: str
    mistaken: Callable[..., Any] | None = None
    around: bool = False


def seeded(cls: Callable[..., nn.Module], *args: Any, **kwargs: Any) -> Make:
    """A factory of ``cls(*args, **kwargs)`` with the same parameters every time."""

    def make() -> nn.Module:
        torch.manual_seed(0)
        return cls(*args, **kwargs)

    return make


def tokens(width: int, batch: int = 2) -> Inputs:
    """Inputs of one tensor (batch, length, ``width``), the same every time."""

    def inputs(length: int) -> tuple[Tensor, ...]:
        generator = torch.Generator().manual_seed(length)
        return (torch.randn(batch, length, width, generator=generator),)

    return inputs
