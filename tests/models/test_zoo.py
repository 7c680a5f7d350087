"""Every family of the zoo computes with effpass what it computes in eager mode."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import effpass
from tests.models import golden
from tests.models.zoo import FAMILIES
from tests.tolerances import close

SHORT, LONG = 11, 18
# torch's own: Dynamo instantiates a model's autograd.Function, which torch deprecates
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
every_family = pytest.mark.parametrize("family", FAMILIES)


def outputs(result: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in result.items() if isinstance(value, Tensor)}


def check(
    compiled: Any, model: nn.Module, inputs: dict[str, Any], row: str
) -> tuple[Tensor, Tensor]:
    """Compares all outputs, their dtypes, shapes and strides; returns a loss over all, of both."""
    expected, actual = outputs(model(**inputs)), outputs(compiled(**inputs))
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        close(actual[name], value, row)
        assert actual[name].stride() == value.stride(), name
    return loss(expected), loss(actual)


def loss(results: dict[str, Tensor]) -> Tensor:
    return torch.stack([value.square().mean() for value in results.values()]).sum()


def check_gradients(model: nn.Module, expected: Tensor, actual: Tensor) -> None:
    weights = dict(model.named_parameters())
    theirs, ours = (
        torch.autograd.grad(total, list(weights.values()), allow_unused=True)
        for total in (expected, actual)
    )
    assert any(g is not None and bool(g.abs().max() > 0) for g in theirs)
    for name, a, e in zip(weights, ours, theirs, strict=True):
        assert (a is None) == (e is None), f"{name}: only one of the two has a gradient"
        if a is not None and e is not None:
            close(a, e, "zoo_gradient_fp32")


def check_family(family: str, compiler: str) -> None:
    """Forward and gradients at one length; then padded, at two; and the golden counts of ops."""
    model, make_inputs = FAMILIES[family]()
    compiled = torch.compile(model, backend="effpass", options={"compiler": compiler})
    within = "zoo_delta_rule_fp32" if family == "qwen3_next" else "zoo_fp32"

    check_gradients(model, *check(compiled, model, make_inputs(2, SHORT, False), within))
    with torch.no_grad():
        check(compiled, model, make_inputs(2, SHORT, True), within)
        check(compiled, model, make_inputs(2, LONG, True), within)

    graphs = effpass.report(compiled).graphs
    assert golden.row(graphs[0]) == golden.expected()[family]
    assert all(golden.row(graph)["ops"] == golden.row(graphs[0])["ops"] for graph in graphs)


@every_family
def test_equals_eager(family: str) -> None:
    check_family(family, "eager")


@pytest.mark.slow
@every_family
def test_equals_eager_with_inductor(family: str) -> None:
    check_family(family, "inductor")


@pytest.mark.parametrize("family", [f for f, row in golden.expected().items() if row["ops"]])
def test_ops_show_in_the_output(family: str) -> None:
    """A wrong scan or convolution could not hide: changing its weights moves the output."""
    model, make_inputs = FAMILIES[family]()
    inputs = make_inputs(2, LONG, False)
    with torch.no_grad():
        before = next(iter(outputs(model(**inputs)).values()))
        for name, weight in model.named_parameters():
            if name.endswith(("A_log", "conv1d.weight", "conv.weight")):
                kept = weight.clone()
                weight.mul_(-0.5)
                after = next(iter(outputs(model(**inputs)).values()))
                assert (after - before).abs().max() > 1e-2 * before.abs().max(), name
                weight.copy_(kept)
