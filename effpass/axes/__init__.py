"""Axes: what each dimension of each tensor is, and what every op does along it."""
