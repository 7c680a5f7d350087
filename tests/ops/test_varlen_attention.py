"""``varlen_attention`` is torch's attention of each sequence, and of nothing else."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import effpass
from effpass.axes.solve import solve
from effpass.ops import varlen_attention
from effpass.ops.varlen_attention import positions, visible
from tests.ops.attention_samples import (
    CAPPED,
    RAGGED,
    SAMPLES,
    AttentionSample,
    by_sequence,
    differentiable,
    doubled,
    grad_of,
    results,
    transposed,
)
from tests.ops.samples import offsets
from tests.tolerances import close

EVERY = [*SAMPLES, *CAPPED]
DEFINITION = varlen_attention.inline.overload


@pytest.mark.parametrize("sample", EVERY, ids=str)
def test_is_attention_of_each_sequence(sample: AttentionSample) -> None:
    given = doubled(sample.given())
    wanted = results(by_sequence, given)
    for name, found in results(DEFINITION, given).items():
        assert found.isfinite().all(), name
        close(found, wanted[name], "raised_fp64")


@pytest.mark.parametrize("sample", EVERY, ids=str)
def test_is_a_sound_torch_op(sample: AttentionSample) -> None:
    given = {n: a.clone() if isinstance(a, Tensor) else a for n, a in sample.given().items()}
    torch.library.opcheck(DEFINITION, tuple(differentiable(given).values()))


NAMED = {sample.name: sample for sample in EVERY}


@pytest.mark.parametrize("name", ["cross, causal", "bias of heads, causal", "soft cap and bias"])
def test_gradient_is_that_of_small_differences(name: str) -> None:
    given = differentiable(doubled(NAMED[name].given()))
    arguments = [a.clone() if isinstance(a, Tensor) else a for a in given.values()]
    for overload in (DEFINITION, varlen_attention.overload):
        assert torch.autograd.gradcheck(overload, tuple(arguments), fast_mode=True)


@pytest.mark.parametrize(
    ("dtype", "row"), [(torch.bfloat16, "kernel_bf16"), (torch.float16, "kernel_fp16")]
)
@pytest.mark.parametrize("name", ["plain", "gaps and window", "bias of heads, causal", "soft cap"])
def test_sums_of_narrow_numbers_are_float32(name: str, dtype: torch.dtype, row: str) -> None:
    given = NAMED[name].given(dtype)
    wanted = results(by_sequence, doubled(given))
    for tensor, found in results(DEFINITION, given).items():
        close(found, wanted[tensor].to(found.dtype), "kernel_fp32" if tensor == "bias" else row)


def test_autocast_does_not_reach_inside() -> None:
    given = NAMED["causal"].given()
    plain = results(DEFINITION, given)
    with torch.autocast("cpu", torch.bfloat16):
        cast = results(DEFINITION, given)
    assert all(torch.equal(cast[name], plain[name]) for name in plain)


@pytest.mark.parametrize("name", ["plain", "bias, causal"])
def test_strides_do_not_matter(name: str) -> None:
    given = NAMED[name].given()
    apart = transposed(given)
    assert not any(apart[n].is_contiguous() for n in ("q", "k", "v"))
    wanted = results(DEFINITION, given)
    found = results(DEFINITION, apart)
    assert all(torch.equal(found[n], wanted[n]) for n in wanted)


def _mask(length: int, length_k: int, causal: bool, window: tuple[int, int]) -> list[list[int]]:
    at = positions(slice(7, 7 + length), slice(2, 2 + length_k), None, None, torch.empty(0))
    return visible(*at, causal, window).int().tolist()


def test_the_last_query_stands_at_the_last_key() -> None:
    """The two examples of flash-attention's documentation, and its rule for windows."""
    assert _mask(2, 5, True, (-1, -1)) == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert _mask(5, 2, True, (-1, -1)) == [[0, 0], [0, 0], [0, 0], [1, 0], [1, 1]]
    assert _mask(2, 5, False, (1, 0)) == [[0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]
    assert _mask(2, 5, True, (1, 3)) == [[0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]


def test_a_query_without_keys_is_zero_and_has_no_gradient() -> None:
    given = AttentionSample("blind", (4, 3), (2, 0), more={"causal": True}).given()
    found = results(varlen_attention.overload, given)
    blind = torch.tensor([0, 1, 4, 5, 6])
    for name in ("out", "q"):
        assert (found[name][blind] == 0).all()
        assert (found[name][2:4] != 0).any()
    assert found["k"].isfinite().all() and found["v"].isfinite().all()


@pytest.mark.parametrize(
    "overload", [DEFINITION, varlen_attention.overload], ids=["inline", "first"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "name", ["plain", "causal window", "gaps", "cross, causal", "bias, causal"]
)
def test_a_bad_sequence_stays_alone(
    overload: Callable[..., Tensor], name: str, dtype: torch.dtype
) -> None:
    given = NAMED[name].given(dtype)
    clean = results(overload, given)
    keys = given["cu_seqlens"] if given["cu_seqlens_k"] is None else given["cu_seqlens_k"]
    bad, keyed = (slice(*each[5:7].tolist()) for each in (given["cu_seqlens"], keys))
    for tensor, at in (("q", bad), ("k", keyed), ("v", keyed), ("bias", keyed)):
        if given[tensor] is None:
            continue
        spoilt = {**given, tensor: given[tensor].clone()}
        spoilt[tensor][at] = float("nan")
        found = results(overload, spoilt)
        assert found["out"][bad].isnan().any()
        for other, wanted in clean.items():
            mine = bad if other in ("out", "q") else keyed
            keep = torch.ones(wanted.shape[0], dtype=torch.bool)
            keep[mine] = False
            assert torch.equal(found[other][keep], wanted[keep]), (tensor, other)


def _given(**change: Any) -> dict[str, Any]:
    q, k, v = torch.randn(5, 4, 8), torch.randn(5, 2, 8), torch.randn(5, 2, 8)
    return {"q": q, "k": k, "v": v, "cu_seqlens": offsets(2, 3), "max_seqlen": 3, **change}


LONGER = torch.randn(6, 2, 8)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (
            {"q": torch.randn(1, 5, 4, 8)},
            ValueError,
            "expected q to have 3 dimensions (t h d), found shape (1, 5, 4, 8)",
        ),
        (
            {"v": LONGER},
            ValueError,
            "expected v (tk hk e) to have tk = 5 (from k), found 6 in shape (6, 2, 8)",
        ),
        (
            {"k": LONGER, "v": LONGER},
            ValueError,
            "expected as many keys as queries without cu_seqlens_k, found 6 keys and 5 queries; "
            "give cu_seqlens_k",
        ),
        (
            {"q": torch.randn(5, 3, 8)},
            ValueError,
            "expected the 3 heads of q to be a multiple of those of k and v, found 2",
        ),
        (
            {"q": torch.randn(5, 0, 8)},
            ValueError,
            "expected q (t, h, d) with h >= 1, found h = 0",
        ),
        (
            {"cu_seqlens": None},
            TypeError,
            "expected cu_seqlens to be a Tensor, found NoneType",
        ),
        (
            {"cu_seqlens": offsets(2, 2)},
            ValueError,
            "expected cu_seqlens to end at the token count 5, found 4",
        ),
        (
            {"cu_seqlens_k": offsets(3, 2).long()},
            TypeError,
            "expected cu_seqlens_k to be torch.int32, found torch.int64",
        ),
        (
            {"cu_seqlens_k": offsets(5)},
            ValueError,
            "expected cu_seqlens_k to have as many sequences as cu_seqlens, found shapes (2,) and "
            "(3,)",
        ),
        (
            {"cu_seqlens_k": offsets(3, 3)},
            ValueError,
            "expected cu_seqlens_k to end at the token count 5, found 6",
        ),
        (
            {"max_seqlen": 2},
            ValueError,
            "expected max_seqlen to be at least the longest sequence, 3 tokens, found 2",
        ),
        (
            {"cu_seqlens_k": offsets(4, 1), "max_seqlen_k": 3},
            ValueError,
            "expected max_seqlen_k to be at least the longest sequence, 4 tokens, found 3",
        ),
        (
            {"q_pos": torch.arange(5)},
            ValueError,
            "expected q_pos and k_pos together, found q_pos alone; give the position of every "
            "query and of every key, or neither",
        ),
        (
            {"q_pos": torch.arange(5), "k_pos": torch.arange(5).int()},
            TypeError,
            "expected k_pos to be torch.int64, found torch.int32",
        ),
        (
            {"q_pos": torch.arange(5), "k_pos": torch.arange(6)},
            ValueError,
            "expected k_pos (tk) to have tk = 5 (from k), found 6 in shape (6,)",
        ),
        (
            {"window": (-2, 0)},
            ValueError,
            "expected window to be (left, right), each a number of keys or -1 for no limit, "
            "found (-2, 0)",
        ),
        ({"softcap": 0.0}, ValueError, "expected softcap to be None or above 0, found 0.0"),
        (
            {"bias": torch.zeros(3, 5)},
            ValueError,
            "expected bias (h tk) to have h = 4 (from q), found 3 in shape (3, 5)",
        ),
        (
            {"bias": torch.zeros(4)},
            ValueError,
            "expected bias (tk) to have tk = 5 (from k), found 4 in shape (4,)",
        ),
        (
            {"bias": torch.zeros(5, dtype=torch.bool)},
            TypeError,
            "expected bias to be floating point, found torch.bool",
        ),
        (
            {"bias": torch.full((5,), float("-inf"))},
            ValueError,
            "expected bias to be finite, found infinity; leave keys out by causal, window and "
            "positions, or pack without them",
        ),
    ],
)
def test_wrong_arguments_are_named(
    change: dict[str, Any], error: type[Exception], text: str
) -> None:
    with pytest.raises(error) as raised:
        varlen_attention(**_given(**change))
    assert str(raised.value) == f"varlen_attention: {text}"


def _packed(*lengths: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    tokens = sum(lengths)
    made = (torch.randn(tokens, h, 8, requires_grad=True) for h in (4, 2, 2))
    q, k, v = made
    cu_seqlens = offsets(*lengths)
    for each in (q, k, v, cu_seqlens):
        torch._dynamo.mark_dynamic(each, 0)
    return q, k, v, cu_seqlens


def _bounded(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    return varlen_attention(q, k, v, cu_seqlens, 64, causal=True).sin()


def _by_tokens(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
    """The bound is a symbol; positions and a bias are made in the graph."""
    at = torch.arange(q.shape[0]) * 2
    more = {"window": (5, -1), "bias": k[:, 0, 0], "q_pos": at, "k_pos": at}
    return varlen_attention(q, k, v, cu_seqlens, q.shape[0], **more).sin()


@pytest.mark.parametrize("function", [_bounded, _by_tokens])
def test_a_new_token_count_does_not_recompile(function: Callable[..., Tensor]) -> None:
    compiled = torch.compile(
        function, backend="effpass", options={"compiler": "eager"}, fullgraph=True
    )
    with torch._dynamo.config.patch(error_on_recompile=True):
        for lengths in ((3, 5), RAGGED, (0, 2, 2, 64)):
            given = _packed(*lengths)
            found, wanted = compiled(*given), function(*given)
            close(found, wanted, "model_fp32")
            grads = [torch.autograd.grad(o, given[:3], grad_of(o)) for o in (found, wanted)]
            for mine, theirs in zip(*grads, strict=True):
                close(mine, theirs, "model_gradient_fp32")


def test_a_compiled_graph_takes_the_kernel_or_says_why_not() -> None:
    def both(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
        plain = varlen_attention(q, k, v, cu_seqlens, 5)
        return plain + varlen_attention(q, k, v, cu_seqlens, 5, softcap=3.0)

    given = [each.detach() for each in _packed(3, 5)]
    compiled = torch.compile(both, backend="effpass", options={"compiler": "eager"})
    close(compiled(*given), both(*given), "model_fp32")
    plain, capped = effpass.report(compiled).chosen
    assert (plain.op, plain.implementation) == ("varlen_attention", "cpu")
    refused = (("cpu", "has no soft cap"), ("gpu", "q is on cpu; needs cuda"))
    assert (capped.implementation, capped.refused) == ("inline", refused)


@pytest.mark.parametrize("bias", [torch.randn(9), torch.randn(4, 9)], ids=["keys", "heads"])
def test_axes_of_a_call_are_known(bias: Tensor) -> None:
    made = (torch.randn(8, 4, 16), torch.randn(9, 2, 16), torch.randn(9, 2, 5))

    def call(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, at: Tensor, at_k: Tensor) -> Tensor:
        return varlen_attention.overload(q, k, v, at, 5, at_k, 6, bias=bias)

    traced = make_fx(call, tracing_mode="fake")(*made, bias, offsets(3, 5), offsets(3, 6))
    q, k, v, added, *_, out, _ = traced.graph.nodes
    found = solve(traced)
    (t, h, _), (tk, _, _), (*_, e) = (found.dims(each) for each in (q, k, v))
    assert found.dims(out) == (t, h, e) and t != tk
    assert found.dims(added) == (h, tk)[-bias.dim() :]
    assert not found.conflicts


def test_bounds_are_checked_when_a_compiled_graph_runs() -> None:
    compiled = torch.compile(_bounded, backend="effpass", options={"compiler": "eager"})
    compiled(*_packed(3, 5))
    with pytest.raises(ValueError, match="at least the longest sequence, 65 tokens, found 64"):
        compiled(*_packed(3, 65))
