"""Ops as nodes of a captured graph."""

from __future__ import annotations

from torch.fx import Node

from effpass.ops.op import OPS, Op


def called(node: Node) -> Op | None:
    """The op of effpass that a node calls; None for anything else."""
    space, _, name = getattr(getattr(node.target, "_schema", None), "name", "").partition("::")
    return OPS.get(name) if space == "effpass" else None


def takes_boundaries(node: Node) -> bool:
    """Whether a node calls an op that can be given ``cu_seqlens``."""
    op = called(node)
    return op is not None and "cu_seqlens" in op.tensor_names
