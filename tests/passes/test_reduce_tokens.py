"""ReduceTokens on small models: as computed by hand, or declined with a reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import effpass
from effpass.report import GraphReport
from tests.passes import reduction_by_hand, small
from tests.passes.paddings import paddings, real
from tests.tiny import Mixer, Stack
from tests.tolerances import close


def compiled(model: nn.Module, **options: Any) -> Any:
    fields = {"reduce_tokens": options, "compiler": "eager"}
    return torch.compile(model, backend="effpass", options=fields)


def stack(layers: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return Stack(layers).eval()


def graphs(run: Any) -> list[GraphReport]:
    return effpass.report(run).graphs


def codes(run: Any) -> list[str]:
    return [d.code for graph in graphs(run) for d in graph.declined]


@pytest.mark.filterwarnings("ignore:.*only the rows of the protected tail")
@pytest.mark.parametrize("q", [0.0, 0.5, 1.0, None])
def test_scans_are_as_computed_by_hand(q: float | None) -> None:
    """Two anchors, several lengths in one compiled model, outputs and gradients.

    As published; q of None: as ``auto`` does it, by deviation and q = 1.
    """
    model = stack()
    how: dict[str, Any] = {} if q is None else {"q": q, "score": "clip_y"}
    run = compiled(model, keep=0.75, layers=[0, 1], protect_last=2, **how)
    by, q = ("deviation", 1.0) if q is None else ("clip_y", q)
    for tokens in (13, 20, 31):
        x = torch.randn(2, tokens, 8, requires_grad=True)
        actual = run(x)
        expected = reduction_by_hand.scans(model, x, {0: 0.75, 1: 0.75}, q, 2, by)
        close(actual, expected, "model_fp32")
        inputs = (x, *model.parameters())
        pairs = [torch.autograd.grad(y.square().mean(), inputs) for y in (actual, expected)]
        for mine, theirs in zip(*pairs, strict=True):
            close(mine, theirs, "model_gradient_fp32")
    assert [g.forms["reduced"] for g in graphs(run)] == [1, 2]


@pytest.mark.parametrize("spell", [small.additive, small.causal, small.filled])
def test_attention_is_as_computed_by_hand(spell: small.Bias) -> None:
    """Masks and positions of each row's own tokens, padding on either side."""
    torch.manual_seed(0)
    model = small.Encoder(spell, small.tokens).eval()
    run = compiled(model, keep=0.7, layers=[0], protect_last=1)
    with torch.no_grad():
        for _, mask in paddings(3, 12):
            ids = torch.randint(0, small.VOCAB, (3, 12))
            expected = reduction_by_hand.encoder(model, ids, mask, 0.7, 1)
            close(real(run(ids, mask), mask), real(expected, mask), "model_fp32")
    assert codes(run) == []


@pytest.mark.parametrize("tokens", [1, 2, 3, 5])
def test_short_rows_run_as_they_are(tokens: int) -> None:
    """One token; fewer than are protected: nothing leaves, and the bits are those of no pass."""
    model, x = stack(), torch.randn(2, tokens, 8)
    with torch.no_grad():
        plain = torch.compile(model, backend="effpass", options={"compiler": "eager"})(x)
        torch._dynamo.reset()
        run = compiled(model, keep=0.5, layers=[0], protect_last=tokens)
        assert torch.equal(run(x), plain)
    assert codes(run) == (["reduce_tokens:one_token"] if tokens == 1 else [])


@pytest.mark.parametrize("options", [{"ratio": 0}, {"ratio": 0.0}, {"keep": 1}])
def test_nothing_asked_is_no_pass(options: dict[str, Any]) -> None:
    model, x = stack(), torch.randn(2, 40, 8)
    with torch.no_grad():
        plain = torch.compile(model, backend="effpass", options={"compiler": "eager"})(x)
        torch._dynamo.reset()
        run = compiled(model, **options)
        assert torch.equal(run(x), plain)
    assert not graphs(run)[0].reductions and not graphs(run)[0].forms


