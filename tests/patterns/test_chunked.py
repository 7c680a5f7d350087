"""Chunked state-space duality becomes ssd_scan however it is spelled; what only looks so, not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effpass.patterns.chunked import IDIOM
from effpass.patterns.chunks.ssd_call import as_op, in_chunks
from tests.patterns.raising import Raiser, equal, tensors
from tests.patterns.spellings import chunked, chunked_near_misses, cumulative, gated
from tests.patterns.spellings.chunked import segsum_difference, segsum_stable
from tests.patterns.spellings.mixers import SSD
from tests.patterns.spellings.spelling import NearMiss, Spelling, seeded, tokens
from tests.tolerances import close

named = {"ids": lambda s: getattr(s, "name", str(s))}


@pytest.mark.parametrize("length", [12, 5])
@pytest.mark.parametrize("spelling", chunked.SPELLINGS, **named)
def test_spellings(spelling: Spelling, length: int) -> None:
    if length % spelling.multiple:
        length = spelling.multiple
    raised = equal(spelling.make(), spelling.inputs(length), [IDIOM])
    assert raised.count("ssd_scan") == raised.nodes("ssd_scan") == spelling.count
    assert raised.reasons == []


def repeated(v: Tensor) -> Tensor:
    """Groups (b, l, 3, n) -> heads (b, l, 6, n)."""
    return v.repeat_interleave(2, dim=2)


def listing(
    X: Tensor, dA: Tensor, B: Tensor, C: Tensor, start: Tensor | None = None, chunk: int = 4
) -> tuple[Tensor, Tensor]:
    """The paper's listing: X (b, l, h, p), dA (b, l, h), B and C (b, l, h, n), a start (b, ...)."""
    X, B, C = (v.unflatten(1, (-1, chunk)) for v in (X, B, C))
    dA = dA.unflatten(1, (-1, chunk)).permute(0, 3, 1, 2)
    cum = dA.cumsum(-1)
    Y = torch.einsum("bclhn,bcshn,bhcls,bcshp->bclhp", C, B, segsum_stable(dA).exp(), X)
    states = torch.einsum("bclhn,bhcl,bclhp->bchpn", B, (cum[..., -1:] - cum).exp(), X)
    first = torch.zeros_like(states[:, :1]) if start is None else start
    flow = segsum_stable(F.pad(cum[..., -1], (1, 0))).exp()
    states = torch.einsum("bhzc,bchpn->bzhpn", flow, torch.cat([first, states], 1))
    Y = Y + torch.einsum("bclhn,bchpn,bhcl->bclhp", C, states[:, :-1], cum.exp())
    return Y.flatten(1, 2), states[:, -1]


