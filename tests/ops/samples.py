"""Samples: calls of every op that its definition, its gradient and every lowering are tried on.

Sizes are small and awkward: one token, none, primes, fewer channels than a vector and one more than
two of them, ragged packs with empty sequences, slices of a fused projection.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from effpass.ops import OPS


@dataclass(frozen=True)
class Sample:
    """One call of an op: float32 arguments by name, the same numbers every time.

    ``storage`` names the arguments that a model keeps in its own dtype; the others stay float32.
    """

    op: str
    name: str
    make: Callable[[], dict[str, Any]]
    storage: tuple[str, ...]

    def arguments(self, dtype: torch.dtype | None = torch.float32) -> list[Any]:
        """All arguments in order, ``storage`` in ``dtype`` (None: as made), strides kept."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(len(self.name))
            given = self.make()
        for name in self.storage:
            if dtype is not None and given.get(name) is not None:
                given[name] = given[name].to(dtype)
        return list(OPS[self.op].bind(**given).values())

    def __str__(self) -> str:
        return f"{self.op}-{self.name}"


def doubled(arguments: list[Any]) -> list[Any]:
    """The arguments with every floating-point tensor in float64."""
    return [a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in arguments]


def offsets(*lengths: int) -> Tensor:
    """``cu_seqlens`` of sequences of these lengths."""
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def _scan(b: int, t: int, d: int, n: int, **more: Any) -> dict[str, Any]:
    return {
        "x": torch.randn(b, t, d),
        "dt": torch.randn(b, t, d) - 1,
        "A": -torch.exp(torch.randn(d, n)),
        "B": torch.randn(b, t, n),
        "C": torch.randn(b, t, n),
        "dt_softplus": True,
        **more,
    }


def _gated(b: int, t: int, d: int, n: int, **more: Any) -> dict[str, Any]:
    extra = {"D": torch.randn(d), "z": torch.randn(b, t, d), "dt_bias": torch.randn(d)}
    return {**_scan(b, t, d, n), **extra, **more}


def _packed(lengths: tuple[int, ...], d: int, n: int) -> dict[str, Any]:
    start = torch.randn(len(lengths), d, n)
    return _gated(1, sum(lengths), d, n, initial_state=start, cu_seqlens=offsets(*lengths))


def _sliced() -> dict[str, Any]:
    """x, z and dt, B, C as slices of two projections, as models make them."""
    given, (b, t, d, n) = _gated(2, 23, 20, 16), (2, 23, 20, 16)
    given["x"], given["z"] = torch.randn(b, t, 2 * d).chunk(2, -1)
    given["dt"], given["B"], given["C"] = torch.randn(b, t, d + 2 * n).split([d, n, n], -1)
    return given


def _token_last() -> dict[str, Any]:
    """Every long tensor transposed: tokens lie side by side."""
    given = _gated(2, 19, 20, 16)
    for name in ("x", "dt", "z", "B", "C"):
        given[name] = given[name].transpose(1, 2).contiguous().transpose(1, 2)
    return given


def _mixed() -> dict[str, Any]:
    """x and z narrow, dt and what makes it float32, a narrow A: all of it legal."""
    given = _gated(2, 21, 20, 16)
    narrow = {name: given[name].bfloat16() for name in ("x", "z", "A", "C")}
    return {**given, **narrow, "B": given["B"].half()}


def _raw_steps() -> dict[str, Any]:
    """dt as it is, zero at some tokens: absent ones."""
    given = _scan(2, 21, 18, 16, dt_softplus=False)
    given["dt"] = given["dt"].abs() * (torch.rand(2, 21, 1) < 0.6)
    return given


def _vanishing() -> dict[str, Any]:
    """Steps so long that decays underflow."""
    given = _gated(1, 40, 17, 16, initial_state=torch.randn(1, 17, 16))
    given["dt"] = given["dt"] * 30
    return given


