"""Causal depthwise convolutions as people write them: library calls with padding and a slice."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.patterns.spellings.spelling import Spelling, seeded, tokens


def by_hand(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, before: Tensor | None = None
) -> Tensor:
    """The definition, token by token: ``x`` (b t c), ``weight`` (c w), ``before`` (b w-1 c)."""
    width, out = weight.shape[-1], []
    for t in range(x.shape[1]):
        y = torch.zeros_like(x[:, 0])
        for j in range(width):
            if t - j >= 0:
                y = y + weight[:, width - 1 - j] * x[:, t - j]
            elif before is not None:
                y = y + weight[:, width - 1 - j] * before[:, t - j]
        out.append(y if bias is None else y + bias)
    return torch.stack(out, 1)


def taps(conv: nn.Conv1d) -> Tensor:
    """The weight (c, w) of a depthwise convolution."""
    return conv.weight[:, 0]


class PaddedBothEnds(nn.Module):
    """Mamba's: pad both ends, keep the first tokens, SiLU, gate."""

    def __init__(self, d: int = 6, inner: int = 10, k: int = 4) -> None:
        super().__init__()
        self.in_proj = nn.Linear(d, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, k, groups=inner, padding=k - 1, bias=True)
        self.act = nn.SiLU()
        self.out_proj = nn.Linear(inner, d, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        length = hidden.shape[1]
        x, z = self.in_proj(hidden).transpose(1, 2).chunk(2, dim=1)
        x = self.act(self.conv1d(x)[..., :length])
        return self.out_proj((x * self.act(z)).transpose(1, 2))

    def expected(self, hidden: Tensor) -> Tensor:
        x, z = self.in_proj(hidden).chunk(2, -1)
        y = F.silu(by_hand(x, taps(self.conv1d), self.conv1d.bias))
        return self.out_proj(y * F.silu(z))


class NegativeSlice(nn.Module):
    """Padding on both ends, the overhang cut off by a negative index; a residual around."""

    def __init__(self, d: int = 7, k: int = 3) -> None:
        super().__init__()
        self.k = k
        self.norm = nn.LayerNorm(d)
        self.conv = nn.Conv1d(d, d, kernel_size=k, groups=d, padding=k - 1, bias=False)
        self.mlp = nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x).permute(0, 2, 1)
        h = F.silu(self.conv(h)[:, :, : -(self.k - 1)]).permute(0, 2, 1)
        return x + self.mlp(h)

    def expected(self, x: Tensor) -> Tensor:
        return x + self.mlp(F.silu(by_hand(self.norm(x), taps(self.conv))))


class LeftPad(nn.Module):
    """WaveNet's habit: pad on the left, then a convolution without padding."""

    def __init__(self, d: int = 6, inner: int = 9, k: int = 3) -> None:
        super().__init__()
        self.left = k - 1
        self.up = nn.Linear(d, inner)
        self.conv = nn.Conv1d(inner, inner, k, groups=inner)
        self.down = nn.Linear(inner, d)

    def forward(self, x: Tensor) -> Tensor:
        h = self.up(x).mT
        h = F.pad(h, (self.left, 0))
        return self.down(self.conv(h).mT)

    def expected(self, x: Tensor) -> Tensor:
        return self.down(by_hand(self.up(x), taps(self.conv), self.conv.bias))


class PadChannelLast(nn.Module):
    """Padded while still channel-last; SiLU written as a product."""

    def __init__(self, d: int = 8, k: int = 4) -> None:
        super().__init__()
        self.k = k
        self.value = nn.Linear(d, d, bias=False)
        self.weight = nn.Parameter(torch.randn(d, 1, k) / k)

    def forward(self, x: Tensor) -> Tensor:
        v = F.pad(self.value(x), (0, 0, self.k - 1, 0))
        v = F.conv1d(v.transpose(-1, -2), self.weight, groups=v.size(-1)).transpose(-1, -2)
        return v * torch.sigmoid(v)

    def expected(self, x: Tensor) -> Tensor:
        return F.silu(by_hand(self.value(x), self.weight[:, 0]))


class ZerosInFront(nn.Module):
    """Zeros joined in front; two taps only; GELU, which no convolution op has, behind it."""

    def __init__(self, d: int = 6, inner: int = 7) -> None:
        super().__init__()
        self.proj = nn.Linear(d, inner)
        self.shift = nn.Conv1d(inner, inner, 2, groups=inner)
        self.head = nn.Linear(inner, d)

    def forward(self, x: Tensor) -> Tensor:
        u = self.proj(x)
        u = torch.cat([u.new_zeros(u.shape[0], 1, u.shape[2]), u], dim=1)
        return self.head(F.gelu(self.shift(u.transpose(1, 2)).transpose(1, 2)))

    def expected(self, x: Tensor) -> Tensor:
        y = by_hand(self.proj(x), taps(self.shift), self.shift.bias)
        return self.head(F.gelu(y))


