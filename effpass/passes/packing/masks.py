"""Reads attention masks by what they are on sample paddings, not by how they are spelled."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node

from effpass.passes.packing.places import Unpackable
from effpass.passes.packing.samples import Samples

CLOSED = -1e4  # what is added to a score that shall not count is at most this (float16's range)


@dataclass(frozen=True)
class Seen:
    """Which keys a token sees: real ones, from ``left`` positions before it to ``right`` after.

    -1: without limit.
    """

    left: int = -1
    right: int = -1

    @property
    def causal(self) -> bool:
        """Whether no token sees what comes after it."""
        return self.right == 0


def seen(attention: Node, mask: Node | None, causal: bool, samples: Samples) -> Seen | None:
    """What the mask of one attention lets tokens see; None where there is only causality.

    Raises Unpackable where that is not "real keys, within a window".
    """
    if mask is None:
        if causal:
            return None
        raise Unpackable("no_mask", attention, "without a mask, this attention reads padding")
    if not samples.light(mask):
        raise Unpackable(
            "mask_of_weights",
            attention,
            "its mask is not made of the padding mask and positions alone",
            "a position bias that is learned cannot be packed yet",
        )
    key = (mask, causal)  # layers share their mask
    if key not in samples.read:
        samples.read[key] = _read(attention, mask, causal, samples)
    return samples.read[key]


def _read(attention: Node, mask: Node, causal: bool, samples: Samples) -> Seen | None:
    found: Seen | None = None
    for i, padding in enumerate(samples.masks):
        allowed = who_sees(attention, _value(attention, mask, i, samples), padding)
        if causal:
            allowed = allowed & torch.ones(allowed.shape[-2:], dtype=torch.bool).tril()
        real = padding.bool()
        if bool(real.all()):
            window = window_of(attention, allowed)
            found = window if found is None else _joined(attention, found, window, padding)
        assert found is not None  # the first sample of every length has no padding
        wanted = within(found, padding.shape[1])[None, None] & real[:, None, None, :]
        if bool(((allowed != wanted) & real[:, None, :, None]).any()):
            raise Unpackable(
                "other_mask",
                attention,
                "its mask lets tokens see something else than real tokens within a window",
            )
    return found


def _value(attention: Node, mask: Node, sample: int, samples: Samples) -> Tensor:
    try:
        return samples.value(mask, sample)
    except (RuntimeError, IndexError, ValueError) as error:
        reason = f"its mask cannot be computed for another padding: {error}"
        raise Unpackable("other_mask", attention, reason) from error


def who_sees(attention: Node, value: Tensor, padding: Tensor) -> Tensor:
    """(b, h, t, t): who sees whom."""
    rows, tokens = padding.shape
    if value.dtype != torch.bool:
        if bool(((value != 0) & (value > CLOSED)).any()):
            raise Unpackable(
                "bias", attention, "its mask adds a bias to scores, not only what closes them"
            )
        value = value == 0
    value = value[(None,) * max(0, 4 - value.dim())]
    if not all(
        n in (1, m)
        for n, m in zip(value.shape, (rows, value.shape[1], tokens, tokens), strict=True)
    ):
        raise Unpackable("other_mask", attention, f"its mask has shape {tuple(value.shape)}")
    return value.expand(rows, value.shape[1], tokens, tokens)


def window_of(attention: Node, allowed: Tensor) -> Seen:
    """The window of a mask without padding."""
    tokens = allowed.shape[-1]
    pattern = allowed[0, 0]
    queries, keys = pattern.nonzero(as_tuple=True)
    if not len(queries):
        raise Unpackable("other_mask", attention, "its mask closes everything")
    left, right = int((queries - keys).max()), int((keys - queries).max())
    found = Seen(*(-1 if reach >= tokens - 1 else reach for reach in (left, right)))
    if min(left, right) < 0 or not bool((allowed == within(found, tokens)).all()):
        raise Unpackable("other_mask", attention, "its mask is no window, even without padding")
    return found


def _joined(attention: Node, short: Seen, long: Seen, padding: Tensor) -> Seen:
    """A longer sample may show a limit that the shorter did not reach."""
    for a, b in ((short.left, long.left), (short.right, long.right)):
        if a not in (-1, b):
            raise Unpackable(
                "other_mask", attention, f"its window changes with the length {padding.shape[1]}"
            )
    return long


def within(window: Seen, tokens: int) -> Tensor:
    """(t, t): which keys are inside the window of each query."""
    ahead = torch.arange(tokens) - torch.arange(tokens)[:, None]
    inside = torch.ones(tokens, tokens, dtype=torch.bool)
    if window.left >= 0:
        inside &= ahead >= -window.left
    if window.right >= 0:
        inside &= ahead <= window.right
    return inside
