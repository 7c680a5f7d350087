"""Recurrences by cumulative products and sums are raised; sums that only look like one are not."""

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
from effpass.patterns import discretised
from effpass.patterns.cumulative import IDIOM
from effpass.patterns.products.ramps import counted, is_ramp
from effpass.patterns.raising import Raising, raise_ops
from tests.patterns.raising import Raiser, equal, tensors
from tests.patterns.spellings import cumulative, parallel_near_misses
from tests.patterns.spellings.spelling import NearMiss, Spelling, tokens
from tests.tolerances import close

OP = "linear_recurrence"
REASONS = {
    "product_with_epsilon": ["0.01 is added to the product that divides"],
    "product_with_tiny_epsilon": ["1e-12 is added to the product that divides"],
    "product_of_channels": ["the product runs over another dimension than the sum"],
    "product_of_the_past": ["the product that divides is that of another token"],
    "not_multiplied_back": [],
}
NEAR_MISSES = [c for c in parallel_near_misses.NEAR_MISSES if c.name in REASONS]


def named(cases: list[Any]) -> Any:
    return pytest.mark.parametrize("case", cases, ids=lambda c: c.name)


@named(cumulative.SPELLINGS)
def test_spellings(case: Spelling) -> None:
    compiled = equal(case.make(), case.inputs(16), [IDIOM, discretised.IDIOM])
    assert compiled.count(OP) == compiled.nodes(case.op) == case.count
    assert not compiled.nodes("cumsum") + compiled.nodes("cumprod") + compiled.nodes("logcumsumexp")
    assert not compiled.reasons


@named(cumulative.SPELLINGS)
def test_a_changing_length(case: Spelling) -> None:
    module = case.make()
    compiled = Raiser(module, [IDIOM], dynamic=True)
    with torch.no_grad():
        for length in (16, 7):
            given = case.inputs(length)
            for actual, wanted in zip(
                tensors(compiled(*given)), tensors(module(*given)), strict=True
            ):
                close(actual, wanted, "model_fp32")
    assert compiled.count(OP) == len(compiled.graphs) == 1


@pytest.mark.slow
@named(cumulative.SPELLINGS)
def test_half_precision(case: Spelling) -> None:
    module = case.make().bfloat16()
    given = [x.bfloat16() for x in case.inputs(16)]
    compiled = Raiser(module, [IDIOM])
    for actual, wanted in zip(tensors(compiled(*given)), tensors(module(*given)), strict=True):
        close(actual, wanted, "model_bf16")
    assert compiled.count(OP) == 1


@named(NEAR_MISSES)
def test_near_misses(case: NearMiss) -> None:
    compiled = equal(case.make(), case.inputs(16), [IDIOM])
    assert compiled.count(OP) == compiled.nodes(OP) == 0
    assert compiled.reasons == REASONS[case.name]


