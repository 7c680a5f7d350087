"""Sizes of a graph's inputs that are the same, though Dynamo has a symbol for each."""

from __future__ import annotations

from torch import SymInt, Tensor
from torch.fx import GraphModule


def join_sizes(gm: GraphModule) -> None:
    """Makes one symbol of batch sizes, and of lengths, that are equal in the call being compiled.

    Token ids (b, t) and their mask (b, t) have symbols of their own where nothing in the graph
    compares them. Asking whether they are equal makes that a guard: a later call in which they are
    not is compiled anew.
    """
    found: tuple[list[SymInt], list[SymInt]] = [], []
    for node in gm.graph.find_nodes(op="placeholder"):
        value = node.meta.get("val")
        if isinstance(value, Tensor) and value.dim() > 1 and not node.meta.get("effpass_parameter"):
            for sizes, size in zip(found, value.shape, strict=False):
                if isinstance(size, SymInt):
                    sizes.append(size)
    for sizes in found:
        first: dict[int, SymInt] = {}
        for size in sizes:
            bool(first.setdefault(size.node.hint, size) == size)
