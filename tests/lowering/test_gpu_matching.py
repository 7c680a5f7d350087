"""Token matching in Triton against the definition, on a GPU or in Triton's interpreter."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import effpass
import effpass.lowering
from effpass.lowering.gpu import token_matching as gpu
from effpass.ops.token_matching import reference, token_matching
from tests.tiny import Stack
from tests.tolerances import close

pytest.importorskip("triton", reason="Triton is not installed")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.usefixtures("triton_runs")
SHAPES = [(2, 67, 130, 20), (1, 1, 1, 3), (3, 5, 64, 70), (1, 130, 1, 129), (2, 3, 0, 4)]


def _given(shape: tuple[int, ...], dtype: torch.dtype, ties: bool) -> tuple[Any, ...]:
    """Sources, destinations not contiguous, which are open, and positions in turns."""
    made = torch.Generator().manual_seed(sum(shape))
    batch, m, k, d = shape
    a = torch.randn(batch, m, d, generator=made)
    b = torch.randn(batch, d, k, generator=made).transpose(1, 2)
    a, b = (x.sign() * 0.5 if ties else x for x in (a, b))
    open = torch.rand(batch, k, generator=made) < 0.7
    order = torch.rand(batch, m + k, generator=made).argsort(1)
    at = (order[:, :m].sort(1).values, order[:, m:].sort(1).values)
    return tuple(x.to(DEVICE) for x in (a.to(dtype), b.to(dtype), open, *at))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("later", [False, True], ids=["any", "later"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_is_the_definition(shape: tuple[int, ...], later: bool, dtype: torch.dtype) -> None:
    a, b, *rest = _given(shape, dtype, ties=False)
    found, similar = gpu.forward(a, b, *rest, later)
    index, wanted = reference(a.double(), b.double(), *rest, later)
    close(similar.double(), wanted, "products_fp32")
    assert torch.equal(found, index)


@pytest.mark.parametrize("later", [False, True], ids=["any", "later"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_of_equal_partners_the_first_is_matched(dtype: torch.dtype, later: bool) -> None:
    """With four signs a token there are 16 different ones, whose products are exact."""
    arguments = (*_given((2, 67, 130, 4), dtype, ties=True), later)
    for found, wanted in zip(gpu.forward(*arguments), reference(*arguments), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("run", [reference, gpu.forward], ids=["definition", "gpu"])
def test_no_partner_zeros_and_nan(run: Any) -> None:
    a = torch.tensor([[[0.0, 0.0], [1.0, 0.0], [float("nan"), 1.0], [1e-30, 0.0]]], device=DEVICE)
    b = torch.tensor([[[float("nan"), 0.0], [-1.0, 0.0], [2.0, 0.0]]], device=DEVICE)
    at = torch.arange(4, device=DEVICE)[None]
    index, similar = run(a, b, at[:, :3] >= 0, at, at[:, :3], False)
    assert index[0, :3].tolist() == [1, 2, 0]
    assert similar[0, :3].tolist() == [0.0, 1.0, float("-inf")]
    index, similar = run(a, b, at[:, :3] < 0, at, at[:, :3], False)
    assert not index.any() and similar.isneginf().all()
    index, similar = run(a, b, at[:, :3] >= 0, at, at[:, :3], True)
    assert index[0].tolist() == [1, 2, 0, 0]
    assert similar[0, 2:].isneginf().all()


def test_is_a_sound_torch_op() -> None:
    arguments: tuple[Any, ...] = (*_given((2, 6, 9, 4), torch.float32, ties=False), True)
    overloads: list[Any] = [w.overload for w in token_matching.lowerings]
    assert len(overloads) == 2
    for overload in overloads:
        torch.library.opcheck(overload, arguments, test_utils=("test_schema", "test_faketensor"))


def test_it_runs_where_it_is_asked_for_and_says_why_not() -> None:
    arguments = (*_given((2, 6, 9, 4), torch.float32, ties=False), True)
    assert token_matching.choose(arguments, ["gpu"])[0].target == "gpu"
    chosen, refused = token_matching.choose(arguments)
    assert chosen.target == "inline"
    assert refused == [("gpu", "runs only where targets name it: not measured yet")]
    wide = (arguments[0].double(), *arguments[1:])
    chosen, refused = token_matching.choose(wide, ["gpu"])
    assert chosen.target == "inline"
    assert refused == [("gpu", "a is float64; needs float32, bfloat16 or float16")]
    empty: Tensor = arguments[0][..., :0]
    reason = gpu._refuses(empty, *arguments[1:])
    assert reason == "a has no channels; needs at least 1"


def test_reduce_tokens_runs_on_it_and_the_report_says_so() -> None:
    model, x = Stack(layers=2).to(DEVICE).eval(), torch.randn(2, 12, 8, device=DEVICE)
    options = {"compiler": "eager", "reduce_tokens": {"keep": 0.7, "layers": [0]}}
    runs: list[Any] = [
        torch.compile(each, backend="effpass", options={**options, "targets": [target]})
        for each, target in ((model, "gpu"), (copy.deepcopy(model), "inline"))
    ]
    with torch.no_grad():
        found, wanted = (run(x) for run in runs)
    close(found, wanted, "model_fp32")
    chosen = [c for c in effpass.report(runs[0]).chosen if c.op == "token_matching"]
    assert [c.implementation for c in chosen] == ["gpu"]
