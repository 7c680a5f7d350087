"""Follows shifted copies of a tensor through a graph, by one rule an ATen operation.

A rule takes the follower and a node and answers the node's value (see ``taps.shifted``)
or raises Lost. What is not in the table, and what a rule does not know, leads out of the domain.
The rules are in ``shift_moves`` (what moves tokens) and ``shift_sums`` (what adds and multiplies).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from effpass.axes.labels import opname
from effpass.axes.relation import arguments
from effpass.graph.region import CarveError, carve, constant
from effpass.graph.writes import writes
from effpass.patterns.taps.shifted import (
    Coefficient,
    Factor,
    Lost,
    Pick,
    Value,
    zeros,
)

aten = torch.ops.aten
Rule = Callable[["Follower", Node], Any]
RULES: dict[Any, Rule] = {}
MOST_NODES = 2000
MOST_CONSTANT = 1 << 22
ZEROS = ("zeros", "zeros_like", "new_zeros")
FULLS = ("full", "full_like", "new_full", "fill")
VIEWS = ("expand", "view", "reshape", "unsqueeze", "squeeze", "to", "_to_copy", "clone", "slice")


def rule(*targets: Any) -> Callable[[Rule], Rule]:
    """The decorated function is the rule of these operations."""

    def keep(function: Rule) -> Rule:
        RULES.update(dict.fromkeys(targets, function))
        return function

    return keep


class Follower:
    """Follows values through a graph, from ``sources`` on.

    Sizes are numbers: ``sizes`` gives the symbols their values; one without leads out.
    ``zeros`` are the operands that are zero whatever the inputs.
    """

    def __init__(self, sources: Mapping[Node, Value], sizes: Mapping[Any, int]) -> None:
        self.sizes = sizes
        self.env: dict[Node, Any] = dict(sources)
        self.zeros: set[Node] = set()

    def follow(self, sources: Iterable[Node]) -> None:
        """Visits everything behind the sources, in the graph's order."""
        pending: list[Node] = []
        seen: set[Node] = set(self.env)

        def push(node: Node) -> None:
            for user in node.users:
                if user not in seen and user.target in RULES:
                    seen.add(user)
                    heapq.heappush(pending, user)

        for source in sources:
            push(source)
        visited = 0
        while pending and visited < MOST_NODES:
            node, visited = heapq.heappop(pending), visited + 1
            try:
                self.env[node] = RULES[node.target](self, node)
            except Lost:
                continue
            push(node)

    def value(self, node: Any) -> Value:
        """The value of an operand; Lost where it has none."""
        found = self.env.get(node) if isinstance(node, Node) else None
        if isinstance(found, Value):
            return found
        if isinstance(node, Node) and is_zero(node):
            self.zeros.add(node)
            return zeros(self.shape(node))
        raise Lost

    def known(self, node: Any) -> bool:
        """Whether an operand has a value of its own."""
        return isinstance(node, Node) and isinstance(self.env.get(node), Value)

    def number(self, value: Any) -> Any:
        """A size or a position, symbols replaced."""
        if isinstance(value, Node):
            value = value.meta.get("val")
        if isinstance(value, torch.SymInt):
            known = value.node.expr.xreplace(self.sizes)
            value = int(known) if known.is_number else None
        if isinstance(value, int):
            return value
        raise Lost

    def scalar(self, value: Any) -> float:
        """A number that multiplies or is added: one that no size decides."""
        if isinstance(value, int | float):
            return float(value)
        raise Lost

    def shape(self, node: Node) -> tuple[int, ...]:
        """The shape of any tensor."""
        return tuple(self.number(s) for s in node.meta["val"].shape)

    def constant(self, node: Any) -> Tensor | None:
        """The value of a tensor that depends on no input but sizes; else None."""
        if not isinstance(node, Node) or not isinstance(node.meta.get("val"), Tensor):
            return None
        if math.prod(self.shape(node)) > MOST_CONSTANT:
            return None
        sizes = sizes_behind(node)
        if not sizes:
            return constant(node, MOST_CONSTANT)
        try:
            return carve(sizes, [node]).run([self.number(size) for size in sizes])[0]
        except (CarveError, Lost):
            return None

    def factor(self, node: Node, rank: int) -> Coefficient:
        """An operand that is not followed, aligned with the last dims of a value of ``rank``."""
        shape = self.shape(node)
        offset = rank - len(shape)
        picks = (Pick(None if n == 1 else i + offset) for i, n in enumerate(shape))
        return Coefficient(1.0, (Factor(node, tuple(picks)),))


def sizes_behind(node: Node) -> list[Node]:
    """The symbolic sizes that a tensor is made of, tensors between passed through."""
    found: dict[Node, None] = {}
    pending, seen = [node], set()
    while pending and len(seen) < 100:
        each = pending.pop()
        if isinstance(each.meta.get("val"), torch.SymInt):
            found[each] = None
        elif each not in seen and each.op != "placeholder":
            seen.add(each)
            pending += each.all_input_nodes
    return list(found)


def is_zero(node: Node) -> bool:
    """Whether a tensor is zero whatever the inputs."""
    while opname(node) in VIEWS and isinstance(node.args[0], Node):
        node = node.args[0]
    if opname(node) in ZEROS:
        return not written(node)
    if opname(node) in FULLS:
        given = arguments(node).get("fill_value", arguments(node).get("value"))
        return _is_number(given, 0.0) and not written(node)
    return _is_number(node, 0.0)


def written(node: Node) -> bool:
    """Whether something writes in place to a tensor, or to a view of it."""
    storage = node.meta["val"].untyped_storage()._cdata
    pending = [node]
    while pending:
        each = pending.pop()
        for user in each.users:
            if each in writes(user):
                return True
            value = user.meta.get("val")
            views = value if isinstance(value, list | tuple) else [value]
            tensors = [v for v in views if isinstance(v, Tensor)]
            if any(v.untyped_storage()._cdata == storage for v in tensors):
                pending.append(user)
    return False


def _is_number(value: Any, number: float) -> bool:
    if isinstance(value, Node):
        tensor = value.meta.get("val")
        if not isinstance(tensor, Tensor) or tensor.is_complex():
            return False
        known = constant(value) if tensor.dim() == 0 or value.op == "get_attr" else None
        return known is not None and bool((known == number).all())
    return isinstance(value, int | float) and value == number


def permutation(node: Node, rank: int) -> list[int] | None:
    """The old dim of every new one, where a node only permutes dims."""
    if opname(node) not in ("transpose", "permute", "t", "mT", "swapaxes", "numpy_T", "movedim"):
        return None
    with torch.device("meta"):
        sizes = [*range(1, rank + 1)]
        moved = node.target(torch.empty(sizes), *node.args[1:], **node.kwargs)  # type: ignore[operator]
    return [size - 1 for size in moved.shape]
