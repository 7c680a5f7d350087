"""Which tokens of a packed row leave: in each sequence those that leave when it is alone."""

from __future__ import annotations

from itertools import accumulate, pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from effpass.passes.reduction.choice import METHODS, Choice, Rule, choose, classes
from effpass.passes.reduction.closest_within import closest_within
from effpass.passes.reduction.merge import gaps, merge, step
from effpass.passes.reduction.packed import (
    Offsets,
    Segments,
    choose_packed,
    first_seen,
    gaps_packed,
)
from effpass.passes.reduction.schedule import lengths
from effpass.passes.reduction.scores import of_first, of_output
from effpass.passes.reduction.steps import aligned_scan
from tests.passes.test_reduction_choice import sample
from tests.tolerances import close


def offsets(counts: list[int]) -> Tensor:
    return torch.tensor([0, *accumulate(counts)], dtype=torch.int32)


def packed(rule: Rule, y: Tensor, counts: list[int], kept: list[int]) -> Choice:
    before = offsets(counts)
    ends = Offsets(before, offsets(kept), before.long())
    row = Segments.of(before, y.shape[1])
    return choose_packed(rule, of_output("clip_y", y), y, row, ends, sum(kept))


def alone(rule: Rule, y: Tensor, kept: int) -> Choice:
    real = torch.ones(y.shape[:2], dtype=torch.bool)
    kinds = classes(real, rule.protect_first, rule.protect_last)
    return choose(rule, of_output("clip_y", y), y, kinds, kept)


def same(
    found: Choice, each: list[Choice], counts: list[int], kept: list[int], causal: bool
) -> None:
    """Indices and flags, and what every token reads, sequence by sequence."""
    starts, behind = offsets(counts).tolist(), offsets(kept).tolist()
    for i, mine in enumerate(each):
        left, right = starts[i] - behind[i], starts[i + 1] - behind[i + 1]
        assert torch.equal(found.kept[:, behind[i] : behind[i + 1]] - starts[i], mine.kept)
        assert torch.equal(found.leaving[:, left:right] - starts[i], mine.leaving)
        for name in ("residual", "mixer"):
            assert torch.equal(getattr(found, name)[:, left:right], getattr(mine, name))
        merged = mine.residual | mine.mixer
        assert torch.equal((found.into[:, left:right] - starts[i])[merged], mine.into[merged])
        reads = step(found, causal)[:, starts[i] : starts[i + 1]]
        assert torch.equal(reads - behind[i], step(mine, causal))


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    counts=st.lists(st.integers(0, 14), min_size=1, max_size=5).filter(lambda n: sum(n) > 0),
    method=st.sampled_from(METHODS),
    keep=st.sampled_from([0.5, 0.6, 0.75, 0.9]),
    q=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
    first=st.integers(0, 2),
    last=st.integers(0, 4),
    ties=st.booleans(),
    causal=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_every_sequence_chooses_as_alone(
    counts: list[int], method: str, keep: float, q: float, first: int, last: int, ties: bool,
    causal: bool, seed: int,
) -> None:  # fmt: skip
    rule = Rule(method, q, first, last, causal, seed)
    y = sample(sum(counts), ties, seed, rows=1)
    kept = [lengths(n, keep, 1, first + last)[1] for n in counts]
    found = packed(rule, y, counts, kept)
    parts = y.split(counts, 1)
    each = [alone(rule, part, k) for part, k in zip(parts, kept, strict=True) if part.shape[1]]
    counts, kept = ([n for n in numbers if n] for numbers in (counts, kept))
    same(found, each, counts, kept, causal)
    if method == "utrc":
        rows = merge(y, found, found.mixer).split(kept, 1)
        for row, mine, part in zip(rows, each, (p for p in parts if p.shape[1]), strict=True):
            close(row, merge(part, mine, mine.mixer), "kernel_fp32")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("broken", [float("nan"), float("inf"), 3.0])
def test_a_sequence_does_not_reach_another(method: str, broken: float) -> None:
    counts, kept = [9, 1, 12, 7], [6, 1, 8, 5]
    y = sample(29, False, 1, rows=1)
    rule = Rule(method, 0.5, 0, 1)
    other = y.clone()
    other[:, 10:22] = broken
    first, second = packed(rule, y, counts, kept), packed(rule, other, counts, kept)
    merged = [merge(x, c, c.residual) for x, c in ((y, first), (other, second))]
    for inside in (slice(0, 7), slice(15, 20)):
        assert torch.equal(first.kept[:, inside], second.kept[:, inside])
        assert torch.equal(merged[0][:, inside], merged[1][:, inside])
    gone = torch.tensor([0, 1, 2, 7, 8])
    for name in ("leaving", "into", "residual", "mixer"):
        assert torch.equal(getattr(first, name)[:, gone], getattr(second, name)[:, gone])
    assert ((second.kept[:, 7:15] >= 10) & (second.kept[:, 7:15] < 22)).all()


