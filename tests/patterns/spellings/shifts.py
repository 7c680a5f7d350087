"""Causal depthwise convolutions without a convolution: shifted copies, windows, one step."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.patterns.spellings.convolutions import by_hand
from tests.patterns.spellings.spelling import Spelling, seeded, tokens


class ShiftedSum(nn.Module):
    """One product a tap, each with its own left pad; newest tap first."""

    def __init__(self, d: int = 6, inner: int = 9) -> None:
        super().__init__()
        self.inp = nn.Linear(d, inner)
        self.w = nn.Parameter(torch.randn(3, inner) / 2)
        self.b = nn.Parameter(torch.randn(inner))
        self.out = nn.Linear(inner, d)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x)
        length = x.shape[1]
        y = self.w[0] * x
        for lag in range(1, self.w.shape[0]):
            y = y + self.w[lag] * F.pad(x, (0, 0, lag, 0))[:, :length]
        return self.out(F.silu(y + self.b))

    def expected(self, x: Tensor) -> Tensor:
        return self.out(F.silu(by_hand(self.inp(x), self.w.t().flip(-1), self.b)))


class NegativePad(nn.Module):
    """A pad that cuts as much on the right as it adds on the left; swish written out."""

    def __init__(self, d: int = 8) -> None:
        super().__init__()
        self.taps = nn.ParameterList(nn.Parameter(torch.randn(d)) for _ in range(3))
        self.proj = nn.Linear(d, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = self.proj(x)
        shifted = (F.pad(x, (0, 0, lag, -lag)) * tap for lag, tap in enumerate(self.taps))
        y = sum(shifted)
        return y * y.sigmoid()

    def expected(self, x: Tensor) -> Tensor:
        return F.silu(by_hand(self.proj(x), torch.stack(list(self.taps)[::-1], -1)))


class RolledAndZeroed(nn.Module):
    """Rolled, and what came round the end set to zero in place."""

    def __init__(self, d: int = 7, k: int = 4) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(d, k) / k)
        self.bias = nn.Parameter(torch.randn(d))
        self.proj = nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        k = self.weight.shape[1]
        acc = torch.zeros_like(x)
        for i in range(k):
            rolled = torch.roll(x, shifts=i, dims=1)
            rolled[:, :i] = 0
            acc = acc + rolled * self.weight[:, k - 1 - i]
        return self.proj(acc + self.bias)

    def expected(self, x: Tensor) -> Tensor:
        return self.proj(by_hand(x, self.weight, self.bias))


class RolledAndMasked(nn.Module):
    """Rolled, and what came round the end multiplied by zero."""

    def __init__(self, d: int = 6, k: int = 3) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(k, d) / k)
        self.proj = nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        position = torch.arange(x.shape[1], device=x.device)
        parts = []
        for lag, tap in enumerate(self.kernel.unbind(0)):
            alive = (position >= lag).to(x.dtype)[None, :, None]
            parts.append(torch.roll(x, lag, 1) * alive * tap)
        return self.proj(torch.stack(parts).sum(0))

    def expected(self, x: Tensor) -> Tensor:
        return self.proj(by_hand(x, self.kernel.t().flip(-1)))


class Unfolded(nn.Module):
    """Windows by ``unfold``, then a weighted sum over each; channel-first."""

    def __init__(self, d: int = 6, inner: int = 8, k: int = 4) -> None:
        super().__init__()
        self.k = k
        self.up = nn.Linear(d, inner, bias=False)
        self.w = nn.Parameter(torch.randn(inner, 1, k) / k)
        self.b = nn.Parameter(torch.randn(inner, 1))

    def forward(self, x: Tensor) -> Tensor:
        h = F.pad(self.up(x).transpose(1, 2), (self.k - 1, 0))
        windows = h.unfold(-1, self.k, 1)
        return F.silu((windows * self.w).sum(-1) + self.b).transpose(1, 2)

    def expected(self, x: Tensor) -> Tensor:
        return F.silu(by_hand(self.up(x), self.w[:, 0], self.b[:, 0]))


class StackedCopies(nn.Module):
    """Shifted copies stacked, then one einsum with the taps."""

    def __init__(self, d: int = 6, inner: int = 10, k: int = 3) -> None:
        super().__init__()
        self.k = k
        self.fc = nn.Linear(d, inner)
        self.weight = nn.Parameter(torch.randn(k, inner) / k)
        self.fo = nn.Linear(inner, d)

    def forward(self, x: Tensor) -> Tensor:
        b, length, _ = x.shape
        h = self.fc(x)
        padded = torch.cat((torch.zeros(b, self.k - 1, h.shape[-1], dtype=h.dtype), h), 1)
        copies = torch.stack([padded[:, i : i + length] for i in range(self.k)], dim=1)
        return self.fo(torch.einsum("bktc,kc->btc", copies, self.weight))

    def expected(self, x: Tensor) -> Tensor:
        return self.fo(by_hand(self.fc(x), self.weight.t()))


class AddedIntoSlices(nn.Module):
    """Each tap added in place into the tokens that it reaches; channel-first."""

    def __init__(self, d: int = 7, k: int = 3) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(d, k) / k)
        self.out = nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        u = x.transpose(1, 2)
        d, length = u.shape[1:]
        y = u * self.w[:, -1].view(1, d, 1)
        for lag in range(1, self.w.shape[1]):
            y[:, :, lag:] += u[:, :, : length - lag] * self.w[:, -1 - lag].view(1, d, 1)
        return self.out(F.silu(y.transpose(1, 2)))

    def expected(self, x: Tensor) -> Tensor:
        return self.out(F.silu(by_hand(x, self.w)))


class TokenShift(nn.Module):
    """RWKV's shift with a free weight on either token: two taps."""

    def __init__(self, d: int = 6, hidden: int = 9) -> None:
        super().__init__()
        self.shift = nn.ZeroPad2d((0, 0, 1, -1))
        self.now = nn.Parameter(torch.rand(1, 1, d))
        self.then = nn.Parameter(torch.rand(1, 1, d))
        self.key = nn.Linear(d, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.key(x * self.now + self.shift(x) * self.then))

    def expected(self, x: Tensor) -> Tensor:
        return torch.tanh(self.key(by_hand(x, torch.stack([self.then, self.now], -1)[0, 0])))


