"""First-order recurrences by cumulative products, sums and log-sum-exps.

``scan(a, b)`` gives h, h[t] = a[t] h[t-1] + b[t]; a is kept near 1, or the products underflow.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effpass import ops
from tests.patterns.spellings.mixers import S6, GatedRNN, gated_by_op, s6_by_op
from tests.patterns.spellings.spelling import Spelling, seeded, tokens


def product_and_sum(a: Tensor, b: Tensor) -> Tensor:
    """h = P * cumsum(b / P), P the running product."""
    P = torch.cumprod(a, dim=1)
    return P * torch.cumsum(b / P, dim=1)


def reciprocal(a: Tensor, b: Tensor) -> Tensor:
    """The same with time last and a product with the reciprocal."""
    a, b = a.transpose(1, 2), b.transpose(1, 2)
    inverse = a.cumprod(-1).reciprocal()
    return ((b * inverse).cumsum(-1) / inverse).transpose(1, 2)


def log_sum(a: Tensor, b: Tensor) -> Tensor:
    """exp of a cumulative sum of logs, and of its negative."""
    s = torch.log(a).cumsum(dim=1)
    return torch.exp(s) * (b * torch.exp(-s)).cumsum(dim=1)


def shifted_products(a: Tensor, b: Tensor) -> Tensor:
    """Time first; everything relative to the last token's product (reversed division)."""
    s = torch.cumsum(a.log().transpose(0, 1), 0)
    to_end = torch.exp(s[-1:] - s)
    return (torch.cumsum(to_end * b.transpose(0, 1), 0) / to_end).transpose(0, 1)


class PowerDecay(nn.Module):
    """A fixed decay per channel: powers instead of cumulative products."""

    def __init__(self, width: int = 6, hidden: int = 7) -> None:
        super().__init__()
        self.decay = nn.Parameter(torch.linspace(1.0, 3.0, hidden))
        self.into = nn.Linear(width, hidden)
        self.out = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(b, l, 6) -> (b, l, 6)."""
        t = torch.arange(x.shape[1], dtype=x.dtype)[:, None]
        powers = torch.sigmoid(self.decay) ** t
        u = self.into(x)
        h = powers * torch.cumsum(u / powers, dim=1)
        return self.out(h)


def _power_by_op(block: PowerDecay, x: Tensor) -> Tensor:
    u = block.into(x)
    h, _ = ops.linear_recurrence(torch.sigmoid(block.decay).expand_as(u), u)
    return block.out(h)


def heinsen(log_coeffs: Tensor, log_values: Tensor) -> Tensor:
    """Heinsen's scan in log space; the values (b, l + 1, d) begin with the start."""
    a_star = F.pad(torch.cumsum(log_coeffs, dim=1), (0, 0, 1, 0))
    log_h0_plus_b_star = torch.logcumsumexp(log_values - a_star, dim=1)
    return torch.exp(a_star + log_h0_plus_b_star)[:, 1:]


def log_g(x: Tensor) -> Tensor:
    """log of minGRU's positive activation."""
    return torch.where(x >= 0, (F.relu(x) + 0.5).log(), -F.softplus(-x))


def g(x: Tensor) -> Tensor:
    """minGRU's positive activation."""
    return torch.where(x >= 0, x + 0.5, torch.sigmoid(x))


