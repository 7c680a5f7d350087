"""Near a feed-forward block, and not one: something stands between up and down, or looks in."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.patterns.spellings.feed_forward import Gated, TwoWeights
from tests.patterns.spellings.spelling import NearMiss, seeded, tokens


class Between(TwoWeights):
    """Something between up and down that is not element by element, or is seen from outside."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.between(F.gelu(self.fc1(x)), x))

    def between(self, h: Tensor, x: Tensor) -> Tensor:
        """(b t f), (b t d) -> (b t f)"""
        return h

    def mistaken(self, x: Tensor) -> Tensor:
        """The block that it would be without it."""
        return self.fc2(F.gelu(self.fc1(x)))


class NormBetween(Between):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(14)

    def between(self, h: Tensor, x: Tensor) -> Tensor:
        return self.norm(h)


class SoftmaxBetween(Between):
    def between(self, h: Tensor, x: Tensor) -> Tensor:
        return h.softmax(-1)


class ResidualBetween(Between):
    def __init__(self) -> None:
        super().__init__(d=7, hidden=7)

    def between(self, h: Tensor, x: Tensor) -> Tensor:
        return h + x


class TokensMixed(Between):
    def between(self, h: Tensor, x: Tensor) -> Tensor:
        return h.cumsum(1)


class ConvBetween(Between):
    def __init__(self) -> None:
        super().__init__()
        self.dwconv = nn.Conv1d(14, 14, 3, padding=1, groups=14)

    def between(self, h: Tensor, x: Tensor) -> Tensor:
        return self.dwconv(h.mT).mT


class PooledBetween(Between):
    def between(self, h: Tensor, x: Tensor) -> Tensor:
        return h.mean(1, keepdim=True).expand_as(h)


class DropoutBetween(Between):
    def between(self, h: Tensor, x: Tensor) -> Tensor:
        return F.dropout(h, 0.5, training=True)


class NoActivation(Between):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x))


class OneLinear(nn.Module):
    """An activation on either side of one matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(6, 14)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.fc(F.gelu(x)))


class Maxout(nn.Module):
    """The larger of two neurons, then the second matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 14), nn.Linear(7, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.fc1(x).unflatten(-1, (7, 2)).amax(-1))


class NormInsteadOfActivation(Between):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.rms_norm(self.fc1(x), (14,)))


class NeuronsReturned(TwoWeights):
    """The neurons are an output too."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        h = F.gelu(self.fc1(x))
        return self.fc2(h), h


class NeuronsInGroups(nn.Module):
    """The second matrix reads seven neurons at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 14), nn.Linear(7, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = F.gelu(self.fc1(x)).unflatten(-1, (2, 7))
        return self.fc2(h).flatten(-2)


class GateOfAnother(Gated):
    """The gate reads another tensor than the value does."""

    def forward(self, x: Tensor, other: Tensor) -> Tensor:  # type: ignore[override]
        return self.down_proj(F.silu(self.gate_proj(other)) * self.up_proj(x))

    def mistaken(self, x: Tensor, other: Tensor) -> Tensor:
        return super().forward(x)


class GateOfThePast(Gated):
    """The gate reads the token before."""

    def forward(self, x: Tensor) -> Tensor:
        gate = self.gate_proj(F.pad(x, (0, 0, 1, -1)))
        return self.down_proj(F.silu(gate) * self.up_proj(x))

    def mistaken(self, x: Tensor) -> Tensor:
        return super().forward(x)


def _pair(length: int) -> tuple[Tensor, Tensor]:
    (x,), (other,) = tokens(6)(length), tokens(6, batch=3)(length)
    return x, other[1:]


NEAR_MISSES: list[NearMiss] = [
    NearMiss(made.__name__, seeded(made), tokens(width), why, mistaken=made.mistaken)
    for made, width, why in (
        (NormBetween, 6, "a norm between activation and down"),
        (SoftmaxBetween, 6, "a softmax over neurons"),
        (ResidualBetween, 7, "the input is added to the neurons"),
        (TokensMixed, 6, "a sum over tokens between up and down"),
        (ConvBetween, 6, "a convolution over tokens between up and down"),
        (PooledBetween, 6, "a mean over tokens between up and down"),
        (DropoutBetween, 6, "dropout is active"),
        (NoActivation, 6, "no activation"),
        (NormInsteadOfActivation, 6, "a norm in the place of the activation"),
        (GateOfThePast, 6, "the gate reads the token before"),
    )
] + [
    NearMiss(
        *("GateOfAnother", seeded(GateOfAnother), _pair, "the gate reads another tensor"),
        mistaken=GateOfAnother.mistaken,
    ),
    NearMiss("OneLinear", seeded(OneLinear), tokens(6), "one matrix"),
    NearMiss("Maxout", seeded(Maxout), tokens(6), "an activation of two neurons at a time"),
    NearMiss("NeuronsReturned", seeded(NeuronsReturned), tokens(6), "the neurons are returned"),
    NearMiss("NeuronsInGroups", seeded(NeuronsInGroups), tokens(6), "down reads half the neurons"),
]