_SELECTIVE: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": lambda: _scan(1, 37, 24, 16),
    "everything": lambda: _gated(2, 37, 35, 16, initial_state=torch.randn(2, 35, 16)),
    "one token": lambda: _gated(3, 1, 33, 16, initial_state=torch.randn(3, 33, 16)),
    "no tokens": lambda: _gated(2, 0, 5, 16, initial_state=torch.randn(2, 5, 16)),
    "primes": lambda: _gated(3, 31, 7, 5),
    "one state": lambda: _gated(1, 17, 16, 1),
    "many states": lambda: _gated(1, 19, 17, 37, initial_state=torch.randn(1, 17, 37)),
    "long": lambda: _gated(1, 211, 16, 4, initial_state=torch.randn(1, 16, 4)),
    "ragged": lambda: _packed((3, 17, 0, 1, 40), 19, 16),
    "empty ends": lambda: _packed((0, 5, 33, 0), 33, 6),
    "no gate": lambda: {**_gated(2, 20, 24, 16), "z": None},
    "no skip": lambda: {**_gated(2, 20, 24, 16), "D": None},
    "sliced": _sliced,
    "token last": _token_last,
    "raw steps": _raw_steps,
    "vanishing": _vanishing,
    "mixed": _mixed,
    "wide": lambda: _gated(1, 70, 100, 16),
    "many sequences": lambda: _packed((20, 1, 0, 33, 7, 90, 5), 16, 16),
}


def _conv(b: int, t: int, c: int, w: int, **more: Any) -> dict[str, Any]:
    return {"x": torch.randn(b, t, c), "weight": torch.randn(c, w), **more}


def _full(b: int, t: int, c: int, w: int, **more: Any) -> dict[str, Any]:
    extra = {"bias": torch.randn(c), "initial_state": torch.randn(b, c, w - 1)}
    return {**_conv(b, t, c, w), **extra, "activation": "silu", **more}


def _packed_conv(lengths: tuple[int, ...], c: int, w: int) -> dict[str, Any]:
    start, cu_seqlens = torch.randn(len(lengths), c, w - 1), offsets(*lengths)
    return _full(1, sum(lengths), c, w, initial_state=start, cu_seqlens=cu_seqlens)


_CONV: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": lambda: _conv(1, 37, 24, 4),
    "everything": lambda: _full(2, 75, 35, 4),
    "no activation": lambda: _full(2, 37, 35, 4, activation=None),
    "one token": lambda: _full(3, 1, 33, 4),
    "no tokens": lambda: _full(2, 0, 5, 4),
    "two tokens": lambda: _full(2, 2, 16, 4),
    "width 1": lambda: _full(2, 33, 7, 1),
    "width 2": lambda: _full(1, 31, 17, 2),
    "width 7": lambda: _full(2, 41, 17, 7),
    "wider than long": lambda: _full(2, 3, 5, 7),
    "ragged": lambda: _packed_conv((3, 17, 0, 1, 40, 2), 19, 4),
    "empty ends": lambda: _packed_conv((0, 33, 64, 0), 33, 3),
    "sliced": lambda: {**_full(2, 33, 20, 4), "x": torch.randn(2, 33, 60)[:, :, 20:40]},
    "token last": lambda: {**_full(2, 33, 20, 4), "x": torch.randn(2, 20, 33).transpose(1, 2)},
    "wide": lambda: _full(1, 200, 100, 4),
    "many sequences": lambda: _packed_conv((200, 1, 0, 33, 7, 90, 500, 300), 16, 4),
    "mixed": lambda: {**_full(2, 33, 20, 4), "x": torch.randn(2, 33, 20).bfloat16()},
}


def _ssd(b: int, t: int, h: int, p: int, g: int, n: int, **more: Any) -> dict[str, Any]:
    return {
        "x": torch.randn(b, t, h, p),
        "dt": torch.randn(b, t, h) - 1,
        "A": -torch.exp(torch.randn(h)),
        "B": torch.randn(b, t, g, n),
        "C": torch.randn(b, t, g, n),
        "dt_softplus": True,
        **more,
    }


