"""Selective scans as loops over time, in blocks that each lay out their tensors their own way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effpass import ops
from tests.patterns.spellings.spelling import Inputs, Spelling, seeded, tokens


class MambaBlock(nn.Module):
    """A residual block in the manner of mamba-minimal, its convolution included."""

    def __init__(self, d_model: int = 6, d_inner: int = 11, n: int = 3, rank: int = 4) -> None:
        super().__init__()
        self.d_inner, self.n, self.rank = d_inner, n, rank
        self.norm = nn.RMSNorm(d_model, eps=1e-5)
        self.in_proj = nn.Linear(d_model, d_inner * 2, bias=False)
        self.conv1d = nn.Conv1d(d_inner, d_inner, 4, groups=d_inner, padding=3)
        self.x_proj = nn.Linear(d_inner, rank + n * 2, bias=False)
        self.dt_proj = nn.Linear(rank, d_inner)
        A = torch.arange(1, n + 1, dtype=torch.float32).repeat(d_inner, 1)
        self.A_log = nn.Parameter(torch.log(A))
        self.D = nn.Parameter(torch.ones(d_inner))
        self.out_proj = nn.Linear(d_inner, d_model, bias=False)

    def inner(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The convolved half and the gate."""
        length = x.shape[1]
        x, res = self.in_proj(self.norm(x)).split([self.d_inner, self.d_inner], dim=-1)
        x = self.conv1d(x.transpose(1, 2))[:, :, :length].transpose(1, 2)
        return F.silu(x), res

    def ssm(self, x: Tensor) -> Tensor:
        """(b, l, 11) -> (b, l, 11)."""
        A = -torch.exp(self.A_log.float())
        D = self.D.float()
        delta, B, C = self.x_proj(x).split([self.rank, self.n, self.n], dim=-1)
        delta = F.softplus(self.dt_proj(delta))
        deltaA = torch.exp(torch.einsum("bld,dn->bldn", delta, A))
        deltaB_u = torch.einsum("bld,bln,bld->bldn", delta, B, x)
        state = torch.zeros((x.shape[0], self.d_inner, self.n), device=x.device)
        ys = []
        for i in range(x.shape[1]):
            state = deltaA[:, i] * state + deltaB_u[:, i]
            ys.append(torch.einsum("bdn,bn->bd", state, C[:, i, :]))
        return torch.stack(ys, dim=1) + x * D

    def forward(self, x: Tensor) -> Tensor:
        """(b, l, 6) -> (b, l, 6)."""
        u, res = self.inner(x)
        return self.out_proj(self.ssm(u) * F.silu(res)) + x


def _mamba_block_by_op(block: MambaBlock, x: Tensor) -> Tensor:
    u, res = block.inner(x)
    delta, B, C = block.x_proj(u).split([block.rank, block.n, block.n], dim=-1)
    dt, A = block.dt_proj(delta), -block.A_log.exp()
    y, _ = ops.selective_scan(u, dt, A, B, C, block.D, res, None, True)
    return block.out_proj(y) + x


class Stack(nn.Module):
    """Three of them, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(MambaBlock() for _ in range(3))
        self.head = nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        """(b, l, 6) -> (b, l, 8)."""
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def _stack_by_op(stack: Stack, x: Tensor) -> Tensor:
    for layer in stack.layers:
        x = _mamba_block_by_op(layer, x)
    return stack.head(x)


class ChannelFirst(nn.Module):
    """(b, d, l) throughout, in the manner of transformers' slow path."""

    def __init__(self, hidden: int = 6, inner: int = 10, state: int = 3, rank: int = 4) -> None:
        super().__init__()
        self.splits = [rank, state, state]
        self.in_proj = nn.Linear(hidden, inner * 2)
        self.x_proj = nn.Linear(inner, sum(self.splits), bias=False)
        self.dt_proj = nn.Linear(rank, inner)
        self.A_log = nn.Parameter(torch.rand(inner, state))
        self.D = nn.Parameter(torch.rand(inner))
        self.out_proj = nn.Linear(inner, hidden)

    def forward(self, input_states: Tensor) -> Tensor:
        """(b, l, 6) -> (b, l, 6)."""
        batch_size, seq_len, _ = input_states.shape
        dtype = input_states.dtype
        projected_states = self.in_proj(input_states).transpose(1, 2)
        hidden_states, gate = projected_states.chunk(2, dim=1)
        ssm_parameters = self.x_proj(hidden_states.transpose(1, 2))
        time_step, B, C = torch.split(ssm_parameters, self.splits, dim=-1)
        discrete_time_step = F.softplus(self.dt_proj(time_step)).transpose(1, 2)
        A = -torch.exp(self.A_log.float())
        discrete_A = torch.exp(A[None, :, None, :] * discrete_time_step[:, :, :, None])
        discrete_B = discrete_time_step[:, :, :, None] * B[:, None, :, :].float()
        deltaB_u = discrete_B * hidden_states[:, :, :, None].float()
        scan_state = hidden_states.new_zeros((batch_size, A.shape[0], A.shape[1]))
        scan_outputs = []
        for i in range(seq_len):
            scan_state = discrete_A[:, :, i, :] * scan_state + deltaB_u[:, :, i, :]
            scan_output = torch.matmul(scan_state.to(dtype), C[:, i, :].unsqueeze(-1))
            scan_outputs.append(scan_output[:, :, 0])
        scan_output = torch.stack(scan_outputs, dim=-1)
        scan_output = scan_output + (hidden_states * self.D[None, :, None])
        scan_output = scan_output * F.silu(gate)
        return self.out_proj(scan_output.transpose(1, 2))


