"""Gated first-order recurrences as loops over time: RG-LRU, minGRU, minLSTM, QRNN, averages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effpass import ops
from tests.patterns.spellings.spelling import Spelling, seeded, tokens


class RGLRU(nn.Module):
    """Griffin's unit: a = exp(-c softplus(L) sigmoid(r)), b = sqrt(1 - a^2) (i * x)."""

    def __init__(self, width: int = 6, hidden: int = 7) -> None:
        super().__init__()
        self.linear_in = nn.Linear(width, hidden)
        self.input_gate = nn.Linear(hidden, hidden)
        self.a_gate = nn.Linear(hidden, hidden)
        self.a_param = nn.Parameter(torch.rand(hidden) * 0.5 - 1)
        self.linear_out = nn.Linear(hidden, width)

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """log a and i * x."""
        log_a = -8.0 * torch.sigmoid(self.a_gate(x)) * F.softplus(self.a_param)
        return log_a, torch.sigmoid(self.input_gate(x)) * x

    def forward(self, x: Tensor) -> Tensor:
        """(b, l, 6) -> (b, l, 6)."""
        log_a, gated_x = self.gates(self.linear_in(x))
        a, a_square = torch.exp(log_a), torch.exp(2 * log_a)
        normalized_x = gated_x * torch.sqrt(1 - a_square)
        h = torch.zeros(x.shape[0], a.shape[-1], dtype=torch.float32)
        y = torch.zeros_like(a)
        for t in range(x.shape[1]):
            h = a[:, t].to(h.dtype) * h
            h += normalized_x[:, t].to(h.dtype)
            y[:, t] = h.type_as(x)
        return self.linear_out(y)


def _rg_lru_by_op(unit: RGLRU, x: Tensor) -> Tensor:
    log_a, gated = unit.gates(unit.linear_in(x))
    h, _ = ops.linear_recurrence(log_a.exp(), gated * torch.sqrt(1 - (2 * log_a).exp()))
    return unit.linear_out(h)


class BlockDiagonalRGLRU(nn.Module):
    """The unit with gates by head, a first token that is not scaled, and a state in and out."""

    def __init__(self, heads: int = 3, per_head: int = 4) -> None:
        super().__init__()
        self.shape = (heads, per_head)
        self.gate_weight = nn.Parameter(torch.randn(heads, per_head, 2 * per_head) / 2)
        self.gate_bias = nn.Parameter(torch.randn(heads, 2 * per_head))
        self.recurrent_param = nn.Parameter(torch.rand(heads * per_head))

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """a and the scaled input, both (b, l, 12)."""
        per_head = x.unflatten(-1, self.shape)
        gates = torch.einsum("blhi,hio->blho", per_head, self.gate_weight) + self.gate_bias
        reset, enter = (v.sigmoid().flatten(2) for v in gates.chunk(2, dim=-1))
        a = torch.exp(-2.0 * F.softplus(self.recurrent_param) * reset)
        multiplier = torch.sqrt(1 - a**2)
        first = torch.arange(x.shape[1])[:, None] == 0
        return a, x * enter * torch.where(first, torch.ones_like(multiplier), multiplier)

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """(b, l, 12) and (b, 12) -> the same."""
        a, inputs = self.gates(x)
        contextualized = torch.zeros_like(inputs)
        for t in range(x.shape[1]):
            state = a[:, t] * state + inputs[:, t]
            contextualized[:, t] = state
        return contextualized, state


def _block_diagonal_by_op(unit: BlockDiagonalRGLRU, x: Tensor, state: Tensor) -> Any:
    return ops.linear_recurrence(*unit.gates(x), state)


