"""Masks of attention: every form and fill, with rows that see nothing, values and gradients."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from effpass.patterns.attention import IDIOMS
from tests.patterns.raising import Raiser
from tests.tolerances import close

Form = Callable[[Tensor, Tensor, float], Tensor]
LOWEST = torch.finfo(torch.float32).min
CLASH = "one mask is added and another overwrites"
BOTH = "while training, a mask is added and scores are overwritten too"
LENGTH = 6


def past(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


def future(length: int, value: float) -> Tensor:
    return torch.full((length, length), value).triu(1)


def keys(mask: Tensor) -> Tensor:
    """(b t) as (b 1 1 t)"""
    return mask[:, None, None]


FORMS: dict[str, Form] = {
    "keys filled": lambda s, m, f: s.masked_fill(~keys(m), f),
    "keys by where": lambda s, m, f: torch.where(keys(m), s, f),
    "rows filled": lambda s, m, f: s.masked_fill(~(keys(m) & m[:, None, :, None]), f),
    "one mask of both": lambda s, m, f: s.masked_fill(~(keys(m) & past(s.shape[-1])), f),
    "one after the other": lambda s, m, f: s.masked_fill(~past(s.shape[-1]), f).masked_fill(
        ~keys(m), f
    ),
    "added": lambda s, m, f: s + torch.where(keys(m), 0.0, f),
    "both in one sum": lambda s, m, f: s + torch.where(keys(m) & past(s.shape[-1]), 0.0, f),
    "two sums": lambda s, m, f: (
        s + torch.where(keys(m), 0.0, f) + torch.where(past(s.shape[-1]), 0.0, f)
    ),
    "filled, the future added": lambda s, m, f: (
        s.masked_fill(~keys(m), f) + future(s.shape[-1], -math.inf)
    ),
    "scaled behind the fill": lambda s, m, f: s.masked_fill(~keys(m), f) * 0.7,
}
VISIBLE = {
    "all": torch.ones(3, LENGTH),
    "left": torch.tensor([[0, 0, 1, 1, 1, 1], [1] * 6, [0, 1, 1, 1, 1, 1]]),
    "right": torch.tensor([[1, 1, 1, 1, 0, 0], [1] * 6, [1, 1, 1, 1, 1, 0]]),
    "a row of padding": torch.tensor([[0] * 6, [1] * 6, [0, 1, 1, 1, 1, 1]]),
}


class Attention(nn.Module):
    """Three heads; ``form`` masks the scores."""

    def __init__(self, form: Form, fill: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Linear(12, 12) for _ in range(3))
        self.form, self.fill = form, fill

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = (f(x).view(b, t, 3, 4).transpose(1, 2) for f in (self.q, self.k, self.v))
        weights = self.form(q @ k.mT * 0.5, mask, self.fill).softmax(-1).to(v.dtype)
        return (weights @ v).transpose(1, 2).reshape(b, t, 12)


def tokens(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(3, LENGTH, 12, generator=torch.Generator().manual_seed(1)).to(dtype)


def same_values(module: nn.Module, x: Tensor, row: str) -> Raiser:
    """Eager's values, NaN included, under every mask of VISIBLE."""
    raiser = Raiser(module, IDIOMS)
    with torch.no_grad():
        for mask in VISIBLE.values():
            actual, expected = raiser(x, mask.bool()), module(x, mask.bool())
            assert torch.equal(actual.isnan(), expected.isnan())
            close(actual, expected, row)
    return raiser


@pytest.mark.parametrize("fill", [-math.inf, LOWEST, -1e9, -1e4])
@pytest.mark.parametrize("form", FORMS)
def test_values(form: str, fill: float) -> None:
    raiser = same_values(Attention(FORMS[form], fill), tokens(), "model_fp32")
    assert raiser.count("sdpa") == 1 and not raiser.reasons


@pytest.mark.parametrize("fill", [-math.inf, -1e4])
@pytest.mark.parametrize("form", FORMS)
def test_values_in_bfloat16(form: str, fill: float) -> None:
    module = Attention(FORMS[form], fill).bfloat16()
    assert same_values(module, tokens(torch.bfloat16), "model_bf16").count("sdpa") == 1


@pytest.mark.parametrize("fill", [LOWEST, -1e9])
@pytest.mark.parametrize("form", FORMS)
def test_gradients_of_rows_that_see_nothing(form: str, fill: float) -> None:
    """Of queries, keys and values: what was overwritten has none, what was swallowed has."""
    mine = Attention(FORMS[form], fill)
    theirs, raiser = copy.deepcopy(mine), Raiser(mine, IDIOMS)
    for mask in VISIBLE.values():
        mine.zero_grad()
        theirs.zero_grad()
        given, wanted = (tokens().requires_grad_() for _ in range(2))
        actual, expected = raiser(given, mask.bool()), theirs(wanted, mask.bool())
        weight = torch.linspace(-1, 1, expected.numel()).view(expected.shape)
        (actual * weight).sum().backward()
        (expected * weight).sum().backward()
        assert given.grad is not None and wanted.grad is not None
        close(given.grad, wanted.grad, "raised_gradient_fp32")
        for a, e in zip(mine.parameters(), theirs.parameters(), strict=True):
            assert a.grad is not None and e.grad is not None
            close(a.grad, e.grad, "raised_gradient_fp32")
    assert raiser.count("sdpa") == 1


@pytest.mark.parametrize("fill", [-100.0, -5.0, 0.0])
def test_a_weak_fill_is_left_alone(fill: float) -> None:
    raiser = same_values(Attention(FORMS["keys filled"], fill), tokens(), "model_fp32")
    assert not raiser.count("sdpa")
    assert raiser.reasons == [f"masked scores are set to {fill:g}: such a key keeps some weight"]


def test_a_moderate_fill_beside_a_sum_is_left_alone() -> None:
    def form(s: Tensor, m: Tensor, f: float) -> Tensor:
        return s.masked_fill(~past(s.shape[-1]), -1e9) + torch.where(keys(m), 0.0, f)

    raiser = same_values(Attention(form, LOWEST), tokens(), "model_fp32")
    assert not raiser.count("sdpa") and raiser.reasons[0].startswith(CLASH)


def test_a_swallowing_fill_beside_a_sum() -> None:
    """Raised to infer with, left alone to train with."""

    def form(s: Tensor, m: Tensor, f: float) -> Tensor:
        return s.masked_fill(~past(s.shape[-1]), f) + torch.where(keys(m), 0.0, f)

    assert same_values(Attention(form, LOWEST), tokens(), "model_fp32").count("sdpa") == 1
    raiser = Raiser(Attention(form, LOWEST), IDIOMS)
    raiser(tokens(), VISIBLE["left"].bool())
    assert not raiser.count("sdpa") and raiser.reasons[0].startswith(BOTH)


def test_a_fill_that_overflows_is_left_alone() -> None:
    module = Attention(FORMS["keys by where"], LOWEST).bfloat16()
    raiser = same_values(module, tokens(torch.bfloat16), "model_bf16")
    assert not raiser.count("sdpa") and "is -inf in torch.bfloat16" in raiser.reasons[0]


def test_a_mask_made_of_scores_is_left_alone() -> None:
    def form(s: Tensor, m: Tensor, f: float) -> Tensor:
        return s.masked_fill(s < s.mean(-1, keepdim=True), f)

    raiser = same_values(Attention(form, -math.inf), tokens(), "model_fp32")
    assert not raiser.count("sdpa")
    assert raiser.reasons == ["the scores are also used by mean"]
