"""State-space duality in chunks, each with one thing wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.patterns.spellings.chunked import segsum_difference
from tests.patterns.spellings.mixers import SSD, ssd_by_op
from tests.patterns.spellings.spelling import NearMiss, Spelling, seeded, tokens


def chunked(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    mask: Callable[[Tensor], Tensor],
    between: str = "decayed",
) -> Tensor:
    """A loop over chunks of 2 with one group; ``mask`` of ones keeps pairs (query, key)."""
    B, C = (v.expand(*x.shape[:3], v.shape[-1]) for v in (B, C))
    state, ys = x.new_zeros(x.shape[0], *x.shape[2:], B.shape[-1]), []
    for xc, dtc, Bc, Cc in zip(
        *(v.split(2, 1) for v in (x * dt[..., None], dt, B, C)), strict=True
    ):
        log_a = (dtc * A).mT
        cum = log_a.cumsum(-1)
        keep = mask(torch.ones(log_a.shape[-1], log_a.shape[-1]))
        gap = (cum.unsqueeze(-1) - cum.unsqueeze(-2)) * keep
        M = torch.einsum("blhn,bshn->bhls", Cc, Bc) * gap.exp() * keep
        y = torch.einsum("bhls,bshp->blhp", M, xc)
        y = y + torch.einsum("blhn,bhpn,bhl->blhp", Cc, state, cum.exp())
        decay = cum[..., -1].exp()[..., None, None] if between == "decayed" else 1.0
        state = decay * state + torch.einsum(
            "bshn,bhs,bshp->bhpn", Bc, (cum[..., -1:] - cum).exp(), xc
        )
        state = torch.zeros_like(state) if between == "nothing" else state
        ys.append(y)
    return torch.cat(ys, dim=1)


def right_mask(*ssm: Tensor) -> Tensor:
    """Nothing is wrong."""
    return chunked(*ssm, mask=torch.tril)


def upper_mask(*ssm: Tensor) -> Tensor:
    """Tokens attend to the future of their chunk."""
    return chunked(*ssm, mask=torch.triu)


def strict_mask(*ssm: Tensor) -> Tensor:
    """Tokens do not see themselves."""
    return chunked(*ssm, mask=lambda ones: ones.tril(-1))


def mask_sees_next(*ssm: Tensor) -> Tensor:
    """Tokens see one token of the future."""
    return chunked(*ssm, mask=lambda ones: ones.tril(1))


def no_mask(*ssm: Tensor) -> Tensor:
    """Tokens see their whole chunk."""
    return chunked(*ssm, mask=torch.ones_like)


def chunks_alone(*ssm: Tensor) -> Tensor:
    """No state flows from chunk to chunk."""
    return chunked(*ssm, mask=torch.tril, between="nothing")


def state_not_decayed(*ssm: Tensor) -> Tensor:
    """The state flows on without the decay of the chunk it passes."""
    return chunked(*ssm, mask=torch.tril, between="plain")


def flow(x: Tensor, first: int = -1, last: int = 0) -> Tensor:
    """The segment sum with its two masks at any diagonals; -1 and 0 are right."""
    ones = torch.ones(x.shape[-1], x.shape[-1], dtype=torch.bool)
    repeated = x[..., None].expand(*x.shape, x.shape[-1])
    summed = repeated.masked_fill(~ones.tril(first), 0).cumsum(dim=-2)
    return summed.masked_fill(~ones.tril(last), -torch.inf)


@dataclass(frozen=True)
class Listing:
    """The paper's listing in chunks of 2, padded, one group; each field is a way to be wrong."""

    within: Callable[[Tensor], Tensor] = flow
    across: Callable[[Tensor], Tensor] = flow
    entering: int = 0
    to_end: Callable[[Tensor], Tensor] = lambda cum: cum[..., -1:] - cum
    from_start: Callable[[Tensor], Tensor] = lambda cum: cum

    def __call__(self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        """x, dt, A, B, C -> y, shapes as in SSD."""
        length = x.shape[1]
        dA, X = dt * A, x * dt[..., None]
        B, C = (v.expand(*x.shape[:3], v.shape[-1]) for v in (B, C))
        X, B, C = (F.pad(v, (0, 0, 0, 0, 0, length % 2)).unflatten(1, (-1, 2)) for v in (X, B, C))
        dA = F.pad(dA, (0, 0, 0, length % 2)).unflatten(1, (-1, 2)).permute(0, 3, 1, 2)
        cum = dA.cumsum(-1)
        y = torch.einsum("bclhn,bcshn,bhcls,bcshp->bclhp", C, B, self.within(dA).exp(), X)
        states = torch.einsum("bclhn,bhcl,bclhp->bchpn", B, self.to_end(cum).exp(), X)
        states = torch.cat([torch.zeros_like(states[:, :1]), states], dim=1)
        decay = self.across(F.pad(cum[..., -1], (1, 0))).exp()
        states = torch.einsum("bhzc,bchpn->bzhpn", decay, states)
        states = states[:, self.entering : self.entering + X.shape[1]]
        y = y + torch.einsum("bclhn,bchpn,bhcl->bclhp", C, states, self.from_start(cum).exp())
        return y.flatten(1, 2)[:, :length]


LISTINGS: list[tuple[str, str, Listing]] = [
    ("own_decay", "a token's own decay is counted", Listing(lambda v: flow(v, 0))),
    ("not_itself", "tokens do not see themselves", Listing(lambda v: flow(v, last=-1))),
    ("next_token", "the mask keeps one token of the future", Listing(lambda v: flow(v, last=1))),
    ("no_decay_within", "no decay within a chunk", Listing(lambda v: flow(v * 0))),
    ("no_decay_across", "chunks pass undecayed", Listing(across=lambda v: flow(v * 0))),
    ("own_chunk_twice", "the state after a chunk enters it", Listing(entering=1)),
    ("decayed_to_start", "states decay by the wrong end", Listing(to_end=lambda cum: cum)),
    ("undecayed_readout", "what enters is not decayed", Listing(from_start=lambda cum: cum * 0)),
]


def quadratic_shifted(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """One chunk whose decays include the writing token's own, one too many."""
    log_a = (dt * A).mT
    L = (segsum_difference(log_a) + log_a.unsqueeze(-2)).exp()
    scores = torch.einsum("blgn,bsgn->bgls", C, B) * L
    return torch.einsum("bhls,bsh,bshp->blhp", scores, dt, x)


def quadratic_normalised(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """One chunk whose rows are divided by their sums."""
    L = segsum_difference((dt * A).mT).exp()
    scores = torch.einsum("blgn,bsgn->bgls", C, B) * L
    scores = scores / scores.abs().sum(-1, keepdim=True).clamp(min=1.0)
    return torch.einsum("bhls,bsh,bshp->blhp", scores, dt, x)


def quadratic_softmax(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Attention with a decay as its bias: a softmax where the scan has a product."""
    scores = torch.einsum("blgn,bsgn->bgls", C, B) + segsum_difference((dt * A).mT)
    return torch.einsum("bhls,bsh,bshp->blhp", scores.softmax(-1), dt, x)


CHUNKED: list[tuple[Callable[..., Tensor], str]] = [
    (upper_mask, "the mask keeps the future"),
    (strict_mask, "tokens do not see themselves"),
    (mask_sees_next, "the mask keeps one token of the future"),
    (no_mask, "there is no mask within a chunk"),
    (chunks_alone, "no state flows between chunks; one scan over the sequence is wrong"),
    (state_not_decayed, "the state is not decayed by the chunks it passes"),
    (quadratic_shifted, "one decay too many"),
    (quadratic_normalised, "rows are divided by their sums"),
    (quadratic_softmax, "attention with a bias"),
]


def _ssd(name: str, scan: Callable[..., Tensor], why: str) -> NearMiss:
    make = seeded(SSD, scan, groups=1)
    return NearMiss(name, make, tokens(9), why, ssd_by_op, name == "chunks_alone")


NEAR_MISSES = [_ssd(scan.__name__, scan, why) for scan, why in CHUNKED]
NEAR_MISSES += [_ssd(name, scan, why) for name, why, scan in LISTINGS]
SPELLINGS = [
    Spelling(
        "nothing_wrong",
        seeded(SSD, Listing(), groups=1),
        tokens(9),
        "ssd_scan",
        reference=ssd_by_op,
    ),
    Spelling(
        "nothing_wrong_in_a_loop",
        seeded(SSD, right_mask, groups=1),
        tokens(9),
        "ssd_scan",
        reference=ssd_by_op,
    ),
]
