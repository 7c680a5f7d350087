"""Anchors, lengths, and what a graph costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import effpass
from effpass.passes.reduction.flops import Cost
from effpass.passes.reduction.schedule import auto, lengths, reachable, solve
from tests.models.zoo import FAMILIES


def equal_blocks(count: int, pairs: float = 0.0) -> Cost:
    linear = (*(1.0,) * count, 0.0)
    return Cost(linear, tuple(pairs * x for x in linear), linear)


def test_the_papers_anchors() -> None:
    assert auto(64) == (12, 17, 22, 27, 32, 37, 42)
    assert auto(48) == (10, 15, 20, 25, 30, 35)


@pytest.mark.parametrize("blocks", range(1, 100))
def test_anchors_lie_inside_every_stack(blocks: int) -> None:
    found = auto(blocks)
    assert bool(found) == (blocks > 1)
    assert list(found) == sorted(set(found)) and all(0 <= i < blocks - 1 for i in found)


@pytest.mark.parametrize(
    ("blocks", "ratio", "final"),
    [
        *[(64, 0.1, 0.825), (64, 0.2, 0.656), (64, 0.3, 0.495)],
        *[(48, 0.1, 0.808), (48, 0.2, 0.626), (48, 0.3, 0.455)],
    ],
)
def test_the_papers_lengths(blocks: int, ratio: float, final: float) -> None:
    """The share of tokens that is left at the end, for the paper's stacks and ratios."""
    found = solve(equal_blocks(blocks), ratio, 2048, auto(blocks), 0)
    assert found[-1] / 2048 == pytest.approx(final, abs=0.006)


def test_the_released_default() -> None:
    """A keep ratio of 0.905 saves 29.8 % of 64 layers and 24.4 % of 48."""
    for blocks, saved in ((64, 0.298), (48, 0.244)):
        anchors = auto(blocks)
        found = lengths(2048, 0.905, len(anchors), 0)
        assert equal_blocks(blocks).saved(found, anchors) == pytest.approx(saved, abs=0.002)


@pytest.mark.parametrize("blocks", [6, 12, 16, 24, 32, 64])
@pytest.mark.parametrize("tokens", [256, 257, 500, 2048])
@pytest.mark.parametrize("ratio", [0.05, 0.1, 0.2, 0.3])
def test_ratios_are_met_within_a_point(blocks: int, tokens: int, ratio: float) -> None:
    for pairs in (0.0, 0.01):
        cost, anchors = equal_blocks(blocks, pairs), auto(blocks)
        if ratio <= reachable(cost, tokens, anchors, 1):
            found = solve(cost, ratio, tokens, anchors, 1)
            assert cost.saved(found, anchors) == pytest.approx(ratio, abs=0.01)


def test_lengths_by_hand() -> None:
    """``N - min(N - ceil(N keep), n // 2)``, exact in decimal fractions."""
    assert lengths(100, 0.07, 1, 0) == (100, 50)
    assert lengths(100, 0.9, 2, 1) == (100, 90, 81)
    assert lengths(10, 0.5, 2, 8) == (10, 9, 9)
    assert lengths(3, 0.5, 1, 7) == (3, 3)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "family", ["llama", *(pytest.param(f, marks=SLOW) for f in ("bert", "vit"))]
)
def test_operations_are_those_that_torch_counts(family: str) -> None:
    """Of one row, the embedding and the head apart; whole attention, also where it is causal."""
    model, make_inputs = FAMILIES[family]()
    inputs: Any = make_inputs(2, 16, False)
    options = {"reduce_tokens": {"keep": 0.75, "layers": [0]}}
    with torch.no_grad():
        found = effpass.explain(model, options=options, **inputs).graphs[0].reductions[0]
        with FlopCounterMode(display=False) as counter:
            model(**inputs)
    counts = counter.get_flop_counts()
    stack = sum(
        sum(ops.values())
        for name, ops in counts.items()
        if name.rpartition(".")[2] in ("0", "1") and name.count("layer") == 1
    )
    # on a CPU torch counts no fused attention: two layers, 4 heads of 8 channels
    attention = 2 * 4 * 4 * 8 * found.lengths[0] ** 2
    assert found.operations[0] == stack / 2 + attention
