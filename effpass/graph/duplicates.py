"""Merge duplicates: nodes that compute the same of the same become one node, unused ones go. Exact.

A loop that Dynamo unrolled computes ``-exp(A_log)`` once a step, and slices ``x[:]`` before it
selects ``x[:, t]``: after this the steps read one node. A tensor that somebody writes to, or that
the graph returns, keeps a node of its own.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Graph, Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from effpass.graph.writes import writes

aten = torch.ops.aten


def merge_duplicates(graph: Graph) -> int:
    """Merges in place; answers how many nodes went."""
    own, seen, merged = _own_storages(graph), {}, 0
    for node in list(graph.nodes):
        if node.op != "call_function" or not _storages(node).isdisjoint(own):
            continue
        target = _whole(node)
        if target is None and _pure(node):
            target = seen.setdefault(_key(node), node)
        if target is None or target is node:
            continue
        node.replace_all_uses_with(target)
        graph.erase_node(node)
        merged += 1
    return merged + _join_cats(graph) + _drop_unused(graph)


def _whole(node: Node) -> Node | None:
    """``x[:]`` is x."""
    if node.target is not aten.slice.Tensor:
        return None
    source, dim, start, end, step = (*node.args, *(0, None, None, 1)[len(node.args) - 1 :])
    if not isinstance(source, Node) or start not in (0, None) or step != 1:
        return None
    size = source.meta["val"].shape[dim]
    reaches = end is None or (isinstance(end, int) and isinstance(size, int) and end >= size)
    return source if reaches or end == 2**63 - 1 else None


def _pure(node: Node) -> bool:
    if node.target is operator.getitem:
        return True
    if not isinstance(node.target, OpOverload) or node.target.namespace not in ("aten", "effpass"):
        return False
    seeded = torch.Tag.nondeterministic_seeded in node.target.tags
    return not seeded and not writes(node)


def _key(node: Node) -> Any:
    args, kwargs = map_arg((node.args, node.kwargs), lambda n: _Name(n.name))
    leaves, spec = pytree.tree_flatten((args, kwargs))
    # 1 == 1.0 == True, and they give other dtypes
    typed = tuple((type(v), str(v)) for v in leaves)
    return node.target, typed, str(spec), node.meta.get("effpass_region")


class _Name(str):
    """The name of a node, told apart from a string argument."""


def _own_storages(graph: Graph) -> set[int]:
    """Storages that are written to, or returned."""
    nodes = [target for node in graph.nodes for target in writes(node)]
    nodes += graph.output_node().all_input_nodes
    return set().union(*(_storages(node) for node in nodes))


def _storages(node: Node) -> set[int]:
    values = pytree.tree_leaves(node.meta.get("val"))
    return {v.untyped_storage()._cdata for v in values if isinstance(v, Tensor)}


def _drop_unused(graph: Graph) -> int:
    dropped = 0
    for node in reversed(list(graph.nodes)):
        if node.op == "call_function" and not node.users and _pure(node):
            graph.erase_node(node)
            dropped += 1
    return dropped


def _join_cats(graph: Graph) -> int:
    """``cat([cat([a, b]), c])`` is ``cat([a, b, c])``: a result that grew by one token a step."""
    joined = 0
    for node in reversed(list(graph.nodes)):
        if node.target is not aten.cat.default or not node.users:
            continue
        parts, inner = [list(node.args[0])], None  # type: ignore[arg-type]
        while parts[-1] and _grows(parts[-1][0], node):
            inner = parts[-1].pop(0)
            parts.append(list(inner.args[0]))
        if inner is None:
            continue
        chain = []
        first = node.args[0][0]  # type: ignore[index]
        while len(chain) < len(parts) - 1:
            chain.append(first)
            first = first.args[0][0]  # type: ignore[union-attr]
        node.args = ([p for part in reversed(parts) for p in part], *node.args[1:])
        for old in chain:
            graph.erase_node(old)  # type: ignore[arg-type]
        joined += len(chain)
    return joined


def _grows(part: Any, node: Node) -> bool:
    if not isinstance(part, Node) or part.target is not aten.cat.default or len(part.users) != 1:
        return False
    same = _dim(part) == _dim(node)
    return same and part.meta.get("effpass_region") == node.meta.get("effpass_region")


def _dim(node: Node) -> int:
    dim = node.args[1] if len(node.args) > 1 else 0
    return int(dim) % node.meta["val"].dim()  # type: ignore[call-overload]
