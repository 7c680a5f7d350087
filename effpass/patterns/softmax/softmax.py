"""Softmax in its spellings: the op, ``exp(log_softmax)``, and exponentials over their sum.

Exponentials from which no largest score was taken away are softmax too, as mathematics. In eager
they overflow, or all vanish in a row masked by a large finite number: 0 / 0. Such rows are NaN in
eager and finite as the op; never the reverse.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import Node

from effpass.axes.labels import EXPANDS, KEEPS, argument, opname

OPS = ("softmax", "_softmax", "special_softmax")
LOGS = ("log_softmax", "_log_softmax", "special_log_softmax")
DETACHED = (*KEEPS, *EXPANDS, "detach")


@dataclass(frozen=True)
class Softmax:
    """``weights`` is the softmax of ``scores`` along ``axis``; ``nodes`` compute it.

    ``flaw``: why it is not quite one.
    """

    scores: Node
    weights: Node
    axis: int
    nodes: tuple[Node, ...]
    flaw: str | None = None


def is_softmax(node: Node) -> bool:
    """Whether a node may be the last of a softmax."""
    name = opname(node)
    if name in OPS:
        return True
    if name == "exp":
        return opname(argument(node, 0)) in (*LOGS, "sub")
    return name == "div" and opname(argument(node, 0)) == "exp"


def softmax(node: Node) -> Softmax | None:
    """The softmax that ends in a node."""
    name, inner = opname(node), argument(node, 0)
    if name in OPS:
        return _made(inner, node, node.args[1], (node,))
    if name == "exp" and opname(inner) in LOGS:
        return _made(argument(inner, 0), node, inner.args[1], (inner, node))
    if name == "exp" and opname(inner) == "sub":
        return _by_logsumexp(node, inner)
    if name == "div" and opname(inner) == "exp":
        return _by_sum(node, inner)
    return None


def _by_logsumexp(node: Node, difference: Node) -> Softmax | None:
    scores, total = argument(difference, 0), argument(difference, 1)
    if not isinstance(total, Node):
        return None  # a number is taken away
    found = _reduction(total, "logsumexp")
    if found is None or found[0].args[0] is not scores or difference.kwargs:
        return None
    reduction, axis, between = found
    return _made(scores, node, axis, (reduction, *between, difference, node))


def _by_sum(node: Node, top: Node) -> Softmax | None:
    bottom, flaw = argument(node, 1), None
    if len(node.args) > 2 or node.kwargs or not isinstance(bottom, Node):
        return None
    if opname(bottom) in ("add", "clamp", "clamp_min"):
        flaw = "something is added to the sum of exponentials"
        flaw = flaw if opname(bottom) == "add" else "the sum of exponentials is clamped"
        sums = [n for n in bottom.all_input_nodes if _reduction(n, "sum") is not None]
        bottom = sums[0] if sums else bottom
    found = _reduction(bottom, "sum")
    if found is None or found[0].args[0] is not top:
        return None
    reduction, axis, between = found
    return _made(argument(top, 0), node, axis, (top, reduction, *between, node), flaw)


def _made(
    scores: Any, weights: Node, axis: Any, nodes: tuple[Node, ...], flaw: str | None = None
) -> Softmax | None:
    if not isinstance(scores, Node) or not isinstance(axis, int) or opname(scores) == "":
        return None
    rank = scores.meta["val"].dim()
    return Softmax(scores, weights, axis % rank, nodes, flaw) if rank else None


def _reduction(node: Node, name: str) -> tuple[Node, int, tuple[Node, ...]] | None:
    """A reduction along one axis that keeps it, or the axis put back behind it."""
    between: list[Node] = []
    while opname(node) in DETACHED and opname(node) != "detach":
        between.append(node)
        node = argument(node, 0)
    place = None
    if opname(node) == "unsqueeze":
        between.append(node)
        node, place = argument(node, 0), node.args[1]
    if opname(node) != name or len(node.args) < 2 or "dtype" in node.kwargs:
        return None
    axes = node.args[1]
    axes = [axes] if isinstance(axes, int) else axes
    if not isinstance(axes, Sequence) or len(axes) != 1 or not isinstance(axes[0], int):
        return None
    rank = argument(node, 0).meta["val"].dim()
    axis, keeps = axes[0] % rank, len(node.args) > 2 and node.args[2] is True
    if keeps == (place is not None):
        return None
    if place is not None and (not isinstance(place, int) or place % rank != axis):
        return None
    return node, axis, tuple(between)