def _channel_first_by_op(block: ChannelFirst, states: Tensor) -> Tensor:
    x, z = block.in_proj(states).chunk(2, -1)
    dt, B, C = block.x_proj(x).split(block.splits, -1)
    A = -block.A_log.exp()
    dt = block.dt_proj(dt)
    return block.out_proj(ops.selective_scan(x, dt, A, B, C, block.D, z, None, True)[0])


class Convolved(nn.Module):
    """Signals (b, c, l); every projection a pointwise convolution; B and C channel-first too."""

    def __init__(self, channels: int = 9, n: int = 4) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, channels)
        self.to_delta = nn.Conv1d(channels, channels, 1)
        self.to_B = nn.Conv1d(channels, n, 1, bias=False)
        self.to_C = nn.Conv1d(channels, n, 1, bias=False)
        self.log_rate = nn.Parameter(torch.randn(channels, n) / 2)
        self.mix = nn.Conv1d(channels, channels, 1)

    def forward(self, signal: Tensor) -> Tensor:
        """(b, 9, l) -> (b, 9, l)."""
        u = self.norm(signal)
        delta, B, C = F.softplus(self.to_delta(u)), self.to_B(u), self.to_C(u)
        rate = self.log_rate.exp()
        s = torch.zeros(u.size(0), rate.size(0), rate.size(1))
        y = torch.zeros_like(u)
        for k in range(u.size(-1)):
            step = delta[..., k, None]
            s = s * torch.exp(-step * rate) + u[..., k, None] * B[:, None, :, k] * step
            y[:, :, k] = torch.einsum("bcn,bn->bc", s, C[..., k])
        return signal + self.mix(F.gelu(y))


def _convolved_by_op(block: Convolved, signal: Tensor) -> Tensor:
    u = block.norm(signal)
    delta, B, C = (f(u).mT for f in (block.to_delta, block.to_B, block.to_C))
    rate = -block.log_rate.exp()
    y, _ = ops.selective_scan(u.mT, delta, rate, B, C, None, None, None, True)
    return signal + block.mix(F.gelu(y.mT))


class AllInside(nn.Module):
    """Bias, softplus, skip and gate all happen inside the loop."""

    def __init__(self, width: int = 7, n: int = 3) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 3 * width + 2 * n)
        self.sizes = [width, width, width, n, n]
        self.A = nn.Parameter(-torch.rand(width, n) - 0.1)
        self.dt_bias = nn.Parameter(torch.randn(width))
        self.D = nn.Parameter(torch.randn(width))

    def forward(self, tokens: Tensor) -> Tensor:
        """(b, l, 7) -> (b, l, 7)."""
        x, z, dt, B, C = self.proj(tokens).split(self.sizes, -1)
        h = torch.zeros(tokens.shape[0], *self.A.shape)
        out = []
        for t in range(tokens.shape[1]):
            step = F.softplus(dt[:, t] + self.dt_bias)
            h = torch.exp(step.unsqueeze(-1) * self.A) * h + torch.einsum(
                "bd,bn->bdn", step * x[:, t], B[:, t]
            )
            y = torch.einsum("bdn,bn->bd", h, C[:, t]) + self.D * x[:, t]
            out.append(y * z[:, t] * torch.sigmoid(z[:, t]))
        return torch.stack(out, dim=1)


def _all_inside_by_op(block: AllInside, tokens: Tensor) -> Tensor:
    x, z, dt, B, C = block.proj(tokens).split(block.sizes, -1)
    return ops.selective_scan(x, dt, block.A, B, C, block.D, z, block.dt_bias, True)[0]