class RolledStep(nn.Module):
    """One token of decoding: the state (b, c, w) rolled, the newest written at its end."""

    def __init__(self, d: int = 6, inner: int = 7, k: int = 4) -> None:
        super().__init__()
        self.in_proj = nn.Linear(d, inner)
        self.conv1d = nn.Conv1d(inner, inner, k, groups=inner)
        self.out_proj = nn.Linear(inner, d)

    def forward(self, token: Tensor, conv_state: Tensor) -> tuple[Tensor, Tensor]:
        x = self.in_proj(token.squeeze(1))
        conv_state = torch.roll(conv_state, shifts=-1, dims=-1)
        conv_state[:, :, -1] = x
        x = torch.sum(conv_state * self.conv1d.weight.squeeze(1), dim=-1) + self.conv1d.bias
        return self.out_proj(F.silu(x)).unsqueeze(1), conv_state

    def expected(self, token: Tensor, conv_state: Tensor) -> tuple[Tensor, Tensor]:
        x, conv = self.in_proj(token), self.conv1d
        before = conv_state[:, :, 1:].mT
        y = by_hand(x, conv.weight[:, 0], conv.bias, before)
        return self.out_proj(F.silu(y)), torch.cat([before, x], 1).mT


class JoinedStep(nn.Module):
    """One token of decoding: the oldest dropped, the newest joined on, an einsum with the taps."""

    def __init__(self, d: int = 7, k: int = 4) -> None:
        super().__init__()
        self.value = nn.Linear(d, d, bias=False)
        self.w = nn.Parameter(torch.randn(d, k) / k)

    def forward(self, x: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
        cache = torch.cat([cache, self.value(x).mT], dim=2)
        y = torch.einsum("bck,ck->bc", cache, self.w)
        return F.silu(y).unsqueeze(1), cache[:, :, 1:]

    def expected(self, x: Tensor, cache: Tensor) -> tuple[Tensor, Tensor]:
        v = self.value(x)
        y = F.silu(by_hand(v, self.w, before=cache.mT))
        return y, torch.cat([cache.mT, v], 1)[:, 1:].mT


class MixedShift(nn.Module):
    """RWKV's own mix: the two taps are ``mu`` and ``1 - mu``."""

    def __init__(self, d: int = 6) -> None:
        super().__init__()
        self.mu = nn.Parameter(torch.rand(d))
        self.receptance = nn.Linear(d, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        last = F.pad(x, (0, 0, 1, -1))
        return torch.sigmoid(self.receptance(torch.lerp(last, x, self.mu)))

    def expected(self, x: Tensor) -> Tensor:
        weight = torch.stack([1 - self.mu, self.mu], -1)
        return torch.sigmoid(self.receptance(by_hand(x, weight)))


class StepByStep(nn.Module):
    """A loop over tokens, each a weighted sum of its window."""

    def __init__(self, d: int = 6, k: int = 3) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(k, d) / k)
        self.out = nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        k = self.weight.shape[0]
        padded = F.pad(x, (0, 0, k - 1, 0))
        steps = [(padded[:, t : t + k] * self.weight).sum(1) for t in range(x.shape[1])]
        return self.out(torch.stack(steps, dim=1))

    def expected(self, x: Tensor) -> Tensor:
        return self.out(by_hand(x, self.weight.t()))


def _token_and_state(width: int, inner: int, kept: int) -> tuple[Tensor, Tensor]:
    (token,) = tokens(width)(1)
    (state,) = tokens(kept)(inner)
    return token, state


SPELLINGS: list[Spelling] = [
    Spelling(made.__name__, seeded(made), inputs, "causal_conv1d", reference=made.expected)
    for made, inputs in (
        (ShiftedSum, tokens(6)),
        (NegativePad, tokens(8)),
        (RolledAndZeroed, tokens(7)),
        (RolledAndMasked, tokens(6)),
        (Unfolded, tokens(6)),
        (StackedCopies, tokens(6)),
        (AddedIntoSlices, tokens(7)),
        (TokenShift, tokens(6)),
        (RolledStep, lambda _: _token_and_state(6, 7, 4)),
        (JoinedStep, lambda _: _token_and_state(7, 7, 3)),
    )
]

# in truth convolutions too: raised or declined, the numbers must be eager's
EITHER: list[Spelling] = [
    Spelling(made.__name__, seeded(made), tokens(6), "causal_conv1d", reference=made.expected)
    for made in (MixedShift, StepByStep)
]
