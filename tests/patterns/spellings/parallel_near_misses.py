"""Trees and cumulative products that look like a linear recurrence and are not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._higher_order_ops.associative_scan import associative_scan

from tests.patterns.spellings.mixers import GatedRNN, gated_by_op
from tests.patterns.spellings.spelling import NearMiss, seeded, tokens

Pair = tuple[Tensor, Tensor]


def combined(combine: Callable[[Pair, Pair], Pair], **kwargs: Any) -> Callable[..., Tensor]:
    """The second half of an ``associative_scan`` of (a, b) with ``combine``."""

    def scan(a: Tensor, b: Tensor) -> Tensor:
        return associative_scan(combine, (a, b), 1, combine_mode="generic", **kwargs)[1]

    return scan


COMBINES: list[tuple[str, str, Callable[..., Tensor]]] = [
    (
        "left_coefficient",
        "the left coefficient multiplies the right value",
        combined(lambda p, q: (p[0] * q[0], p[0] * q[1] + p[1])),
    ),
    (
        "added_coefficients",
        "coefficients are added, not multiplied",
        combined(lambda p, q: (p[0] + q[0], q[0] * p[1] + q[1])),
    ),
    (
        "left_factor_kept",
        "only the right coefficient is passed on",
        combined(lambda p, q: (q[0], q[0] * p[1] + q[1])),
    ),
    (
        "maximum_of_values",
        "values are compared, not added",
        combined(lambda p, q: (p[0] * q[0], torch.maximum(q[0] * p[1], q[1]))),
    ),
]


def doubling(a: Tensor, b: Tensor, shifts: list[int], ahead: bool = False) -> Tensor:
    """Rounds of b += a * shifted b, looking back (or ahead) by each of ``shifts``."""
    length = b.shape[1]
    for shift in shifts:
        pad = (0, 0, 0, shift) if ahead else (0, 0, shift, 0)
        side = slice(shift, None) if ahead else slice(0, length)
        b = b + a * F.pad(b, pad)[:, side]
        a = a * F.pad(a, pad, value=1.0)[:, side]
    return b


def tripled_shift(a: Tensor, b: Tensor) -> Tensor:
    """Shifts 1, 3, 9: terms are left out."""
    return doubling(a, b, [s for s in (1, 3, 9, 27) if s < b.shape[1]])


def off_by_one_shift(a: Tensor, b: Tensor) -> Tensor:
    """Shifts 1, 3, 5, 9: one more than it should be after the first."""
    return doubling(a, b, [1, *(s + 1 for s in (2, 4, 8, 16, 32) if s + 1 < b.shape[1])])


def repeated_shift(a: Tensor, b: Tensor) -> Tensor:
    """Shifts 1, 1, 2, 4, ...: the first round is done twice."""
    return doubling(a, b, [1, *(s for s in (1, 2, 4, 8, 16, 32) if s < b.shape[1])])


def stops_early(a: Tensor, b: Tensor) -> Tensor:
    """The last round is missing: a window, not the whole past."""
    return doubling(a, b, [s for s in (1, 2, 4, 8, 16, 32) if 2 * s < b.shape[1]])


def looks_ahead(a: Tensor, b: Tensor) -> Tensor:
    """Shifted the other way: a scan from the future."""
    return doubling(a, b, [s for s in (1, 2, 4, 8, 16, 32) if s < b.shape[1]], ahead=True)


def pads_with_one(a: Tensor, b: Tensor) -> Tensor:
    """Ones, not zeros, stand before the first value."""
    shift = 1
    while shift < b.shape[1]:
        b = b + a * F.pad(b, (0, 0, shift, 0), value=1.0)[:, :-shift]
        a = a * F.pad(a, (0, 0, shift, 0), value=1.0)[:, :-shift]
        shift *= 2
    return b


def coefficient_first(a: Tensor, b: Tensor) -> Tensor:
    """The coefficient is updated before the value that needs the old one."""
    shift = 1
    while shift < b.shape[1]:
        a = a * F.pad(a, (0, 0, shift, 0), value=1.0)[:, :-shift]
        b = b + a * F.pad(b, (0, 0, shift, 0))[:, :-shift]
        shift *= 2
    return b


def circular(a: Tensor, b: Tensor) -> Tensor:
    """Shifts by roll: the end of the sequence flows into its beginning."""
    shift = 1
    while shift < b.shape[1]:
        b = b + a * torch.roll(b, shift, dims=1)
        a = a * torch.roll(a, shift, dims=1)
        shift *= 2
    return b


def product_with_epsilon(a: Tensor, b: Tensor) -> Tensor:
    """Something is added to the product before it divides."""
    P = torch.cumprod(a, dim=1)
    return P * torch.cumsum(b / (P + 1e-2), dim=1)


def product_with_tiny_epsilon(a: Tensor, b: Tensor) -> Tensor:
    """The same, so small that it shows only where the product underflows."""
    P = torch.cumprod(a, dim=1)
    return P * torch.cumsum(b / (P + 1e-12), dim=1)


def product_of_channels(a: Tensor, b: Tensor) -> Tensor:
    """Products run over channels, sums over time."""
    P = torch.cumprod(a, dim=2)
    return P * torch.cumsum(b / P, dim=1)


def product_of_the_past(a: Tensor, b: Tensor) -> Tensor:
    """The product that divides stops one token early."""
    P = torch.cumprod(a, dim=1)
    before = F.pad(P, (0, 0, 1, 0), value=1.0)[:, :-1]
    return P * torch.cumsum(b / before, dim=1)


def not_multiplied_back(a: Tensor, b: Tensor) -> Tensor:
    """The sum of quotients is not scaled again."""
    return torch.cumsum(b / torch.cumprod(a, dim=1).clamp(min=0.1), dim=1)


CUMULATIVE: list[tuple[Callable[[Tensor, Tensor], Tensor], str]] = [
    (tripled_shift, "shifts grow by three: tokens are left out"),
    (off_by_one_shift, "shifts are off by one"),
    (repeated_shift, "one shift is done twice"),
    (stops_early, "a window of the past, not all of it"),
    (looks_ahead, "the scan runs from the last token to the first"),
    (pads_with_one, "the state before the first token is one at every level"),
    (coefficient_first, "values are multiplied by the coefficient of the next level"),
    (circular, "the last tokens flow into the first"),
    (product_with_epsilon, "an epsilon in the division"),
    (product_of_channels, "the product runs over channels"),
    (product_of_the_past, "the product that divides is one token behind"),
    (not_multiplied_back, "a clamped product divides and never multiplies"),
]


REVERSED = combined(lambda p, q: (p[0] * q[0], q[0] * p[1] + q[1]), reverse=True)
AROUND = {"looks_ahead", "product_of_the_past"}


def _gated(name: str, scan: Callable[..., Tensor], why: str) -> NearMiss:
    make = seeded(GatedRNN, scan)
    return NearMiss(name, make, tokens(6), why, gated_by_op, name in AROUND)


NEAR_MISSES = [_gated(name, scan, why) for name, why, scan in COMBINES]
NEAR_MISSES += [_gated(scan.__name__, scan, why) for scan, why in CUMULATIVE]
NEAR_MISSES += [
    NearMiss(
        "product_with_tiny_epsilon",
        seeded(GatedRNN, product_with_tiny_epsilon),
        tokens(6),
        "an epsilon in the division, seen only where the product underflows",
    )
]
