"""Eager attention: what it is raised to, in every setting; masks have ``test_masks``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node

from effpass.capture.dynamo import capture
from effpass.graph.clean import clean
from effpass.patterns.attention import IDIOMS
from effpass.patterns.raising import Raising, raise_ops, recorded
from tests.patterns.raising import Raiser, equal, tensors
from tests.patterns.spellings import (
    attention,
    attention_biases,
    attention_layouts,
    attention_masks,
    attention_near_misses,
)
from tests.patterns.spellings.spelling import NearMiss, Spelling, tokens
from tests.tolerances import close

OP = "scaled_dot_product_attention"
SPELLINGS = [
    *(*attention.SPELLINGS, *attention_layouts.SPELLINGS),
    *(*attention_biases.SPELLINGS, *attention_masks.SPELLINGS),
]
SAME_AXIS = "the softmax runs over one axis, the product with the values sums over another"
MULTIPLIED = "the attention weights are multiplied by a tensor before they meet the values"
REASONS = {
    "OverQueries": [SAME_AXIS],
    "OverHeads": ["the softmax runs over an axis that queries and keys share"],
    "OverPairs": ["the softmax runs over queries and keys together"],
    "OtherWayRound": [SAME_AXIS],
    "GatedTokens": [MULTIPLIED],
    "GatedPairs": [MULTIPLIED],
    "MaskedLate": [MULTIPLIED],
    "TrainingDropout": ["dropout is active (p = 0.5)"],
    "ModuleDropout": ["dropout is active (p = 0.5)"],
    "PositiveScores": ["between the scores and the softmax is relu"],
    "QuietSoftmax": ["something is added to the sum of exponentials"],
    "Sink": ["between the scores and the softmax is cat"],
    "TalkingProbabilities": [SAME_AXIS],
    "TalkingScores": ["the axes of queries, keys and values are not those of attention"],
    "BestTwo": ["the scores are also used by topk"],
    "WeightsReturned": ["the attention weights are also returned"],
}
# not one token attends to another by a softmax: nothing to report
SILENT = ("Relu", "Sigmoid", "NoNormalising", "Linear", "Efficient", "StickBreaking")


def named(cases: list[Any]) -> Any:
    return pytest.mark.parametrize("case", cases, ids=lambda c: c.name)


def calls(raiser: Raiser) -> list[Node]:
    """The nodes of the op."""
    nodes = [n for graph in raiser.graphs for n in graph.graph.nodes]
    return [n for n in nodes if getattr(n.target, "_opname", "") == OP]


def by_structure(module: Any, inputs: tuple[Tensor, ...]) -> tuple[Raising, Any]:
    """What is raised, and computed, when nothing is proven in numbers."""
    found: list[Raising] = []

    def backend(gm: Any, example: Any) -> Any:
        graph = capture(gm, example)
        clean(graph)
        found.append(raise_ops(graph, proving=False, idioms=IDIOMS, strict=True))
        return graph.forward

    outputs = torch.compile(module, backend=backend, fullgraph=True)(*inputs)
    return found[0], outputs


@named(SPELLINGS)
def test_by_structure_alone(case: Spelling) -> None:
    module, inputs = case.make(), case.inputs(7)
    with torch.no_grad():
        outcome, outputs = by_structure(module, inputs)
        for a, e in zip(tensors(outputs), tensors(module(*inputs)), strict=True):
            close(a, e, "model_fp32")
    assert [r.op for r in outcome.raised] == ["sdpa"] * case.count
    assert not outcome.misses


@named(attention_near_misses.NEAR_MISSES)
def test_near_misses(case: NearMiss) -> None:
    outcome, _ = by_structure(case.make(), case.inputs(7))
    assert not outcome.raised
    if case.name in REASONS:
        assert [miss.reason for miss in outcome.misses] == REASONS[case.name]
    elif case.name in SILENT:
        assert not outcome.misses


def test_the_reasons_are_of_near_misses() -> None:
    assert {*REASONS, *SILENT} <= {case.name for case in attention_near_misses.NEAR_MISSES}


class Attention(nn.Module):
    """Three projections around a function of queries, keys and values, (b h t d) each."""

    def __init__(self, attend: Callable[..., Tensor], heads: int = 4, keys: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.heads, self.keys, self.attend = heads, keys, attend
        self.q, self.k, self.v = (nn.Linear(12, 3 * n) for n in (heads, keys, keys))

    def forward(self, x: Tensor, *given: Tensor) -> Tensor:
        b, t, _ = x.shape
        parts = zip((self.q, self.k, self.v), (self.heads, self.keys, self.keys), strict=True)
        q, k, v = (f(x).view(b, t, n, 3).transpose(1, 2) for f, n in parts)
        return self.attend(q, k, v, *given).transpose(1, 2).reshape(b, t, -1)


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT * 0.5).softmax(-1) @ v


def raised(module: nn.Module, *inputs: Tensor, row: str = "model_fp32") -> Raiser:
    """Compares without gradients; answers what was raised."""
    raiser = Raiser(module, IDIOMS)
    with torch.no_grad():
        close(raiser(*inputs), module(*inputs), row)
    return raiser


def x(length: int = 5) -> Tensor:
    return tokens(12)(length)[0]


def test_a_causal_constant_becomes_a_flag() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        t = q.shape[2]
        hidden = torch.arange(t)[None] > torch.arange(t)[:, None]
        return (q @ k.mT * 0.25).masked_fill(hidden, -1e4).softmax(-1) @ v

    (call,) = calls(raised(Attention(attend), x()))
    assert call.args[3:6] == (None, 0.0, True) and call.kwargs["scale"] == 0.25


def test_a_window_stays_a_mask() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        apart = torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])
        scores = torch.where((apart >= 0) & (apart < 2), q @ k.mT, float("-inf"))
        return scores.softmax(-1) @ v

    (call,) = calls(raised(Attention(attend), x()))
    assert isinstance(call.args[3], Node) and call.args[4:5] in ((0.0,), ())


def test_a_mask_that_hides_nothing_is_dropped() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        hidden = torch.zeros(q.shape[2], q.shape[2], dtype=torch.bool)
        bias = torch.zeros(1, 1, 1, k.shape[2]).masked_fill(hidden, float("-inf"))
        return (q @ k.mT + bias).masked_fill(hidden, -1e9).softmax(-1) @ v

    (call,) = calls(raised(Attention(attend), x()))
    assert all(arg is None for arg in call.args[3:4])


def test_the_same_mask_with_other_lengths() -> None:
    """Causal from the top left corner is not causal where there are more keys."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        hidden = torch.ones(q.shape[2], 5, dtype=torch.bool).triu(1)
        return (q @ k[:, :, :5].mT).masked_fill(hidden, float("-inf")).softmax(-1) @ v[:, :, :5]

    (call,) = calls(raised(Attention(attend), x(7)))
    assert isinstance(call.args[3], Node)


