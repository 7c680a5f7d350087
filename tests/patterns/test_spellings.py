"""The test models of scans are what they are said to be: equal to their op, or not equal to it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from effpass import ops
from tests.patterns.spellings import (
    chunked,
    chunked_near_misses,
    cumulative,
    gated,
    loops,
    scan_near_misses,
    trees,
)
from tests.patterns.spellings.spelling import NearMiss, Spelling
from tests.tolerances import close

FILES = (loops, trees, chunked, chunked_near_misses, cumulative, gated)
SPELLINGS: list[Spelling] = [s for file in FILES for s in file.SPELLINGS]
NEAR_MISSES = [*scan_near_misses.NEAR_MISSES, *scan_near_misses.FLIPPED]
BASES = (5, 16)


def named(model: Spelling | NearMiss) -> str:
    return model.name


def inputs(spelling: Spelling, base: int) -> tuple[Tensor, ...]:
    """Inputs of the first legal length from ``base`` on."""
    return spelling.inputs(-(-base // spelling.multiple) * spelling.multiple)


def gradients(model: nn.Module, outputs: Any) -> dict[str, Tensor]:
    """Gradients of the outputs' squares; each parameter has one that is finite and not zero."""
    model.zero_grad()
    torch.stack([v.square().sum() for v in tree_leaves(outputs)]).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == dict(model.named_parameters()).keys(), "a parameter has no gradient"
    assert all(g.isfinite().all() and g.any() for g in found.values())
    return {name: g.clone() for name, g in found.items()}


def all_close(actual: Any, expected: Any, row: str) -> None:
    """``close`` of every tensor in two results of one structure."""
    for a, e in zip(tree_leaves(actual), tree_leaves(expected), strict=True):
        close(a, e, row)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("spelling", SPELLINGS, ids=named)
def test_spelling_is_its_op(spelling: Spelling, base: int) -> None:
    """Outputs and gradients are those of the op."""
    assert spelling.op in ops.OPS and spelling.reference is not None
    model, args = spelling.make(), inputs(spelling, base)
    actual, expected = model(*args), spelling.reference(model, *args)
    assert all(v.isfinite().all() for v in tree_leaves(actual))
    all_close(actual, expected, "model_fp32")
    theirs = gradients(model, expected)
    for name, mine in gradients(model, actual).items():
        close(mine, theirs[name], "model_gradient_fp32")


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("near_miss", NEAR_MISSES, ids=named)
def test_near_miss_is_not_the_op(near_miss: NearMiss, base: int) -> None:
    """It runs and trains; its outputs or its gradients are not those of a careless match."""
    model, args = near_miss.make(), near_miss.inputs(base)
    actual = model(*args)
    assert all(v.isfinite().all() for v in tree_leaves(actual))
    mine = gradients(model, actual)
    if near_miss.mistaken is None:
        return
    wrong = near_miss.mistaken(model, *args)
    wrong_gradients = gradients_if_any(model, wrong)
    with pytest.raises(AssertionError, match="off by"):
        all_close(actual, wrong, "model_fp32")
        for name, grad in wrong_gradients.items():
            close(mine[name], grad, "model_gradient_fp32")


def gradients_if_any(model: nn.Module, outputs: Any) -> dict[str, Tensor]:
    """As ``gradients``, of those parameters that the outputs use."""
    model.zero_grad()
    torch.stack([v.square().sum() for v in tree_leaves(outputs)]).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("near_miss", scan_near_misses.RANDOM, ids=named)
def test_random_models_follow_the_seed(near_miss: NearMiss) -> None:
    model, (x,) = near_miss.make(), near_miss.inputs(16)
    torch.manual_seed(1)
    first, second = model(x), model(x)
    torch.manual_seed(1)
    assert torch.equal(model(x), first) and not torch.equal(first, second)


@pytest.mark.slow
@pytest.mark.parametrize("model", [*SPELLINGS, *NEAR_MISSES], ids=named)
def test_captured_as_one_graph(model: Spelling | NearMiss) -> None:
    torch._dynamo.reset()
    args = inputs(model, 5) if isinstance(model, Spelling) else model.inputs(5)
    module = model.make()
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    all_close(compiled(*args), module(*args), "model_fp32")


def test_names_are_unique() -> None:
    models = [*SPELLINGS, *NEAR_MISSES, *scan_near_misses.RANDOM]
    assert len({m.name for m in models}) == len(models)


def test_same_parameters_every_time() -> None:
    """Two makes and two draws are equal, or a comparison of two models would mean nothing."""
    for model in [*SPELLINGS, *NEAR_MISSES]:
        first, second = model.make().state_dict(), model.make().state_dict()
        assert all(torch.equal(first[name], second[name]) for name in first)
        pairs = zip(model.inputs(8), model.inputs(8), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
