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
    "mixed": lambda: {**_full(2, 33, 20, 4), "x": torch.randn(2, 33, 20).bfloat16()},
}

_STORAGE = {
    "selective_scan": ("x", "dt", "B", "C", "z"),
    "causal_conv1d": ("x", "weight", "bias", "initial_state"),
}
_MAKERS = {"selective_scan": _SELECTIVE, "causal_conv1d": _CONV}

SAMPLES: list[Sample] = [
    Sample(op, name, make, () if name == "mixed" else _STORAGE[op])
    for op, makers in _MAKERS.items()
    for name, make in makers.items()
]
