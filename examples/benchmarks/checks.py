"""Measurements that compare effpass with itself: the scan alone, and what a new length costs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import memory
import torch
from cases import Sizes, mamba1, tokens
from torch import Tensor
from torch._dynamo.utils import counters

MIB = 2**20


def _seconds(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _scan_inputs(sizes: Sizes, length: int) -> dict[str, Any]:
    channels, states = 2 * sizes.hidden, sizes.states
    torch.manual_seed(0)
    return {
        "x": torch.randn(1, length, channels),
        "dt": torch.randn(1, length, channels),
        "A": -torch.arange(1.0, states + 1).repeat(channels, 1),
        "B": torch.randn(1, length, states),
        "C": torch.randn(1, length, states),
        "D": torch.ones(channels),
        "z": torch.randn(1, length, channels),
        "dt_bias": torch.randn(channels) - 4,
        "dt_softplus": True,
    }


def scan_alone(sizes: Sizes, repeats: int) -> dict[str, Any]:
    """Milliseconds of ``selective_scan`` and of ``linear`` hidden -> 4 hidden, taking turns."""
    from effpass.ops import selective_scan

    inputs = _scan_inputs(sizes, sizes.scan_tokens)
    rows = torch.randn(1, sizes.scan_tokens, sizes.hidden)
    weight = torch.randn(4 * sizes.hidden, sizes.hidden)
    times: dict[str, list[float]] = {"scan_ms": [], "linear_ms": []}
    with torch.no_grad():
        for turn in range(repeats + 3):
            scan = _seconds(lambda: selective_scan(**inputs))
            linear = _seconds(lambda: torch.nn.functional.linear(rows, weight))
            if turn >= 3:  # the first calls build the kernel and warm the caches
                times["scan_ms"].append(1e3 * scan)
                times["linear_ms"].append(1e3 * linear)
    return times


def scan_memory(sizes: Sizes) -> dict[str, Any]:
    """MiB that one long scan adds at its peak, and what a tensor (b, t, d, n) would take."""
    from effpass.ops import selective_scan

    inputs = _scan_inputs(sizes, sizes.scan_long_tokens)
    full = inputs["x"].numel() * sizes.states * 4 / MIB
    with torch.no_grad():
        selective_scan(**_scan_inputs(sizes, 8))
        before = memory.reset_peak()
        kept = selective_scan(**inputs)
        after = memory.peak() if before is not None else None
    result = sum(t.numel() * t.element_size() for t in kept) / MIB
    added = None if before is None or after is None else after - before
    return {"added_mib": added, "result_mib": result, "full_mib": full}


def lengths(sizes: Sizes, repeats: int, compiled: Callable[[Any], Any]) -> dict[str, Any]:
    """Per sequence length of Mamba-1: first call, median call (ms) and graphs compiled so far."""
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    model = compiled(mamba1(sizes))
    rows = []
    with torch.no_grad():
        for length in sizes.lengths:
            ids = tokens(sizes, length)
            rows.append({"tokens": length, **_length(model, ids, repeats)})
    return {"rows": rows}


def _length(model: Callable[..., Any], ids: Tensor, repeats: int) -> dict[str, Any]:
    def call() -> None:
        model(input_ids=ids, use_cache=False)

    first = _seconds(call)
    return {
        "first_call_s": first,
        "median_ms": 1e3 * statistics.median(_seconds(call) for _ in range(repeats)),
        "graphs": counters["stats"]["unique_graphs"],
    }
