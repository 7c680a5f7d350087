"""Attention scores: reads what stands in a softmax back to the product of queries and keys.

``scores = scale * q k^T``, perhaps capped by tanh, then steps outwards: something is added, masked
positions are overwritten. Scale factors may stand anywhere, views and casts between anything.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Node

from effpass.axes.contraction import Contraction, contraction, is_float
from effpass.axes.labels import Dim, Dims, Labels, aligned, argument, opname
from effpass.patterns.proposal import Missed
from effpass.patterns.softmax.bounds import fixed_value
from effpass.patterns.softmax.masks import Added, Filled, Floor, Operand, Step

CASTS = ("to", "_to_copy", "type_as")
FARTHEST = 60


@dataclass(frozen=True)
class Multiplier:
    """A tensor that multiplies (or divides) queries or keys, since it does not vary over both."""

    operand: Operand
    divides: bool
    on_keys: bool


@dataclass(frozen=True)
class Scores:
    """What a softmax is taken of. ``path`` holds the nodes from the product outwards.

    With a ``cap`` it is ``cap * tanh(scale * q k^T)`` that the steps are applied to.
    """

    query: Operand
    key: Operand
    path: tuple[Node, ...]
    scale: float = 1.0
    cap: float | None = None
    multipliers: tuple[Multiplier, ...] = ()
    steps: tuple[Step, ...] = ()

    def scaled(self, factor: float) -> Scores:
        """Everything so far, times a number."""
        steps = tuple(step.scaled(factor) for step in self.steps)
        if self.cap is not None:
            return replace(self, cap=self.cap * factor, steps=steps)
        return replace(self, scale=self.scale * factor, steps=steps)

    def then(self, step: Step) -> Scores:
        """With one more step outwards."""
        return replace(self, steps=(*self.steps, step))


class Reader:
    """Reads the scores of one softmax, which runs over the labels ``keys``."""

    def __init__(self, labels: Labels, keys: Dim) -> None:
        self.labels, self.keys = labels, keys
        self.tried: set[Node] = set()

    def read(self, node: Any, dims: Dims, depth: int = 0) -> Scores | None:
        """The scores whose value is ``node``; None where no product of two tensors is behind it.

        Raises Missed where there is one, behind something that attention does not have.
        """
        if not is_float(node) or node in self.tried or depth > FARTHEST:
            return None
        if not self._over_keys(dims):
            return None
        self.tried.add(node)
        found = self._product(node, dims) or self._around(node, dims, depth + 1)
        return None if found is None else replace(found, path=(*found.path, node))

    def _over_keys(self, dims: Dims) -> bool:
        held = self.labels.resolve(label for dim in dims for label in dim)
        return set(self.labels.resolve(self.keys)) <= set(held)

    def _shares(self, operand: Operand) -> bool:
        held = self.labels.resolve(label for dim in operand.dims for label in dim)
        return not set(self.labels.resolve(self.keys)).isdisjoint(held)

    def _product(self, node: Node, dims: Dims) -> Scores | None:
        product = contraction(node)
        if product is None:
            return None
        left, right, _ = product.labelled(self.labels, out=dims)
        sides = (Operand(product.left, left), Operand(product.right, right))
        holders = [s for s in sides if self._over_keys(s.dims)]
        if len(holders) == 2:
            raise Missed("the softmax runs over an axis that queries and keys share", node)
        if not holders:
            if self._shares(sides[0]) and self._shares(sides[1]):
                raise Missed("the softmax runs over queries and keys together", node)
            return None
        key = holders[0]
        query = sides[0] if key is sides[1] else sides[1]
        found = Scores(query, key, ()).scaled(product.factor)
        if product.addend is None:
            return found
        return found.then(self._added(product.addend, product, dims))

    def _added(self, addend: Node, product: Contraction, dims: Dims) -> Added:
        return Added(self._operand(addend, dims), product.addend_factor)

    def _operand(self, node: Node, dims: Dims) -> Operand:
        return Operand(node, aligned(dims, node.meta["val"].shape))

    def _inner(self, node: Any, dims: Dims, depth: int) -> Scores | None:
        """The scores in one of several arguments, which may be broadcast."""
        if not is_float(node):
            return None
        return self.read(node, aligned(dims, node.meta["val"].shape), depth)

    def _around(self, node: Node, dims: Dims, depth: int) -> Scores | None:
        name = opname(node)
        if name in CASTS:
            return self._inner(node.args[0], dims, depth)
        if name in RULES:
            return RULES[name](self, node, dims, depth)
        behind = self.labels.behind(node, dims) if node.args else None
        if behind is not None:
            return self.read(node.args[0], behind, depth)
        if _hides_product(node):
            raise Missed(f"between the scores and the softmax is {name or node.target}", node)
        return None

    def _either(self, node: Node, dims: Dims, depth: int) -> tuple[Scores, Any] | None:
        """The argument in which the scores are, and the other one."""
        missed = None
        for inner, other in (node.args[:2], node.args[1::-1]):
            try:
                if (found := self._inner(inner, dims, depth)) is not None:
                    return found, other
            except Missed as miss:
                missed = missed or miss
        if missed is not None:
            raise missed
        return None

    def add(self, node: Node, dims: Dims, depth: int) -> Scores | None:
        """``scores + bias``, ``bias + alpha * scores``, ``scores - scores.max()``."""
        found = self._either(node, dims, depth)
        if found is None:
            return None
        scores, other = found
        factor = number(node.kwargs.get("alpha", 1))
        if factor is None:
            raise Missed("the scores are added with a factor that is no fixed number", node)
        factor = -factor if opname(node) == "sub" else factor
        if other is node.args[0]:  # the factor stands before the scores
            scores, factor = scores.scaled(factor), 1.0
        elif (chain := self._maximum(other, node.args[0], dims)) is not None:
            return replace(scores, path=(*scores.path, *chain))
        if (value := number(other)) is not None:
            return scores.then(Added(value * factor, 1.0))
        return scores.then(Added(self._operand(other, dims), factor))

    def multiply(self, node: Node, dims: Dims, depth: int) -> Scores | None:
        """``scores * factor``."""
        found = self._either(node, dims, depth)
        return None if found is None else self._times(*found, node, dims, False)

    def divide(self, node: Node, dims: Dims, depth: int) -> Scores | None:
        """``scores / factor``."""
        scores = self._inner(node.args[0], dims, depth)
        if scores is None:
            return None
        if len(node.args) > 2 or node.kwargs:
            raise Missed("the scores are rounded", node)
        return self._times(scores, argument(node, 1), node, dims, True)

    def negate(self, node: Node, dims: Dims, depth: int) -> Scores | None:
        """``-scores``."""
        scores = self._inner(node.args[0], dims, depth)
        return None if scores is None else scores.scaled(-1.0)

    def fill(self, node: Node, dims: Dims, depth: int) -> Scores | None:
        """``scores.masked_fill(mask, value)`` and ``where(mask, scores, value)``."""
        if opname(node) == "masked_fill":
            inner, mask, value, inverted = *node.args[:3], False
        elif len(node.args) < 3:
            return None
        elif number(node.args[1]) is not None:
            mask, value, inner, inverted = *node.args[:3], False
        else:
            mask, inner, value, inverted = *node.args[:3], True
        scores = self._inner(inner, dims, depth)
        if scores is None:
            return None
        fixed = number(value)
        if fixed is None or not isinstance(mask, Node):
            raise Missed("masked scores are replaced by a tensor that is no fixed number", node)
        dtype = node.meta["val"].dtype
        if math.isfinite(fixed) and not -torch.finfo(dtype).max <= fixed:
            raise Missed(f"masked scores are set to {fixed:g}, which is -inf in {dtype}", node)
        return scores.then(Filled(self._operand(mask, dims), inverted, fixed))

    def clamp(self, node: Node, dims: Dims, depth: int) -> Scores | None:
        """``scores.clamp(min=lowest)`` and ``max(scores, lowest)``."""
        if opname(node) in ("maximum", "max"):
            pair = len(node.args) == 2 and isinstance(node.args[1], Node)
            found = self._either(node, dims, depth) if pair else None
            (scores, least), most = found or (None, None), None
        else:
            scores = self._inner(node.args[0], dims, depth)
            least, most = (*node.args[1:], None, None)[:2]
            least, most = node.kwargs.get("min", least), node.kwargs.get("max", most)
        if scores is None:
            return None
        fixed = number(least)
        if most is not None or fixed is None:
            raise Missed("the scores are clamped", node)
        return scores.then(Floor(fixed))

    def tanh(self, node: Node, dims: Dims, depth: int) -> Scores | None:
        """``tanh(scores)``: the middle of a soft cap."""
        scores = self._inner(node.args[0], dims, depth)
        if scores is None:
            return None
        if scores.steps or scores.multipliers or scores.cap is not None:
            raise Missed("something is done to the scores before tanh", node)
        return replace(scores, cap=1.0)

    def drop(self, node: Node, dims: Dims, depth: int) -> Scores | None:
        """Dropout on scores."""
        scores = self._inner(node.args[0], dims, depth)
        if scores is not None and (active := dropout(node)) is not None:
            raise Missed(active, node)
        return scores

    def _times(self, scores: Scores, factor: Any, node: Node, dims: Dims, divides: bool) -> Scores:
        if (fixed := number(factor)) is not None:
            return scores.scaled(1.0 / fixed if divides else fixed)
        if not isinstance(factor, Node):
            raise Missed("the scores are scaled by a size that changes", node)
        operand = self._operand(factor, dims)
        held = set(self.labels.resolve(label for dim in operand.dims for label in dim))
        keys = set(self.labels.resolve(self.keys))
        if not divides and held & keys and _is_mask(factor):
            return scores.then(Filled(operand, True, 0.0))
        over_key = self.labels.resolve(label for dim in scores.key.dims for label in dim)
        if held & keys and not held <= set(over_key):
            raise Missed("the scores are multiplied by a tensor over queries and keys", node)
        if scores.cap is not None or not all(isinstance(s, Added) for s in scores.steps):
            raise Missed("scores that are masked or capped are multiplied by a tensor", node)
        if scores.steps:
            raise Missed("biased scores are multiplied by a tensor", node)
        made = Multiplier(operand, divides, bool(held & keys))
        return replace(scores, multipliers=(*scores.multipliers, made))

    def _maximum(self, node: Any, scores: Any, dims: Dims) -> list[Node] | None:
        """The nodes of ``scores.amax(keys)``: what is the same for all keys changes nothing."""
        if not isinstance(node, Node) or not isinstance(scores, Node):
            return None
        operand, keys = self._operand(node, dims), set(self.labels.resolve(self.keys))
        if keys & set(self.labels.resolve(label for dim in operand.dims for label in dim)):
            return None
        chain: list[Node] = []
        while node is not scores:
            allowed = node.op == "call_function" and node.all_input_nodes
            if not allowed or len(chain) > 8 or len(node.all_input_nodes) != 1:
                return None
            chain.append(node)
            node = node.all_input_nodes[0]
        return chain


Rule = Callable[[Reader, Node, Dims, int], Scores | None]
RULES: dict[str, Rule] = {
    "add": Reader.add,
    "sub": Reader.add,
    "mul": Reader.multiply,
    "div": Reader.divide,
    "neg": Reader.negate,
    "masked_fill": Reader.fill,
    "where": Reader.fill,
    "clamp": Reader.clamp,
    "clamp_min": Reader.clamp,
    "maximum": Reader.clamp,
    "max": Reader.clamp,
    "tanh": Reader.tanh,
    "dropout": Reader.drop,
}


def number(value: Any) -> float | None:
    """The number that an argument is, or that every element of a constant tensor is."""
    if isinstance(value, bool) or value is None:
        return None
    if isinstance(value, int | float):
        return float(value)
    fixed = fixed_value(value) if isinstance(value, Node) else None
    if fixed is None or not fixed.numel() or fixed.dtype.is_complex:
        return None
    return float(fixed.min()) if bool(fixed.min() == fixed.max()) else None


def dropout(node: Node) -> str | None:
    """Why a dropout is more than the identity; None where it is not."""
    rate, active = node.args[1:3]
    return f"dropout is active (p = {rate})" if active and rate != 0 else None


def _is_mask(node: Node) -> bool:
    fixed = fixed_value(node)
    return fixed is not None and bool(((fixed == 0) | (fixed == 1)).all())


def _hides_product(node: Node) -> bool:
    """Whether a product is one of the few nodes behind."""
    pending = [(each, 0) for each in node.all_input_nodes]
    while pending:
        each, distance = pending.pop()
        if contraction(each) is not None:
            return True
        if distance < 3:
            pending += [(n, distance + 1) for n in each.all_input_nodes]
    return False