@pytest.mark.parametrize("form", ["interleaved", "expanded", "products"])
def test_grouped_queries_are_told_to_the_op(form: str) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        b, h, t, d = k.shape
        if form == "interleaved":
            k, v = (y.repeat_interleave(2, dim=1) for y in (k, v))
        elif form == "expanded":
            k, v = (y[:, :, None].expand(b, h, 2, t, d).reshape(b, -1, t, d) for y in (k, v))
        else:
            grouped = q.unflatten(1, (h, 2))
            weights = torch.einsum("bkgtd,bksd->bkgts", grouped, k).softmax(-1)
            return torch.einsum("bkgts,bksd->bkgtd", weights, v).flatten(1, 2)
        return plain(q, k, v)

    (call,) = calls(raised(Attention(attend, keys=2), x()))
    assert call.kwargs["enable_gqa"] is True
    key = call.args[1]
    assert isinstance(key, Node) and key.meta["val"].shape[1] == 2


def test_heads_tiled_in_another_order_are_repeated() -> None:
    """``repeat`` gives query head 1 the key head 1, where the op would give it 0."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return plain(q, k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1))

    (call,) = calls(raised(Attention(attend, keys=2), x()))
    assert not call.kwargs.get("enable_gqa")


def test_one_query_at_a_time() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        k, v = torch.cat([keys, k], 2), torch.cat([values, v], 2)
        return plain(q, k, v)

    past = torch.randn(2, 2, 4, 6, 3)
    assert raised(Attention(attend), x(1), *past).count("sdpa") == 1


def test_a_single_key_is_left_alone() -> None:
    raiser = raised(Attention(plain), x(1))
    assert not raiser.count("sdpa") and not raiser.reasons


def test_a_temperature_that_is_learned() -> None:
    class Tempered(Attention):
        def __init__(self) -> None:
            super().__init__(self.tempered)
            self.temperature = nn.Parameter(torch.rand(4, 1, 1))

        def tempered(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return (q @ k.mT / self.temperature.exp()).softmax(-1) @ v

    module = Tempered()
    assert raised(module, x()).count("sdpa") == 1


@pytest.mark.parametrize("scale", [-0.5, 1 / 3])
def test_scales_of_any_sign(scale: float) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax((2 * q) @ (k / 3).mT * scale, -1) @ v / 7

    assert raised(Attention(attend), x()).count("sdpa") == 1


def test_values_narrower_than_queries() -> None:
    """Rotated in float32, say: scores keep that precision, the output its dtype."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        turned = torch.arange(q.shape[2])[:, None].cos()
        return ((q * turned) @ (k * turned).mT).softmax(-1).to(v.dtype) @ v

    module = Attention(attend).bfloat16()
    raiser = raised(module, x().bfloat16(), row="model_bf16")
    (call,) = calls(raiser)
    assert call.meta["val"].dtype is torch.float32


