"""Is a dim made by weights? What a projection puts out are channels, never time."""

from __future__ import annotations

import operator

import torch
from torch import Tensor
from torch.fx import Node

from effpass.patterns.products.algebra import RULES, Dims, Label, Product, fresh, resolved, shape

aten = torch.ops.aten
PIECES = (aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default)
CONVOLUTIONS = (aten.conv1d.default, aten.conv2d.default, aten.convolution.default)


def made_by_weights(node: Node, dim: int) -> bool:
    """Whether ``dim`` is the output of a linear layer, an embedding or a convolution's channels.

    Followed backwards through views and elementwise operations; False where nothing tells.
    """
    dims = fresh(node)
    wanted = set(dims[dim])
    pending, seen = [(node, dims)], set()
    while pending:
        node, dims = pending.pop()
        wanted |= {r for label in wanted for r in label.resolved()}
        if node in seen or len(seen) > 200:
            continue
        seen.add(node)
        dims = resolved(dims)
        if _makes(node, dims, wanted):
            return True
        pending += _sources(node, dims)
    return False


def _makes(node: Node, dims: Dims, wanted: set[Label]) -> bool:
    if node.target in (aten.linear.default, aten.embedding.default, aten.addmm.default):
        return bool(wanted & set(dims[-1]))
    if node.target in CONVOLUTIONS:
        return bool(wanted & set(dims[1]))
    return False


def _sources(node: Node, dims: Dims) -> list[tuple[Node, Dims]]:
    rule = RULES.get(node.target)
    if rule is not None:
        return rule(node, dims, Product()) or []
    if node.target is operator.getitem:
        whole = node.args[0].args[0] if node.args[0].target in PIECES else None  # type: ignore[union-attr]
        return [(whole, dims)] if isinstance(whole, Node) else []
    if node.target is aten.linear.default:
        source: Node = node.args[0]  # type: ignore[assignment]
        return [(source, (*dims[:-1], fresh(source)[-1]))]
    if torch.Tag.pointwise not in getattr(node.target, "tags", ()):
        return []
    made = []
    for source in node.all_input_nodes:
        if isinstance(source.meta.get("val"), Tensor):
            own = dims[len(dims) - len(shape(source)) :] if shape(source) else ()
            broadcast = zip(shape(source), own, strict=True)
            made.append((source, tuple(() if s == 1 else d for s, d in broadcast)))
    return made
