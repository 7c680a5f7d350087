"""Feed-forward blocks: what is recorded of each, and what is none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Node

from effpass.patterns.blocks.activations import NAMED, recognise
from effpass.patterns.feed_forward import IDIOM
from effpass.patterns.raising import recorded
from tests.patterns.raising import Raiser, equal
from tests.patterns.spellings import feed_forward, feed_forward_near_misses
from tests.patterns.spellings.spelling import NearMiss, Spelling, tokens

REASONS = {
    "NormBetween": ["between the activation and the second projection is layer_norm"],
    "DropoutBetween": ["dropout is active (p = 0.5)"],
    "GateOfThePast": ["the two factors are projections of different tensors"],
    "GateOfAnother": ["the two factors are projections of different tensors"],
    "NeuronsReturned": ["the hidden values are also returned"],
}
# kind, activation, fused
FACTS = {
    "Sequential, gelu": ("plain", "gelu", None),
    "Sequential, tanh gelu": ("plain", "gelu_tanh", None),
    "Sequential, relu, in place": ("plain", "relu", None),
    "Bert": ("plain", "gelu", None),
    "ErfWrittenOut": ("plain", "gelu", None),
    "TanhWrittenOut": ("plain", "gelu_tanh", None),
    "TanhFactored": ("plain", "gelu_tanh", None),
    "QuickGelu": ("plain", "quick_gelu", None),
    "SquaredRelu": ("plain", "relu2", None),
    "Gpt2": ("plain", "gelu_tanh", None),
    "Gated": ("gated", "silu", None),
    "Fused": ("gated", "silu", "gate_up"),
    "Glu": ("gated", "sigmoid", "up_gate"),
}


def named(cases: list[Any]) -> Any:
    return pytest.mark.parametrize("case", cases, ids=lambda c: c.name)


def facts(raiser: Raiser) -> dict[str, Any]:
    """What was recorded of the one block of a graph."""
    (record,) = recorded(raiser.graphs[0])
    assert record.op == "ffn" and record.region.outputs == (record.attributes["output"],)
    return dict(record.attributes)


@named(feed_forward.SPELLINGS)
def test_spellings(case: Spelling) -> None:
    raiser = equal(case.make(), case.inputs(5), [IDIOM])
    assert raiser.count("ffn") == case.count and not raiser.reasons


@named([case for case in feed_forward.SPELLINGS if case.name in FACTS])
def test_what_is_recorded(case: Spelling) -> None:
    raiser = Raiser(case.make(), [IDIOM])
    raiser(*case.inputs(5))
    found = facts(raiser)
    assert (found["kind"], found["activation"], found["fused"]) == FACTS[case.name]
    names = {"up", "down"} | ({"gate"} if found["kind"] == "gated" else set())
    assert set(found["weights"]) == set(found["transposed"]) == names
    for name, weight in found["weights"].items():
        assert isinstance(weight, Node) and weight.op == "placeholder"
        hidden = weight.meta["val"].shape[(name == "down") ^ found["transposed"][name]]
        assert hidden == found["hidden"] * (2 if found["fused"] and name != "down" else 1)
    assert isinstance(found["input"], Node)


def test_every_fact_is_of_a_spelling() -> None:
    assert set(FACTS) <= {case.name for case in feed_forward.SPELLINGS}
    assert set(REASONS) <= {case.name for case in feed_forward_near_misses.NEAR_MISSES}


@named(feed_forward_near_misses.NEAR_MISSES)
def test_near_misses(case: NearMiss) -> None:
    raiser = Raiser(case.make(), [IDIOM])
    raiser(*case.inputs(5))
    assert not raiser.count("ffn")
    assert raiser.reasons == REASONS.get(case.name, [])


class Block(nn.Module):
    """Two projections around a function of the first."""

    def __init__(self, between: Callable[[Tensor], Tensor], hidden: int = 10) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = nn.Linear(6, hidden), nn.Linear(10, 6)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.between(self.up(x)))


def test_an_activation_without_a_name_is_told() -> None:
    raiser = equal(Block(lambda h: torch.tanh(h) * h * h), tokens(6)(5), [IDIOM])
    assert not raiser.count("ffn")
    assert raiser.reasons == ["the function between the projections is no activation known by name"]


def test_a_factor_is_recorded() -> None:
    raiser = equal(Block(lambda h: F.silu(h) * 3), tokens(6)(5), [IDIOM])
    found = facts(raiser)
    assert found["activation"] == "silu" and found["factor"] == pytest.approx(3)


def test_two_activations_are_told() -> None:
    def between(h: Tensor) -> Tensor:
        first, second = h.chunk(2, -1)
        return F.silu(first) * torch.tanh(second)

    raiser = equal(Block(between, 20), tokens(6)(5), [IDIOM])
    assert not raiser.count("ffn")
    assert raiser.reasons == ["both factors of the gated product pass an activation"]


def test_up_before_gate() -> None:
    def between(h: Tensor) -> Tensor:
        return h[..., :10] * F.gelu(h[..., 10:])

    found = facts(equal(Block(between, 20), tokens(6)(5), [IDIOM]))
    assert (found["activation"], found["fused"], found["hidden"]) == ("gelu", "up_gate", 10)


def test_a_part_that_is_used_elsewhere_is_told() -> None:
    """Attention and feed-forward block from one matrix, say."""

    class Parallel(Block):
        def forward(self, x: Tensor) -> Tensor:
            gate, up, rest = self.up(x).split((10, 10, 6), -1)
            return self.down(F.silu(gate) * up) + rest

    raiser = equal(Parallel(F.silu, 26), tokens(6)(5), [IDIOM])
    assert not raiser.count("ffn") and len(raiser.reasons) == 1


@pytest.mark.parametrize("name", NAMED)
def test_activations_have_different_names(name: str) -> None:
    assert recognise(NAMED[name]) == (name, 1.0)
    found = recognise(lambda x: -2.5 * NAMED[name](x))
    assert found is not None and found[0] == name and found[1] == pytest.approx(-2.5)


@pytest.mark.parametrize(
    "function",
    [torch.sin, torch.zeros_like, lambda x: 1 / x, lambda x: F.gelu(x) + 1e-3, lambda x: x**3],
    ids=["sin", "zero", "reciprocal", "shifted gelu", "cube"],
)
def test_functions_without_a_name(function: Callable[[Tensor], Tensor]) -> None:
    assert recognise(function) is None
