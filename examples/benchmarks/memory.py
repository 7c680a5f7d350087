"""Resident memory of this process, in MiB, from ``/proc`` (Linux; None elsewhere)."""

from __future__ import annotations

import ctypes
import gc
from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")


def reset_peak() -> float | None:
    """Returns freed memory to the system, restarts the peak, and answers what is resident now."""
    gc.collect()
    if not _STATUS.exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)
    try:
        _CLEAR.write_text("5")
    except OSError:  # a container may forbid it: then no peak can be told, rather than a wrong one
        return None
    return _read("VmRSS")


def peak() -> float:
    """The largest resident size since ``reset_peak``."""
    return _read("VmHWM")


def _read(field: str) -> float:
    for line in _STATUS.read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"expected {field} in {_STATUS}, found none")
