"""Kernels for CPUs; importing this registers them.

In C++, compiled on first use, but for attention, which calls torch's own.
"""

from effpass.lowering.cpu import (
    causal_conv1d,
    linear_recurrence,
    selective_scan,
    ssd_scan,
    varlen_attention,
)

__all__ = ["causal_conv1d", "linear_recurrence", "selective_scan", "ssd_scan", "varlen_attention"]
