"""Lowerings: where the doing is. Importing this registers every implementation of every op.

Tried in this order: ``step`` (one token, traced into the graph), ``cpu`` (compiled C++), ``gpu``
(Triton, where asked for), and ``inline``, the op's own reference function, which runs anything.
"""

from effpass.lowering import gpu  # noqa: I001  the last one registered is the first one tried
from effpass.lowering import cpu
from effpass.lowering import step

__all__ = ["cpu", "gpu", "step"]
