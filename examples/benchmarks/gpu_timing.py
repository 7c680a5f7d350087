"""What all sections of ``gpu.py`` share: the device, times, and the error of a wrong number."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LONG = 1.0  # seconds: what takes longer is run twice, not warmed up and repeated
Case = tuple[str, Callable[[], dict[str, Any]]]


class WrongNumber(AssertionError):
    """A result that disagrees with its reference."""


def seconds(run: Callable[[], Any]) -> float:
    """The median time of ``run``, caches flushed between runs; of a long one, the better of two."""
    first = _once(run)
    if DEVICE == "cpu":
        return first
    if first > LONG:
        return min(first, _once(run))
    from triton.testing import do_bench

    return float(do_bench(run, warmup=50, rep=300, return_mode="median")) / 1e3


def _once(run: Callable[[], Any]) -> float:
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    started = time.perf_counter()
    run()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started