@pytest.mark.parametrize(
    ("method", "score"),
    [
        *[(m, "auto") for m in ("utrc", "evit", "tome", "pumer", "random", "prefix")],
        *[("evit", s) for s in ("dt_norm", "hidden_norm", "l1", "deviation")],
    ],
)
def test_every_method_keeps_the_contract(method: str, score: str) -> None:
    model, x = stack(), torch.randn(2, 33, 8)
    with torch.no_grad():
        run = compiled(model, ratio=0.2, method=method, score=score)
        assert run(x).shape == x.shape and run(x).isfinite().all()
    (graph,) = graphs(run)
    assert graph.forms == {"plain": 0, "reduced": 2}
    assert abs(graph.reductions[0].saved - 0.2) < 0.05


def test_the_next_token_is_predicted_by_a_kept_one() -> None:
    """Whatever leaves, the protected tail is what the blocks make of it, and not a copy."""
    model, x = stack(), torch.randn(2, 30, 8)
    options = {"reduce_tokens": {"keep": 0.6, "protect_last": 4}}
    with torch.no_grad():
        report = effpass.explain(model, x, options=options)
    assert "o stays, m is merged, x is dropped" in str(report)
    for step in report.graphs[0].reductions[0].steps:
        assert {26, 27, 28, 29} <= set(step.kept)


def _disturbed(run: Any, x: Tensor, at: int) -> Tensor:
    """How far every row moves when one token does, a little."""
    moved = x.clone()
    moved[:, at] += 1e-4
    with torch.no_grad():
        return (run(moved) - run(x)).abs().amax((0, 2))


def test_causal_rows_do_not_read_later_values() -> None:
    """Disturbed too little to change who leaves, a token does not move earlier rows."""
    model, x = stack(), torch.randn(1, 40, 8).double()
    model = model.double()
    ahead = _disturbed(compiled(model, keep=0.6, layers=[0, 1], q=0.0), x, 30)
    torch._dynamo.reset()
    causal = _disturbed(compiled(model, keep=0.6, layers=[0, 1], q=0.0, causal=True), x, 30)
    assert ahead[:30].max() > 1e-7, "without causal=True, merges look ahead"
    assert not causal[:30].any() and causal[30:].max() > 1e-7
    torch._dynamo.reset()
    tail = _disturbed(compiled(model, keep=0.6, layers=[0, 1], protect_last=9), x, 35)
    assert not tail[31:35].any(), "rows of the protected tail never look ahead"


@pytest.mark.parametrize("causal", [True, False])
def test_training_warns_where_rows_look_ahead(causal: bool, recwarn: Any) -> None:
    run = compiled(stack(), keep=0.7, layers=[0], causal=causal)
    run(torch.randn(2, 20, 8)).sum().backward()
    said = [w for w in recwarn if "only the rows of the protected tail" in str(w.message)]
    assert bool(said) == (not causal)


@pytest.mark.parametrize("alignment", ["repeat", "bias_gap"])
def test_alignment_changes_the_decay_over_gaps_only(alignment: str) -> None:
    from effpass.passes.reduction.steps import aligned_scan

    torch.manual_seed(0)
    x, dt, B, C = (torch.randn(1, 4, k).double() for k in (3, 3, 2, 2))
    A, D, bias = -torch.rand(3, 2).double(), torch.randn(3).double(), torch.randn(3).double()
    given = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "z": None, "dt_bias": bias}
    given |= {"dt_softplus": True, "initial_state": None}
    at = torch.tensor([[0, 2, 3, 7]])
    y, final = aligned_scan("selective_scan", alignment, at, given)
    state, rows = torch.zeros(3, 2).double(), []
    for t, gap in enumerate((0, 1, 0, 3)):
        step = torch.nn.functional.softplus(dt[0, t] + bias)
        missing = step if alignment == "repeat" else torch.nn.functional.softplus(bias)
        state = torch.exp((step + gap * missing)[:, None] * A) * state
        state = state + (step * x[0, t])[:, None] * B[0, t]
        rows.append((state * C[0, t]).sum(-1) + D * x[0, t])
    close(y[0], torch.stack(rows), "raised_fp64")
    close(final[0], state, "raised_fp64")


