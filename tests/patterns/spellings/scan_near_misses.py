"""Loops that look like a linear recurrence over time and are not.

``NEAR_MISSES`` also holds those of the files for cells, parallel scans and chunks. ``FLIPPED`` may
be raised as long as the flips stay. ``RANDOM`` gives equal outputs only after equal seeds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.patterns.spellings import cell_near_misses, chunked_near_misses, parallel_near_misses
from tests.patterns.spellings.mixers import GatedRNN, gated_by_op
from tests.patterns.spellings.spelling import NearMiss, seeded, tokens

Step = Callable[[Tensor, Tensor, Tensor], Tensor]


def loop(step: Step) -> Callable[[Tensor, Tensor], Tensor]:
    """A loop over time of ``step(a_t, b_t, h)``."""

    def scan(a: Tensor, b: Tensor) -> Tensor:
        h, hs = torch.zeros_like(b[:, 0]), []
        for t in range(b.shape[1]):
            h = step(a[:, t], b[:, t], h)
            hs.append(h)
        return torch.stack(hs, dim=1)

    return scan


def rms(h: Tensor) -> Tensor:
    """Root-mean-square normalisation, written out."""
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-3)


STEPS: list[tuple[str, str, Step]] = [
    ("tanh_inside", "tanh of the state", lambda a, b, h: torch.tanh(a * h + b)),
    ("tanh_of_input_and_state", "tanh of the carried part", lambda a, b, h: a * h.tanh() + b),
    ("relu_inside", "relu of the state", lambda a, b, h: torch.relu(torch.addcmul(b, a, h))),
    (
        "layer_norm_inside",
        "the state is normalised over channels at every step",
        lambda a, b, h: F.layer_norm(a * h + b, h.shape[-1:]),
    ),
    ("rms_norm_inside", "the state is normalised over channels", lambda a, b, h: rms(a * h + b)),
    (
        "unit_norm_inside",
        "the carried state has length one",
        lambda a, b, h: a * F.normalize(h, dim=-1, eps=1e-3) + b,
    ),
    (
        "coefficient_from_state",
        "the gate looks at the state",
        lambda a, b, h: torch.sigmoid(a + 0.5 * h) * h + b,
    ),
    (
        "input_gate_from_state",
        "what is added depends on the state",
        lambda a, b, h: a * h + b * torch.sigmoid(h),
    ),
    ("squared_state", "a quadratic map", lambda a, b, h: a * h * (1 - 0.1 * h) + b),
    ("maximum", "the larger of state and input is kept", lambda a, b, h: torch.maximum(a * h, b)),
    ("clamped", "the state is clamped", lambda a, b, h: (a * h + b).clamp(-0.1, 0.1)),
    ("rounded", "the state is rounded to bfloat16", lambda a, b, h: (a * h + b).bfloat16().float()),
    ("rolled", "each channel reads its neighbour", lambda a, b, h: a * torch.roll(h, 1, -1) + b),
    ("mean_of_state", "channels are mixed", lambda a, b, h: a * h.mean(-1, keepdim=True) + b),
    ("cumulative_state", "channels are mixed", lambda a, b, h: a * h.cumsum(-1) * 0.3 + b),
    ("absolute", "the sign of the state is lost", lambda a, b, h: a * h.abs() + b),
    ("detached", "no gradient flows through time", lambda a, b, h: a * h.detach() + b),
]


def backwards(a: Tensor, b: Tensor) -> Tensor:
    """From the last token to the first."""
    h, hs = torch.zeros_like(b[:, 0]), torch.zeros_like(b)
    for t in range(b.shape[1] - 1, -1, -1):
        h = a[:, t] * h + b[:, t]
        hs[:, t] = h
    return hs


def reversed_list(a: Tensor, b: Tensor) -> Tensor:
    """Forwards, the outputs in reverse order."""
    h, hs = torch.zeros_like(b[:, 0]), []
    for t in range(b.shape[1]):
        h = a[:, t] * h + b[:, t]
        hs.insert(0, h)
    return torch.stack(hs, dim=1)


def evens_then_odds(a: Tensor, b: Tensor) -> Tensor:
    """Every second token, then the others; outputs stay where they belong."""
    h, hs = torch.zeros_like(b[:, 0]), torch.zeros_like(b)
    for t in [*range(0, b.shape[1], 2), *range(1, b.shape[1], 2)]:
        h = a[:, t] * h + b[:, t]
        hs[:, t] = h
    return hs


def second_order(a: Tensor, b: Tensor) -> Tensor:
    """h[t] = a h[t-1] - 0.2 h[t-2] + b."""
    hs = [torch.zeros_like(b[:, 0]), torch.zeros_like(b[:, 0])]
    for t in range(b.shape[1]):
        hs.append(a[:, t] * hs[-1] - 0.2 * hs[-2] + b[:, t])
    return torch.stack(hs[2:], dim=1)


def two_back(a: Tensor, b: Tensor) -> Tensor:
    """h[t] = a h[t-2] + b: two recurrences, interleaved."""
    hs = [torch.zeros_like(b[:, 0]), torch.zeros_like(b[:, 0])]
    for t in range(b.shape[1]):
        hs.append(a[:, t] * hs[t] + b[:, t])
    return torch.stack(hs[2:], dim=1)


def sometimes_skipped(a: Tensor, b: Tensor) -> Tensor:
    """Every fourth token leaves the state alone."""
    h, hs = torch.zeros_like(b[:, 0]), []
    for t in range(b.shape[1]):
        if t % 4 == 3:
            hs.append(h)
            continue
        h = a[:, t] * h + b[:, t]
        hs.append(h)
    return torch.stack(hs, dim=1)


def one_step_differs(a: Tensor, b: Tensor) -> Tensor:
    """The token in the middle is added without decay."""
    h, hs = torch.zeros_like(b[:, 0]), []
    for t in range(b.shape[1]):
        h = h + b[:, t] if t == b.shape[1] // 2 else a[:, t] * h + b[:, t]
        hs.append(h)
    return torch.stack(hs, dim=1)


def one_index_differs(a: Tensor, b: Tensor) -> Tensor:
    """The third step reads the second's input again."""
    h, hs = torch.zeros_like(b[:, 0]), []
    for t in range(b.shape[1]):
        h = a[:, t] * h + b[:, 1 if t == 2 else t]
        hs.append(h)
    return torch.stack(hs, dim=1)