class FlippedKernel(nn.Module):
    """A filter stored newest tap first, flipped for the cross-correlation (H3, Hyena)."""

    def __init__(self, d: int = 6, k: int = 3) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.randn(k, d) / k)
        self.skip = nn.Parameter(torch.randn(d))
        self.out = nn.Linear(d, d)

    def forward(self, u: Tensor) -> Tensor:
        k, d = self.filter.shape
        kernel = self.filter.t().flip(-1).unsqueeze(1)
        y = F.conv1d(u.transpose(1, 2), kernel, padding=k - 1, groups=d)
        y = y[..., : u.shape[1]].transpose(1, 2)
        return self.out(y + u * self.skip)

    def expected(self, u: Tensor) -> Tensor:
        return self.out(by_hand(u, self.filter.t().flip(-1)) + u * self.skip)


class ConvPerProjection(nn.Module):
    """A short convolution on each of queries, keys and values (gated delta nets, H3)."""

    def __init__(self, d: int = 8, k: int = 4) -> None:
        super().__init__()
        self.projections = nn.ModuleList(nn.Linear(d, d, bias=False) for _ in range(3))
        self.convs = nn.ModuleList(
            nn.Conv1d(d, d, k, padding=k - 1, groups=d, bias=i == 2) for i in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        length = x.size(1)
        q, k, v = (
            F.silu(conv(proj(x).transpose(1, 2))[:, :, :length]).transpose(1, 2)
            for proj, conv in zip(self.projections, self.convs, strict=True)
        )
        return q * k + v

    def expected(self, x: Tensor) -> Tensor:
        q, k, v = (
            F.silu(by_hand(proj(x), taps(conv), conv.bias))
            for proj, conv in zip(self.projections, self.convs, strict=True)
        )
        return q * k + v


class MixedChannels(nn.Module):
    """Mamba-2's: x, B and C through one convolution, split behind it."""

    def __init__(self, d: int = 6, inner: int = 8, n: int = 3, k: int = 4) -> None:
        super().__init__()
        self.sizes = [inner, n, n]
        self.in_proj = nn.Linear(d, inner + sum(self.sizes))
        self.conv_dim = inner + 2 * n
        self.conv1d = nn.Conv1d(
            self.conv_dim, self.conv_dim, k, groups=self.conv_dim, padding=k - 1
        )
        self.out_proj = nn.Linear(inner, d)

    def forward(self, u: Tensor) -> Tensor:
        z, xBC = torch.split(self.in_proj(u), [self.sizes[0], self.conv_dim], dim=-1)
        xBC = F.silu(self.conv1d(xBC.transpose(1, 2)).transpose(1, 2)[:, : u.shape[1]])
        return self.mix(z, xBC)

    def mix(self, z: Tensor, xBC: Tensor) -> Tensor:
        """What stays of the mixer when the scan is left out."""
        x, B, C = torch.split(xBC, self.sizes, dim=-1)
        return self.out_proj(x * (B * C).sum(-1, keepdim=True) * z)

    def expected(self, u: Tensor) -> Tensor:
        z, xBC = torch.split(self.in_proj(u), [self.sizes[0], self.conv_dim], dim=-1)
        return self.mix(z, F.silu(by_hand(xBC, taps(self.conv1d), self.conv1d.bias)))


class StateInFront(nn.Module):
    """A prompt in pieces: the last tokens of the piece before are joined in front, and kept."""

    def __init__(self, d: int = 6, k: int = 4) -> None:
        super().__init__()
        self.k = k
        self.proj = nn.Linear(d, d)
        self.conv = nn.Conv1d(d, d, k, groups=d)

    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        window = torch.cat([state, self.proj(x).transpose(1, 2)], dim=-1)
        y = F.silu(self.conv(window))
        return y.transpose(1, 2), window[..., -(self.k - 1) :]

    def expected(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        h = self.proj(x)
        y = F.silu(by_hand(h, taps(self.conv), self.conv.bias, before=state.mT))
        return y, torch.cat([state, h.mT], -1)[..., -(self.k - 1) :]


def _piece_and_state(length: int) -> tuple[Tensor, Tensor]:
    (x,) = tokens(6)(length)
    (state,) = tokens(3)(6)
    return x, state


SPELLINGS: list[Spelling] = [
    Spelling(made.__name__, seeded(made), inputs, "causal_conv1d", count, reference=made.expected)
    for made, inputs, count in (
        (PaddedBothEnds, tokens(6), 1),
        (NegativeSlice, tokens(7), 1),
        (LeftPad, tokens(6), 1),
        (PadChannelLast, tokens(8), 1),
        (ZerosInFront, tokens(6), 1),
        (FlippedKernel, tokens(6), 1),
        (ConvPerProjection, tokens(8), 3),
        (MixedChannels, tokens(6), 1),
        (StateInFront, _piece_and_state, 1),
    )
]