class MinGRU(nn.Module):
    """h = (1 - z) h + z h~, one token after the other, the states in a list."""

    def __init__(self, width: int = 6, hidden: int = 8) -> None:
        super().__init__()
        self.linear_z = nn.Linear(width, hidden)
        self.linear_h = nn.Linear(width, hidden)
        self.head = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(b, l, 6) -> (b, l, 6)."""
        z, h_tilde = torch.sigmoid(self.linear_z(x)), self.linear_h(x)
        h, hs = torch.zeros_like(h_tilde[:, 0]), []
        for t in range(x.size(1)):
            h = (1 - z[:, t]) * h + z[:, t] * h_tilde[:, t]
            hs.append(h)
        return self.head(torch.stack(hs, 1))


class LerpGRU(MinGRU):
    """The same by linear interpolation, the gate computed inside the loop."""

    def forward(self, x: Tensor) -> Tensor:
        """(b, l, 6) -> (b, l, 6)."""
        h = x.new_zeros(x.shape[0], self.linear_z.out_features)
        out = []
        for x_t in x.unbind(1):
            h = torch.lerp(h, self.linear_h(x_t), self.linear_z(x_t).sigmoid())
            out.append(self.head(h))
        return torch.stack(out, dim=1)


def _min_gru_by_op(unit: MinGRU, x: Tensor) -> Tensor:
    z = torch.sigmoid(unit.linear_z(x))
    return unit.head(ops.linear_recurrence(1 - z, z * unit.linear_h(x))[0])


class MinLSTM(nn.Module):
    """Forget and input gates that are normalised to sum to one; only the last state is used."""

    def __init__(self, width: int = 7, hidden: int = 9) -> None:
        super().__init__()
        self.linear_f = nn.Linear(width, hidden)
        self.linear_i = nn.Linear(width, hidden)
        self.linear_h = nn.Linear(width, hidden)
        self.classify = nn.Linear(hidden, 4)

    def forward(self, x: Tensor) -> Tensor:
        """(b, l, 7) -> (b, 4)."""
        h = torch.zeros(x.shape[0], self.linear_h.out_features)
        for t in range(x.shape[1]):
            f_t = torch.sigmoid(self.linear_f(x[:, t, :]))
            i_t = torch.sigmoid(self.linear_i(x[:, t, :]))
            f_prime, i_prime = f_t / (f_t + i_t), i_t / (f_t + i_t)
            h = f_prime * h + i_prime * self.linear_h(x[:, t, :])
        return self.classify(h)


def _min_lstm_by_op(unit: MinLSTM, x: Tensor) -> Tensor:
    f, i = torch.sigmoid(unit.linear_f(x)), torch.sigmoid(unit.linear_i(x))
    _, last = ops.linear_recurrence(f / (f + i), i / (f + i) * unit.linear_h(x))
    return unit.classify(last)


class MovingAverage(nn.Module):
    """An exponential moving average with a plain number, the first token as its start."""

    def __init__(self, width: int = 8, momentum: float = 0.9) -> None:
        super().__init__()
        self.momentum = momentum
        self.mix = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(b, l, 8) -> (b, l, 8)."""
        u = self.mix(x)
        average = u[:, 0]
        smoothed = [average]
        for t in range(1, u.shape[1]):
            average = self.momentum * average + (1 - self.momentum) * u[:, t]
            smoothed.append(average)
        return x - torch.stack(smoothed, dim=1)


def _average_by_op(unit: MovingAverage, x: Tensor) -> Tensor:
    u, m = unit.mix(x), unit.momentum
    h, _ = ops.linear_recurrence(torch.full_like(u, m), (1 - m) * u, u[:, 0])
    return x - h