def aliased_states(a: Tensor, b: Tensor) -> Tensor:
    """The list holds one tensor many times: every output is the last state."""
    h, hs = torch.zeros_like(b[:, 0]), []
    for t in range(b.shape[1]):
        h.mul_(a[:, t]).add_(b[:, t])
        hs.append(h)
    return torch.stack(hs, dim=1)


def next_input(a: Tensor, b: Tensor) -> Tensor:
    """The state of a token holds the input of the next."""
    h, hs = torch.zeros_like(b[:, 0]), []
    for t in range(b.shape[1]):
        h = a[:, t] * h + b[:, min(t + 1, b.shape[1] - 1)]
        hs.append(h)
    return torch.stack(hs, dim=1)


def next_state(a: Tensor, b: Tensor) -> Tensor:
    """Each token outputs the state of the token after it."""
    h, hs = torch.zeros_like(b[:, 0]), []
    for t in range(b.shape[1]):
        h = a[:, t] * h + b[:, t]
        hs.append(h)
    return torch.stack([*hs[1:], hs[-1]], dim=1)


def previous_state(a: Tensor, b: Tensor) -> Tensor:
    """Each token outputs the state before it."""
    h, hs = torch.zeros_like(b[:, 0]), torch.zeros_like(b)
    for t in range(b.shape[1]):
        hs[:, t] = h
        h = a[:, t] * h + b[:, t]
    return hs


def over_channels(a: Tensor, b: Tensor) -> Tensor:
    """The same recurrence from channel to channel."""
    h, hs = torch.zeros_like(b[..., 0]), []
    for c in range(b.shape[-1]):
        h = a[..., c] * h + b[..., c]
        hs.append(h)
    return torch.stack(hs, dim=-1)


