"""The Triton kernels, a file an op; imported when the first of them is launched."""