class LeakyIntegrator(nn.Module):
    """A leak per channel, moved toward the input by its difference; time last."""

    def __init__(self, width: int = 9) -> None:
        super().__init__()
        self.leak = nn.Parameter(torch.randn(width))
        self.input = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(b, l, 9) -> (b, 9, l)."""
        alpha = torch.sigmoid(self.leak)
        current = self.input(x).transpose(1, 2)
        v = torch.zeros_like(current[..., 0])
        trace = []
        for i in range(current.shape[-1]):
            v = v + alpha * (current[..., i] - v)
            trace.append(v.unsqueeze(-1))
        return torch.cat(trace, dim=-1)


def _leaky_by_op(unit: LeakyIntegrator, x: Tensor) -> Tensor:
    alpha, current = torch.sigmoid(unit.leak), unit.input(x)
    a = (1 - alpha).expand_as(current)
    return ops.linear_recurrence(a, alpha * current)[0].mT


class QRNN(nn.Module):
    """Quasi-recurrent: a convolution makes z, f and o; fo-pooling over (l, b, h)."""

    def __init__(self, width: int = 6, hidden: int = 7) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, 3 * hidden, 2)

    def gates(self, x: Tensor) -> tuple[Tensor, ...]:
        """z, f, o, each (l, b, 7)."""
        zfo = self.conv(F.pad(x.transpose(1, 2), (1, 0))).permute(2, 0, 1)
        z, f, o = zfo.chunk(3, dim=2)
        return z.tanh(), f.sigmoid(), o.sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        """(b, l, 6) -> (b, l, 7)."""
        zs, fs, os = self.gates(x)
        C: list[Tensor] = []
        for f, z in zip(fs, zs, strict=True):
            c = (1 - f) * z if not C else f * C[-1] + (1 - f) * z
            C.append(c)
        return (os * torch.stack(C)).transpose(0, 1)


def _qrnn_by_op(unit: QRNN, x: Tensor) -> Tensor:
    z, f, o = (v.transpose(0, 1) for v in unit.gates(x))
    return o * ops.linear_recurrence(f, (1 - f) * z)[0]


class SRU(nn.Module):
    """A simple recurrent unit: c = f c + (1 - f) x~, and a highway around it."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width, 3 * width) / width**0.5)
        self.bias = nn.Parameter(torch.randn(2 * width))

    def gates(self, x: Tensor) -> tuple[Tensor, ...]:
        """x~, f, r, each (b, l, 8)."""
        u = torch.matmul(x, self.weight)
        value, forget, highway = u.split(x.shape[-1], dim=-1)
        f_bias, r_bias = self.bias.chunk(2)
        return value, (forget + f_bias).sigmoid(), (highway + r_bias).sigmoid()

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(b, l, 8) -> (b, l, 8) and the last cell (b, 8)."""
        value, forget, highway = self.gates(x)
        c, h = torch.zeros_like(x[:, 0]), torch.empty_like(x)
        for t in range(x.size(1)):
            c = (c - value[:, t]) * forget[:, t] + value[:, t]
            h[:, t, :] = (c.tanh() - x[:, t]) * highway[:, t] + x[:, t]
        return h, c


def _sru_by_op(unit: SRU, x: Tensor) -> tuple[Tensor, Tensor]:
    value, f, r = unit.gates(x)
    c, last = ops.linear_recurrence(f, (1 - f) * value)
    return (c.tanh() - x) * r + x, last


class HGRN(nn.Module):
    """Forget gates above a learned lower bound, in a residual block with a norm after."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.proj = nn.Linear(width, 3 * width)
        self.lower_bound = nn.Parameter(torch.randn(width))
        self.out_norm = nn.RMSNorm(width, eps=1e-5)

    def gates(self, x: Tensor) -> tuple[Tensor, ...]:
        """input, forget, output, each (b, l, 6)."""
        i, f, g = self.proj(self.norm(x)).chunk(3, -1)
        bound = self.lower_bound.sigmoid()
        forget = bound + (1 - bound) * torch.sigmoid(f)
        return F.silu(i) * (1 - forget), forget, torch.sigmoid(g)

    def forward(self, x: Tensor) -> Tensor:
        """(b, l, 6) -> (b, l, 6)."""
        i, f, g = self.gates(x)
        i, f = i.transpose(0, 1), f.transpose(0, 1)
        h = torch.zeros_like(i[0])
        o = torch.empty_like(i)
        for t in range(i.shape[0]):
            h = torch.addcmul(i[t], f[t], h)
            o[t] = h
        return x + self.out_norm(o.transpose(0, 1) * g)


def _hgrn_by_op(unit: HGRN, x: Tensor) -> Tensor:
    i, f, g = unit.gates(x)
    return x + unit.out_norm(ops.linear_recurrence(f, i)[0] * g)


def tokens_and_state(length: int) -> tuple[Tensor, ...]:
    """(2, length, 12) and a state (2, 12)."""
    generator = torch.Generator().manual_seed(7)
    return (*tokens(12)(length), torch.randn(2, 12, generator=generator))


def _spelling(name: str, cls: type[nn.Module], width: int, by_op: Callable[..., Any]) -> Spelling:
    return Spelling(name, seeded(cls), tokens(width), "linear_recurrence", reference=by_op)


SPELLINGS = [
    _spelling("rg_lru", RGLRU, 6, _rg_lru_by_op),
    Spelling(
        "block_diagonal_rg_lru",
        seeded(BlockDiagonalRGLRU),
        tokens_and_state,
        "linear_recurrence",
        reference=_block_diagonal_by_op,
    ),
    _spelling("min_gru", MinGRU, 6, _min_gru_by_op),
    _spelling("lerp_gru", LerpGRU, 6, _min_gru_by_op),
    _spelling("min_lstm", MinLSTM, 7, _min_lstm_by_op),
    _spelling("moving_average", MovingAverage, 8, _average_by_op),
    _spelling("leaky_integrator", LeakyIntegrator, 9, _leaky_by_op),
    _spelling("qrnn", QRNN, 6, _qrnn_by_op),
    _spelling("sru", SRU, 8, _sru_by_op),
    _spelling("hgrn", HGRN, 6, _hgrn_by_op),
]
