"""``options={"compiler": "onnxruntime"}``: what runs there, what is declined, all of it right."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import effpass
from tests.tiny import Stack
from tests.tolerances import close

OPTIONS = {"compiler": "onnxruntime"}


def compiled(model: Any) -> Any:
    return torch.compile(model, backend="effpass", options=OPTIONS)


def reason(run: Any) -> str:
    """Why the graph of what ran did not run in ONNX Runtime."""
    (graph,) = effpass.report(run).graphs
    assert graph.compiler == "inductor"
    (declined,) = [d for d in graph.declined if d.code == "onnxruntime"]
    return declined.reason


def test_lengths_and_weights_that_change() -> None:
    model = Stack(layers=1).eval()
    run = compiled(model)
    with torch.no_grad():
        for length in (5, 9, 13, 1, 2):
            x = torch.randn(2, length, 8)
            close(run(x), model(x), "model_fp32")
        x = torch.randn(2, 11, 8)
        for p in model.parameters():
            p.mul_(1.1)
        close(run(x), model(x), "model_fp32")
        for p in model.parameters():
            p.data = p.data.clone() * 0.9  # without a trace in its version
        close(run(x), model(x), "model_fp32")
        apart = torch.stack([x, x], -1)[..., 0]
        close(run(apart), model(apart), "model_fp32")
    report = effpass.report(run)
    assert {g.compiler for g in report.graphs} == {"onnxruntime"}
    assert all("ONNX Runtime" in g.verified for g in report.graphs)
    assert {c.implementation for c in report.chosen} == {"onnxruntime"}


def test_training_is_declined() -> None:
    model = Stack(layers=1)
    run, x = compiled(model), torch.randn(2, 5, 8)
    out = run(x)
    close(out, model(x), "model_fp32")
    out.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p is not None)
    assert "gradients are wanted" in reason(run)


class Layouts(nn.Module):
    """Outputs that are a transposed value, an input, a number and nothing."""

    def forward(self, x: Tensor) -> Any:
        return (x @ x.transpose(1, 2)).transpose(0, 1), x, 3, None


def test_outputs_keep_their_layout() -> None:
    run, x = compiled(Layouts()), torch.randn(2, 3, 4)
    with torch.no_grad():
        found, same, number, nothing = run(x)
        expected = Layouts()(x)[0]
    close(found, expected, "kernel_fp32")
    assert found.stride() == expected.stride()
    assert same is x and number == 3 and nothing is None


def halves(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[:, :2], x * 2


def doubled_in_place(x: Tensor) -> Tensor:
    return x.mul_(2) + 1


def noisy(x: Tensor) -> Tensor:
    return x + torch.rand_like(x)


def bessel(x: Tensor) -> Tensor:
    return torch.special.modified_bessel_i0(x)


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (halves, "shares memory with"),
        (doubled_in_place, "writes in place"),
        (noisy, "draws random numbers"),
        (bessel, "no ONNX translation of the operator"),
    ],
)
def test_declined(function: Any, text: str) -> None:
    x = torch.randn(2, 5)
    run = compiled(function)
    with torch.no_grad():
        torch.manual_seed(0)
        found = run(x.clone())
        if function is not noisy:
            expected = function(x.clone())
            pairs = (
                zip(found, expected, strict=True)
                if isinstance(found, tuple)
                else [(found, expected)]
            )
            for have, want in pairs:
                close(have, want, "kernel_fp32")
    assert text in reason(run)


def test_a_wrong_translation_is_declined(monkeypatch: pytest.MonkeyPatch) -> None:
    from effpass.lowering.ort import table

    right = table.selective_scan.selective_scan

    def wrong(**given: Any) -> Any:
        return right(**{**given, "dt_softplus": False})

    monkeypatch.setattr(table.selective_scan, "selective_scan", wrong)
    model = Stack(layers=1).eval()
    run, x = compiled(model), torch.randn(2, 5, 8)
    with torch.no_grad():
        close(run(x), model(x), "model_fp32")
    assert "disagrees with eager" in reason(run)
