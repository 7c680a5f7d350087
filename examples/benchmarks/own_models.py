"""Research code: models that no library knows, with a Python loop over time.

Written the way a paper's first implementation is: nothing in here knows of effpass, which finds the
convolution and the scan in the graph.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LoopBlock(nn.Module):
    """A Mamba block with a loop over time, in the style of minimal implementations."""

    def __init__(self, width: int, states: int = 16, kernel: int = 4) -> None:
        super().__init__()
        inner, self.rank, self.states = 2 * width, max(1, width // 16), states
        self.norm = nn.RMSNorm(width)
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.conv = nn.Conv1d(inner, inner, kernel, padding=kernel - 1, groups=inner)
        self.x_proj = nn.Linear(inner, self.rank + 2 * states, bias=False)
        self.dt_proj = nn.Linear(self.rank, inner)
        self.A_log = nn.Parameter(torch.log(torch.arange(1.0, states + 1)).repeat(inner, 1))
        self.D = nn.Parameter(torch.ones(inner))
        self.out_proj = nn.Linear(inner, width, bias=False)

    def forward(self, u: Tensor) -> Tensor:
        """(b, t, width) -> (b, t, width)."""
        length = u.shape[1]
        x, gate = self.in_proj(self.norm(u)).chunk(2, dim=-1)
        x = F.silu(self.conv(x.transpose(1, 2))[:, :, :length].transpose(1, 2))
        dt, B, C = self.x_proj(x).split([self.rank, self.states, self.states], dim=-1)
        y = self.scan(x, F.softplus(self.dt_proj(dt)), B, C) + x * self.D
        return u + self.out_proj(y * F.silu(gate))

    def scan(self, x: Tensor, dt: Tensor, B: Tensor, C: Tensor) -> Tensor:
        """The state space, one token after the other."""
        decay = torch.exp(torch.einsum("bld,dn->bldn", dt, -torch.exp(self.A_log)))
        drive = torch.einsum("bld,bln,bld->bldn", dt, B, x)
        state = torch.zeros_like(drive[:, 0])
        outputs = []
        for t in range(x.shape[1]):
            state = decay[:, t] * state + drive[:, t]
            outputs.append(torch.einsum("bdn,bn->bd", state, C[:, t]))
        return torch.stack(outputs, dim=1)


class LoopModel(nn.Module):
    """A stack of loop blocks: (b, t, width) -> (b, t, width)."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(LoopBlock(width) for _ in range(layers))

    def forward(self, u: Tensor) -> Tensor:
        """Runs the blocks in turn."""
        for layer in self.layers:
            u = layer(u)
        return u