class Gated(nn.Module):
    """``function(a, b, start)`` of decays and inputs (b, t, 7), and a start (7), between layers."""

    def __init__(self, function: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.forget, self.value, self.out = (nn.Linear(*s) for s in ((6, 7), (6, 7), (7, 6)))
        self.start = nn.Parameter(torch.randn(7))
        nn.init.constant_(self.forget.bias, 1.5)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        a = torch.sigmoid(self.forget(x))
        return self.out(self.function(a, self.value(x), self.start))


def started(a: Tensor, b: Tensor, start: Tensor) -> Tensor:
    P = a.cumprod(1)
    return 2 * P * (torch.cumsum(b / P, 1) + start)


def started_in_front(a: Tensor, b: Tensor, start: Tensor) -> Tensor:
    """The start is the first token, which stays."""
    log_P = F.pad(a.log().cumsum(1), (0, 0, 1, 0))
    first = start.sigmoid().log().expand(a.shape[0], 1, -1)
    log_b = torch.cat([first, -F.softplus(b)], 1)
    return (log_P + torch.logcumsumexp(log_b - log_P, 1)).exp()


def ones_in_front(a: Tensor, b: Tensor, start: Tensor) -> Tensor:
    """Decays of the second token on."""
    P = torch.cat([torch.ones_like(a[:, :1]), a[:, 1:]], 1).cumprod(1)
    return P * (b / P).cumsum(1) * start


def scalar_decay(a: Tensor, b: Tensor, start: Tensor) -> Tensor:
    powers = 0.9 ** (1 - torch.arange(b.shape[1], dtype=b.dtype)[:, None])
    return (b / powers).cumsum(1) * powers


def fixed_rate(a: Tensor, b: Tensor, start: Tensor) -> Tensor:
    t = torch.arange(1, b.shape[1] + 1, dtype=b.dtype).unsqueeze(-1)
    rate = F.softplus(start) * 0.1
    return torch.exp(-rate * t) * torch.cumsum(b * torch.exp(rate * t), 1)


def known_rate(a: Tensor, b: Tensor, start: Tensor) -> Tensor:
    t = torch.arange(b.shape[1], dtype=b.dtype)[:, None] / 8
    return torch.exp(-t) * torch.cumsum(b * torch.exp(t), 1)


def one_decay_a_token(a: Tensor, b: Tensor, start: Tensor) -> Tensor:
    P = a[..., :1].cumprod(1)
    return P * torch.cumsum(b / P, 1)


def two_decays(a: Tensor, b: Tensor, start: Tensor) -> Tensor:
    s, P = (-F.softplus(b)).cumsum(1) / 8, a.cumprod(1)
    return P * s.exp() * torch.cumsum(b / P / s.exp(), 1)


def growing(a: Tensor, b: Tensor, start: Tensor) -> Tensor:
    P = a.cumprod(1)
    return torch.cumsum(b * P, 1) / P


def heads(a: Tensor, b: Tensor, start: Tensor) -> Tensor:
    """Tokens last, an outer product as the input, no name for the batch."""
    outer = (b.unsqueeze(-1) * b[..., None, :3]).movedim(1, -1)
    s = a.log().transpose(1, 2).cumsum(-1)[:, :, None]
    h = torch.exp(s) * torch.cumsum(outer * torch.exp(-s), -1)
    return h.sum(2).transpose(1, 2)


def in_double(a: Tensor, b: Tensor, start: Tensor) -> Tensor:
    s = a.double().log().cumsum(1)
    return (s.exp() * (b.double() * (-s).exp()).cumsum(1)).to(a.dtype)


def scaled_inside(a: Tensor, b: Tensor, start: Tensor) -> Tensor:
    P = a.cumprod(1)
    return (P / 3) * torch.cumsum(b * start.exp() * P**-1, 1)


@pytest.mark.parametrize(
    "function",
    [
        *(started, started_in_front, ones_in_front, scalar_decay, fixed_rate, known_rate),
        *(one_decay_a_token, two_decays, growing, heads, in_double, scaled_inside),
    ],
)
def test_forms(function: Any) -> None:
    compiled = equal(Gated(function), tokens(6)(12), [IDIOM])
    assert compiled.count(OP) == compiled.nodes(OP) == 1
    assert not compiled.reasons


def test_one_sequence() -> None:
    def alone(a: Tensor, b: Tensor, start: Tensor) -> Tensor:
        P = a[0].cumprod(0)
        return P * torch.cumsum(b[0] / P, 0)

    assert equal(Gated(alone), tokens(6)(12), [IDIOM]).count(OP) == 1


def reads_the_gate_twice(a: Tensor, b: Tensor, start: Tensor) -> Tensor:
    """What multiplies inside and divides outside is that of another token."""
    P = a.cumprod(1)
    return P / a * torch.cumsum(b * a / P, 1)


def unequal(a: Tensor, b: Tensor, start: Tensor) -> Tensor:
    return a.cumprod(1) * torch.cumsum(b / (a * 0.9).cumprod(1), 1)


def squared(a: Tensor, b: Tensor, start: Tensor) -> Tensor:
    P = a.cumprod(1)
    return P * P * torch.cumsum(b / P, 1)


def backwards(a: Tensor, b: Tensor, start: Tensor) -> Tensor:
    P = a.flip(1).cumprod(1).flip(1)
    return P * torch.cumsum(b / P, 1)


def start_of_every_token(a: Tensor, b: Tensor, start: Tensor) -> Tensor:
    P = a.cumprod(1)
    return P * (torch.cumsum(b / P, 1) + b)


def changing_rate(a: Tensor, b: Tensor, start: Tensor) -> Tensor:
    t = torch.arange(b.shape[1], dtype=b.dtype)[:, None] / 8
    return torch.exp(-a * t) * torch.cumsum(b * torch.exp(a * t), 1)


def stays_a_logarithm(a: Tensor, b: Tensor, start: Tensor) -> Tensor:
    s = a.log().cumsum(1)
    return s + torch.logcumsumexp(b - s, 1)


def clamped(a: Tensor, b: Tensor, start: Tensor) -> Tensor:
    P = a.cumprod(1)
    return P * torch.cumsum(b / P.clamp(min=1e-6), 1)


def plain_sum(a: Tensor, b: Tensor, start: Tensor) -> Tensor:
    return a.cumprod(1) * b.cumsum(1)


OTHERS: list[tuple[Callable[..., Tensor], list[str]]] = [
    (reads_the_gate_twice, []),
    (unequal, []),
    (squared, []),
    (backwards, []),
    (start_of_every_token, []),
    (changing_rate, []),
    (stays_a_logarithm, []),
    (clamped, ["the product that divides is clamped"]),
    (plain_sum, []),
]


@pytest.mark.parametrize(("function", "reasons"), OTHERS)
def test_others_stay(function: Any, reasons: list[str]) -> None:
    compiled = equal(Gated(function), tokens(6)(12), [IDIOM])
    assert not compiled.count(OP) and compiled.reasons == reasons


@pytest.mark.parametrize("function", [f for f, _ in OTHERS])
def test_structure_alone_refuses_them(function: Any) -> None:
    found: list[Raising] = []

    def backend(gm: Any, example: Any) -> Any:
        graph = capture(gm, example)
        clean(graph)
        found.append(raise_ops(graph, proving=False, idioms=[IDIOM], strict=True))
        return graph.forward

    torch._dynamo.reset()
    torch.compile(Gated(function), backend=backend, fullgraph=True)(*tokens(6)(12))
    assert not found[0].raised


@pytest.mark.parametrize(
    ("dtype", "length", "counts"),
    [(torch.float32, 3000, True), (torch.bfloat16, 200, True), (torch.bfloat16, 300, False)],
)
def test_a_ramp_is_exact(dtype: torch.dtype, length: int, counts: bool) -> None:
    """Beyond 256 a bfloat16 leaves numbers out."""
    gm = make_fx(lambda x: x * torch.arange(length, dtype=dtype))(torch.ones(length))
    (node,) = (n for n in gm.graph.nodes if n.target is torch.ops.aten.arange.default)
    assert is_ramp(node) == counts


@pytest.mark.parametrize(
    ("scaled", "line"),
    [
        (lambda t: 3 - t / 8, (3.0, -0.125)),
        (lambda t: -(t + 1) * 2.0, (-2.0, -2.0)),
        (lambda t: (t.float() - 4).unsqueeze(-1), (-4.0, 1.0)),
        (lambda t: (t / 8).to(torch.int64), None),
        (lambda t: torch.rsub(t, 1, alpha=2), None),
        (lambda t: t * t, None),
    ],
)
def test_what_counts(scaled: Callable[[Tensor], Tensor], line: tuple[float, float] | None) -> None:
    gm = make_fx(lambda: scaled(torch.arange(16)), pre_dispatch=True)()
    node = gm.graph.output_node().args[0]
    assert is_ramp(node) == (line is not None)
    assert line is None or counted(node) == line


def test_finite_where_the_product_underflows() -> None:
    """The form as it was written gives NaN from the token on at which P is 0."""
    module = Gated(lambda a, b, start: a.cumprod(1) * 0.1 * torch.cumsum(b / a.cumprod(1), 1))
    nn.init.constant_(module.forget.bias, -9.0)
    x = tokens(6)(40)[0]
    with torch.no_grad():
        assert module(x).isnan().any()
        assert Raiser(module, [IDIOM])(x).isfinite().all()