def _full_ssd(b: int, t: int, h: int, p: int, g: int, n: int, **more: Any) -> dict[str, Any]:
    extra = {"D": torch.randn(h), "z": torch.randn(b, t, h, p), "dt_bias": torch.randn(h)}
    start = {"initial_state": torch.randn(b, h, p, n)}
    return {**_ssd(b, t, h, p, g, n), **extra, **start, **more}


def _packed_ssd(*lengths: int) -> dict[str, Any]:
    given, start = _full_ssd(1, sum(lengths), 4, 5, 2, 9), torch.randn(len(lengths), 4, 5, 9)
    return {**given, "initial_state": start, "cu_seqlens": offsets(*lengths)}


def _sliced_ssd() -> dict[str, Any]:
    """x, B and C as slices of one convolution's output, z and dt of one projection's."""
    given, (b, t, h, p, g, n) = _full_ssd(2, 70, 4, 8, 2, 16), (2, 70, 4, 8, 2, 16)
    x, B, C = torch.randn(b, t, h * p + 2 * g * n).split([h * p, g * n, g * n], -1)
    z, _, dt = torch.randn(b, t, h * p + 3 + h).split([h * p, 3, h], -1)
    given |= {"x": x.unflatten(2, (h, p)), "z": z.unflatten(2, (h, p)), "dt": dt}
    return {**given, "B": B.unflatten(2, (g, n)), "C": C.unflatten(2, (g, n))}


def _heads_first_ssd() -> dict[str, Any]:
    """Every long tensor stored (b, h, t, ...): heads do not lie end to end."""
    given = _full_ssd(2, 19, 4, 8, 2, 16)
    for name in ("x", "z", "B", "C", "dt"):
        given[name] = given[name].transpose(1, 2).contiguous().transpose(1, 2)
    return given


def _mixed_ssd() -> dict[str, Any]:
    """x and z narrow, what makes the steps float32, a narrow A and state: all of it legal."""
    given = _full_ssd(2, 21, 4, 8, 2, 16)
    narrow = {name: given[name].bfloat16() for name in ("x", "z", "A", "C", "initial_state")}
    return {**given, **narrow, "B": given["B"].half()}


def _raw_steps_ssd() -> dict[str, Any]:
    """dt as it is, zero or negative (clamped to zero) at some tokens: absent ones."""
    given = _ssd(2, 70, 4, 8, 2, 16, dt_softplus=False)
    given["dt"] = given["dt"] + 1.5
    return given


def _vanishing_ssd() -> dict[str, Any]:
    """Steps so long that decays underflow, beside heads that hardly forget."""
    given = _full_ssd(1, 140, 4, 8, 1, 16)
    return {**given, "A": torch.tensor([-1e4, -50.0, -1e-6, 0.0])}


