"""PackVarlen on small models: as the padded model at real tokens, or declined with a reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import effpass
from effpass.report import Declined
from tests.passes import small
from tests.passes.paddings import paddings, real
from tests.tolerances import close

ROWS = 4


def compiled(model: nn.Module, compiler: str = "eager") -> Any:
    return torch.compile(
        model, backend="effpass", options={"pack_varlen": True, "compiler": compiler}
    )


def ids(rows: int, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(rows + tokens)
    return torch.randint(0, small.VOCAB, (rows, tokens), generator=generator)


def declined(run: Any) -> list[Declined]:
    return [d for graph in effpass.report(run).graphs for d in graph.declined]


def ran(run: Any) -> dict[str, int]:
    """How often each form ran, over all graphs."""
    counts = {"plain": 0, "packed": 0}
    for graph in effpass.report(run).graphs:
        for form, count in graph.forms.items():
            counts[form] += count
    return counts


def seeded(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return make().eval()


SPELLINGS = (
    *(small.additive, small.boolean, small.filled, small.causal, small.banded),
    *(small.local_and_causal, small.both_ways),
)
HEADS = (small.tokens, small.first, small.last, small.masked_mean, small.steered)
named = lambda f: f.__name__  # noqa: E731


@pytest.mark.parametrize("spell", SPELLINGS, ids=named)
def test_masks_in_any_spelling(spell: small.Bias) -> None:
    model = seeded(lambda: small.Encoder(spell, small.tokens))
    run = compiled(model)
    for tokens in (7, 12, 5):
        for _, mask in paddings(ROWS, tokens):
            x = ids(ROWS, tokens)
            actual, expected = run(x, mask), model(x, mask)
            close(real(actual, mask), real(expected, mask), "model_fp32")
            assert not actual[mask == 0].any()
    assert ran(run) == {"plain": 0, "packed": 9}, declined(run)


WRONG = {
    small.nothing: "other_mask",
    small.shifted: "other_mask",
    small.other_rows: "other_mask",
}


@pytest.mark.parametrize("spell", WRONG, ids=named)
def test_other_masks_are_declined(spell: small.Bias) -> None:
    model = seeded(lambda: small.Encoder(spell, small.masked_mean))
    run = compiled(model)
    x, (_, mask) = ids(ROWS, 7), next(paddings(ROWS, 7))
    close(run(x, mask), model(x, mask), "model_fp32")
    (record,) = declined(run)
    assert record.code == f"pack_varlen:{WRONG[spell]}", record
    assert ran(run) == {"plain": 0, "packed": 0}


@pytest.mark.parametrize("head", HEADS, ids=named)
@pytest.mark.parametrize("mixer", ["attention", "scan"])
def test_heads(head: small.Head, mixer: str) -> None:
    make = {
        "attention": lambda: small.Encoder(small.boolean, head),
        "scan": lambda: small.Recurrent(head=head),
    }[mixer]
    model = seeded(make)
    run = compiled(model)
    for tokens in (7, 10):
        x, (_, mask) = ids(ROWS, tokens), next(paddings(ROWS, tokens))
        actual, expected = run(x, mask), model(x, mask)
        if actual.shape[:2] == mask.shape:
            actual, expected = real(actual, mask), real(expected, mask)
        close(actual, expected, "model_fp32")
    assert ran(run) == {"plain": 0, "packed": 2}, declined(run)


@pytest.mark.parametrize("head", [small.plain_mean, small.backwards, small.centred], ids=named)
def test_heads_that_read_padding_are_declined(head: small.Head) -> None:
    model = seeded(lambda: small.Encoder(small.boolean, head))
    run = compiled(model)
    x, (_, mask) = ids(ROWS, 7), next(paddings(ROWS, 7))
    close(run(x, mask), model(x, mask), "model_fp32")
    (record,) = declined(run)
    assert record.code in ("pack_varlen:reads_padding", "pack_varlen:mixes_tokens"), record


@pytest.mark.parametrize("head", [small.first, small.last], ids=named)
def test_a_position_that_is_padding_runs_plain(head: small.Head) -> None:
    """With padding on the left, these heads read padding (first) or another token (last)."""
    model = seeded(lambda: small.Encoder(small.boolean, head))
    run = compiled(model)
    x, mask = ids(3, 6), torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6, [0, 1, 1, 1, 1, 1]])
    mask[0, 2] = 0 if head is small.last else 1
    close(run(x, mask), model(x, mask), "model_fp32")
    assert ran(run) == {"plain": 1, "packed": 0}, declined(run)


@pytest.mark.parametrize("masked", [True, False])
def test_scans_run_packed_where_padding_does_not_reach_them(masked: bool) -> None:
    """A mask that closes the inputs allows padding in front; without one only that at the end."""
    model = seeded(lambda: small.Recurrent(masked, small.masked_mean))
    run = compiled(model)
    for _, mask in paddings(ROWS, 9):
        x = ids(ROWS, 9)
        close(run(x, mask), model(x, mask), "model_fp32")
    if not masked:  # then nothing proves that it is a padding mask
        assert declined(run)[0].code == "pack_varlen:no_mask"
    else:
        assert ran(run) == {"plain": 1, "packed": 2}


@pytest.mark.parametrize("mixer", ["attention", "scan"])
@pytest.mark.parametrize("compiler", ["eager", "inductor"])
def test_gradients(mixer: str, compiler: str) -> None:
    make = {
        "attention": lambda: small.Encoder(small.causal, small.tokens),
        "scan": lambda: small.Recurrent(),
    }[mixer]
    model = seeded(make).train()
    run = compiled(model, compiler)
    for tokens in (8, 13):
        x, (_, mask) = ids(ROWS, tokens), next(paddings(ROWS, tokens))
        weights = torch.linspace(0.5, 1.5, int(mask.sum()))[:, None]
        losses = [(real(f(x, mask), mask).square() * weights).sum() for f in (run, model)]
        actual, expected = (torch.autograd.grad(each, list(model.parameters())) for each in losses)
        for a, e in zip(actual, expected, strict=True):
            close(a, e, "model_gradient_fp32")
    assert ran(run) == {"plain": 0, "packed": 2}


def test_edges() -> None:
    """Rows of padding alone, one token, no padding, one row."""
    model = seeded(lambda: small.Encoder(small.boolean, small.tokens))
    run = compiled(model)
    x, mask = ids(ROWS, 6), torch.ones(ROWS, 6, dtype=torch.long)
    mask[1], mask[2, 1:] = 0, 0
    close(real(run(x, mask), mask), real(model(x, mask), mask), "model_fp32")
    assert not run(x, mask)[1].any()
    assert ran(run) == {"plain": 0, "packed": 2}
    for single in (torch.ones_like(mask), torch.zeros_like(mask)):
        run(x, single)
    assert ran(run) == {"plain": 2, "packed": 2}
    one = seeded(lambda: small.Recurrent())
    run, mask = compiled(one), torch.tensor([[1, 1, 1, 1, 0, 0, 0]])
    close(real(run(ids(1, 7), mask), mask), real(one(ids(1, 7), mask), mask), "model_fp32")
    assert ran(run) == {"plain": 0, "packed": 1}


def test_sequences_are_apart() -> None:
    """What one sequence holds, NaN too, leaves the others as they are, bit by bit."""
    for make in (lambda: small.Encoder(small.causal, small.tokens), lambda: small.Recurrent()):
        model = seeded(make)
        run = compiled(model)
        x, (_, mask) = ids(ROWS, 9), next(paddings(ROWS, 9))
        before = run(x, mask)
        model.embed.weight.data[3] = float("nan")
        x[1] = torch.where(x[1] == 3, 4, x[1])
        x[x == 3] = 4
        clean = run(x, mask)
        x[1] = 3
        spoilt = run(x, mask)
        assert spoilt[1].isnan().any() and before.isfinite().all()
        others = [0, 2, 3]
        assert torch.equal(spoilt[others], clean[others])


def test_masks_hold_zeros_and_ones() -> None:
    model = seeded(lambda: small.Encoder(small.boolean, small.tokens))
    run = compiled(model)
    x, (_, mask) = ids(ROWS, 6), next(paddings(ROWS, 6))
    run(x, mask)
    with pytest.raises(ValueError, match=r"expected the padding mask to hold 0 .* to 3"):
        run(x, mask * 3)


def test_a_second_length_is_the_last_to_compile() -> None:
    """After the second batch nothing is compiled again, whatever the lengths."""
    model = seeded(lambda: small.Encoder(small.causal, small.tokens))
    run = compiled(model)
    counts = []
    for tokens in (6, 9, 13, 7, 20, 11):
        for _, mask in paddings(ROWS, tokens):
            run(ids(ROWS, tokens), mask)
        counts.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert len(set(counts[1:])) == 1, counts


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.int32])
def test_dtypes_of_masks(dtype: torch.dtype) -> None:
    model = seeded(lambda: small.Encoder(lambda m: m[:, None, None, :] > 0, small.masked_mean))
    run = compiled(model)
    x, (_, mask) = ids(ROWS, 8), next(paddings(ROWS, 8))
    close(run(x, mask.to(dtype)), model(x, mask.to(dtype)), "model_fp32")
    assert ran(run) == {"plain": 0, "packed": 1}, declined(run)


def test_what_is_not_contiguous() -> None:
    model = seeded(lambda: small.Recurrent())
    run = compiled(model)
    x, (_, mask) = ids(9, ROWS).t(), next(paddings(ROWS, 9))
    mask = mask.t().contiguous().t()
    close(real(run(x, mask), mask), real(model(x, mask), mask), "model_fp32")
    assert ran(run) == {"plain": 0, "packed": 1}


def test_weights_change_between_calls() -> None:
    model = seeded(lambda: small.Encoder(small.boolean, small.tokens))
    run = compiled(model)
    x, (_, mask) = ids(ROWS, 8), next(paddings(ROWS, 8))
    for _ in range(2):
        close(real(run(x, mask), mask), real(model(x, mask), mask), "model_fp32")
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1.5)


@pytest.mark.parametrize("head", [small.tokens, small.masked_mean], ids=named)
def test_explain_verifies(head: small.Head) -> None:
    """The report says how close both forms are, at real tokens; or why they were not compared."""
    model = seeded(lambda: small.Encoder(small.banded, head))
    x, (_, mask) = ids(ROWS, 9), next(paddings(ROWS, 9))
    found = effpass.explain(model, x, mask, options={"pack_varlen": True})
    (graph,) = found.graphs
    assert graph.verified.startswith("equal within"), graph.verified
    assert graph.forms == {"plain": 0, "packed": 1}
    assert found.count("varlen_attention") == 2
    assert "calls of each form: plain 0, packed 1" in str(found)
    full = effpass.explain(model, x, torch.ones_like(mask), options={"pack_varlen": True})
    assert "no padding" in full.graphs[0].verified


def test_a_wrong_packed_form_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    from effpass.passes.packing import mixers
    from effpass.passes.packing.masks import Seen

    monkeypatch.setattr(mixers, "seen", lambda *_: Seen(1, 1))
    model = seeded(lambda: small.Encoder(small.boolean, small.tokens))
    options = {"pack_varlen": True, "compiler": "eager", "verify": True}
    run = torch.compile(model, backend="effpass", options=options)
    x, (_, mask) = ids(ROWS, 9), next(paddings(ROWS, 9))
    with pytest.warns(UserWarning, match="verification failed in pack_varlen"):
        close(run(x, mask), model(x, mask), "model_fp32")
    torch._dynamo.reset()
    strict = torch.compile(model, backend="effpass", options=options | {"strict": True})
    with pytest.raises(Exception, match=r"value 0 differs by"):
        strict(x, mask)


def test_tokens_before_rows() -> None:
    model = seeded(small.TimeFirst)
    run = compiled(model)
    for tokens in (7, 10):
        x, (_, mask) = ids(ROWS, tokens), next(paddings(ROWS, tokens))
        close(real(run(x, mask), mask), real(model(x, mask), mask), "model_fp32")
    assert ran(run) == {"plain": 0, "packed": 2}, declined(run)


def test_outputs_with_tokens_and_rows_in_one_dim() -> None:
    model = seeded(small.Flat)
    x, (_, mask) = ids(ROWS, 7), next(paddings(ROWS, 7))
    options = {"pack_varlen": True, "compiler": "eager", "verify": True, "strict": True}
    run = torch.compile(model, backend="effpass", options=options)
    keep = mask.t().flatten().bool()
    actual, expected = run(x, mask), model(x, mask)
    close(actual[keep], expected[keep], "model_fp32")
    assert not actual[~keep].any()
    assert ran(run) == {"plain": 0, "packed": 1}, declined(run)


@pytest.mark.parametrize(
    "make", [lambda: small.Encoder(small.causal, small.tokens), small.Recurrent]
)
def test_narrow_numbers_and_autocast(make: Callable[[], nn.Module]) -> None:
    model = seeded(make)
    x, (_, mask) = ids(ROWS, 9), next(paddings(ROWS, 9))
    run = compiled(model)
    with torch.autocast("cpu", torch.bfloat16):
        actual, expected = run(x, mask), model(x, mask)
    assert actual.dtype == expected.dtype
    close(real(actual, mask), real(expected, mask), "model_bf16")
    assert ran(run) == {"plain": 0, "packed": 1}, declined(run)
    torch._dynamo.reset()
    narrow = model.bfloat16()
    run = compiled(narrow)
    close(real(run(x, mask), mask), real(narrow(x, mask), mask), "model_bf16")
    assert ran(run)["plain"] == 0, declined(run)


def test_active_dropout() -> None:
    """That of activations runs packed, with random numbers of its own."""
    outside = nn.Sequential(nn.Dropout(0.5))

    def head(x: Tensor, mask: Tensor) -> Tensor:
        return outside(x)

    model = seeded(lambda: small.Encoder(small.boolean, head)).train()
    run = compiled(model)
    x, (_, mask) = ids(ROWS, 9), next(paddings(ROWS, 9))
    found = real(run(x, mask), mask)
    dropped = (found == 0).float().mean()
    assert 0.3 < dropped < 0.7 and ran(run)["packed"] == 1, declined(run)
    kept = real(small.Encoder.forward(model, x, mask), mask)
    both = (found != 0) & (kept != 0)
    close(found[both], kept[both], "model_fp32")


def test_one_look_at_the_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    """All numbers that the host reads of a batch are read at once: one wait for a device."""
    from effpass.passes.packing.prologue import Needs, Packed

    looks: list[str] = []
    for name in ("tolist", "item", "nonzero", "__bool__", "__int__"):
        whole = getattr(Tensor, name)

        def counted(self: Tensor, *args: Any, _name: str = name, _whole: Any = whole) -> Any:
            looks.append(_name)
            return _whole(self, *args)

        monkeypatch.setattr(Tensor, name, counted)
    given: list[tuple[Any, ...]] = []
    run = Packed(0, Needs(True, columns=(0,)), len, lambda *a: given.append(a), {"packed": 0})
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]])
    run(mask)
    assert looks == ["tolist"]
    _, flat, rows, columns, cu_seqlens = given[0]
    monkeypatch.undo()
    assert [flat.tolist(), rows.tolist(), columns.tolist()] == [[0, 1, 4], [0, 0, 1], [0, 1, 0]]
    assert cu_seqlens.tolist() == [0, 2, 3, 3] and cu_seqlens.dtype == torch.int32
