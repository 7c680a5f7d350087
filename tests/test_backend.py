"""``torch.compile(model, backend="effpass")``: the backend as a user meets it."""

import json
import logging
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import effpass
from tests.tiny import Stack, op_count, scan_args
from tests.tolerances import close

EAGER = {"compiler": "eager"}


def gradients(model: nn.Module, out: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(out.square().mean(), list(model.parameters())))


def test_listed_without_an_import() -> None:
    assert "effpass" in torch.compiler.list_backends()


@pytest.mark.parametrize("compiler", ["eager", "inductor"])
@pytest.mark.parametrize("checkpointed", [False, True])
def test_forward_and_gradients_equal_eager(compiler: str, checkpointed: bool) -> None:
    model = Stack(checkpointed=checkpointed)
    compiled = torch.compile(model, backend="effpass", options={"compiler": compiler})
    x = torch.randn(2, 7, 8)
    expected = model(x)
    actual = compiled(x)
    close(actual, expected, "model_fp32")
    pairs = zip(gradients(model, actual), gradients(model, expected), strict=True)
    for mine, theirs in pairs:
        close(mine, theirs, "model_gradient_fp32")
    assert op_count(effpass.report(compiled)) == {"selective_scan": 2, "causal_conv1d": 2}


def test_ops_inside_a_checkpoint_are_lowered_and_named() -> None:
    model = Stack(checkpointed=True)
    report = effpass.explain(model, torch.randn(2, 7, 8))
    assert {c.where for c in report.chosen} == {"layers.0", "layers.1"}
    assert report.graphs[0].verified.startswith("equal within")


def test_a_third_length_does_not_recompile() -> None:
    model = Stack()
    compiled = torch.compile(model, backend="effpass", options=EAGER)
    with torch.no_grad():
        for length in (5, 9, 13, 1, 2, 31):
            x = torch.randn(2, length, 8)
            close(compiled(x), model(x), "model_fp32")
    # static, symbolic, and length 1, which torch always specialises
    assert len(effpass.report(compiled).graphs) <= 3


@pytest.mark.parametrize("dynamic", [True, False])
def test_dynamic_and_fullgraph(dynamic: bool) -> None:
    model = Stack()
    compiled = torch.compile(
        model, backend="effpass", options=EAGER, fullgraph=True, dynamic=dynamic
    )
    for length in (4, 6):
        x = torch.randn(2, length, 8)
        close(compiled(x), model(x), "model_fp32")


def test_mode_reaches_inductor() -> None:
    model = Stack(layers=1)
    compiled = torch.compile(model, backend="effpass", mode="reduce-overhead")
    x = torch.randn(2, 4, 8)
    close(compiled(x), model(x), "model_fp32")


def test_autocast_outside_and_inside() -> None:
    model = Stack()

    class Inside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                x = self.model(x)
            return self.model.layers[0].proj(x.float())

    x = torch.randn(2, 6, 8)
    outside = torch.compile(model, backend="effpass", options=EAGER)
    with torch.autocast("cpu", torch.bfloat16):
        expected, actual = model(x), outside(x)
    assert actual.dtype == expected.dtype
    close(actual, expected, "model_bf16")
    inside = torch.compile(Inside(), backend="effpass", options=EAGER)
    assert inside(x).dtype == torch.float32
    close(inside(x), Inside()(x), "model_bf16")


def test_no_grad_region_inside_stops_the_gradient() -> None:
    def run(x: Tensor, w: Tensor) -> Tensor:
        with torch.no_grad():
            y = x * w
        return y + x @ w.T

    compiled = torch.compile(run, backend="effpass", options=EAGER)
    x, w = torch.randn(3, 3, requires_grad=True), torch.randn(3, 3, requires_grad=True)
    expected = torch.autograd.grad(run(x, w).sum(), (x, w))
    actual = torch.autograd.grad(compiled(x, w).sum(), (x, w))
    for mine, theirs in zip(actual, expected, strict=True):
        close(mine, theirs, "model_gradient_fp32")


@pytest.mark.parametrize("compiler", ["eager", "inductor"])
def test_writes_in_place_reach_the_caller(compiler: str) -> None:
    x, dt, A, B, C = scan_args(t=1)

    def step(state: Tensor) -> Tensor:
        y, new = torch.ops.effpass.selective_scan(
            x, dt, A, B, C, None, None, None, True, state.clone()
        )
        state.copy_(new)
        return y

    compiled = torch.compile(step, backend="effpass", options={"compiler": compiler})
    mine, theirs = torch.zeros(2, 8, 4), torch.zeros(2, 8, 4)
    for _ in range(3):
        close(compiled(mine), step(theirs), "model_fp32")
        close(mine, theirs, "model_fp32")
    assert mine.abs().max() > 0


