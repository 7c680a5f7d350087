"""Shifted copies of a tensor, followed through a graph and read as the taps of a convolution."""
