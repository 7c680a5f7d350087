"""Convolutions that look causal and depthwise and are not, each beside the one it looks like."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.patterns.spellings.convolutions import by_hand, taps
from tests.patterns.spellings.spelling import NearMiss, Spelling, seeded, tokens


class Mixer(nn.Module):
    """Projections around a convolution over tokens, which each subclass writes in ``mix``."""

    groups: int | None = None
    outputs = 1

    def __init__(self, d: int = 6, inner: int = 8, k: int = 3) -> None:
        super().__init__()
        self.k = k
        self.in_proj = nn.Linear(d, inner)
        channels, groups = inner * self.outputs, self.groups or inner
        self.conv = nn.Conv1d(inner, channels, k, groups=groups, padding=k - 1)
        self.out_proj = nn.Linear(channels, d)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(F.silu(self.mix(self.in_proj(x).mT).mT))

    def mix(self, x: Tensor) -> Tensor:
        """(b c t) -> (b c t)"""
        return self.conv(x)[..., : x.shape[-1]]

    def convolve(self, x: Tensor, stride: int = 1, padding: int = 0, dilation: int = 1) -> Tensor:
        """The convolution with other padding, stride or dilation than its own."""
        conv = self.conv
        return F.conv1d(x, conv.weight, conv.bias, stride, padding, dilation, conv.groups)

    @property
    def bias(self) -> Tensor:
        """(c, 1)"""
        assert self.conv.bias is not None
        return self.conv.bias[:, None]

    def mistaken(self, x: Tensor) -> Tensor:
        """The causal convolution with the same weights, output i reading channel i."""
        h = self.in_proj(x).repeat(1, 1, self.outputs)
        return self.out_proj(F.silu(by_hand(h, taps(self.conv), self.conv.bias)))


class Centred(Mixer):
    def mix(self, x: Tensor) -> Tensor:
        return self.convolve(x, padding=self.k // 2)


class RightPadded(Mixer):
    def mix(self, x: Tensor) -> Tensor:
        return self.convolve(F.pad(x, (0, self.k - 1)))


class SlicedAtTheFront(Mixer):
    def mix(self, x: Tensor) -> Tensor:
        return self.conv(x)[..., self.k - 1 :]


class OneTokenEarly(Mixer):
    def mix(self, x: Tensor) -> Tensor:
        return self.conv(x)[..., 1 : x.shape[-1] + 1]


class OneTokenLate(Mixer):
    def mix(self, x: Tensor) -> Tensor:
        return self.convolve(F.pad(x, (self.k, 0)))[..., : x.shape[-1]]


class Dilated(Mixer):
    def mix(self, x: Tensor) -> Tensor:
        return self.convolve(F.pad(x, (2 * (self.k - 1), 0)), dilation=2)


class Strided(Mixer):
    def mix(self, x: Tensor) -> Tensor:
        y = self.convolve(F.pad(x, (self.k - 1, 0)), stride=2)
        return y.repeat_interleave(2, -1)[..., : x.shape[-1]]


class Dense(Mixer):
    groups = 1


class Grouped(Mixer):
    groups = 4


class TwoOutputs(Mixer):
    outputs = 2


class Wrapped(Mixer):
    def mix(self, x: Tensor) -> Tensor:
        return self.convolve(F.pad(x, (self.k - 1, 0), mode="circular"))


class EdgeRepeated(Mixer):
    def mix(self, x: Tensor) -> Tensor:
        return self.convolve(F.pad(x, (self.k - 1, 0), mode="replicate"))


class RolledRound(Mixer):
    def mix(self, x: Tensor) -> Tensor:
        y = self.bias
        for lag in range(self.k):
            y = y + torch.roll(x, lag, -1) * self.conv.weight[:, :, -1 - lag]
        return y


class ShiftedBack(Mixer):
    def mix(self, x: Tensor) -> Tensor:
        y = self.bias
        for lag in range(self.k):
            y = y + F.pad(x, (-lag, lag)) * taps(self.conv)[:, -1 - lag, None]
        return y


class WeightOfTheInput(Mixer):
    """Lightweight dynamic convolutions: the taps are a function of the token."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.Linear(8, 3)

    def mix(self, x: Tensor) -> Tensor:
        windows = F.pad(x, (self.k - 1, 0)).unfold(-1, self.k, 1)
        dynamic = self.weights(x.mT)[:, None] + taps(self.conv)[:, None]
        return (windows * dynamic).sum(-1) + self.bias


class WeightOfThePosition(Mixer):
    def mix(self, x: Tensor) -> Tensor:
        windows = F.pad(x, (self.k - 1, 0)).unfold(-1, self.k, 1)
        at = torch.arange(x.shape[-1], dtype=x.dtype)
        turning = torch.cos(at[:, None] * torch.arange(self.k, dtype=x.dtype))
        return (windows * taps(self.conv)[:, None] * turning).sum(-1) + self.bias


class LargestOfWindow(Mixer):
    def mix(self, x: Tensor) -> Tensor:
        windows = F.pad(x, (self.k - 1, 0)).unfold(-1, self.k, 1)
        return (windows * taps(self.conv)[:, None]).amax(-1) + self.bias


