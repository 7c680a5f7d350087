"""Compiled C++ kernels for CPUs; importing this registers them, the first use compiles them."""

from effpass.lowering.cpu import causal_conv1d, linear_recurrence, selective_scan, ssd_scan

__all__ = ["causal_conv1d", "linear_recurrence", "selective_scan", "ssd_scan"]
