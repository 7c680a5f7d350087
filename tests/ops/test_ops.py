"""Every op: a sound torch op, a true gradient, and clear words for wrong arguments."""

from typing import Any

import pytest
import torch
from torch import Tensor

from effpass.ops import OPS, causal_conv1d, selective_scan
from tests.ops.samples import SAMPLES, Sample, doubled, offsets


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_is_a_sound_torch_op(sample: Sample) -> None:
    arguments = [a.clone() if isinstance(a, Tensor) else a for a in sample.arguments()]
    for a in arguments:
        if isinstance(a, Tensor) and a.is_floating_point():
            a.requires_grad_()
    torch.library.opcheck(OPS[sample.op].overload, tuple(arguments))


def _small(sample: Sample) -> list[Any]:
    """The sample with at most three channels, so that numeric differences are quick."""
    op = OPS[sample.op]
    given = dict(zip(op.signature.parameters, doubled(sample.arguments()), strict=True))
    channel = {"causal_conv1d": "c", "ssd_scan": "p"}.get(sample.op, "d")
    for name, dims in op.axes.inputs.items():
        if given[name] is not None and channel in dims:
            at = dims.index(channel)
            given[name] = given[name].narrow(at, 0, min(3, given[name].shape[at]))
    return [a.clone() if isinstance(a, Tensor) else a for a in given.values()]


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_gradient_is_that_of_small_differences(sample: Sample) -> None:
    arguments = _small(sample)
    for a in arguments:
        if isinstance(a, Tensor) and a.is_floating_point():
            a.requires_grad_()
    assert torch.autograd.gradcheck(OPS[sample.op].overload, tuple(arguments), fast_mode=True)


def test_second_gradient_is_refused() -> None:
    x = torch.randn(1, 3, 4, requires_grad=True)
    y, _ = causal_conv1d(x, torch.randn(4, 4))
    (grad,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="causal_conv1d cannot be differentiated twice"):
        grad.sum().backward()


SCAN = {
    "x": torch.randn(2, 5, 4),
    "dt": torch.randn(2, 5, 4),
    "A": -torch.rand(4, 3),
    "B": torch.randn(2, 5, 3),
    "C": torch.randn(2, 5, 3),
}
ONE_ROW = {n: v if n == "A" else v[:1] for n, v in SCAN.items()}


@pytest.mark.parametrize(
    ("given", "change", "error", "text"),
    [
        (
            SCAN,
            {"dt": torch.randn(2, 6, 4)},
            ValueError,
            "selective_scan: expected dt (b t d) to have t = 5 (from x), "
            "found 6 in shape (2, 6, 4)",
        ),
        (
            SCAN,
            {"A": torch.randn(4)},
            ValueError,
            "selective_scan: expected A to have 2 dimensions (d n), found shape (4,)",
        ),
        (
            SCAN,
            {"D": [1.0] * 4},
            TypeError,
            "selective_scan: expected D to be a Tensor, found list",
        ),
        (
            SCAN,
            {"B": torch.ones(2, 5, 3, dtype=torch.int64)},
            TypeError,
            "selective_scan: expected B to be floating point, found torch.int64",
        ),
        (
            SCAN,
            {"z": torch.empty(2, 5, 4, device="meta")},
            ValueError,
            "selective_scan: expected z on cpu like the first argument, found meta",
        ),
        (
            SCAN,
            {"cu_seqlens": offsets(5)},
            ValueError,
            "selective_scan: expected batch 1 with cu_seqlens (sequences lie end to end in one "
            "row), found batch 2; reshape to (1, batch * tokens, ...)",
        ),
        (
            ONE_ROW,
            {"cu_seqlens": torch.tensor([0, 5])},
            ValueError,
            "selective_scan: expected cu_seqlens to be int32 of shape (sequences + 1,), "
            "found torch.int64 of shape (2,)",
        ),
        (
            ONE_ROW,
            {"cu_seqlens": offsets(5)[1:]},
            ValueError,
            "selective_scan: expected cu_seqlens to be int32 of shape (sequences + 1,), "
            "found torch.int32 of shape (1,)",
        ),
        (
            ONE_ROW,
            {"cu_seqlens": torch.tensor([1, 5], dtype=torch.int32)},
            ValueError,
            "selective_scan: expected cu_seqlens to start at 0, found 1",
        ),
        (
            ONE_ROW,
            {"cu_seqlens": torch.tensor([0, 4, 2, 5], dtype=torch.int32)},
            ValueError,
            "selective_scan: expected cu_seqlens not to decrease, found 4 then 2 at entry 2",
        ),
        (
            ONE_ROW,
            {"cu_seqlens": offsets(2, 2)},
            ValueError,
            "selective_scan: expected cu_seqlens to end at the token count 5, found 4",
        ),
        (
            ONE_ROW,
            {"cu_seqlens": offsets(2, 3), "initial_state": torch.zeros(1, 4, 3)},
            ValueError,
            "selective_scan: expected initial_state (s d n) to have s = 2 (from given), "
            "found 1 in shape (1, 4, 3)",
        ),
    ],
)
def test_wrong_arguments_are_named(
    given: dict[str, Any], change: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error) as raised:
        selective_scan(**{**given, **change})
    assert str(raised.value) == text


def test_wrong_activation_is_named() -> None:
    with pytest.raises(ValueError) as raised:
        causal_conv1d(torch.randn(1, 3, 4), torch.randn(4, 4), activation="relu")
    expected = "causal_conv1d: expected activation to be None or 'silu', found 'relu'"
    assert str(raised.value) == expected


def test_weight_without_columns_is_refused() -> None:
    with pytest.raises(ValueError) as raised:
        causal_conv1d(torch.randn(1, 3, 4), torch.randn(4, 0))
    expected = "causal_conv1d: expected weight (c, w) with w >= 1, found w = 0"
    assert str(raised.value) == expected