class Cell(nn.Module):
    """A decoding step that projects one token, run over all of them from a given state."""

    def __init__(self, width: int = 6, inner: int = 8, n: int = 3) -> None:
        super().__init__()
        self.inner, self.n = inner, n
        self.in_proj = nn.Linear(width, 2 * inner)
        self.bc = nn.Linear(inner, 2 * n, bias=False)
        self.dt = nn.Linear(inner, inner)
        self.A_log = nn.Parameter(torch.rand(inner, n))
        self.out_proj = nn.Linear(inner, width)

    def step(self, token: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One token (b, 6) and the state (b, 8, 3): its output and the next state."""
        x, gate = self.in_proj(token).chunk(2, dim=-1)
        B, C = self.bc(x).chunk(2, dim=-1)
        dt = F.softplus(self.dt(x))
        dA = torch.exp(dt[:, :, None] * -torch.exp(self.A_log))
        state = state * dA + x[:, :, None] * (dt[:, :, None] * B[:, None, :])
        y = (state * C[:, None, :]).sum(dim=-1)
        return self.out_proj(y * F.silu(gate)), state

    def forward(self, tokens: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """(b, l, 6) and a state -> (b, l, 6) and the last state."""
        outputs = []
        for t in range(tokens.shape[1]):
            y, state = self.step(tokens[:, t], state)
            outputs.append(y)
        return torch.stack(outputs, dim=1), state


def _cell_by_op(cell: Cell, tokens: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    x, gate = cell.in_proj(tokens).chunk(2, -1)
    B, C = cell.bc(x).chunk(2, -1)
    A = -cell.A_log.exp()
    y, state = ops.selective_scan(x, cell.dt(x), A, B, C, None, gate, None, True, state)
    return cell.out_proj(y), state


class LearnedStart(nn.Module):
    """The first state is a parameter, broadcast over the batch; the last state comes back."""

    def __init__(self, width: int = 9, n: int = 4) -> None:
        super().__init__()
        self.h0 = nn.Parameter(torch.randn(width, n))
        self.log_A = nn.Parameter(torch.rand(width, n))
        self.select = nn.Linear(width, width + 2 * n)
        self.sizes = [width, n, n]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(b, l, 9) -> (b, l, 9) and (b, 9, 4)."""
        step, write, read = self.select(x).split(self.sizes, dim=-1)
        step = F.softplus(step).unsqueeze(-1)
        forget = torch.exp(-self.log_A.exp() * step)
        remember = x.unsqueeze(-1) * step * write.unsqueeze(-2)
        memory = self.h0.expand(x.shape[0], -1, -1)
        recalled = torch.zeros_like(x)
        for now in range(x.shape[1]):
            memory = forget[:, now] * memory + remember[:, now]
            recalled[:, now] += (memory @ read[:, now, :, None]).squeeze(-1)
        return x + recalled, memory


def _learned_start_by_op(block: LearnedStart, x: Tensor) -> tuple[Tensor, Tensor]:
    step, write, read = block.select(x).split(block.sizes, -1)
    A, start = -block.log_A.exp(), block.h0.expand(x.shape[0], -1, -1)
    y, memory = ops.selective_scan(x, step, A, write, read, None, None, None, True, start)
    return x + y, memory


class Classifier(nn.Module):
    """Only the last token's output is used."""

    def __init__(self, width: int = 7, n: int = 3, classes: int = 4) -> None:
        super().__init__()
        self.A_log = nn.Parameter(torch.rand(width, n))
        self.D = nn.Parameter(torch.rand(width))
        self.x_proj = nn.Linear(width, width + 2 * n)
        self.sizes = [width, n, n]
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """(b, l, 7) -> (b, 4)."""
        dt, B, C = self.x_proj(x).split(self.sizes, dim=-1)
        dt, A = F.softplus(dt), -torch.exp(self.A_log)
        h = 0
        for t in range(x.shape[1]):
            h = torch.exp(dt[:, t, :, None] * A) * h
            h = h + (dt[:, t] * x[:, t])[:, :, None] * B[:, t, None]
        y = (h * C[:, -1, None]).sum(-1) + self.D * x[:, -1]
        return self.head(y)


def _classifier_by_op(block: Classifier, x: Tensor) -> Tensor:
    dt, B, C = block.x_proj(x).split(block.sizes, -1)
    A = -block.A_log.exp()
    y, _ = ops.selective_scan(x, dt, A, B, C, block.D, None, None, True)
    return block.head(y[:, -1])


def signal(length: int) -> tuple[Tensor, ...]:
    """(2, 9, length)."""
    (x,) = tokens(9)(length)
    return (x.mT.contiguous(),)


def tokens_and_state(length: int) -> tuple[Tensor, ...]:
    """(2, length, 6) and a state (2, 8, 3)."""
    generator = torch.Generator().manual_seed(7)
    return (*tokens(6)(length), torch.randn(2, 8, 3, generator=generator))


def _block(
    name: str, cls: type[nn.Module], inputs: Inputs, by_op: Callable[..., Any], count: int = 1
) -> Spelling:
    return Spelling(name, seeded(cls), inputs, "selective_scan", count, reference=by_op)


SPELLINGS = [
    _block("mamba_minimal_block", MambaBlock, tokens(6), _mamba_block_by_op),
    _block("three_layers", Stack, tokens(6), _stack_by_op, count=3),
    _block("channel_first", ChannelFirst, tokens(6), _channel_first_by_op),
    _block("pointwise_convolutions", Convolved, signal, _convolved_by_op),
    _block("all_inside", AllInside, tokens(7), _all_inside_by_op),
    _block("step_by_step", Cell, tokens_and_state, _cell_by_op),
    _block("learned_start", LearnedStart, tokens(9), _learned_start_by_op),
    _block("last_token_only", Classifier, tokens(7), _classifier_by_op),
]
