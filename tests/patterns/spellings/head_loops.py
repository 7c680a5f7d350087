"""Loops over time whose state is a matrix per head (Mamba-2, retention), or plainly linear.

With one decay per head the op is ``ssd_scan``. Where the coefficients do not come from dt and A, or
the readout is not C's, it is ``linear_recurrence``.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effpass import ops
from tests.patterns.spellings.mixers import S6, SSD, ssd_and_state_by_op, ssd_by_op
from tests.patterns.spellings.spelling import Spelling, seeded, tokens


def outer_by_einsum(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Groups repeated, the outer product and the readout by einsum."""
    heads = x.shape[2]
    B = B.repeat_interleave(heads // B.shape[2], dim=2)
    C = C.repeat_interleave(heads // C.shape[2], dim=2)
    state = torch.zeros(x.shape[0], heads, x.shape[3], B.shape[3])
    ys = []
    for t in range(x.shape[1]):
        dA = torch.exp(dt[:, t] * A)
        dBx = torch.einsum("bh,bhn,bhp->bhpn", dt[:, t], B[:, t], x[:, t])
        state = state * dA[:, :, None, None] + dBx
        ys.append(torch.einsum("bhpn,bhn->bhp", state, C[:, t]))
    return torch.stack(ys, dim=1)


def broadcast_with_state(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor
) -> tuple[Tensor, Tensor]:
    """B and C expanded per group, decay for all tokens first; the last state comes back."""
    b, length, h, p = x.shape
    g, n = B.shape[2:]
    B = B[:, :, :, None].expand(b, length, g, h // g, n).reshape(b, length, h, n)
    C = C[:, :, :, None].expand(b, length, g, h // g, n).reshape(b, length, h, n)
    decay = (dt * A).exp()
    xdt = x * dt.unsqueeze(-1)
    state = x.new_zeros(b, h, p, n)
    y = torch.empty_like(x)
    for i in range(length):
        state = decay[:, i].view(b, h, 1, 1) * state + xdt[:, i, :, :, None] * B[:, i, :, None, :]
        y[:, i] = (state * C[:, i, :, None, :]).sum(dim=-1)
    return y, state


def merged_heads(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Batch and heads merged, the update by baddbmm, one group for all heads."""
    b, length, h, p = x.shape
    n = B.shape[-1]
    flat = x.permute(1, 0, 2, 3).reshape(length, b * h, p)
    step = dt.permute(1, 0, 2).reshape(length, b * h)
    rate = A.repeat(b)
    writes = B.expand(b, length, h, n).permute(1, 0, 2, 3).reshape(length, b * h, n)
    reads = C.expand(b, length, h, n).permute(1, 0, 2, 3).reshape(length, b * h, n)
    S = torch.zeros(b * h, n, p)
    out = []
    for t in range(length):
        S = S * torch.exp(rate * step[t])[:, None, None]
        S = torch.baddbmm(S, (writes[t] * step[t, :, None])[:, :, None], flat[t][:, None, :])
        out.append(torch.bmm(reads[t][:, None, :], S).squeeze(1))
    return torch.stack(out).view(length, b, h, p).permute(1, 0, 2, 3)


def grouped_state(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Heads split into (group, head of the group); nothing is repeated."""
    b, _, h, p = x.shape
    g, n = B.shape[2:]
    x, dt = x.unflatten(2, (g, h // g)), dt.unflatten(2, (g, h // g))
    A = A.view(g, h // g)
    H = torch.zeros(b, g, h // g, p, n)
    ys = []
    for xt, dtt, Bt, Ct in zip(x.unbind(1), dt.unbind(1), B.unbind(1), C.unbind(1), strict=True):
        H = torch.exp(dtt * A)[..., None, None] * H
        H = H + torch.einsum("bghp,bgn->bghpn", xt * dtt[..., None], Bt)
        ys.append(torch.einsum("bghpn,bgn->bghp", H, Ct).flatten(1, 2))
    return torch.stack(ys, 1)


class Retention(nn.Module):
    """The recurrent form of RetNet: a fixed decay per head, S = gamma S + k v, y = q S."""

    def __init__(self, width: int = 9, heads: int = 4, key: int = 3, value: int = 6) -> None:
        super().__init__()
        self.heads, self.key, self.value = heads, key, value
        self.q = nn.Linear(width, heads * key, bias=False)
        self.k = nn.Linear(width, heads * key, bias=False)
        self.v = nn.Linear(width, heads * value, bias=False)
        self.o = nn.Linear(heads * value, width, bias=False)
        gamma = 1 - torch.exp(torch.linspace(-1.2, -3.5, heads))
        self.register_buffer("gamma", gamma)

    def heads_of(self, x: Tensor) -> tuple[Tensor, ...]:
        """q and k (b, l, 4, 3), v (b, l, 4, 6)."""
        b, length, _ = x.shape
        q = self.q(x).view(b, length, self.heads, self.key)
        k = self.k(x).view(b, length, self.heads, self.key) * self.key**-0.5
        return q, k, self.v(x).view(b, length, self.heads, self.value)

    def forward(self, x: Tensor) -> Tensor:
        """(b, l, 9) -> (b, l, 9)."""
        q, k, v = (u.transpose(1, 2) for u in self.heads_of(x))
        S = torch.zeros(x.shape[0], self.heads, self.key, self.value)
        outputs = []
        for i in range(x.shape[1]):
            kv = k[:, :, i].unsqueeze(-1) @ v[:, :, i].unsqueeze(-2)
            S = self.gamma.view(1, -1, 1, 1) * S + kv
            outputs.append((q[:, :, i].unsqueeze(-2) @ S).squeeze(-2))
        y = torch.stack(outputs, dim=1)
        return self.o(y.flatten(2))


def _retention_by_op(block: Retention, x: Tensor) -> Tensor:
    q, k, v = block.heads_of(x)
    ones = torch.ones(*x.shape[:2], block.heads)
    y, _ = ops.ssd_scan(v, ones, block.gamma.log(), k, q)
    return block.o(y.flatten(2))


class LRU(nn.Module):
    """A real linear recurrent unit: h = lambda h + B x, y = C h + D x, lambda a fixed vector."""

    def __init__(self, width: int = 6, hidden: int = 8) -> None:
        super().__init__()
        self.nu_log = nn.Parameter(torch.log(-torch.log(torch.rand(hidden) * 0.5 + 0.4)))
        self.gamma_log = nn.Parameter(torch.rand(hidden))
        self.B = nn.Parameter(torch.randn(hidden, width) / width**0.5)
        self.C = nn.Parameter(torch.randn(width, hidden) / hidden**0.5)
        self.D = nn.Parameter(torch.randn(width))

    def forward(self, inputs: Tensor) -> Tensor:
        """(b, l, 6) -> (b, l, 6)."""
        lam = torch.exp(-torch.exp(self.nu_log))
        B_norm = self.B * torch.exp(self.gamma_log).unsqueeze(-1)
        state = torch.zeros(inputs.shape[0], lam.shape[0])
        output = torch.empty_like(inputs)
        for i in range(inputs.shape[1]):
            x = inputs[:, i]
            state = lam * state + x @ B_norm.T
            output[:, i] = state @ self.C.T + self.D * x
        return output


def _lru_by_op(unit: LRU, x: Tensor) -> Tensor:
    b = x @ (unit.B * unit.gamma_log.exp()[:, None]).mT
    a = (-unit.nu_log.exp()).exp().expand_as(b)
    h, _ = ops.linear_recurrence(a, b)
    return h @ unit.C.mT + unit.D * x


class S4D(nn.Module):
    """A diagonal state space with fixed coefficients (d, n): time-invariant, zero-order hold."""

    def __init__(self, width: int = 7, n: int = 3) -> None:
        super().__init__()
        self.log_dt = nn.Parameter(torch.rand(width) - 2)
        self.log_A = nn.Parameter(torch.rand(width, n))
        self.C = nn.Parameter(torch.randn(width, n))
        self.out = nn.Linear(width, 2 * width)

    def discrete(self) -> tuple[Tensor, Tensor]:
        """The decay and the input coefficient, both (7, 3)."""
        A = -torch.exp(self.log_A)
        dA = torch.exp(self.log_dt).unsqueeze(-1) * A
        return torch.exp(dA), torch.expm1(dA) / A

    def forward(self, u: Tensor) -> Tensor:
        """(b, l, 7) -> (b, l, 7)."""
        A_bar, B_bar = self.discrete()
        x = u.new_zeros(u.size(0), *A_bar.shape)
        ys = []
        for k in range(u.size(1)):
            x = A_bar * x + B_bar * u[:, k].unsqueeze(-1)
            ys.append(torch.einsum("bdn,dn->bd", x, self.C))
        return F.glu(self.out(torch.stack(ys, dim=1)), dim=-1)


def _s4d_by_op(block: S4D, u: Tensor) -> Tensor:
    A_bar, B_bar = block.discrete()
    b = (B_bar * u[..., None]).flatten(2)
    h, _ = ops.linear_recurrence(A_bar.flatten().expand_as(b), b)
    y = (h.unflatten(2, A_bar.shape) * block.C).sum(-1)
    return F.glu(block.out(y), -1)


class CellLoop(nn.Module):
    """A recurrent cell called for each token, in the manner of nn.RNNCell; all states are used."""

    def __init__(self, width: int = 6, hidden: int = 9) -> None:
        super().__init__()
        self.write = nn.Linear(width, hidden)
        self.keep = nn.Linear(width, hidden)
        self.read = nn.Linear(hidden, width)

    def cell(self, x: Tensor, h: Tensor) -> Tensor:
        """One token and the state: the next state."""
        return torch.sigmoid(self.keep(x)) * h + torch.tanh(self.write(x))

    def forward(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(b, l, 6) and a state (b, 9): output, states, last state."""
        hs = []
        for token in torch.unbind(x, dim=1):
            h = self.cell(token, h)
            hs.append(h)
        states = torch.stack(hs, dim=1)
        return F.relu(self.read(states)), states, h


def _cell_loop_by_op(block: CellLoop, x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    a, b = torch.sigmoid(block.keep(x)), torch.tanh(block.write(x))
    states, last = ops.linear_recurrence(a, b, h)
    return F.relu(block.read(states)), states, last


def euler_step(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """1 + dt A in place of exp(dt A): linear, but not the selective scan."""
    h, ys = torch.zeros(x.shape[0], *A.shape), []
    for t in range(x.shape[1]):
        step = dt[:, t].unsqueeze(-1)
        h = h + step * (A * h + B[:, t].unsqueeze(1) * x[:, t].unsqueeze(-1))
        ys.append(torch.einsum("bdn,bn->bd", h, C[:, t]))
    return torch.stack(ys, dim=1)


def _euler_by_op(block: S6, h: Tensor) -> Tensor:
    z, x, dt, A, B, C = block.ssm_inputs(h)
    a, b = 1 + dt[..., None] * A, (dt * x)[..., None] * B[..., None, :]
    states, _ = ops.linear_recurrence(a.flatten(2), b.flatten(2))
    y = (states.view_as(b) @ C[..., None])[..., 0] + x * block.D
    return block.out_proj(y * F.silu(z))


def tokens_and_state(length: int) -> tuple[Tensor, ...]:
    """(2, length, 6) and a state (2, 9)."""
    generator = torch.Generator().manual_seed(7)
    return (*tokens(6)(length), torch.randn(2, 9, generator=generator))


_ssd = (tokens(9), "ssd_scan")
_linear = "linear_recurrence"
SPELLINGS = [
    Spelling("outer_by_einsum", seeded(SSD, outer_by_einsum), *_ssd, reference=ssd_by_op),
    Spelling(
        "broadcast_with_state",
        seeded(SSD, broadcast_with_state),
        *_ssd,
        reference=ssd_and_state_by_op,
    ),
    Spelling("merged_heads", seeded(SSD, merged_heads, groups=1), *_ssd, reference=ssd_by_op),
    Spelling("grouped_state", seeded(SSD, grouped_state), *_ssd, reference=ssd_by_op),
    Spelling("retention", seeded(Retention), *_ssd, reference=_retention_by_op),
    Spelling("real_lru", seeded(LRU), tokens(6), _linear, reference=_lru_by_op),
    Spelling("s4d", seeded(S4D), tokens(7), _linear, reference=_s4d_by_op),
    Spelling("euler_step", seeded(S6, euler_step), tokens(6), _linear, reference=_euler_by_op),
    Spelling("cell", seeded(CellLoop), tokens_and_state, _linear, reference=_cell_loop_by_op),
]
