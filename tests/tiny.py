"""A small model written with the ops themselves: what a captured graph looks like, in 0.1 s."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from effpass import ops


class Mixer(nn.Module):
    """A Mamba mixer, width d, 4 states."""

    def __init__(self, d: int = 8) -> None:
        super().__init__()
        self.proj = nn.Linear(d, 2 * d)
        self.dt = nn.Linear(d, d)
        self.BC = nn.Linear(d, 8)
        self.conv = nn.Parameter(torch.randn(d, 4))
        self.A_log = nn.Parameter(torch.rand(d, 4))

    def forward(self, x: Tensor) -> Tensor:
        u, z = self.proj(x).chunk(2, -1)
        u, _ = torch.ops.effpass.causal_conv1d(u, self.conv, None, "silu")
        B, C = self.BC(u).chunk(2, -1)
        A = -torch.exp(self.A_log)
        y, _ = torch.ops.effpass.selective_scan(u, self.dt(u), A, B, C, None, z, None, True)
        return x + y


class Stack(nn.Module):
    """Mixers, perhaps under gradient checkpointing."""

    def __init__(self, layers: int = 2, checkpointed: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Mixer() for _ in range(layers))
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            if self.checkpointed and torch.is_grad_enabled():
                x = checkpoint(layer, x, use_reentrant=False)  # type: ignore[assignment]
            else:
                x = layer(x)
        return x


def scan_args(b: int = 2, t: int = 5, d: int = 8, n: int = 4) -> tuple[Tensor, ...]:
    """x, dt, A, B, C of a selective scan."""
    x, dt, B, C = (torch.randn(b, t, k) for k in (d, d, n, n))
    return x, dt, -torch.rand(d, n), B, C


def op_count(report: object) -> dict[str, int]:
    """How many nodes of each op a report holds."""
    return {name: report.count(name) for name in ops.OPS if report.count(name)}  # type: ignore[attr-defined]


def small() -> tuple[nn.Module, tuple[Tensor]]:
    """A factory for the command line."""
    return Stack(layers=1), (torch.randn(1, 4, 8),)
