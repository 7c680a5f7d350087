"""Verification: it catches a wrong rewrite, and says when it could not look."""

import pytest
import torch
from torch import Tensor, nn

from effpass.backend import compile_graph
from effpass.config import Config
from effpass.graph.verify import VerificationError, verify
from effpass.ops import OPS, Lowering
from effpass.report import GraphReport
from tests.tiny import scan_args


def traced(run) -> torch.fx.GraphModule:
    return torch.fx.symbolic_trace(run)


def test_equal_graphs() -> None:
    text = verify(traced(lambda x: x * 2), traced(lambda x: x + x), [torch.randn(4)])
    assert text.startswith("equal within 0.0e+00")


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (lambda x: x * 2.01, "value 0 differs by"),
        (lambda x: (x * 2).double(), "expected torch.float32"),
        (lambda x: (x * 2)[1:], r"expected torch.float32 of shape \(4,\)"),
        (lambda x: x * 2 + torch.inf, "NaN or infinity in different places"),
    ],
)
def test_differences_are_named(run, message: str) -> None:
    with pytest.raises(VerificationError, match=message):
        verify(traced(lambda x: x * 2), traced(run), [torch.randn(4)])


def test_writes_into_inputs_are_compared_and_do_not_leak() -> None:
    x = torch.ones(3)
    with pytest.raises(VerificationError, match="value 1 differs"):
        verify(traced(lambda x: x.add_(1) * 0), traced(lambda x: x.add_(2) * 0), [x])
    assert torch.equal(x, torch.ones(3))


def test_writes_to_parameters_are_not_run() -> None:
    weight = nn.Parameter(torch.ones(3))

    def step(w: Tensor) -> Tensor:
        return torch.ops.aten.mul_.Tensor(w, 2)

    assert "writes to parameters" in verify(traced(step), traced(step), [weight])
    assert torch.equal(weight.detach(), torch.ones(3))


def wrong(*args: object) -> tuple[Tensor, Tensor]:
    y, state = OPS["selective_scan"].reference(*args)
    return y * 1.5, state


@pytest.mark.parametrize("strict", [False, True])
def test_a_wrong_implementation_is_caught(strict: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    op = OPS["selective_scan"]
    liar = Lowering("step", wrong, op.backward, lambda *_: None, None, splice=True)
    monkeypatch.setattr(op, "lowerings", [liar, op.inline])
    reports: list[GraphReport] = []
    config = Config(compiler="eager", verify=True, strict=strict)

    def backend(gm, inputs):
        return compile_graph(gm, inputs, config, keep=reports.append)

    args = scan_args(t=3)
    compiled = torch.compile(lambda *a: torch.ops.effpass.selective_scan(*a)[0], backend=backend)
    if strict:
        with pytest.raises(Exception, match="value 0 differs by"):
            compiled(*args)
        return
    with pytest.warns(UserWarning, match="verification failed in clean and lower"):
        out = compiled(*args)
    torch.testing.assert_close(out, op.reference(*args)[0])
    assert reports[0].verified.startswith("failed: value 0 differs")
