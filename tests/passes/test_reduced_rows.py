"""ReduceTokens with PackVarlen on small models: every row is what it is alone, reduced."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo import maybe_mark_dynamic

import effpass
from effpass.report import GraphReport
from effpass.token_report import Reduction, token_tables
from tests.passes import reduction_by_hand as by_hand
from tests.passes import small
from tests.tolerances import close

LENGTHS = [9, 1, 13, 4]
ONCE = "ignore:.*only the rows of the protected tail"


def slow(value: Any) -> Any:
    return pytest.param(value, marks=pytest.mark.slow)


def compiled(model: nn.Module, pack: bool = True, **fields: Any) -> Any:
    torch._dynamo.reset()
    options = {"pack_varlen": pack, "reduce_tokens": fields, "compiler": "eager"}
    return torch.compile(model, backend="effpass", options=options)


def encoder(spell: small.Bias = small.additive, layers: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return small.Encoder(spell, small.tokens, layers).eval()


def recurrent() -> nn.Module:
    torch.manual_seed(0)
    return small.Recurrent().eval()


def batch(lengths: list[int], side: str = "right") -> tuple[Tensor, Tensor]:
    """Ids and mask (b, t), padded on one side."""
    generator = torch.Generator().manual_seed(sum(lengths))
    at, counts = torch.arange(max(lengths)), torch.tensor(lengths)[:, None]
    mask = at < counts if side == "right" else at >= max(lengths) - counts
    ids = torch.zeros(mask.shape, dtype=torch.long)
    ids[mask] = torch.randint(1, small.VOCAB, (sum(lengths),), generator=generator)
    return ids, mask.long()


def alone(run: Any, ids: Tensor, mask: Tensor) -> list[Tensor]:
    found = []
    for each, here in zip(ids, mask, strict=True):
        row = each[here.bool()][None]
        given = (row, torch.ones_like(row))
        for value in given:
            maybe_mark_dynamic(value, 1)  # one compilation for all lengths
        found.append(run(*given)[0])
    return found


def parts(y: Tensor, mask: Tensor) -> list[Tensor]:
    return [row[here.bool()] for row, here in zip(y, mask, strict=True)]


def last_graph(run: Any) -> GraphReport:
    return effpass.report(run).graphs[-1]


def agree(model: nn.Module, *sides: str, **fields: Any) -> None:
    """Rows of padded batches and rows alone."""
    batches = [batch(LENGTHS, side) for side in sides or ("right",)]
    with torch.no_grad():
        expected = alone(compiled(model, pack=False, **fields), *batches[0])
        run = compiled(model, **fields)
        for ids, mask in batches:
            for mine, theirs in zip(parts(run(ids, mask), mask), expected, strict=True):
                close(mine, theirs, "model_fp32")
    assert last_graph(run).forms["packed_reduced"] == len(batches)


@pytest.mark.parametrize("q", [0.5, slow(0.0), slow(1.0)])
def test_attention_is_as_computed_by_hand(q: float) -> None:
    """The NumPy oracle on every row alone; lengths and the number of rows change."""
    model = encoder(layers=2)
    run = compiled(model, keep=0.7, layers=[0], protect_last=2, q=q)
    with torch.no_grad():
        for lengths in (LENGTHS, [7, 2, 11], [31, 1, 1, 17, 5]):
            ids, mask = batch(lengths)
            found = parts(run(ids, mask), mask)
            for row, mine in zip(ids, found, strict=True):
                own = row[None, : len(mine)]
                expected = by_hand.encoder(model, own, torch.ones_like(own), 0.7, 2, q)
                close(mine, expected[0], "model_fp32")
    assert [g.forms["packed_reduced"] for g in effpass.report(run).graphs] == [1, 2]


@pytest.mark.parametrize(
    "method", ["evit", *map(slow, ("utrc", "tome", "pumer", "random", "prefix"))]
)
def test_attention_is_as_alone(method: str) -> None:
    """Two anchors; evit by what the first token of each sequence attends to."""
    agree(encoder(), keep=0.6, layers=[0, 1], method=method)


@pytest.mark.parametrize(
    "fields",
    [
        {"ratio": 0.2},
        slow({"method": "tome", "keep": 0.6}),
        slow({"keep": 0.6, "score": "dt_norm", "alignment": "repeat", "protect_last": 2}),
        slow({"keep": 0.5, "protect_first": 1, "q": 0.0}),
    ],
)
def test_scans_are_as_alone(fields: dict[str, Any]) -> None:
    agree(recurrent(), "right", "left", layers=[0], **fields)


@pytest.mark.slow
@pytest.mark.parametrize("spell", [small.causal, small.banded, small.local_and_causal])
def test_windows_count_in_first_positions(spell: small.Bias) -> None:
    agree(encoder(spell), keep=0.6, layers=[0], method="utrc")
    if spell is small.banded:
        agree(encoder(spell), keep=0.6, layers=[0, 1], method="evit")


@pytest.mark.parametrize("causal", [False, slow(True)])
@pytest.mark.filterwarnings(ONCE)
def test_gradients_are_as_alone(causal: bool) -> None:
    model = encoder(small.causal)
    fields: dict[str, Any] = {"keep": 0.6, "layers": [0, 1], "causal": causal}
    ids, mask = batch(LENGTHS)
    direction = torch.randn(ids.shape[0], ids.shape[1], small.WIDTH) * mask[..., None]
    found = {}
    for pack in (False, True):
        run = compiled(model, pack, **fields)
        rows = parts(run(ids, mask), mask) if pack else alone(run, ids, mask)
        loss = sum((y * d).sum() for y, d in zip(rows, parts(direction, mask), strict=True))
        assert isinstance(loss, Tensor)
        found[pack] = torch.autograd.grad(loss, list(model.parameters()))
    for mine, theirs in zip(found[True], found[False], strict=True):
        close(mine, theirs, "raised_gradient_fp32")


@pytest.mark.parametrize("make", [encoder, slow(recurrent)])
def test_a_sequence_never_reaches_another(make: Any) -> None:
    """Other tokens, and NaN, in one of them: the others keep their bits."""
    model = make()
    ids, mask = batch(LENGTHS)
    ids[:, :] = ids.clamp(max=small.VOCAB - 2)
    run = compiled(model, keep=0.6, layers=[0])
    with torch.no_grad():
        expected = run(ids, mask)
        for token in (1, small.VOCAB - 1):
            other = ids.clone()
            other[2, 3:9] = token
            model.embed.weight[small.VOCAB - 1] = float("nan")
            actual = run(other, mask)
            for row in (0, 1, 3):
                assert torch.equal(actual[row], expected[row])
            assert not torch.equal(actual[2], expected[2])


def test_rows_too_short_to_lose_a_token_run_as_packed() -> None:
    model = encoder()
    ids, mask = batch([3, 1, 2])
    with torch.no_grad():
        run = compiled(model, keep=0.5, layers=[0], protect_last=3)
        actual = run(ids, mask)
        graph = last_graph(run)
        torch._dynamo.reset()
        options = {"pack_varlen": True, "compiler": "eager"}
        assert torch.equal(
            actual, torch.compile(model, backend="effpass", options=options)(ids, mask)
        )
    assert graph.forms["packed_whole"] == 1 and graph.forms["packed_reduced"] == 0


def test_batches_without_padding_are_reduced_as_rows() -> None:
    model = encoder()
    ids, mask = batch([12, 12])
    with torch.no_grad():
        run = compiled(model, keep=0.6, layers=[0])
        actual = run(ids, mask)
        assert last_graph(run).forms["plain_reduced"] == 1
        expected = alone(compiled(model, pack=False, keep=0.6, layers=[0]), ids, mask)
    for mine, theirs in zip(actual, expected, strict=True):
        close(mine, theirs, "model_fp32")


def test_an_empty_row_is_a_row_of_zeros() -> None:
    model, (ids, mask) = recurrent(), batch([9, 5, 7])
    mask[1] = 0
    with torch.no_grad():
        run = compiled(model, keep=0.6, layers=[0])
        actual = run(ids, mask)
        assert last_graph(run).forms["packed_reduced"] == 1
        whole = compiled(model, pack=False, keep=0.6, layers=[0])
        assert not actual[1].any()
        for row, count in ((0, 9), (2, 7)):
            expected = whole(ids[row : row + 1, :count], mask[row : row + 1, :count])
            close(actual[row : row + 1, :count], expected, "model_fp32")


def test_what_cannot_be_reduced_runs_packed_and_says_why() -> None:
    """Its bias is a layer's own, so that the decay over a gap is not known."""
    model, (ids, mask) = recurrent(), batch(LENGTHS)
    with torch.no_grad():
        run = compiled(model, keep=0.6, layers=[0], alignment="bias_gap")
        actual = run(ids, mask)
        close(actual * mask[..., None], model(ids, mask) * mask[..., None], "model_fp32")
    (declined,) = last_graph(run).declined
    assert declined.code == "reduce_tokens:alignment"
    assert declined.reason.startswith("its packed form: alignment 'bias_gap' needs")
    assert last_graph(run).forms == {"plain": 0, "packed": 1}