def test_matching_looks_at_tiles_of_its_own_sequence_only(monkeypatch: Any) -> None:
    """The op is registered as it should be; tiles do not matter."""
    y, counts = sample(30, True, 2, rows=1), [11, 1, 0, 18]
    order = torch.cat(
        [torch.randperm(n) + s for n, s in zip(counts, offsets(counts), strict=False)]
    )
    args: Any = (y, order[None], torch.rand(1, 30) < 0.8, offsets(counts).long(), 1, True, False)
    whole = closest_within(*args)
    monkeypatch.setattr("effpass.ops.token_matching.TILE", 3)
    tiled = closest_within(*args)
    assert torch.equal(whole[0], tiled[0])
    close(tiled[1], whole[1], "kernel_fp32")
    for start, end in pairwise(offsets(counts).tolist()):
        inside = whole[0][:, start:end]
        assert ((inside >= start) & (inside < end)).all()
    torch.library.opcheck(torch.ops.effpass_tokens.closest_within.default, args)


@pytest.mark.parametrize("right", [-1, 2])
def test_first_tokens_attention_is_that_of_each_sequence(right: int) -> None:
    counts = [5, 1, 0, 8]
    q, k = torch.randn(14, 4, 3), torch.randn(14, 2, 3)
    positions = torch.arange(14)[None] + torch.tensor([[0] * 5 + [4] * 9])
    found = first_seen(q, k, 0.7, offsets(counts), positions, right)
    start = 0
    for count in (n for n in counts if n):
        own = slice(start, start + count)
        keys = k[own].repeat_interleave(2, 1)
        rows = (each[None].transpose(1, 2) for each in (q[own], keys))
        far = positions[:, own] - positions[:, start : start + 1] > right
        open = None if right < 0 else ~far[:, None, None]
        close(found[:, own], of_first(*rows, 0.7, open), "kernel_fp32")
        start += count


def test_gaps_begin_anew_in_every_sequence() -> None:
    """Sequences of 6, 0, 5 and 1 tokens, of which 3, 0, 2 and 1 are left."""
    at, now, first = (
        torch.tensor([[1, 2, 5, 6, 9, 11]]),
        offsets([3, 0, 2, 1]),
        offsets([6, 0, 5, 1]),
    )
    assert gaps_packed(at, now, first).tolist() == [[1, 0, 2, 0, 2, 0]]
    assert gaps(at[:, :3]).tolist() == [[1, 0, 2]]


@pytest.mark.parametrize("name", ["selective_scan", "ssd_scan"])
@pytest.mark.parametrize("mode", ["repeat", "bias_gap"])
def test_aligned_scans_are_those_of_each_sequence(name: str, mode: str) -> None:
    torch.manual_seed(0)
    heads = name == "ssd_scan"
    x = torch.randn(1, 7, 4, 2) if heads else torch.randn(1, 7, 4)
    B, C = (torch.randn(1, 7, 2, 3) if heads else torch.randn(1, 7, 3) for _ in range(2))
    A = -torch.rand(4) if heads else -torch.rand(4, 3)
    given: dict[str, Any] = {"x": x, "dt": torch.randn(1, 7, 4), "A": A, "B": B, "C": C, "D": None}
    given |= {"z": None, "dt_bias": torch.randn(4), "dt_softplus": True, "initial_state": None}
    given |= {"dt_min": 0.0, "dt_max": None} if heads else {}
    at, now, first = torch.tensor([[0, 2, 5, 7, 8, 11, 12]]), [3, 4], [7, 6]
    whole = given | {"cu_seqlens": offsets(now)}
    y, states = aligned_scan(name, mode, at, whole, offsets(first))
    start = 0
    for i, count in enumerate(now):
        own = slice(start, start + count)
        part = {n: v[:, own] if n in ("x", "dt", "B", "C") else v for n, v in given.items()}
        mine, state = aligned_scan(name, mode, at[:, own] - 7 * i, part)
        close(y[:, own], mine, "kernel_fp32")
        close(states[i : i + 1], state, "kernel_fp32")
        start += count
