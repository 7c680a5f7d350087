"""Causal depthwise convolutions are raised, however they are written; others are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from effpass.capture.dynamo import capture
from effpass.graph.clean import clean
from effpass.patterns.convolution import IDIOM
from effpass.patterns.raising import Raising, raise_ops
from effpass.patterns.taps.shift_follow import is_zero
from tests.patterns.raising import Raiser, equal, tensors
from tests.patterns.spellings import convolution_near_misses, convolutions, shifts
from tests.patterns.spellings.spelling import NearMiss, Spelling, tokens
from tests.tolerances import close

OP = "causal_conv1d"
WHOLE = [*convolutions.SPELLINGS, *shifts.SPELLINGS, *shifts.EITHER]
FLIPPED = convolution_near_misses.FLIPPED
FUTURE = "it sees {} of the future"
REASONS = {
    "Centred": [FUTURE.format("1 token")],
    "RightPadded": [FUTURE.format("2 tokens")],
    "SlicedAtTheFront": [FUTURE.format("2 tokens")],
    "OneTokenEarly": [FUTURE.format("1 token")],
    "OneTokenLate": ["a token does not see itself, only those 1 to 3 before it"],
    "Dilated": ["dilation 2"],
    "Strided": ["stride 2"],
    "Grouped": ["4 groups for 8 channels: not depthwise"],
    "TwoOutputs": ["2 outputs for each channel, not one"],
    "Wrapped": ["circular padding, not zeros"],
    "EdgeRepeated": ["replicate padding, not zeros"],
    "RolledRound": ["its first tokens read the last ones, where zeros belong"],
    "ShiftedBack": [FUTURE.format("2 tokens")],
    "WeightOfTheInput": ["its taps depend on the token"],
    "WeightOfThePosition": ["its taps depend on the token"],
    "PaddedWithOnes": ["padded with 1.0, not with zeros"],
    "TapsApart": ["its taps lie apart: they are 0, 2, 4 tokens back"],
    "Valid": ["its output has 16 tokens, its input 18"],
}


def named(cases: list[Any]) -> Any:
    return pytest.mark.parametrize("case", cases, ids=lambda c: c.name)


def by_structure(module: nn.Module, inputs: tuple[Tensor, ...]) -> Raising:
    """What is raised when nothing is proven in numbers."""
    found: list[Raising] = []

    def backend(gm: Any, example: Any) -> Any:
        graph = capture(gm, example)
        clean(graph)
        found.append(raise_ops(graph, proving=False, idioms=[IDIOM], strict=True))
        return graph.forward

    torch._dynamo.reset()
    torch.compile(module, backend=backend, fullgraph=True)(*inputs)
    return found[0]


@named(WHOLE)
def test_spellings(case: Spelling) -> None:
    compiled = equal(case.make(), case.inputs(16), [IDIOM])
    assert compiled.count(OP) == compiled.nodes(OP) == case.count
    assert not compiled.reasons


@pytest.mark.slow
@named([*WHOLE, *FLIPPED])
def test_short_inputs(case: Spelling) -> None:
    """Fewer tokens than taps: raised or not, the numbers and gradients are eager's."""
    equal(case.make(), case.inputs(2), [IDIOM])


@named(FLIPPED)
def test_between_two_flips(case: Spelling) -> None:
    compiled = equal(case.make(), case.inputs(16), [IDIOM])
    assert compiled.count(OP) == 1 and compiled.nodes("flip") == 2


@named([*convolution_near_misses.NEAR_MISSES, *convolution_near_misses.EITHER])
def test_near_misses(case: NearMiss) -> None:
    compiled = equal(case.make(), case.inputs(16), [IDIOM])
    assert compiled.count(OP) == compiled.nodes(OP) == 0
    assert compiled.reasons == REASONS.get(case.name, [])
    assert not by_structure(case.make(), case.inputs(16)).raised


@named([c for c in WHOLE if c.name != "StateInFront"])
def test_a_changing_length(case: Spelling) -> None:
    """One graph for all lengths; of a state, only that of the captured size is a state."""
    module = case.make()
    compiled = Raiser(module, [IDIOM], dynamic=True)
    with torch.no_grad():
        for length in (16, 7, 16):
            given = case.inputs(length)
            for actual, wanted in zip(
                tensors(compiled(*given)), tensors(module(*given)), strict=True
            ):
                close(actual, wanted, "model_fp32")
    assert compiled.count(OP) == case.count * len(compiled.graphs)