class AlongChannels(Mixer):
    """The window slides over channels, the tokens are a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.over = nn.Conv1d(1, 1, 3, padding=2)

    def mix(self, x: Tensor) -> Tensor:
        b, c, t = x.shape
        rows = x.mT.reshape(b * t, 1, c)
        y = self.over(rows)[..., :c].reshape(b, t, c).mT
        return y * taps(self.conv)[:, -1, None] + self.bias


class SquashedTaps(Mixer):
    def mix(self, x: Tensor) -> Tensor:
        h = F.pad(x, (self.k - 1, 0))
        length, w = x.shape[-1], taps(self.conv)
        y = sum(torch.tanh(h[..., j : j + length] * w[:, j, None]) for j in range(self.k))
        return y + self.bias


class Reversed(Mixer):
    """A causal convolution in reversed time: the op, so long as both flips stay around it."""

    def mix(self, x: Tensor) -> Tensor:
        return self.conv(x.flip(-1))[..., : x.shape[-1]].flip(-1)

    def expected(self, x: Tensor) -> Tensor:
        h = by_hand(self.in_proj(x).flip(1), taps(self.conv), self.conv.bias).flip(1)
        return self.out_proj(F.silu(h))


class PaddedWithOnes(Mixer):
    """A causal convolution with an initial state of ones."""

    def mix(self, x: Tensor) -> Tensor:
        return self.convolve(F.pad(x, (self.k - 1, 0), value=1.0))

    def expected(self, x: Tensor) -> Tensor:
        h = self.in_proj(x)
        ones = torch.ones_like(h[:, :1]).expand(-1, self.k - 1, -1)
        return self.out_proj(F.silu(by_hand(h, taps(self.conv), self.conv.bias, ones)))


class Valid(Mixer):
    """No padding: the first tokens are the initial state of the others, and have no output."""

    def mix(self, x: Tensor) -> Tensor:
        return self.convolve(x)

    def expected(self, x: Tensor) -> Tensor:
        h = by_hand(self.in_proj(x), taps(self.conv), self.conv.bias)[:, self.k - 1 :]
        return self.out_proj(F.silu(h))


class TapsApart(Mixer):
    """Dilation by hand: a causal convolution of width 5 whose odd taps are zero."""

    def mix(self, x: Tensor) -> Tensor:
        y = self.bias
        for tap in range(self.k):
            lag = 2 * (self.k - 1 - tap)
            y = y + F.pad(x, (lag, 0))[..., : x.shape[-1]] * taps(self.conv)[:, tap, None]
        return y

    def expected(self, x: Tensor) -> Tensor:
        w = torch.stack([taps(self.conv), torch.zeros_like(taps(self.conv))], -1).flatten(1)
        return self.out_proj(F.silu(by_hand(self.in_proj(x), w[:, :-1], self.conv.bias)))


NEAR_MISSES: list[NearMiss] = [
    NearMiss(made.__name__, seeded(made), tokens(6), why, made.mistaken, around)
    for made, why, around in (
        (Centred, "padding on both sides: it sees the next token", True),
        (RightPadded, "padding on the right only: it sees the future, and no past", True),
        (SlicedAtTheFront, "padded on both sides, the wrong end cut off: it sees the future", True),
        (OneTokenEarly, "cut one token too late: it sees the next token", True),
        (OneTokenLate, "one pad too many: it does not see the token itself", True),
        (Dilated, "a dilation of 2", True),
        (Strided, "a stride of 2", True),
        (Dense, "one group: every channel reads all others", False),
        (Grouped, "half as many groups as channels: a channel reads its neighbour", False),
        (TwoOutputs, "two outputs a channel: output i reads channel i // 2", True),
        (Wrapped, "circular padding: the first tokens read the last", True),
        (EdgeRepeated, "the first token repeated in place of zeros", True),
        (RolledRound, "rolled and not zeroed: the first tokens read the last", True),
        (ShiftedBack, "shifted the other way: it sees the future", True),
        (WeightOfTheInput, "the taps depend on the token", False),
        (WeightOfThePosition, "the taps depend on the position", False),
        (LargestOfWindow, "the largest of the window, not the sum", False),
        (AlongChannels, "it slides over channels, not over tokens", True),
        (SquashedTaps, "a nonlinearity on each tap", False),
    )
]

# the op, but only with what stands around it: raised or declined, the numbers must be eager's
FLIPPED: list[Spelling] = [
    Spelling("Reversed", seeded(Reversed), tokens(6), "causal_conv1d", reference=Reversed.expected)
]
EITHER: list[Spelling] = [
    Spelling(made.__name__, seeded(made), tokens(6), "causal_conv1d", reference=made.expected)
    for made in (PaddedWithOnes, TapsApart)
] + [
    Spelling(
        "Valid",
        seeded(Valid),
        lambda length: tokens(6)(length + 2),
        "causal_conv1d",
        reference=Valid.expected,
    )
]
