"""The blocks around a scan: projections in, gate and projection out, the scan left open.

No two sizes are equal, so that a confused dimension is an error and not a coincidence.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effpass import ops


class S6(nn.Module):
    """A Mamba block without its convolution; ``scan(x, dt, A, B, C)`` gives y.

    x, dt (b, l, 10); A (10, 3), negative; B, C (b, l, 3).
    """

    def __init__(
        self,
        scan: Callable[..., Tensor],
        d_model: int = 6,
        d_inner: int = 10,
        d_state: int = 3,
        dt_rank: int = 4,
    ) -> None:
        super().__init__()
        self.scan = scan
        self.sizes = [dt_rank, d_state, d_state]
        self.in_proj = nn.Linear(d_model, 2 * d_inner, bias=False)
        self.x_proj = nn.Linear(d_inner, sum(self.sizes), bias=False)
        self.dt_proj = nn.Linear(dt_rank, d_inner)
        self.A_log = nn.Parameter(torch.log(torch.rand(d_inner, d_state) + 0.2))
        self.D = nn.Parameter(torch.rand(d_inner))
        self.out_proj = nn.Linear(d_inner, d_model, bias=False)

    def ssm_inputs(self, h: Tensor) -> tuple[Tensor, ...]:
        """z, then x, dt, A, B and C."""
        x, z = self.in_proj(h).chunk(2, dim=-1)
        x = F.silu(x)
        dt, B, C = self.x_proj(x).split(self.sizes, dim=-1)
        return z, x, F.softplus(self.dt_proj(dt)), -torch.exp(self.A_log), B, C

    def forward(self, h: Tensor) -> Tensor:
        """(b, l, 6) -> (b, l, 6)."""
        z, x, dt, A, B, C = self.ssm_inputs(h)
        y = self.scan(x, dt, A, B, C) + x * self.D
        return self.out_proj(y * F.silu(z))


def s6_by_op(block: S6, h: Tensor) -> Tensor:
    """What an S6 computes when its scan is the op."""
    z, x, dt, A, B, C = block.ssm_inputs(h)
    y, _ = ops.selective_scan(x, dt, A, B, C, block.D, z)
    return block.out_proj(y)


class SSD(nn.Module):
    """A Mamba-2 block without its convolution; ``scan(x, dt, A, B, C)`` gives y, perhaps a state.

    x (b, l, 6, 4); dt (b, l, 6); A (6); B, C (b, l, ``groups``, 7).
    """

    def __init__(
        self,
        scan: Callable[..., Any],
        d_model: int = 9,
        heads: int = 6,
        headdim: int = 4,
        groups: int = 3,
        d_state: int = 7,
    ) -> None:
        super().__init__()
        self.scan = scan
        self.heads, self.groups = heads, groups
        inner = heads * headdim
        self.sizes = [inner, inner, groups * d_state, groups * d_state, heads]
        self.in_proj = nn.Linear(d_model, sum(self.sizes), bias=False)
        self.dt_bias = nn.Parameter(torch.randn(heads))
        self.A_log = nn.Parameter(torch.log(torch.rand(heads) + 0.2))
        self.D = nn.Parameter(torch.rand(heads))
        self.norm = nn.RMSNorm(inner, eps=1e-5)
        self.out_proj = nn.Linear(inner, d_model, bias=False)

    def ssm_inputs(self, h: Tensor) -> tuple[Tensor, ...]:
        """z, then x, dt, A, B and C."""
        batch, length = h.shape[:2]
        z, x, B, C, dt = torch.split(self.in_proj(h), self.sizes, dim=-1)
        x = F.silu(x).view(batch, length, self.heads, -1)
        B, C = (v.reshape(batch, length, self.groups, -1) for v in (B, C))
        return z, x, F.softplus(dt + self.dt_bias), -self.A_log.exp(), B, C

    def finish(self, y: Tensor, x: Tensor, z: Tensor) -> Tensor:
        """Skip, gate, normalisation and the projection out."""
        y = (y + x * self.D[:, None]).reshape(z.shape)
        return self.out_proj(self.norm(y * F.silu(z)))

    def forward(self, h: Tensor) -> Any:
        """(b, l, 9) -> (b, l, 9), with the final state if the scan gives one."""
        z, x, dt, A, B, C = self.ssm_inputs(h)
        out = self.scan(x, dt, A, B, C)
        if isinstance(out, tuple):
            return self.finish(out[0], x, z), out[1]
        return self.finish(out, x, z)


def ssd_by_op(block: SSD, h: Tensor) -> Tensor:
    """What an SSD computes when its scan is the op."""
    return ssd_and_state_by_op(block, h)[0]


def ssd_and_state_by_op(block: SSD, h: Tensor) -> tuple[Tensor, Tensor]:
    """The same, and the final state (b, 6, 4, 7)."""
    z, x, dt, A, B, C = block.ssm_inputs(h)
    y, state = ops.ssd_scan(x, dt, A, B, C)
    return block.finish(y, x, z), state


class GatedRNN(nn.Module):
    """A gated linear recurrence between projections; ``scan(a, b)`` gives h, all (b, l, 7)."""

    def __init__(self, scan: Callable[..., Tensor], width: int = 6, hidden: int = 7) -> None:
        super().__init__()
        self.scan = scan
        self.forget = nn.Linear(width, hidden)
        self.value = nn.Linear(width, hidden)
        self.out = nn.Linear(hidden, width)
        nn.init.constant_(self.forget.bias, 1.5)

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The coefficient a, in (0, 1), and the input b."""
        f = torch.sigmoid(self.forget(x))
        return f, (1 - f) * self.value(x)

    def forward(self, x: Tensor) -> Tensor:
        """(b, l, 6) -> (b, l, 6)."""
        a, b = self.gates(x)
        return x + self.out(self.scan(a, b))


def gated_by_op(block: GatedRNN, x: Tensor) -> Tensor:
    """What a GatedRNN computes when its scan is the op."""
    h, _ = ops.linear_recurrence(*block.gates(x))
    return x + block.out(h)
