"""Parts without a packed form run with their padding, where that changes no real token."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import effpass
from tests.passes import small
from tests.passes.paddings import paddings, real
from tests.passes.test_pack_varlen import ROWS, compiled, declined, ids, ran, seeded
from tests.tolerances import close

HEADS, SIZE = 2, small.WIDTH // 2


class Scores(nn.Module):
    """Attention written out, with a soft cap (Gemma 2) that is larger than all scores, or not."""

    def __init__(self, cap: float = 2.0, closing: float = float("-inf")) -> None:
        super().__init__()
        self.cap, self.closing = cap, closing
        self.embed = nn.Embedding(small.VOCAB, small.WIDTH)
        self.qkv, self.out = nn.Linear(small.WIDTH, 3 * small.WIDTH), nn.Linear(small.WIDTH, 5)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.embed(ids)
        b, t, _ = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, HEADS, SIZE).permute(2, 0, 3, 1, 4).unbind(0)
        scores = self.cap * torch.tanh(q @ k.transpose(-1, -2) / self.cap)
        scores = scores.masked_fill(mask[:, None, None, :] == 0, self.closing)
        y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(b, t, small.WIDTH)
        return self.out(x + y)


class Relative(small.Encoder):
    """A learned bias for every distance and head, as T5 has it."""

    def __init__(self) -> None:
        super().__init__(lambda mask: mask, small.tokens)
        self.distances = nn.Embedding(33, HEADS)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        at = torch.arange(ids.shape[1])
        buckets = (at - at[:, None]).clamp(-16, 16) + 16
        bias = self.distances(buckets).permute(2, 0, 1)[None] + small.additive(mask)
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x, bias)
        return x


class Routed(small.Encoder):
    """Each token goes to its best of three experts; tokens are sorted by expert."""

    def __init__(self) -> None:
        super().__init__(small.boolean, small.tokens)
        self.router = nn.Linear(small.WIDTH, 3)
        self.experts = nn.ModuleList(nn.Linear(small.WIDTH, small.WIDTH) for _ in range(3))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = super().forward(ids, mask)
        flat = x.flatten(0, 1)
        weight, expert = self.router(flat).softmax(-1).max(-1)
        order = expert.argsort(stable=True)
        chosen = flat[order]
        made = torch.stack([each(chosen) for each in self.experts])
        made = made.gather(0, expert[order][None, :, None].expand(1, -1, small.WIDTH))[0]
        back = torch.zeros_like(made).index_copy(0, order, made)
        return x + (back * weight[:, None]).view_as(x)


def alibi(mask: Tensor) -> Tensor:
    """Slopes times the key's position among real tokens, as BLOOM has it."""
    slopes = torch.tensor([0.5, 0.25])
    at = ((mask.cumsum(-1) - 1) * mask)[:, None, :]
    return (slopes[:, None] * at)[:, :, None] + small.additive(mask)


def worn(mask: Tensor) -> Tensor:
    """Closed scores of which something is left."""
    return (1.0 - mask[:, None, None, :].float()) * -6.0


def average(x: Tensor, mask: Tensor) -> Tensor:
    """Tokens minus the mean of everything, padding too."""
    return x - x.mean((0, 1))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "soft_cap": Scores,
    "relative": Relative,
    "experts": Routed,
    "alibi": lambda: small.Encoder(alibi, small.tokens),
    "distance": lambda: small.Encoder(small.biased, small.tokens),
    "prefix": lambda: small.Encoder(small.prefix, small.tokens),
    "maximum": lambda: small.Encoder(small.boolean, small.maximum),
}


QUICK = ("soft_cap", "relative", "maximum")
each = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]