_SSD: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": lambda: _ssd(1, 37, 4, 16, 1, 16),
    "everything": lambda: _full_ssd(2, 67, 6, 16, 2, 32),
    "one token": lambda: _full_ssd(3, 1, 4, 8, 2, 16),
    "one token from nothing": lambda: _ssd(2, 1, 4, 33, 1, 17),
    "three tokens": lambda: _full_ssd(2, 3, 4, 5, 1, 7),
    "no tokens": lambda: _full_ssd(2, 0, 4, 8, 2, 16),
    "one of each": lambda: _full_ssd(1, 67, 1, 1, 1, 1),
    "primes": lambda: _full_ssd(3, 31, 7, 5, 1, 3),
    "wider than tiles": lambda: _full_ssd(1, 70, 3, 33, 3, 37),
    "chunk less one": lambda: _full_ssd(1, 63, 2, 8, 1, 16),
    "one chunk": lambda: _full_ssd(1, 64, 2, 8, 1, 16),
    "chunk and one": lambda: _ssd(1, 65, 2, 8, 1, 16),
    "two chunks less one": lambda: _ssd(1, 127, 2, 8, 1, 16),
    "two chunks and one": lambda: _full_ssd(1, 129, 2, 8, 1, 16),
    "a group a head": lambda: _full_ssd(1, 70, 3, 8, 3, 16),
    "wide": lambda: _full_ssd(1, 70, 14, 16, 1, 32),
    "many sequences": lambda: _full_ssd(40, 9, 2, 8, 1, 16),
    "no gate": lambda: _full_ssd(1, 70, 4, 8, 1, 16, z=None),
    "no skip": lambda: _full_ssd(1, 70, 4, 8, 1, 16, D=None, dt_bias=None),
    "clamped": lambda: _full_ssd(1, 70, 4, 8, 2, 16, dt_min=0.2, dt_max=0.6),
    "ragged": lambda: _packed_ssd(3, 70, 0, 1, 64, 129),
    "empty ends": lambda: _packed_ssd(0, 5, 33, 0),
    "sliced": _sliced_ssd,
    "heads first": _heads_first_ssd,
    "raw steps": _raw_steps_ssd,
    "vanishing": _vanishing_ssd,
    "mixed": _mixed_ssd,
}


def _recurrence(b: int, t: int, d: int, **more: Any) -> dict[str, Any]:
    return {"a": torch.rand(b, t, d) * 1.1, "b": torch.randn(b, t, d), **more}


def _packed_recurrence(*lengths: int) -> dict[str, Any]:
    start, cu_seqlens = torch.randn(len(lengths), 19), offsets(*lengths)
    return _recurrence(1, sum(lengths), 19, initial_state=start, cu_seqlens=cu_seqlens)


def _sliced_recurrence() -> dict[str, Any]:
    a, b = torch.randn(2, 70, 40).chunk(2, -1)
    return {"a": a, "b": b}


def _resetting_recurrence() -> dict[str, Any]:
    """A zero decay begins anew; powers of a small one underflow."""
    given = _recurrence(2, 70, 19, initial_state=torch.randn(2, 19))
    given["a"] = given["a"].square() * (torch.rand(2, 70, 1) < 0.9)
    return given


_RECURRENCE: dict[str, Callable[[], dict[str, Any]]] = {
    "plain": lambda: _recurrence(1, 37, 24),
    "everything": lambda: _recurrence(2, 70, 35, initial_state=torch.randn(2, 35)),
    "one token": lambda: _recurrence(3, 1, 33, initial_state=torch.randn(3, 33)),
    "no tokens": lambda: _recurrence(2, 0, 5, initial_state=torch.randn(2, 5)),
    "one chunk": lambda: _recurrence(1, 64, 67),
    "two chunks and one": lambda: _recurrence(1, 129, 150, initial_state=torch.randn(1, 150)),
    "ragged": lambda: _packed_recurrence(3, 70, 0, 1, 64, 129),
    "empty ends": lambda: _packed_recurrence(0, 5, 33, 0),
    "sliced": _sliced_recurrence,
    "resetting": _resetting_recurrence,
    "wide": lambda: _recurrence(1, 70, 600),
    "many sequences": lambda: _recurrence(60, 20, 40),
    "mixed": lambda: {**_recurrence(2, 21, 20), "a": torch.rand(2, 21, 20).bfloat16()},
}

_STORAGE = {
    "selective_scan": ("x", "dt", "B", "C", "z"),
    "causal_conv1d": ("x", "weight", "bias", "initial_state"),
    "ssd_scan": ("x", "dt", "B", "C", "z"),
    "linear_recurrence": ("a", "b"),
}
_MAKERS = {
    "selective_scan": _SELECTIVE,
    "causal_conv1d": _CONV,
    "ssd_scan": _SSD,
    "linear_recurrence": _RECURRENCE,
}

SAMPLES: list[Sample] = [
    Sample(op, name, make, () if name == "mixed" else _STORAGE[op])
    for op, makers in _MAKERS.items()
    for name, make in makers.items()
]
