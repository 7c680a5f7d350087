"""Recurrent cells that are not linear in their state, or not elementwise, or not over time."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.patterns.spellings.mixers import S6, SSD, GatedRNN, gated_by_op, s6_by_op, ssd_by_op
from tests.patterns.spellings.spelling import NearMiss, seeded, tokens


class DenseRNN(GatedRNN):
    """h = h W + b: not elementwise."""

    def __init__(self) -> None:
        super().__init__(self._scan)
        self.W = nn.Parameter(torch.randn(7, 7) / 4)

    def _scan(self, a: Tensor, b: Tensor) -> Tensor:
        h, hs = torch.zeros_like(b[:, 0]), []
        for a_t, b_t in zip(a.unbind(1), b.unbind(1), strict=True):
            h = a_t * (h @ self.W) + b_t
            hs.append(h)
        return torch.stack(hs, dim=1)


class GRU(nn.Module):
    """A gated recurrent unit: its gates look at the state."""

    def __init__(self, width: int = 6, hidden: int = 7) -> None:
        super().__init__()
        self.x, self.h = nn.Linear(width, 3 * hidden), nn.Linear(hidden, 3 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        """(b, l, 6) -> (b, l, 7)."""
        h, hs = torch.zeros(x.shape[0], self.h.in_features), []
        for x_t in self.x(x).unbind(1):
            (xr, xz, xn), (hr, hz, hn) = x_t.chunk(3, -1), self.h(h).chunk(3, -1)
            z = torch.sigmoid(xz + hz)
            h = (1 - z) * torch.tanh(xn + torch.sigmoid(xr + hr) * hn) + z * h
            hs.append(h)
        return torch.stack(hs, dim=1)


class LSTM(nn.Module):
    """Its cell is first-order, but the gates look at the output before."""

    def __init__(self, width: int = 6, hidden: int = 7) -> None:
        super().__init__()
        self.gates = nn.Linear(width + hidden, 4 * hidden)
        self.hidden = hidden

    def forward(self, x: Tensor) -> Tensor:
        """(b, l, 6) -> (b, l, 7)."""
        h = c = torch.zeros(x.shape[0], self.hidden)
        hs = []
        for t in range(x.shape[1]):
            i, f, g, o = self.gates(torch.cat([x[:, t], h], -1)).chunk(4, -1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            hs.append(h)
        return torch.stack(hs, dim=1)


class Layers(nn.Module):
    """h = decay h + layer(x), from layer to layer."""

    def __init__(self, width: int = 6, depth: int = 5) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.decay = nn.Parameter(torch.rand(depth, width))

    def forward(self, x: Tensor) -> Tensor:
        """(b, l, 6) -> (b, l, 5, 6): every layer's."""
        h, hs = torch.zeros_like(x), []
        for i, layer in enumerate(self.layers):
            h = self.decay[i] * h + layer(x)
            hs.append(h)
        return torch.stack(hs, dim=2)


def output_feedback(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The output of a token is added to the input of the next."""
    h, y, ys = torch.zeros(x.shape[0], *A.shape), torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        fed = (dt[:, t] * (x[:, t] + 0.1 * y)).unsqueeze(-1)
        h = torch.exp(dt[:, t].unsqueeze(-1) * A) * h + fed * B[:, t].unsqueeze(1)
        y = (h * C[:, t].unsqueeze(1)).sum(-1)
        ys.append(y)
    return torch.stack(ys, dim=1)


def delta_rule(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The state forgets what it holds under the key before it writes."""
    k, q = (F.normalize(v, dim=-1, eps=1e-3).expand(*x.shape[:3], v.shape[-1]) for v in (B, C))
    S, ys = torch.zeros(x.shape[0], x.shape[2], x.shape[3], k.shape[-1]), []
    for t in range(x.shape[1]):
        S = S * torch.exp(dt[:, t] * A)[..., None, None]
        held = torch.einsum("bhpn,bhn->bhp", S, k[:, t])
        new = (x[:, t] - held) * torch.sigmoid(dt[:, t])[..., None]
        S = S + torch.einsum("bhp,bhn->bhpn", new, k[:, t])
        ys.append(torch.einsum("bhpn,bhn->bhp", S, q[:, t]))
    return torch.stack(ys, dim=1)


NEAR_MISSES = [
    NearMiss("dense", seeded(DenseRNN), tokens(6), "a matrix times h", gated_by_op),
    NearMiss("gru", seeded(GRU), tokens(6), "the gates depend on the state"),
    NearMiss("lstm", seeded(LSTM), tokens(6), "the gates depend on the output before"),
    NearMiss("layers", seeded(Layers), tokens(6), "the loop runs over layers"),
    NearMiss(
        "output_feedback",
        seeded(S6, output_feedback),
        tokens(6),
        "the input depends on the output before",
        s6_by_op,
    ),
    NearMiss(
        "delta_rule",
        seeded(SSD, delta_rule, groups=1),
        tokens(9),
        "the state is multiplied by a matrix made of the key",
        ssd_by_op,
    ),
]
