"""The labels of the test models are true: convolutions, attention and feed-forward blocks.

Every spelling equals the op, written out or torch's own, in float64, gradients too; every near miss
differs from it. All of them run, train and are captured whole.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.patterns.spellings import (
    attention,
    attention_biases,
    attention_layouts,
    attention_masks,
    attention_near_misses,
    convolution_near_misses,
    convolutions,
    feed_forward,
    feed_forward_near_misses,
    shifts,
)
from tests.patterns.spellings.spelling import NearMiss, Spelling
from tests.tolerances import close

SPELLINGS: list[Spelling] = [
    *(*convolutions.SPELLINGS, *shifts.SPELLINGS, *shifts.EITHER),
    *(*convolution_near_misses.FLIPPED, *convolution_near_misses.EITHER),
    *(*attention.SPELLINGS, *attention_layouts.SPELLINGS, *attention_layouts.EITHER),
    *(*attention_biases.SPELLINGS, *attention_biases.EITHER),
    *(*attention_masks.SPELLINGS, *attention_masks.EITHER, *attention_near_misses.EITHER),
    *(*feed_forward.SPELLINGS, *feed_forward.EITHER),
]
NEAR_MISSES: list[NearMiss] = [
    *(*convolution_near_misses.NEAR_MISSES, *attention_near_misses.NEAR_MISSES),
    *(*attention_near_misses.SOFTCAP, *feed_forward_near_misses.NEAR_MISSES),
]
ALL: list[Spelling | NearMiss] = [*SPELLINGS, *NEAR_MISSES]
RANDOM = {"TrainingDropout", "ModuleDropout", "DropoutBetween"}
LENGTHS = (2, 5, 16)


def label(case: Spelling | NearMiss) -> str:
    kind = case.op if isinstance(case, Spelling) else "near"
    return f"{kind}: {case.name}"


def tensors(outputs: Any) -> list[Tensor]:
    """The outputs of a module, as a list."""
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)


def doubled(case: Spelling | NearMiss, length: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The module and its inputs in float64."""
    inputs = case.inputs(length)
    return case.make().double(), tuple(x.double() if x.is_floating_point() else x for x in inputs)


def gradients(outputs: list[Tensor], module: nn.Module) -> list[Tensor]:
    """Of the outputs times fixed random numbers, by each parameter."""
    random = torch.Generator().manual_seed(1)
    loss = sum(
        (y * torch.randn(y.shape, generator=random, dtype=torch.float64)).sum() for y in outputs
    )
    assert isinstance(loss, Tensor)
    return list(torch.autograd.grad(loss, list(module.parameters())))


@pytest.mark.parametrize("case", [s for s in SPELLINGS if s.reference], ids=label)
@pytest.mark.parametrize("length", LENGTHS)
def test_a_spelling_is_the_op(case: Spelling, length: int) -> None:
    module, inputs = doubled(case, length)
    assert case.reference is not None
    actual, expected = tensors(module(*inputs)), tensors(case.reference(module, *inputs))
    for a, e in zip(actual, expected, strict=True):
        close(a, e, "model_fp32")
    pairs = zip(gradients(actual, module), gradients(expected, module), strict=True)
    for a, e in pairs:
        close(a, e, "model_gradient_fp32")


@pytest.mark.parametrize("case", [n for n in NEAR_MISSES if n.mistaken], ids=label)
@pytest.mark.parametrize("length", LENGTHS[1:])
def test_a_near_miss_is_not(case: NearMiss, length: int) -> None:
    module, inputs = doubled(case, length)
    assert case.mistaken is not None
    (actual,), (mistaken,) = tensors(module(*inputs)), tensors(case.mistaken(module, *inputs))
    assert actual.shape == mistaken.shape and actual.dtype == mistaken.dtype
    with pytest.raises(AssertionError, match="off by"):
        close(actual, mistaken, "model_bf16")


@pytest.mark.parametrize("case", ALL, ids=label)
@pytest.mark.parametrize("length", LENGTHS)
def test_it_runs_and_trains(case: Spelling | NearMiss, length: int) -> None:
    module, inputs = case.make(), case.inputs(length)
    outputs = tensors(module(*inputs))
    assert all(y.isfinite().all() for y in outputs)
    for gradient in gradients(outputs, module):
        assert gradient.isfinite().all()
        # a bias of keys has none, in truth
        assert gradient.ndim == 1 or gradient.any()


@pytest.mark.parametrize("case", ALL, ids=label)
def test_it_is_captured_whole(case: Spelling | NearMiss) -> None:
    module, inputs = case.make(), case.inputs(6)
    torch.manual_seed(0)
    expected = tensors(module(*inputs))
    compiled = torch.compile(case.make(), backend="eager", fullgraph=True)
    torch.manual_seed(0)
    actual = tensors(compiled(*case.inputs(6)))
    for a, e in zip(actual, expected, strict=True):
        close(a, e, "model_fp32")


@pytest.mark.parametrize("case", ALL, ids=label)
def test_it_is_the_same_every_time(case: Spelling | NearMiss) -> None:
    first, again = case.make().state_dict(), case.make().state_dict()
    assert first.keys() == again.keys() and all(first[n].equal(again[n]) for n in first)
    inputs = case.inputs(4)
    assert all(x.equal(y) for x, y in zip(inputs, case.inputs(4), strict=True))
    module = case.make()
    outputs = zip(tensors(module(*inputs)), tensors(module(*inputs)), strict=True)
    assert all(x.equal(y) for x, y in outputs) != (case.name in RANDOM)


def test_names_are_unique() -> None:
    labels = [label(case) for case in ALL]
    assert len(labels) == len(set(labels))