def over_batch(a: Tensor, b: Tensor) -> Tensor:
    """The same recurrence from one row of the batch to the next."""
    h, hs = torch.zeros_like(b[0]), []
    for row in range(b.shape[0]):
        h = a[row] * h + b[row]
        hs.append(h)
    return torch.stack(hs)


def flipped(a: Tensor, b: Tensor) -> Tensor:
    """Inputs flipped, scanned, the result flipped back."""
    a, b = a.flip(1), b.flip(1)
    return loop(lambda at, bt, h: at * h + bt)(a, b).flip(1)


def both_directions(a: Tensor, b: Tensor) -> Tensor:
    """A scan forwards and one over flipped inputs, added."""
    forwards = loop(lambda at, bt, h: at * h + bt)
    return forwards(a, b) + torch.flip(forwards(torch.flip(a, [1]), torch.flip(b, [1])), [1])


def dropout_inside(a: Tensor, b: Tensor) -> Tensor:
    """The carried state loses channels at random."""
    return loop(lambda at, bt, h: at * F.dropout(h, 0.3, training=True) + bt)(a, b)


LOOPS: list[tuple[Callable[[Tensor, Tensor], Tensor], str]] = [
    (backwards, "the loop runs from the last token to the first"),
    (reversed_list, "outputs are in the reverse order of inputs"),
    (evens_then_odds, "the loop visits tokens out of order"),
    (second_order, "the state depends on the two before it"),
    (two_back, "the state depends on the one before the last"),
    (sometimes_skipped, "some steps leave the state as it is"),
    (one_step_differs, "one step has another formula"),
    (one_index_differs, "one step reads another token"),
    (aliased_states, "every output is the last state"),
    (next_input, "the state reads the next token"),
    (next_state, "the output reads the next state"),
    (previous_state, "the output reads the state before"),
    (over_channels, "the loop runs over channels"),
    (over_batch, "the loop runs over the batch"),
]


def running_softmax(a: Tensor, b: Tensor) -> Tensor:
    """Attention over the past, one token at a time: the decay comes from a running maximum."""
    top = torch.full_like(b[:, 0], -30.0)
    total, mass, out = torch.zeros_like(top), torch.zeros_like(top), []
    for t in range(b.shape[1]):
        new_top = torch.maximum(top, 4 * a[:, t])
        keep, add = torch.exp(top - new_top), torch.exp(4 * a[:, t] - new_top)
        total, mass, top = keep * total + add * b[:, t], keep * mass + add, new_top
        out.append(total / mass)
    return torch.stack(out, dim=1)


AROUND = {
    "backwards",
    "reversed_list",
    "evens_then_odds",
    "two_back",
    "sometimes_skipped",
    "one_step_differs",
    "one_index_differs",
    "aliased_states",
    "next_input",
    "next_state",
    "previous_state",
    "over_channels",
    "over_batch",
    "flipped",
    "both_directions",
    "reversed_scan",
}


def _gated(name: str, scan: Callable[..., Any], why: str) -> NearMiss:
    make = seeded(GatedRNN, scan)
    return NearMiss(name, make, tokens(6), why, gated_by_op, name in AROUND)


NEAR_MISSES = [_gated(name, loop(step), why) for name, why, step in STEPS]
NEAR_MISSES += [_gated(scan.__name__, scan, why) for scan, why in LOOPS]
NEAR_MISSES += [
    _gated("running_softmax", running_softmax, "the decay depends on a running maximum"),
    *cell_near_misses.NEAR_MISSES,
    *parallel_near_misses.NEAR_MISSES,
    *chunked_near_misses.NEAR_MISSES,
]
FLIPPED = [
    _gated("flipped", flipped, "flips must stay"),
    _gated("both_directions", both_directions, "flips must stay"),
    _gated("reversed_scan", parallel_near_misses.REVERSED, "flips must stay"),
]
RANDOM = [_gated("dropout_inside", dropout_inside, "dropout inside the recurrence")]
