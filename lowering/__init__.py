"""Lowerings: where the doing is. Importing this registers every implementation of every op."""

from effpass.lowering import cpu

__all__ = ["cpu"]
