"""Lowerings: where the doing is. Importing this registers every implementation of every op.

Tried in this order: ``step`` (one token, traced into the graph), ``cpu`` (compiled C++), and
``inline``, the op's own reference function, which runs anything.
"""

from effpass.lowering import cpu  # noqa: I001  the last one registered is the first one tried
from effpass.lowering import step

__all__ = ["cpu", "step"]
