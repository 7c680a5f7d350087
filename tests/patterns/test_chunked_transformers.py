"""Chunked state-space duality of transformers, met as a plain graph: not through the front door."""

from __future__ import annotations

import importlib
import inspect
from types import FunctionType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from effpass.patterns.chunked import IDIOM
from tests.models.zoo import FAMILIES
from tests.patterns.raising import Raiser, equal, tensors
from tests.tolerances import close

FROM_TRANSFORMERS = ["mamba2", "bamba", "zamba2", "nemotron_h", "granitemoehybrid", "falcon_h1"]


def plain(function: Any) -> FunctionType:
    """A twin of a function of transformers, which the front door does not know."""
    inner = inspect.unwrap(function)
    twin = FunctionType(inner.__code__, inner.__globals__, "twin", inner.__defaults__)
    twin.__kwdefaults__ = inner.__kwdefaults__
    return twin


class Function(nn.Module):
    """A function of a library as a layer; the state it begins with is an input."""

    def __init__(self, function: Any, **options: Any) -> None:
        super().__init__()
        self.function, self.options = function, options
        self.A, self.D = nn.Parameter(-torch.rand(6) - 0.1), nn.Parameter(torch.rand(6))

    def forward(self, x: Tensor, dt: Tensor, B: Tensor, C: Tensor, *start: Tensor) -> Any:
        given = dict(zip(("initial_states",), start, strict=False)) | self.options
        return self.function(x, dt, self.A, B, C, 8, D=self.D, **given)


def ssm_inputs(length: int) -> tuple[Tensor, ...]:
    """x, dt, B and C."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, length, 6, 4), (2, length, 6), (2, length, 3, 7), (2, length, 3, 7))
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


@pytest.mark.parametrize("length", [5, 19, 24])
def test_every_option_of_transformers(length: int) -> None:
    modeling = importlib.import_module("transformers.models.mamba2.modeling_mamba2")
    options = {"return_final_states": True, "dt_softplus": True, "dt_limit": (0.1, 0.9)}
    module = Function(plain(modeling.mamba2_chunk_scan), **options)
    inputs = (*ssm_inputs(length), torch.ones(2, 6, 4, 7))
    raised = equal(module, inputs, [IDIOM])
    assert raised.count("ssd_scan") == 1 and raised.nodes("cumsum") == 0


@pytest.mark.parametrize("family", FROM_TRANSFORMERS)
def test_transformers(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, make_inputs = FAMILIES[family]()
    modeling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    layers = sum(hasattr(m, "A_log") for m in model.modules())
    monkeypatch.setattr(modeling, "mamba2_chunk_scan", plain(modeling.mamba2_chunk_scan))
    inputs = make_inputs(2, 19, True)
    raised = Raiser(model, [IDIOM])
    with torch.no_grad():
        actual, expected = raised.run(**inputs), model(**inputs)
    for a, e in zip(tensors(actual.to_tuple()), tensors(expected.to_tuple()), strict=True):
        close(a, e, "zoo_fp32")
    assert raised.count("ssd_scan") == raised.nodes("ssd_scan") == layers
    assert raised.reasons == []