@pytest.mark.parametrize("alignment", ["repeat", "bias_gap"])
def test_alignment_runs_or_is_declined(alignment: str) -> None:
    run = compiled(stack(), keep=0.7, layers=[0], alignment=alignment)
    with torch.no_grad():
        assert run(torch.randn(2, 20, 8)).isfinite().all()
    expected = {"repeat": [], "bias_gap": ["reduce_tokens:alignment"]}  # its bias is a layer's
    assert codes(run) == expected[alignment]


class Averaged(nn.Module):
    """Between its blocks, every token reads the mean of all."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Mixer(), Mixer()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.second(x - x.mean(1, keepdim=True))


def test_what_mixes_tokens_between_blocks_is_declined() -> None:
    run, x = compiled(Averaged(), keep=0.7, layers=[0]), torch.randn(2, 20, 8)
    with torch.no_grad():
        run(x)
    (declined,) = graphs(run)[0].declined
    assert declined.code == "reduce_tokens:mixes_tokens"
    assert "mean is folded" in declined.reason


def test_one_block_and_no_mixer_are_declined() -> None:
    for model, code in ((stack(1), "one_block"), (nn.Linear(8, 8), "no_mixer")):
        torch._dynamo.reset()
        run = compiled(model, ratio=0.1)
        with torch.no_grad():
            run(torch.randn(2, 20, 8))
        assert codes(run) == [f"reduce_tokens:{code}"]


@pytest.mark.parametrize("head", [small.first, small.masked_mean])
def test_heads_read_all_tokens(head: small.Head) -> None:
    """What comes behind the last block runs on restored tokens, and equals that by hand."""
    torch.manual_seed(0)
    model, whole = small.Encoder(small.additive, head).eval(), small.tokens
    run, ids = compiled(model, keep=0.7, layers=[0]), torch.randint(0, small.VOCAB, (3, 12))
    mask = torch.ones(3, 12, dtype=torch.long)
    with torch.no_grad():
        actual = run(ids, mask)
        model.head = whole
        expected = head(reduction_by_hand.encoder(model, ids, mask, 0.7, 1), mask)
    close(actual, expected, "model_fp32")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({}, "expected either ratio"),
        ({"ratio": 0.1, "keep": 0.9}, "expected either ratio"),
        ({"ratio": 1.0}, "at least 0 and below 1"),
        ({"keep": 0}, "above 0 and at most 1"),
        ({"keep": True}, "to be a number"),
        ({"ratio": 0.1, "method": "utcr"}, "expected method to be one of utrc"),
        ({"ratio": 0.1, "score": "none"}, "expected score"),
        ({"ratio": 0.1, "layers": [0, -1]}, "whole numbers from 0"),
        ({"ratio": 0.1, "layers": "all"}, "'auto' or numbers of blocks"),
        ({"ratio": 0.1, "protect_last": 1.5}, "protect_last to be a whole number"),
        ({"ratio": 0.1, "output": "short"}, "expected output to be one of restore"),
        ({"ratio": 0.1, "q": 2}, "from 0 to 1"),
    ],
)
def test_misuse_is_said(options: dict[str, Any], text: str) -> None:
    with pytest.raises((ValueError, TypeError), match=text):
        effpass.ReduceTokens(**options)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"ratio": 0.9}, r"at most 0\.\d+, the largest that anchors behind blocks 0, 1 reach"),
        ({"ratio": 0.1, "layers": [7]}, "expected layers below 3"),
    ],
)
def test_what_a_model_cannot_is_said(options: dict[str, Any], text: str) -> None:
    with torch.no_grad(), pytest.raises(Exception, match=text):
        compiled(stack(), **options)(torch.randn(2, 20, 8))