def tiled_groups(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Head i reads group i % 3."""
    return listing(x * dt[..., None], dt * A, B.repeat(1, 1, 2, 1), C.repeat(1, 1, 2, 1))[0]


def scaled(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers multiplied into what is written and into what reads."""
    X = 0.5 * (x * dt[..., None])
    return listing(X, -(dt * -A), repeated(B), repeated(C) * 7**-0.5)


def scaled_scores(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """One chunk, the scores scaled, the step multiplied into them."""
    q, k, v = (w.transpose(1, 2) for w in (repeated(C), repeated(B), x))
    L = segsum_difference((dt * A).mT).exp()
    return (((q @ k.mT) / 7**0.5 * L * dt.mT[:, :, None]) @ v).transpose(1, 2)


def chunked_before(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """Everything is computed in chunks, so that no tensor has a dim of all tokens."""
    x, B, C = (v.unflatten(1, (-1, 4)).sin() for v in (x, repeated(B), repeated(C)))
    dt = dt.unflatten(1, (-1, 4)).sigmoid()
    dA = (dt * A).permute(0, 3, 1, 2)
    cum, X = dA.cumsum(-1), x * dt[..., None]
    Y = torch.einsum("bclhn,bcshn,bhcls,bcshp->bclhp", C, B, segsum_stable(dA).exp(), X)
    states = torch.einsum("bclhn,bhcl,bclhp->bchpn", B, (cum[..., -1:] - cum).exp(), X)
    states = F.pad(states, (0, 0, 0, 0, 0, 0, 1, 0))
    flow = segsum_stable(F.pad(cum[..., -1], (1, 0))).exp()
    states = torch.einsum("bhzc,bchpn->bzhpn", flow, states)
    Y = Y + torch.einsum("bclhn,bchpn,bhcl->bclhp", C, states[:, :-1], cum.exp())
    return Y.flatten(1, 2), states[:, -1]


def indexed_chunks(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """A loop that indexes chunks; an additive mask; a state (n, p)."""
    b, _, h, p = x.shape
    x, a, B, C = (
        v.unflatten(1, (-1, 3)) for v in (x * dt[..., None], dt * A, repeated(B), repeated(C))
    )
    future = torch.full((3, 3), float("-inf")).triu(1)[:, :, None]
    S, ys = torch.zeros(b, h, B.shape[-1], p), []
    for i in range(x.shape[1]):
        s = a[:, i].cumsum(1)
        D = (s[:, :, None] - s[:, None] + future).exp()
        y = torch.einsum("blhn,bshn,blsh,bshp->blhp", C[:, i], B[:, i], D, x[:, i])
        ys.append(y + torch.einsum("blhn,bhnp->blhp", C[:, i] * s.exp()[..., None], S))
        new = torch.einsum("bshn,bshp->bhnp", B[:, i] * (s[:, -1:] - s).exp()[..., None], x[:, i])
        S = S * s[:, -1].exp()[:, :, None, None] + new
    return torch.stack(ys, 1).flatten(1, 2), S


def chunks_in_front(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Any:
    """A loop over a first dim of chunks; no state before the first."""
    S, ys = None, []
    moved = (v.unflatten(1, (-1, 3)).transpose(0, 1) for v in (x, dt, repeated(B), repeated(C)))
    for xi, di, Bi, Ci in zip(*moved, strict=True):
        s = (di * A).cumsum(1)
        D = torch.tril((s[:, :, None] - s[:, None]).permute(0, 3, 1, 2).exp())
        y = torch.einsum("blhn,bshn,bhls,bsh,bshp->blhp", Ci, Bi, D, di, xi)
        if S is not None:
            y = y + torch.einsum("blhn,bhpn,blh->blhp", Ci, S, s.exp())
        new = torch.einsum("bshn,bsh,bshp->bhpn", Bi, (s[:, -1:] - s).exp() * di, xi)
        S = new if S is None else S * s[:, -1].exp()[..., None, None] + new
        ys.append(y)
    assert S is not None
    return torch.cat(ys, 1), S.transpose(-1, -2)


def rate_after_sum(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The rate is multiplied into differences of summed steps."""
    s = dt.cumsum(1)
    L = ((s[:, :, None] - s[:, None]) * A).exp()
    L = L * torch.ones(x.shape[1], x.shape[1]).tril()[:, :, None]
    return torch.einsum("blhn,bshn,blsh,bsh,bshp->blhp", repeated(C), repeated(B), L, dt, x)


def step_is_decay(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """A rate of -1 that is not written."""
    return listing(x * dt[..., None], -dt, repeated(B), repeated(C))


def constant_decay(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Any:
    """Retention: a decay per head, no step."""
    return listing(x, A.expand(dt.shape), repeated(B), repeated(C))


def factored(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """exp of a sum times exp of minus a sum."""
    s = (dt * A).cumsum(1)
    q, k = repeated(C) * s.exp()[..., None], repeated(B) * (-s).exp()[..., None]
    q, k, v = (w.transpose(1, 2) for w in (q, k, x * dt[..., None]))
    return ((q @ k.mT).tril() @ v).transpose(1, 2)


def channels_first(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Time last throughout."""
    x, dt, B, C = (v.movedim(1, -1).contiguous() for v in (x, dt, repeated(B), repeated(C)))
    s = (dt * A[:, None]).cumsum(-1)
    lower = torch.ones(s.shape[-1], s.shape[-1]).tril() == 1
    L = torch.where(lower, s[..., :, None] - s[..., None, :], -torch.inf).exp()
    y = torch.einsum("bhnl,bhns,bhls,bhs,bhps->bhpl", C, B, L, dt, x)
    return y.permute(0, 3, 1, 2)


def merged_heads(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Batch and heads are one dim of bmm."""
    b, length, h, _ = x.shape
    moved = (v.transpose(1, 2) for v in (repeated(C), repeated(B), x * dt[..., None]))
    q, k, v = (w.reshape(b * h, length, -1) for w in moved)
    L = segsum_stable((dt * A).transpose(1, 2).reshape(b * h, length)).exp()
    return torch.bmm(torch.bmm(q, k.mT) * L, v).unflatten(0, (b, h)).transpose(1, 2)


VARIATIONS = [
    *(tiled_groups, scaled, scaled_scores, chunked_before, indexed_chunks, chunks_in_front),
    *(rate_after_sum, step_is_decay, constant_decay, factored, channels_first, merged_heads),
]


@pytest.mark.parametrize("scan", VARIATIONS, ids=lambda f: f.__name__)
def test_variations(scan: Any) -> None:
    raised = equal(seeded(SSD, scan)(), tokens(9)(12), [IDIOM])
    assert raised.count("ssd_scan") == raised.nodes("ssd_scan") == 1
    assert raised.reasons == []


def test_two_scans_share_a_decay() -> None:
    def both(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        B, C = repeated(B), repeated(C)
        y, _ = listing(x * dt[..., None], dt * A, B, C)
        z, _ = listing(x.sin() * dt[..., None], dt * A, C, B)
        return y * torch.sigmoid(z)

    raised = equal(seeded(SSD, both)(), tokens(9)(12), [IDIOM])
    assert raised.count("ssd_scan") == raised.nodes("ssd_scan") == 2


def test_a_start_that_is_a_parameter() -> None:
    class Started(SSD):
        def __init__(self) -> None:
            super().__init__(lambda *ssm: None)
            self.start = nn.Parameter(torch.randn(1, 1, 6, 4, 7))

        def forward(self, h: Tensor) -> Any:
            z, x, dt, A, B, C = self.ssm_inputs(h)
            start = self.start.expand(h.shape[0], -1, -1, -1, -1)
            y, state = listing(x * dt[..., None], dt * A, repeated(B), repeated(C), start)
            return self.finish(y, x, z), state

    raised = equal(seeded(Started)(), tokens(9)(12), [IDIOM])
    assert raised.count("ssd_scan") == 1


@pytest.mark.parametrize("length", [1, 64, 130])
def test_what_proofs_compare_with_is_the_op(length: int) -> None:
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x, dt, A = drawn(2, length, 6, 4), drawn(2, length, 6) * 0.1, -drawn(6).abs()
    B, C, start = drawn(2, length, 3, 5), drawn(2, length, 3, 5), drawn(2, 6, 4, 5)
    for first in (None, start):
        pairs = zip(in_chunks(x, dt, A, B, C, first), as_op(x, dt, A, B, C, first), strict=True)
        for actual, expected in pairs:
            close(actual, expected, "raised_fp64")


REASONS = {
    "upper_mask": "proof: region and op differ",
    "strict_mask": "proof: region and op differ",
    "mask_sees_next": "proof: region and op differ",
    "no_mask": "proof: region and op differ",
    "chunks_alone": "proof: region and op differ",
    "state_not_decayed": "proof: region and op differ",
    "quadratic_shifted": "proof: region and op differ",
    "quadratic_normalised": "multiplied with, abs is applied",
    "own_decay": "proof: region and op differ",
    "not_itself": "proof: region and op differ",
    "next_token": "proof: region and op differ",
    "own_chunk_twice": "proof: region and op differ",
    "decayed_to_start": "proof: region and op differ",
    "no_decay_across": "exp_3 are multiplied",
    "undecayed_readout": "exp_4 are multiplied",
}


@pytest.mark.parametrize("near", chunked_near_misses.NEAR_MISSES, **named)
def test_near_misses(near: NearMiss) -> None:
    raised = equal(near.make(), near.inputs(12), [IDIOM])
    assert raised.count("ssd_scan") == raised.nodes("ssd_scan") == 0
    if near.name in REASONS:
        assert REASONS[near.name] in raised.reasons[0]


def free_decay(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """What is written has no step."""
    return listing(x, F.logsigmoid(dt), repeated(B), repeated(C))[0]


def tanh_between(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The state goes through tanh from chunk to chunk."""
    B, C = repeated(B), repeated(C)
    S, ys = torch.zeros(x.shape[0], 6, 4, 7), []
    for xi, di, Bi, Ci in zip(*(v.split(4, 1) for v in (x, dt, B, C)), strict=True):
        y, new = listing(xi * di[..., None], di * A, Bi, Ci, S[:, None])
        ys.append(y)
        S = new.tanh()
    return torch.cat(ys, 1)


def rounded(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """What is written is rounded."""
    X = (x * dt[..., None]).bfloat16().float()
    return listing(X, dt * A, repeated(B), repeated(C))[0]


def masked_by_data(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Pairs of tokens are left out where the scores are small."""
    s = (dt * A).cumsum(1)
    scores = torch.einsum("blhn,bshn->blsh", repeated(C), repeated(B))
    L = (s[:, :, None] - s[:, None]).exp()
    L = L * torch.ones(x.shape[1], x.shape[1]).tril()[:, :, None]
    return torch.einsum("blsh,bsh,bshp->blhp", (scores * L).masked_fill(scores < 0, 0), dt, x)


@pytest.mark.parametrize(
    ("scan", "reason"),
    [
        (free_decay, "is not multiplied by the step log_sigmoid of the decay"),
        (tanh_between, "inside the chunked scan, tanh is applied"),
        (rounded, "rounded to torch.bfloat16"),
        (masked_by_data, "a mask depends on data"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_the_op_does_not_express(scan: Any, reason: str) -> None:
    raised = equal(seeded(SSD, scan)(), tokens(9)(12), [IDIOM])
    assert raised.count("ssd_scan") == 0
    assert any(reason in found for found in raised.reasons), raised.reasons


@pytest.mark.parametrize("spelling", [*cumulative.SPELLINGS, *gated.SPELLINGS], **named)
def test_other_recurrences_are_left_to_others(spelling: Spelling) -> None:
    raised = Raiser(spelling.make(), [IDIOM])
    raised(*spelling.inputs(8 * spelling.multiple))
    assert raised.count("ssd_scan") == 0
    assert raised.reasons == []


@pytest.mark.parametrize("spelling", chunked.SPELLINGS, **named)
def test_a_changing_batch(spelling: Spelling) -> None:
    module = spelling.make()
    raised = Raiser(module, [IDIOM])
    for batch in (2, 3, 5):
        inputs = [v.repeat_interleave(3, 0)[:batch].clone() for v in spelling.inputs(12)]
        for value in inputs:
            torch._dynamo.mark_dynamic(value, 0)
        for a, e in zip(tensors(raised(*inputs)), tensors(module(*inputs)), strict=True):
            close(a, e, "model_fp32")
    assert len(raised.graphs) == raised.count("ssd_scan") == 1


def test_a_changing_length_is_left_alone() -> None:
    module = seeded(SSD, chunked.quadratic)()
    raised = Raiser(module, [IDIOM])
    for length in (12, 20):
        (h,) = tokens(9)(length)
        torch._dynamo.mark_dynamic(h, 1)
        close(raised(h), module(h), "model_fp32")
    assert len(raised.graphs) == 1
    assert raised.reasons == ["the length of x changes from call to call"]


@pytest.mark.parametrize("name", ["paper_listing", "states_passed", "quadratic"])
def test_half_precision(name: str) -> None:
    spelling = next(s for s in chunked.SPELLINGS if s.name == name)
    module = spelling.make()
    halved = copy.deepcopy(module).bfloat16()
    (h,) = spelling.inputs(12)
    raised = Raiser(halved, [IDIOM])
    for a, e in zip(tensors(raised(h.bfloat16())), tensors(halved(h.bfloat16())), strict=True):
        close(a, e, "model_bf16")
    assert raised.count("ssd_scan") == 1
    raised = Raiser(module, [IDIOM])
    with torch.autocast("cpu", torch.bfloat16):
        for a, e in zip(tensors(raised(h)), tensors(module(h)), strict=True):
            close(a, e, "model_bf16")
    assert raised.count("ssd_scan") == 1