@pytest.mark.parametrize("name", each)
def test_real_tokens_and_gradients(name: str) -> None:
    """Padding on every side, another length, and no other way to pack."""
    model = seeded(MODELS[name])
    run = compiled(model)
    for tokens in (9, 6):
        for _, mask in paddings(ROWS, tokens):
            x = ids(ROWS, tokens)
            outputs = [f(x, mask) for f in (run, model)]
            if outputs[0].shape[:2] == mask.shape:
                assert not outputs[0][mask == 0].any()
                outputs = [real(y, mask) for y in outputs]
            close(*outputs, "model_fp32")
            weights = list(model.parameters())
            grads = [
                torch.autograd.grad(y.square().sum(), weights, allow_unused=True) for y in outputs
            ]
            for a, e in zip(*grads, strict=True):
                assert (a is None) == (e is None)
                if a is not None and e is not None:
                    close(a, e, "model_gradient_fp32")
    assert ran(run) == {"plain": 0, "packed": 6}, declined(run)
    parts = [a for a in effpass.report(run).applied if "with their padding" in a.what]
    assert parts and parts[0].count >= 1


@pytest.mark.parametrize(
    "make",
    [
        lambda: Scores(closing=-3.0),
        lambda: small.Encoder(worn, small.tokens),
        lambda: small.Encoder(small.boolean, average),
    ],
    ids=["leaks", "leaks_in_sdpa", "mean"],
)
def test_what_padding_reaches_is_declined(make: Callable[[], nn.Module]) -> None:
    model = seeded(make)
    run = compiled(model)
    x, (_, mask) = ids(ROWS, 7), next(paddings(ROWS, 7))
    close(run(x, mask), model(x, mask), "model_fp32")
    assert len(declined(run)) == 1
    assert ran(run) == {"plain": 0, "packed": 0}


@pytest.mark.parametrize("name", ["soft_cap", pytest.param("experts", marks=pytest.mark.slow)])
def test_what_padding_holds_does_not_leak(name: str) -> None:
    """NaN in the table's row of the id that stands at padding; the padded model spreads it."""
    model = seeded(MODELS[name])
    run = compiled(model)
    x, (_, mask) = ids(ROWS, 9).clamp(min=1), next(paddings(ROWS, 9))
    x = x * mask
    before = real(run(x, mask), mask)
    with torch.no_grad():
        model.embed.weight[0] = float("nan")
    close(real(run(x, mask), mask), before, "model_fp32")


class Dropped(small.Encoder):
    """Attention with active dropout, which drops nothing in practice."""

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.embed(ids)
        q, k, v = self.layers[0].qkv(x).unflatten(-1, (3, HEADS, SIZE)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, self.spell(mask), dropout_p=1e-12)
        return x + y.transpose(1, 2).flatten(2)


def test_active_dropout_in_attention() -> None:
    model = seeded(lambda: Dropped(small.boolean, small.tokens))
    run = compiled(model)
    x, (_, mask) = ids(ROWS, 9), next(paddings(ROWS, 9))
    close(real(run(x, mask), mask), real(model(x, mask), mask), "model_fp32")
    assert ran(run) == {"plain": 0, "packed": 1}, declined(run)


def test_rows_are_apart() -> None:
    model = seeded(Scores)
    run = compiled(model)
    x, (_, mask) = ids(ROWS, 9), next(paddings(ROWS, 9))
    before = run(x, mask)
    x[0] = 1 - x[0].clamp(max=1)
    after = run(x, mask)
    assert torch.equal(before[1:], after[1:]) and not torch.equal(before[0], after[0])


def test_explain_verifies_islands() -> None:
    model = seeded(Scores)
    x, (_, mask) = ids(ROWS, 9), next(paddings(ROWS, 9))
    found = effpass.explain(model, x, mask, options={"pack_varlen": True})
    assert found.graphs[0].verified.startswith("equal within"), found.graphs[0].verified


def test_a_wrong_verdict_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were every island taken for harmless, ``verify`` would see it."""
    from effpass.passes.packing import islands

    harmless = islands.Verdict(True, True, True, True)
    monkeypatch.setattr(islands.Islands, "verdict", lambda *_: harmless)
    model = seeded(lambda: Scores(closing=-3.0))
    options = {"pack_varlen": True, "compiler": "eager", "verify": True, "strict": True}
    run = torch.compile(model, backend="effpass", options=options)
    x, (_, mask) = ids(ROWS, 9), next(paddings(ROWS, 9))
    with pytest.raises(Exception, match=r"value 0 differs by"):
        run(x, mask)
