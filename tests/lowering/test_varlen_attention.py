"""Packed attention by torch's fused kernel against the definition in float64."""

import dataclasses
import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from effpass.lowering.cpu import varlen_attention as lowering
from effpass.ops import Lowering, varlen_attention
from tests.ops.attention_samples import (
    CAPPED,
    SAMPLES,
    AttentionSample,
    differentiable,
    doubled,
    results,
    transposed,
)
from tests.ops.samples import offsets
from tests.tolerances import close

ROWS = {
    torch.float64: "raised_fp64",
    torch.float32: "attention_fp32",
    torch.bfloat16: "attention_bf16",
    torch.float16: "attention_fp16",
}
DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
NAMED = {sample.name: sample for sample in SAMPLES}


def _cpu() -> Lowering:
    return next(w for w in varlen_attention.lowerings if w.target == "cpu")


def _found(given: dict[str, Any]) -> dict[str, Tensor]:
    return results(_cpu().overload, given)


@functools.cache
def _wanted(sample: AttentionSample, dtype: torch.dtype) -> dict[str, Tensor]:
    return results(varlen_attention.inline.overload, doubled(sample.given(dtype)))


def _agree(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    for name, tensor in found.items():
        try:
            close(tensor, wanted[name].to(tensor.dtype), ROWS[tensor.dtype])
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_is_the_definition(sample: AttentionSample, dtype: torch.dtype) -> None:
    _agree(_found(sample.given(dtype)), _wanted(sample, dtype))


@pytest.mark.parametrize("elements", [1, 40, 500], ids=str)
@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_large_masks_are_made_in_stretches(
    sample: AttentionSample, elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lowering, "MASK_ELEMENTS", elements)
    if sample.name == "cross, causal":
        calls = list(lowering._plan(_problem(sample), 4, torch.empty(0)))
        stretches = {c.queries[0].stop - c.queries[0].start for c in calls if not c.causal}
        assert (max(stretches) == 1) == (elements == 1)
    _agree(_found(sample.given()), _wanted(sample, torch.float32))


def _problem(sample: AttentionSample) -> Any:
    given = sample.given()
    tokens = (given["q"].shape[0], given["k"].shape[0])
    names = ("cu_seqlens", "max_seqlen", "cu_seqlens_k", "max_seqlen_k")
    at = lowering.spans(*tokens, *(given[n] for n in names))
    rest = (given[n] for n in ("causal", "window", "bias", "q_pos", "k_pos"))
    return lowering._Problem(at, *rest)


def test_sequences_of_one_length_share_a_call() -> None:
    for name, count in (
        ("pairs", 1),
        ("alike, between others", 3),
        ("gaps", 5),
        ("causal window", 5),
    ):
        calls = list(lowering._plan(_problem(NAMED[name]), 4, torch.empty(0)))
        assert len(calls) == count, name
    assert next(iter(lowering._plan(_problem(NAMED["gaps"]), 4, torch.empty(0)))).seen is None


def test_a_window_does_not_read_the_keys_outside() -> None:
    calls = list(lowering._plan(_problem(NAMED["long window"]), 2, torch.empty(0)))
    widths = [
        (c.queries[0].stop - c.queries[0].start, c.keys[0].stop - c.keys[0].start) for c in calls
    ]
    assert widths == [(3, 3), (256, 258), (145, 154), (1, 1)]  # the second sequence has 401


def test_a_window_wider_than_a_sequence_needs_no_mask() -> None:
    """That of a model for long texts, on short ones: only the one of 9 tokens has a mask."""
    narrow = {"window": (7, 0), "causal": True}
    for made in (AttentionSample("index"), NAMED["gaps"]):
        made = dataclasses.replace(made, lengths=(9, 8, 3, 8), more=narrow)
        calls = list(lowering._plan(_problem(made), 4, torch.empty(0)))
        masked = [c.queries[0].stop - c.queries[0].start for c in calls if c.seen is not None]
        assert masked == ([9] if made.name == "index" else [9, 8, 3]), made
    wide = dataclasses.replace(NAMED["gaps"], more={"window": (70, 0), "causal": True})
    assert all(c.seen is None for c in lowering._plan(_problem(wide), 4, torch.empty(0)))
    _agree(_found(wide.given()), _wanted(wide, torch.float32))


@pytest.mark.parametrize(
    "name", ["plain", "causal", "bias, causal", "gaps and window", "wide values"]
)
def test_strides_do_not_matter(name: str) -> None:
    given = NAMED[name].given()
    apart = transposed(given)
    assert not any(apart[n].is_contiguous() for n in ("q", "k", "v"))
    _agree(_found(apart), _wanted(NAMED[name], torch.float32))


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_is_a_sound_torch_op(sample: AttentionSample) -> None:
    given = {n: a.clone() if isinstance(a, Tensor) else a for n, a in sample.given().items()}
    torch.library.opcheck(_cpu().overload, tuple(differentiable(given).values()))


@pytest.mark.parametrize("tensor", ["q", "k", "v"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("name", ["plain", "causal", "cross, causal", "bias of heads, causal"])
def test_bad_numbers_are_where_the_definition_has_them(name: str, bad: float, tensor: str) -> None:
    given = NAMED[name].given()
    given[tensor][20, 1, 2] = bad
    found, wanted = _found(given), results(varlen_attention.inline.overload, doubled(given))
    assert not found["out"].isfinite().all() and found["out"].isfinite().any()
    _agree(found, wanted)


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_good_numbers_are_not_left_to_the_definition(
    sample: AttentionSample, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Tensor:
        raise AssertionError("the definition was called")

    monkeypatch.setattr(lowering, "attend", fail)
    monkeypatch.setattr(lowering, "attend_backward", fail)
    assert _found(sample.given())["out"].isfinite().all()


def test_a_bad_value_reaches_queries_far_before_it() -> None:
    """As in the definition, where its weight of 0 multiplies it; the kernel skips whole blocks."""
    sample = AttentionSample("far", (2, 1100), sizes=(1, 1, 4, 4), more={"causal": True})
    given = sample.given()
    given["v"][-1, 0, 0] = math.nan
    found = _cpu().forward(*given.values())
    assert torch.equal(found.isnan(), varlen_attention.reference(*given.values()).isnan())
    assert found[2:, 0, 0].isnan().all() and found[:2].isfinite().all()


@pytest.mark.parametrize("sign", [-1, 1])
def test_scores_that_overflow_are_as_defined(sign: int) -> None:
    given = NAMED["causal"].given()
    given["q"][3:10] = 1e30
    given["k"][3:10] = sign * 1e30
    found = _found(given)
    assert found["out"][3:10].isnan().all() and found["out"][10:].isfinite().all()
    _agree(found, results(varlen_attention.inline.overload, given))


def test_large_scores_keep_their_gradient() -> None:
    """exp(score - log-sum-exp) has no digits left where both are large."""
    given = AttentionSample(
        "large", (4, 3, 6), made=lambda t, tk: {"bias": torch.full((tk,), -1e8)}
    ).given()
    given["bias"][:4] = torch.tensor([0.0, -1e8, 0.0, 0.0])
    found = _found(given)
    _agree(found, results(varlen_attention.inline.overload, given))
    assert found["v"][4:].abs().max() > 0.1


def test_a_bias_in_half_precision_has_its_gradient_in_half_precision() -> None:
    given = NAMED["bias, causal"].given(torch.bfloat16)
    given["bias"] = given["bias"].bfloat16()
    found = _found(given)
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    _agree(found, results(varlen_attention.inline.overload, doubled(given)))


def test_storage_dtypes_may_differ() -> None:
    given = NAMED["causal"].given()
    given["v"] = given["v"].bfloat16()
    found = _found(given)
    assert found["out"].dtype == torch.float32 and found["v"].dtype == torch.bfloat16
    _agree(found, results(varlen_attention.inline.overload, doubled(given)))


def test_autocast_does_not_reach_inside() -> None:
    given = NAMED["bias, causal"].given()
    plain = _found(given)
    with torch.autocast("cpu", torch.bfloat16):
        cast = _found(given)
    assert all(torch.equal(cast[name], plain[name]) for name in plain)


def test_threads_agree_and_repeat() -> None:
    given = NAMED["long"].given()
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        found, again = _found(given), _found(given)
    finally:
        torch.set_num_threads(before)
    for name, tensor in found.items():
        assert torch.equal(tensor, again[name]), name
    _agree(found, _found(given))


def test_refusals_say_what_is_needed() -> None:
    refuses = _cpu().refuses
    given = NAMED["plain"].given()
    assert refuses(*given.values()) is None
    assert refuses(*CAPPED[0].given().values()) == "has no soft cap"
    tiny = {**given, "v": given["v"].to(torch.float8_e4m3fn)}
    expected = "v is float8_e4m3fn; needs float32, float64, bfloat16 or float16"
    assert refuses(*tiny.values()) == expected
    meta = {n: a.to("meta") if isinstance(a, Tensor) else a for n, a in given.items()}
    assert refuses(*meta.values()) == "q is on meta; needs cpu"


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            {"cu_seqlens": offsets(30, 4)},
            "expected cu_seqlens to end at the token count 33, found 34",
        ),
        ({"cu_seqlens_k": offsets(33, 0, 0, 0, 0, 0, 1)}, "expected cu_seqlens_k to end at"),
        ({"max_seqlen": 12}, "at least the longest sequence, 13 tokens, found 12"),
    ],
)
def test_wrong_offsets_do_not_reach_the_kernel(change: dict[str, Any], text: str) -> None:
    given = {**NAMED["plain"].given(), **change}
    with pytest.raises(ValueError, match=text):
        _cpu().overload(*given.values())
