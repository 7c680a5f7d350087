"""Compiled C++ kernels for CPUs; importing this registers them, the first use compiles them."""