@pytest.mark.slow
@named(WHOLE)
def test_half_precision(case: Spelling) -> None:
    module = case.make().bfloat16()
    given = [x.bfloat16() for x in case.inputs(16)]
    compiled = Raiser(module, [IDIOM])
    for actual, wanted in zip(tensors(compiled(*given)), tensors(module(*given)), strict=True):
        close(actual, wanted, "model_bf16")
    assert compiled.count(OP) == case.count


@named([c for c in WHOLE if c.name in ("PaddedBothEnds", "ShiftedSum", "JoinedStep")])
def test_under_autocast(case: Spelling) -> None:
    module = case.make()

    def run(*given: Tensor) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return module(*given)

    compiled = Raiser(run, [IDIOM])
    given = case.inputs(16)
    for actual, wanted in zip(tensors(compiled(*given)), tensors(run(*given)), strict=True):
        close(actual, wanted, "model_bf16")
    assert compiled.count(OP) == case.count


class Written(nn.Module):
    """A convolution (8 channels, 3 taps) around a function of ``x, conv, weight``."""

    def __init__(self, function: Callable[[Tensor, nn.Conv1d, Tensor], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.proj = nn.Linear(6, 8)
        self.conv = nn.Conv1d(8, 8, 3, groups=8, padding=2)
        self.weight = nn.Parameter(torch.randn(8, 3))
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(self.proj(x), self.conv, self.weight)


def counted(function: Callable[[Tensor, nn.Conv1d, Tensor], Any]) -> Raiser:
    return equal(Written(function), tokens(6)(12), [IDIOM])


def plain(x: Tensor, conv: nn.Conv1d) -> Tensor:
    return conv(x.mT)[..., : x.shape[1]].mT


def shifted(x: Tensor, lag: int) -> Tensor:
    return F.pad(x, (0, 0, lag, -lag))


def by_taps(x: Tensor, weight: Tensor) -> Tensor:
    return sum(shifted(x, lag) * weight[..., lag] for lag in range(weight.shape[-1]))  # type: ignore[return-value]


def activation(compiled: Raiser) -> Any:
    (node,) = [
        n
        for n in compiled.graphs[0].graph.nodes
        if n.target is torch.ops.effpass.causal_conv1d.default
    ]
    return node.args[3] if len(node.args) > 3 else None


def test_silu_is_folded() -> None:
    compiled = counted(lambda x, conv, _: F.silu(plain(x, conv)))
    assert activation(compiled) == "silu" and not compiled.nodes("silu")


def test_silu_of_a_convolution_that_shows_elsewhere_is_not_folded() -> None:
    compiled = counted(lambda x, conv, _: F.silu(plain(x, conv)) + plain(x, conv).tanh())
    assert activation(compiled) is None and compiled.nodes("silu") == 1


def test_a_residual_around_stays_outside() -> None:
    compiled = counted(lambda x, conv, _: x + plain(x, conv))
    assert compiled.count(OP) == 1 and compiled.nodes("add") == 1


def test_two_in_a_row_are_two() -> None:
    compiled = counted(lambda x, conv, weight: by_taps(by_taps(plain(x, conv), weight), weight))
    assert compiled.count(OP) == 3


def test_three_mixes_of_one_shift() -> None:
    def mixes(x: Tensor, _: nn.Conv1d, weight: Tensor) -> Tensor:
        before = shifted(x, 1)
        q, k, v = (x * w + before * (1 - w) for w in weight.sigmoid().unbind(1))
        return q * k.tanh() * v

    assert counted(mixes).count(OP) == 3


def test_heads_and_channels_together() -> None:
    def heads(x: Tensor, _: nn.Conv1d, weight: Tensor) -> Tensor:
        split = x.view(*x.shape[:2], 4, 2)
        taps = weight.view(4, 2, 3)
        return sum(F.pad(split, (0, 0, 0, 0, j, -j)) * taps[..., j] for j in range(3))  # type: ignore[return-value]

    assert counted(heads).count(OP) == 1


def test_tokens_first_and_no_batch() -> None:
    assert counted(lambda x, _, w: F.silu(by_taps(x[0], w))).count(OP) == 1

    def tokens_first(x: Tensor, _: nn.Conv1d, weight: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        return sum(F.pad(x, (0, 0, 0, 0, j, -j)) * weight[:, j] for j in range(3))  # type: ignore[return-value]

    assert counted(tokens_first).count(OP) == 1


@pytest.mark.parametrize("kept", [1, 2, 5])
def test_states_of_any_length(kept: int) -> None:
    """What is missing of a state is zero, what is too much of it is not read."""

    def continued(x: Tensor, conv: nn.Conv1d, _: Tensor) -> tuple[Tensor, Tensor]:
        joined = torch.cat([x[:, :kept], x[:, kept:]], 1).mT
        padded = F.pad(joined, (max(0, 2 - kept), 0))
        y = F.conv1d(padded, conv.weight, conv.bias, groups=8)
        return y[..., -(x.shape[1] - kept) :], joined[..., -2:]

    compiled = counted(continued)
    assert compiled.count(OP) == 1


def test_scalars_and_constants() -> None:
    compiled = counted(lambda x, _, w: (by_taps(2 * x, w) / 4 + 1) * torch.tensor(3.0))
    assert compiled.count(OP) == 1 and compiled.nodes("div") == 0


def test_taps_that_are_whole_numbers() -> None:
    def signed(x: Tensor, _: nn.Conv1d, weight: Tensor) -> Tensor:
        return by_taps(x, (weight > 0).long()) + by_taps(x, weight > 1)

    assert counted(signed).count(OP) == 2


def test_complex_taps_and_division_by_zero() -> None:
    def turning(x: Tensor, _: nn.Conv1d, weight: Tensor) -> Tensor:
        return by_taps(x, torch.polar(torch.ones_like(weight), weight)).real

    assert not counted(turning).count(OP)
    compiled = Raiser(Written(lambda x, _, w: by_taps(x, w) / torch.tensor(0.0)), [IDIOM])
    assert not compiled(*tokens(6)(12)).isfinite().any()


def test_a_size_is_not_a_number() -> None:
    """A factor, or a shift, that is a symbolic size would be another one in the next call."""

    def scaled(x: Tensor, _: nn.Conv1d, weight: Tensor) -> Tensor:
        return by_taps(x, weight) + shifted(x, 1) * weight[:, 0] * x.shape[0]

    def rolled(x: Tensor, _: nn.Conv1d, weight: Tensor) -> Tensor:
        ahead = F.pad(x, (0, 0, x.shape[0], -x.shape[0]))
        return x * weight[:, 0] + ahead * weight[:, 1]

    for function in (scaled, rolled):
        module = Written(function)
        compiled = Raiser(module, [IDIOM], dynamic=True)
        for batch in (1, 2, 3):
            (given,) = tokens(6, batch)(12)
            close(compiled(given), module(given), "model_fp32")


def test_zeros_that_are_written_to_are_a_state() -> None:
    def filled(x: Tensor, conv: nn.Conv1d, _: Tensor) -> Tensor:
        front = x.new_zeros(x.shape[0], 2, 8)
        front[:, 1] = x[:, -1]
        y = F.conv1d(torch.cat([front, x], 1).mT, conv.weight, conv.bias, groups=8)
        return y.mT

    assert counted(filled).count(OP) == 1


@pytest.mark.parametrize("write", [False, True])
def test_zeros_in_a_graph_that_writes(write: bool) -> None:
    def run(x: Tensor) -> Tensor:
        made = torch.zeros(2, 8)
        if write:
            made[0].copy_(x)
        return made * 1

    gm = make_fx(run, tracing_mode="fake", pre_dispatch=True)(torch.ones(8))
    (made,) = gm.graph.find_nodes(op="call_function", target=torch.ops.aten.zeros.default)
    assert is_zero(made) != write


def rotary(x: Tensor, _: nn.Conv1d, weight: Tensor) -> Tensor:
    half = torch.cat([-x[..., 4:], x[..., :4]], -1)
    angle = torch.arange(x.shape[1])[:, None] * weight[:, 0]
    return x * angle.cos() + half * angle.sin()


def cached_keys(x: Tensor, _: nn.Conv1d, weight: Tensor) -> Tensor:
    keys = torch.cat([x[:, :3] * 2, x], 1)
    return torch.softmax(x @ keys.mT, -1) @ (keys * weight[:, 0])


@pytest.mark.parametrize(
    "function",
    [
        rotary,
        cached_keys,
        lambda x, conv, w: x - shifted(x, 1),
        lambda x, conv, w: x * w[:, 0],
        lambda x, conv, w: shifted(x, 1) * w[:, 0],
        lambda x, conv, w: F.conv1d(x.mT, conv.weight.expand(8, 8, 3), padding=1),
    ],
    ids=["rotary", "keys", "difference", "one tap", "one shift", "dense"],
)
def test_silent_about_what_is_something_else(function: Any) -> None:
    compiled = counted(function)
    assert not compiled.count(OP) and not compiled.reasons