@pytest.mark.parametrize("length", [5, 9])
def test_under_autocast(length: int) -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        t = q.shape[2]
        mask = torch.where(torch.ones(t, t).tril(1) > 0, 0.0, torch.finfo(torch.float32).min)
        return (q @ k.mT * 0.5 + mask).softmax(-1) @ v

    module = Attention(attend)
    with torch.autocast("cpu", torch.bfloat16):
        raiser = raised(module, x(length), row="model_bf16")
    assert raiser.count("sdpa") == 1


def test_a_wide_bias_under_autocast_is_left_alone() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return (q @ k.mT * 0.5 + bias).softmax(-1) @ v

    with torch.autocast("cpu", torch.bfloat16):
        raiser = raised(Attention(attend), x(), torch.randn(5, 5), row="model_bf16")
    assert raiser.reasons == ["autocast would round a bias from torch.float32 to torch.bfloat16"]


def test_weights_that_nobody_reads() -> None:
    """torch's own module computes their mean, which is dropped here."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(12, 3, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x)[0]

    assert raised(Own(), x()).count("sdpa") == 1


def test_attention_inside_no_grad() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.no_grad():
            attended = plain(q, k, v)
        return attended + v

    raiser = equal(Attention(attend), (x(),), IDIOMS)
    assert raiser.count("sdpa") == 1


def test_a_change_of_grad_mode_inside_is_left_alone() -> None:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with torch.no_grad():
            weights = (q @ k.mT).softmax(-1)
        return weights @ v

    raiser = equal(Attention(attend), (x(),), IDIOMS)
    assert not raiser.count("sdpa")
    assert raiser.reasons == ["grad mode or autocast changes inside it"]


def test_a_router_is_none() -> None:
    """Experts weighed by a softmax: nothing attends to anything."""

    class Router(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.experts = nn.Linear(12, 3), nn.Parameter(torch.randn(3, 12, 12))

        def forward(self, x: Tensor) -> Tensor:
            weights = self.gate(x).softmax(-1)
            return torch.einsum(
                "bte,beto->bto", weights, torch.einsum("btd,edo->beto", x, self.experts)
            )

    raiser = raised(Router(), x())
    assert not raiser.count("sdpa") and not raiser.reasons


@named(attention_near_misses.SOFTCAP)
def test_soft_caps_are_recorded(case: NearMiss) -> None:
    raiser = raised_any(case)
    assert raiser.count("attention_softcap") == 1 and not raiser.nodes(OP)
    (record,) = recorded(raiser.graphs[0])
    attributes = record.attributes
    assert attributes["softcap"] > 0 and attributes["scale"] > 0
    assert all(isinstance(attributes[name], Node) for name in ("query", "key", "value"))
    assert attributes["causal"] or attributes["mask"] or case.name != "CapThenMask"


def raised_any(case: NearMiss) -> Raiser:
    raiser = Raiser(case.make(), IDIOMS)
    raiser(*case.inputs(7))
    return raiser