def test_a_ratio_out_of_reach_is_an_error() -> None:
    run, (ids, mask) = compiled(encoder(), ratio=0.9, layers=[0]), batch(LENGTHS)
    with torch.no_grad(), pytest.raises(Exception, match="expected a ratio of at most"):
        run(ids, mask)


def test_the_token_map_is_that_of_every_sequence_alone() -> None:
    """The same tokens survive, merge and are dropped; the report shows where sequences end."""
    model, (ids, mask) = encoder(), batch(LENGTHS)
    fields = {"keep": 0.6, "layers": [0, 1]}
    with torch.no_grad():
        options = {"pack_varlen": True, "reduce_tokens": fields}
        report = effpass.explain(model, ids, mask, options=options)
        (found,) = report.graphs[0].reductions
        expected = [_map_alone(model, ids[i, :n], fields) for i, n in enumerate(LENGTHS)]
    assert found.sequences == tuple(LENGTHS) and found.lengths[0] == sum(LENGTHS)
    for number, step in enumerate(found.steps):
        kept, merged, dropped = [], {}, []
        start = 0
        for count, reduction in zip(LENGTHS, expected, strict=True):
            if reduction is None:
                kept.append(start)
            else:
                own = reduction.steps[number]
                kept += [start + k for k in own.kept]
                merged |= {start + a: start + b for a, b in own.merged.items()}
                dropped += [start + k for k in own.dropped]
            start += count
        assert step.kept == tuple(kept) and sorted(step.dropped) == sorted(dropped)
        assert step.merged == merged
    text = str(report)
    assert "4 packed sequences" in text and "sequences between |" in text
    assert "packed with fewer tokens: equal within" in report.graphs[0].verified


def _map_alone(model: nn.Module, ids: Tensor, fields: dict[str, Any]) -> Reduction | None:
    torch._dynamo.reset()
    row = ids[None]
    report = effpass.explain(model, row, torch.ones_like(row), options={"reduce_tokens": fields})
    return report.graphs[0].reductions[0] if report.graphs[0].reductions else None


def test_marks_of_a_map_stand_between_bars() -> None:
    found = Reduction("utrc", None, 0.0, (1, 1), (1, 1), (5, 3), "all", (3, 2))
    from effpass.token_report import TokenStep

    found.steps.append(TokenStep(0, "layer", 5, (0, 2, 4), {1: 0}, (3,)))
    table = list(token_tables(found))[-1]
    assert list(table.columns[-1].cells) == ["omo|xo"]
