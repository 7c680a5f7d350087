"""Compiled C++ kernels for CPUs; importing this registers them, the first use compiles them."""

from effpass.lowering.cpu import selective_scan

__all__ = ["selective_scan"]