class MinGRU(nn.Module):
    """minGRU trained in log space, as in its paper's appendix; the start is a parameter."""

    def __init__(self, width: int = 6, hidden: int = 7) -> None:
        super().__init__()
        self.linear_z = nn.Linear(width, hidden)
        self.linear_h = nn.Linear(width, hidden)
        self.h_0 = nn.Parameter(torch.randn(hidden))
        self.out = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(b, l, 6) -> (b, l, 6)."""
        k = self.linear_z(x)
        log_z = -F.softplus(-k)
        log_coeffs = -F.softplus(k)
        log_h_0 = log_g(self.h_0).expand(x.shape[0], 1, -1)
        log_tilde_h = log_g(self.linear_h(x))
        h = heinsen(log_coeffs, torch.cat([log_h_0, log_z + log_tilde_h], dim=1))
        return self.out(h)


def _min_gru_by_op(block: MinGRU, x: Tensor) -> Tensor:
    z = torch.sigmoid(block.linear_z(x))
    start = g(block.h_0).expand(x.shape[0], -1)
    h, _ = ops.linear_recurrence(1 - z, z * g(block.linear_h(x)), start)
    return block.out(h)


class FusedMinGRU(nn.Module):
    """minGRU as a package writes it: one projection, no start, residual."""

    def __init__(self, dim: int = 8, expand: float = 1.25) -> None:
        super().__init__()
        inner = int(dim * expand)
        self.to_hidden_and_gate = nn.Linear(dim, inner * 2, bias=False)
        self.to_out = nn.Linear(inner, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(b, l, 8) -> (b, l, 8)."""
        hidden, gate = self.to_hidden_and_gate(x).chunk(2, dim=-1)
        log_coeffs = -F.softplus(gate)
        log_values = -F.softplus(-gate) + log_g(hidden)
        a_star = log_coeffs.cumsum(dim=1)
        log_h = a_star + (log_values - a_star).logcumsumexp(dim=1)
        return self.to_out(log_h.exp()) + x


def _fused_min_gru_by_op(block: FusedMinGRU, x: Tensor) -> Tensor:
    hidden, gate = block.to_hidden_and_gate(x).chunk(2, -1)
    z = torch.sigmoid(gate)
    return block.to_out(ops.linear_recurrence(1 - z, z * g(hidden))[0]) + x


class SlowS6(S6):
    """An S6 whose steps are so small that cumulative sums of dt A can be exponentiated."""

    def ssm_inputs(self, h: Tensor) -> tuple[Tensor, ...]:
        """z, then x, dt, A, B and C."""
        z, x, dt, A, B, C = super().ssm_inputs(h)
        return z, x, dt * 0.1, A, B, C


def cumulative_selective(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The selective scan by two cumulative sums; exp is never taken of dt A itself."""
    dA = torch.einsum("bld,dn->bldn", dt, A)
    dBx = torch.einsum("bld,bln->bldn", dt * x, B)
    dA_cumsum = dA.cumsum(1).exp()
    hidden = (dBx / dA_cumsum).cumsum(1) * dA_cumsum
    return torch.einsum("bldn,bln->bld", hidden, C)


def cumulative_from_first(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The same relative to the first token: the sum of dt A starts at the second."""
    log_decay = F.pad((dt.unsqueeze(-1) * A)[:, 1:], (0, 0, 0, 0, 1, 0)).cumsum(dim=1)
    driven = dt.unsqueeze(-1) * B.unsqueeze(2) * x.unsqueeze(-1)
    state = torch.cumsum(driven * torch.exp(-log_decay), dim=1) * torch.exp(log_decay)
    return torch.matmul(state, C.unsqueeze(-1)).squeeze(-1)


def _gated(scan: Callable[[Tensor, Tensor], Tensor]) -> Spelling:
    make = seeded(GatedRNN, scan)
    return Spelling(scan.__name__, make, tokens(6), "linear_recurrence", reference=gated_by_op)


def _slow(scan: Callable[..., Tensor]) -> Spelling:
    make = seeded(SlowS6, scan)
    return Spelling(scan.__name__, make, tokens(6), "selective_scan", reference=s6_by_op)


_linear = "linear_recurrence"
SPELLINGS = [
    _gated(product_and_sum),
    _gated(reciprocal),
    _gated(log_sum),
    _gated(shifted_products),
    Spelling("powers", seeded(PowerDecay), tokens(6), _linear, reference=_power_by_op),
    Spelling("heinsen", seeded(MinGRU), tokens(6), _linear, reference=_min_gru_by_op),
    Spelling(
        "fused_min_gru", seeded(FusedMinGRU), tokens(8), _linear, reference=_fused_min_gru_by_op
    ),
    _slow(cumulative_selective),
    _slow(cumulative_from_first),
]