def test_weights_changed_in_place_are_seen() -> None:
    model = Stack(layers=1)
    compiled = torch.compile(model, backend="effpass", options=EAGER)
    x = torch.randn(1, 4, 8)
    before = compiled(x)
    with torch.no_grad():
        model.layers[0].proj.weight.mul_(2)
    close(compiled(x), model(x), "model_fp32")
    assert not torch.allclose(compiled(x), before)


def test_dropout_in_training_is_random_and_scaled() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5)).train()
    compiled = torch.compile(model, backend="effpass", options=EAGER)
    out = compiled(torch.ones(64, 8))
    assert 0.3 < (out == 0).float().mean() < 0.7


def test_graph_without_a_tensor_or_an_op() -> None:
    compiled = torch.compile(lambda x: x + 1, backend="effpass", options=EAGER)
    assert compiled(torch.zeros(2)).tolist() == [1.0, 1.0]


def test_shape_changed_in_place_declines_the_capture() -> None:
    def run(x: Tensor) -> Tensor:
        y = x.clone()
        y.t_()
        return y + 1

    report = effpass.explain(run, torch.randn(2, 3))
    assert [d.code for d in report.declined if d.code == "capture"] == ["capture"]
    assert "t_ changes a tensor's shape" in report.declined[0].reason
    compiled = torch.compile(run, backend="effpass", options=EAGER)
    x = torch.randn(2, 3)
    assert torch.equal(compiled(x), run(x))


def test_report_by_source_for_a_plain_function() -> None:
    def plain(x: Tensor) -> Tensor:
        return torch.ops.effpass.linear_recurrence(x.sigmoid(), x)[0]

    compiled = torch.compile(plain, backend="effpass", options=EAGER)
    assert effpass.report(compiled).graphs == []
    compiled(torch.randn(1, 4, 3))
    assert effpass.report(compiled).count("linear_recurrence") == 1


def test_report_of_something_else_raises() -> None:
    with pytest.raises(TypeError, match=r"expected the result of torch\.compile"):
        effpass.report(3)


def test_targets_choose_the_implementation_and_say_why() -> None:
    report = effpass.explain(Stack(layers=1), torch.randn(1, 4, 8), options={"targets": ["step"]})
    chosen = report.chosen[0]
    assert chosen.implementation == "inline"
    assert ("cpu", "not in the configured targets") in chosen.refused


def test_explain_twelve_times_is_not_a_recompile() -> None:
    model = Stack(layers=1)
    for _ in range(12):
        assert effpass.explain(model, torch.randn(1, 4, 8)).count("selective_scan") == 1


def test_explain_leaves_the_random_state() -> None:
    x = torch.randn(4)
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    effpass.explain(nn.Dropout(0.5), x)
    assert torch.equal(torch.rand(2), expected)


def test_dump_writes_every_stage(tmp_path: Path) -> None:
    model = Stack(layers=1)
    with effpass.dump(tmp_path / "stages"):
        torch.compile(model, backend="effpass", options=EAGER)(torch.randn(1, 4, 8))
    (folder,) = (tmp_path / "stages").iterdir()
    names = sorted(p.name for p in folder.iterdir())
    assert names == [
        *("00_dynamo.txt", "01_captured.txt", "02_cleaned.txt", "03_raised.txt"),
        *("04_lowered.txt", "report.json", "report.txt"),
    ]
    assert "effpass.selective_scan" in (folder / "01_captured.txt").read_text()
    assert json.loads((folder / "report.json").read_text())["graphs"][0]["chosen"]


def test_a_summary_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "effpass"):
        torch.compile(Stack(), backend="effpass", options=EAGER)(torch.randn(1, 4, 8))
    assert "2 selective_scan on" in caplog.text


def test_report_text_and_json() -> None:
    report = effpass.explain(Stack(layers=1), torch.randn(1, 4, 8))
    assert "selective_scan" in str(report) and "layers.0" in str(report)
    graph = json.loads(report.to_json())["graphs"][0]
    assert {c["op"] for c in graph["chosen"]} == {"selective_scan", "causal_conv1d"}
    assert "compiled no graph" in str(effpass.Report())
