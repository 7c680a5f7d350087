"""Which tokens leave, index by index, against a NumPy oracle; ties, padding, odd lengths."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from effpass.passes.reduction.choice import METHODS, Choice, Rule, choose, classes
from effpass.passes.reduction.merge import gaps, grown, merge, pick, step
from effpass.passes.reduction.scores import (
    of_deviation,
    of_deviation_within,
    of_first,
    of_output,
    of_steps,
)
from tests.passes import reduction_oracle as oracle
from tests.tolerances import close


def sample(tokens: int, ties: bool, seed: int, rows: int = 3) -> Tensor:
    """(rows, tokens, 4); with ties few different unit vectors, whose products are exact."""
    generator = torch.Generator().manual_seed(seed)
    if not ties:
        return torch.randn(rows, tokens, 4, generator=generator)
    signs = torch.randint(0, 2, (rows, tokens, 4), generator=generator) * 2 - 1
    return signs * 0.5


def reals(tokens: int, rows: int, seed: int, side: str) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, tokens + 1, (rows, 1), generator=generator)
    lengths[0] = tokens
    at = torch.arange(tokens)
    if side == "none":
        return torch.ones(rows, tokens, dtype=torch.bool)
    if side == "scattered":
        return torch.rand(rows, tokens, generator=generator) < 0.6
    return at < lengths if side == "right" else at >= tokens - lengths


def as_result(choice: Choice, row: int) -> oracle.Result:
    gone, into = choice.leaving[row].tolist(), choice.into[row].tolist()
    both = (choice.residual[row].tolist(), choice.mixer[row].tolist())
    residual, mixer = (
        {g: (t if m else None) for g, t, m in zip(gone, into, each, strict=True)} for each in both
    )
    return oracle.Result(choice.kept[row].tolist(), residual, mixer)


def same(choice: Choice, expected: oracle.Result, row: int) -> None:
    found = as_result(choice, row)
    assert found.kept == expected.kept
    assert found.residual == expected.residual
    assert found.mixer == expected.mixer


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    tokens=st.integers(1, 24),
    keep=st.sampled_from([0.5, 0.6, 0.75, 0.9, 1.0]),
    q=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    first=st.integers(0, 2),
    last=st.integers(0, 5),
    ties=st.booleans(),
    causal=st.booleans(),
    side=st.sampled_from(["none", "right", "left", "scattered"]),
    seed=st.integers(0, 1000),
)
def test_utrc_is_the_oracles(
    tokens: int, keep: float, q: float, first: int, last: int, ties: bool, causal: bool, side: str,
    seed: int,
) -> None:  # fmt: skip
    y, real = sample(tokens, ties, seed), reals(tokens, 3, seed, side)
    kinds = classes(real, first, last)
    kept = oracle.lengths(tokens, keep, first + last)
    rule = Rule("utrc", q, first, last, causal)
    choice = choose(rule, of_output("clip_y", y), y, kinds, kept)
    for row in range(3):
        expected = oracle.utrc(
            y[row].numpy(), kinds[row].tolist(), tokens - kept, q, first + last, causal
        )
        same(choice, expected, row)
        x = torch.randn(3, tokens, 2, dtype=torch.float64)
        for which, branch in ((choice.residual, "residual"), (choice.mixer, "mixer")):
            mine = merge(x, choice, which)[row]
            theirs = oracle.merged(x[row].numpy(), expected, getattr(expected, branch))
            close(mine, torch.from_numpy(theirs), "raised_fp64")
        assert step(choice, causal)[row].tolist() == oracle.reads(expected, tokens, causal)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    tokens=st.integers(1, 20),
    keep=st.sampled_from([0.5, 0.8]),
    ties=st.booleans(),
    side=st.sampled_from(["none", "right", "left"]),
    seed=st.integers(0, 1000),
)
def test_rivals_are_the_oracles(tokens: int, keep: float, ties: bool, side: str, seed: int) -> None:
    y, real = sample(tokens, ties, seed), reals(tokens, 3, seed, side)
    kinds, kept = classes(real, 0, 1), oracle.lengths(tokens, keep, 1)
    score = of_output("l2", y)
    found = {m: choose(Rule(m), score, y, kinds, kept) for m in ("tome", "pumer", "evit", "prefix")}
    for row in range(3):
        kind, gone = kinds[row].tolist(), tokens - kept
        paired = oracle.alternate(y[row].numpy(), kind, gone, 1)
        same(found["tome"], paired, row)
        same(found["pumer"], paired, row)
        same(found["evit"], oracle.lowest(score[row].numpy(), kind, gone), row)
        places = np.cumsum([k == oracle.REAL for k in kind]) - 1
        odd = [p % 2 * (k == oracle.REAL) for p, k in zip(places, kind, strict=True)]
        parity = np.array(odd)
        same(found["prefix"], oracle.lowest(parity, kind, gone), row)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_keeps_order_and_the_protected(method: str) -> None:
    y, real = sample(17, False, 3), reals(17, 3, 5, "right")
    kinds = classes(real, 1, 3)
    choice = choose(Rule(method, 0.5, 1, 3), of_output("clip_y", y), y, kinds, 11)
    assert (choice.kept.diff(dim=1) > 0).all()
    for row in range(3):
        staying = set(choice.kept[row].tolist())
        assert {i for i in range(17) if kinds[row, i] == oracle.PROTECTED} <= staying
        gone = set(choice.leaving[row].tolist())
        assert gone | staying == set(range(17)) and not gone & staying
        padding = {i for i in range(17) if kinds[row, i] == oracle.PADDING}
        assert len(gone & padding) == min(len(padding), 6), "padding goes first"
        merged = choice.residual[row] | choice.mixer[row]
        targets = set(choice.into[row][merged].tolist())
        assert not targets & (padding | gone)


def test_random_depends_on_the_seed_and_the_row() -> None:
    kinds = torch.ones(2, 40, dtype=torch.long)
    first, again, other = (
        choose(Rule("random", seed=s), None, None, kinds, 25).kept for s in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other) and not torch.equal(first[0], first[1])


def test_matching_in_tiles_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(0, 2, (2, n, 4), generator=generator) - 0.5 for n in (37, 41))
    args: Any = (a, b, torch.ones(2, 41) > 0, torch.arange(37).expand(2, -1))
    args = (*args, torch.arange(41).expand(2, -1), True)
    whole = torch.ops.effpass.token_matching(*args)
    monkeypatch.setattr("effpass.ops.token_matching.TILE", 5)
    tiled = torch.ops.effpass.token_matching(*args)
    assert torch.equal(whole[0], tiled[0])
    close(tiled[1], whole[1], "kernel_fp32")
    torch.library.opcheck(torch.ops.effpass.token_matching.default, args)


def test_weighted_mean_counts_earlier_merges() -> None:
    """Two, three and four tokens stand behind 1, 2 and 3: merging all three gives their mean."""
    x = torch.tensor([[[1.0], [2.0], [3.0]]])
    one, two = torch.tensor([[2]]), torch.tensor([[0, 1]])
    yes = torch.ones_like(two, dtype=torch.bool)
    choice = Choice(one, torch.tensor([[-1, -1, 0]]), two, torch.tensor([[2, 2]]), yes, yes)
    sizes = torch.tensor([[2.0, 3.0, 4.0]])
    assert merge(x, choice, yes, sizes).item() == pytest.approx((2 + 6 + 12) / 9)
    assert grown(sizes, choice).item() == 9
    assert merge(x, choice, yes).item() == 2


def test_gradients_of_a_merge() -> None:
    y = sample(9, False, 0).double().requires_grad_()

    def run(x: Tensor) -> Tensor:
        choice = choose(Rule("utrc"), of_output("clip_y", x), x, torch.ones(3, 9).long(), 6)
        return merge(x, choice, choice.mixer)

    assert torch.autograd.gradcheck(run, (y,))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_merged_in_single(dtype: torch.dtype) -> None:
    y = sample(15, False, 1)
    choice = choose(Rule("utrc"), of_output("clip_y", y), y, torch.ones(3, 15).long(), 8)
    narrow = merge(y.to(dtype), choice, choice.residual)
    assert narrow.dtype == dtype
    close(narrow, merge(y.to(dtype).float(), choice, choice.residual).to(dtype), "kernel_bf16")


def test_positions_and_gaps() -> None:
    positions = torch.tensor([[1, 2, 5, 9]])
    assert gaps(positions).tolist() == [[1, 0, 2, 3]]
    assert pick(positions, torch.tensor([[0, 3]])).tolist() == [[1, 9]]


def test_scores_by_hand() -> None:
    y = torch.tensor([[[3.0, -4.0], [1.0, 1.0]]])
    expected = {"clip_y": [1.5, 1.0], "y": [-0.5, 1.0], "l1": [3.5, 1.0], "l2": [5.0, 2**0.5]}
    for name, values in expected.items():
        close(of_output(name, y), torch.tensor([values]), "kernel_fp32")
    real = torch.tensor([[True, True, False]])
    row = torch.cat([y, torch.full((1, 1, 2), torch.nan)], 1)
    close(of_deviation(row, real)[:, :2], torch.tensor([[7.25**0.5, 7.25**0.5]]), "kernel_fp32")
    both = torch.cat([row, y], 1)[:, [0, 1, 3, 4]]
    within = of_deviation_within(both, torch.tensor([0, 0, 2, 2]), 3)
    close(within, torch.full((1, 4), 7.25**0.5), "kernel_fp32")
    dt = torch.tensor([[[0.0, 1.0]]])
    steps = torch.nn.functional.softplus(dt + 1.0)
    close(of_steps(dt, torch.ones(2), True), steps.norm(dim=-1), "kernel_fp32")
    close(of_steps(steps, None, False), steps.norm(dim=-1), "kernel_fp32")
    clamped = of_steps(dt, torch.ones(2), True, 0.5, 1.0)
    close(clamped, steps.clamp(0.5, 1.0).norm(dim=-1), "kernel_fp32")


def test_first_query_is_the_row_of_attention() -> None:
    q, k = torch.randn(2, 3, 7, 4), torch.randn(2, 3, 7, 4)
    mask = torch.rand(2, 1, 1, 7) > 0.3
    mask[..., 0] = True
    scores = (q @ k.transpose(2, 3) * 0.5).masked_fill(~mask, -torch.inf).softmax(-1)
    close(of_first(q, k, 0.5, mask), scores[:, :, 0].mean(1), "kernel_fp32")
    bias = torch.zeros(2, 1, 1, 7).masked_fill(~mask, -torch.inf)
    close(of_first(q, k, 0.5, bias), scores[:, :, 0].mean(1), "kernel_fp32")
