"""Every family of the zoo runs packed, or declines with the reason that the golden table holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import effpass
from tests.models import packing
from tests.models.zoo import FAMILIES
from tests.passes.paddings import paddings, real
from tests.tolerances import close

TABLE = packing.expected()
QUICK = ("bert", "llama", "mamba", "mamba2", "bamba")
# torch's own: Dynamo instantiates a model's autograd.Function, which torch deprecates
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


def test_the_table_has_every_family_with_a_mask() -> None:
    assert list(TABLE) == packing.families()


@pytest.mark.parametrize(
    "family",
    [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in TABLE],
)
def test_real_tokens_are_as_without_packing(family: str) -> None:
    """Padding on every side, lengths that change; and what the table says."""
    model, make_inputs = FAMILIES[family]()
    compiled = torch.compile(model, backend="effpass", options=packing.OPTIONS)
    with torch.no_grad():
        for length in (11, 16):
            for _, mask in paddings(3, length):
                inputs = make_inputs(3, length, True) | {"attention_mask": mask}
                actual, expected = tokens(compiled(**inputs)), tokens(model(**inputs))
                close(real(actual, mask), real(expected, mask), "zoo_fp32")
    first = effpass.report(compiled).graphs[0]
    found = packing.row(first)
    assert found == TABLE[family]
    assert ("packed" in found) == (first.forms.get("packed", 0) > 0)


@pytest.mark.parametrize("family", ["bert", "mamba2"])
def test_gradients(family: str) -> None:
    model, make_inputs = FAMILIES[family]()
    compiled = torch.compile(model, backend="effpass", options=packing.OPTIONS)
    for length in (11, 14):
        _, mask = next(paddings(3, length))
        inputs = make_inputs(3, length, True) | {"attention_mask": mask}
        losses = [real(tokens(f(**inputs)), mask).square().mean() for f in (compiled, model)]
        weights = [p for p in model.parameters() if p.requires_grad]
        pairs = [torch.autograd.grad(each, weights, allow_unused=True) for each in losses]
        for a, e in zip(*pairs, strict=True):
            assert (a is None) == (e is None)
            if a is not None and e is not None:
                close(a, e, "zoo_gradient_fp32")


@pytest.mark.parametrize("family", ["mamba", "mamba2", "bamba"])
def test_caches_are_those_of_rows_alone(family: str) -> None:
    """After a packed prefill, padded in front, states are those of each row without padding."""
    model, make_inputs = FAMILIES[family]()
    compiled = torch.compile(model, backend="effpass", options=packing.OPTIONS)
    masks = dict(paddings(3, 12))
    inputs = make_inputs(3, 12, True) | {"attention_mask": masks["left"], "use_cache": True}
    with torch.no_grad():
        cache = compiled(**inputs)[cache_name(family)]
        assert effpass.report(compiled).graphs[0].forms == {"plain": 0, "packed": 1}
        compiled(**(inputs | {"attention_mask": masks["right"]}))
        assert effpass.report(compiled).graphs[0].forms == {"plain": 1, "packed": 1}
        for i, length in enumerate(masks["left"].sum(1).tolist()):
            alone = {"input_ids": inputs["input_ids"][i : i + 1, -length:], "use_cache": True}
            expected = model(**alone)[cache_name(family)]
            for a, e in zip(states(cache), states(expected), strict=True):
                close(a[i : i + 1], e, "zoo_fp32")


def cache_name(family: str) -> str:
    return "past_key_values" if family == "bamba" else "cache_params"


def states(cache: Any) -> list[Tensor]:
    """Recurrent states of every layer that has one; in a dict in newer versions."""
    found: list[Tensor] = []
    for each in cache.layers:
        for name in ("conv_states", "recurrent_states"):
            value = getattr(each, name, {})
            found += list(value.values()) if isinstance(value, dict) else [value]
    assert found
    return found


def tokens(result: Any) -> Tensor:
    return result[0]
