"""A normal form of quotients: a tensor as a number times powers of other tensors.

Like the normal form of products (``algebra``), with division, powers and ``exp`` of sums:
``exp(s - x) / y`` is exp(s) exp(x)^-1 y^-1. What is recognised inside are running products:
``cumprod(a)``, ``exp(cumsum(g))``, powers ``r ** t`` of a fixed decay, all perhaps with ones padded
in front. What holds none of them is left whole.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from effpass.axes.labels import opname
from effpass.axes.relation import arguments
from effpass.patterns.products.algebra import RULES, VIEWS, Dims, Label, Product, resolved, shape
from effpass.patterns.products.ramps import counted, is_ramp
from effpass.patterns.taps.shift_follow import is_zero, written

aten = torch.ops.aten
DEEPEST = 12
MOST_VISITS = 300
PADS = ("pad", "constant_pad_nd")
SCALES = (aten.mul.Tensor, aten.mul.Scalar, aten.multiply.Tensor)
WALKED = (
    "add",
    "sub",
    "rsub",
    "div",
    "reciprocal",
    "exp",
    "log",
    "pow",
    "slice",
    "clamp",
    "clamp_min",
)


@dataclass(frozen=True)
class Key:
    """What is raised to a power.

    ``kind``: "tensor", the node itself; "exp", its exponential; "prod", its running product along
    ``time``; "expsum", the exponential of its running sum; "pow" and "exppow", the node, or its
    exponential, to the number of the token (without a node: ``number``); "sum", the running sum
    that is looked for. Running products have ``front`` tokens padded in front, at which they are 1;
    the node's own tokens are then labelled ``inside``.
    """

    kind: str
    node: Node | None
    dims: Dims
    time: Label | None = None
    front: int = 0
    inside: Label | None = None
    number: float = 1.0

    @property
    def labels(self) -> frozenset[Label]:
        """All labels of the node."""
        return frozenset(r for dim in self.dims for label in dim for r in label.resolved())

    @property
    def runs(self) -> bool:
        """Whether it is a running product."""
        return self.kind in ("prod", "expsum", "pow", "exppow")


@dataclass
class Monomial:
    """``coefficient * prod(key ** power)``; of what was added to the running sum, ``start``."""

    coefficient: float = 1.0
    powers: dict[Key, float] = field(default_factory=dict)
    start: tuple[Node, Dims] | None = None

    def times(self, key: Key, power: float) -> None:
        """Multiplies by one more power."""
        self.powers[key] = self.powers.get(key, 0.0) + power

    def scale(self, number: float, power: float = 1.0) -> None:
        """Multiplies by a power of a number. Raises Unreadable where it is none."""
        if (number == 0 and power < 0) or (number < 0 and power != round(power)):
            raise Unreadable
        self.coefficient *= number**power

    def settled(self) -> Monomial:
        """The same with all labels resolved, and powers of 0 left out."""
        made = Monomial(self.coefficient, {}, self.start)
        for key, power in self.powers.items():
            time = None if key.time is None else key.time.resolved()
            if time is not None and len(time) != 1:
                raise Unreadable
            dims = resolved(key.dims)
            made.times(replace(key, dims=dims, time=time and time[0]), power)
        made.powers = {key: power for key, power in made.powers.items() if power}
        return made


class Unreadable(Exception):
    """It has no such form."""


class Reader:
    """Reads nodes as monomials. ``target`` is the running sum to be found: "sum" among the keys."""

    def __init__(self, target: Node | None) -> None:
        self.target = target
        self.holding: dict[Node, bool] = {}
        self.inner: dict[tuple[Label, int], Label] = {}
        self.visits = 0

    def read(self, node: Node, dims: Dims) -> Monomial:
        """The monomial of a node with these labels. Raises Unreadable."""
        made = Monomial()
        self._multiply(made, node, dims, 1.0)
        return made.settled()

    def read_exp(self, node: Node, dims: Dims) -> Monomial:
        """The monomial of the exponential of a node."""
        made = Monomial()
        self._exponent(made, node, dims, 1.0)
        return made.settled()

    def holds(self, node: Node, depth: int = DEEPEST) -> bool:
        """Whether a running product, or the target, is in it."""
        if node is self.target or opname(node) in ("cumsum", "cumprod") or is_ramp(node):
            return True
        if node not in self.holding:
            walked = opname(node) in (*WALKED, *PADS, "cat") or node.target in RULES
            sources = (
                node.all_input_nodes if walked and depth and node.op == "call_function" else []
            )
            self.holding[node] = any(self.holds(source, depth - 1) for source in sources)
        return self.holding[node]

    def _visit(self) -> None:
        self.visits += 1
        if self.visits > MOST_VISITS:
            raise Unreadable

    def _multiply(self, made: Monomial, node: Node, dims: Dims, power: float) -> None:
        """made *= node ** power"""
        self._visit()
        name = opname(node)
        if node is self.target and name == "cumsum":
            made.times(Key("sum", node, dims), power)
        elif running := self._running(node, dims, "prod"):
            made.times(running, power)
        elif not self.holds(node):
            made.times(Key("tensor", node, dims), power)
        elif name == "exp":
            self._exponent(made, _first(node), dims, power)
        elif name in ("div", "reciprocal") and not node.kwargs:
            self._divide(made, node, dims, power)
        elif name == "add" and self.target is not None and power == 1:
            self._started(made, node, dims)
        elif name == "pow":
            self._power(made, node, dims, power)
        else:
            self._product(made, node, dims, power)

    def _divide(self, made: Monomial, node: Node, dims: Dims, power: float) -> None:
        above, below = (1.0, node.args[0]) if opname(node) == "reciprocal" else node.args[:2]
        for value, sign in ((above, power), (below, -power)):
            if isinstance(value, Node):
                self._multiply(made, value, broadcast(value, dims), sign)
            else:
                made.scale(_number(value), sign)

    def _product(self, made: Monomial, node: Node, dims: Dims, power: float) -> None:
        """Views and products; anything else, sums over labels included, is left whole."""
        product = Product()
        rule = RULES.get(node.target)
        parts = None if rule is None else rule(node, resolved(dims), product)
        if parts is None or product.summed:
            made.times(Key("tensor", node, dims), power)
            return
        made.scale(product.coefficient, power)
        for part, labels in parts:
            self._multiply(made, part, labels, power)

    def _power(self, made: Monomial, node: Node, dims: Dims, power: float) -> None:
        """A fixed decay to the number of the token."""
        base, exponent = node.args[:2]
        if isinstance(base, Node) and exponent in (1, -1):
            self._multiply(made, base, dims, power * exponent)  # type: ignore[operator]
            return
        ramp = self._ramp_of(exponent, dims)
        if ramp is None:
            made.times(Key("tensor", node, dims), power)
            return
        start, step, time = ramp
        if not isinstance(base, Node):
            made.times(Key("pow", None, (), time, number=_number(base)), step * power)
            made.scale(_number(base), start * power)
            return
        labels = broadcast(base, dims)
        made.times(Key("pow", base, labels, time), step * power)
        if start:
            made.times(Key("tensor", base, labels), start * power)

    def _started(self, made: Monomial, node: Node, dims: Dims) -> None:
        """The running sum plus what is there before the first token."""
        if len(node.args) != 2 or node.kwargs:
            raise Unreadable
        sides = [n for n in node.args if isinstance(n, Node)]
        sums = [n for n in sides if self._leads(n)]
        if len(sides) != 2 or len(sums) != 1 or made.start is not None:
            raise Unreadable
        start = next(n for n in sides if n is not sums[0])
        inside = Monomial()
        self._multiply(inside, sums[0], broadcast(sums[0], dims), 1.0)
        if [key.kind for key in inside.powers] != ["sum"] or inside.coefficient != 1:
            raise Unreadable
        made.start = (start, broadcast(start, dims))
        made.powers |= inside.powers

    def _leads(self, node: Node) -> bool:
        """Whether it is the target, through views."""
        while node.target in VIEWS:
            node = _first(node)
        return node is self.target

    def _exponent(self, made: Monomial, node: Node, dims: Dims, power: float) -> None:
        """made *= exp(power * node)"""
        self._visit()
        name = opname(node)
        if node is self.target and name == "logcumsumexp":
            made.times(Key("sum", node, dims), power)
        elif running := self._running(node, dims, "expsum"):
            made.times(running, power)
        elif (ramp := self._ramp_of(node, dims)) is not None:
            made.times(Key("pow", None, (), ramp[2], number=math.e), ramp[1] * power)
            made.scale(math.exp(ramp[0]), power)
        elif not self.holds(node):
            made.times(Key("exp", node, dims), power)
        elif name == "log":
            self._multiply(made, _first(node), dims, power)
        elif name in ("add", "sub", "rsub"):
            self._sum(made, node, dims, power)
        elif node.target in SCALES and (ramped := self._ramped(node, dims)) is not None:
            self._decay(made, ramped, power)
        else:
            self._scaled(made, node, dims, power)

    def _sum(self, made: Monomial, node: Node, dims: Dims, power: float) -> None:
        scale = _number(arguments(node).get("alpha", 1))
        sign = {"add": (1.0, scale), "sub": (1.0, -scale), "rsub": (-scale, 1.0)}[opname(node)]
        for value, factor in zip(node.args[:2], sign, strict=True):
            if isinstance(value, Node):
                self._exponent(made, value, broadcast(value, dims), power * factor)
            else:
                made.scale(math.exp(factor * _number(value)), power)

    def _scaled(self, made: Monomial, node: Node, dims: Dims, power: float) -> None:
        """Views, negation, products with numbers."""
        product = Product()
        rule = RULES.get(node.target)
        parts = None if rule is None else rule(node, resolved(dims), product)
        if parts is None or product.summed or len(parts) != 1:
            made.times(Key("exp", node, dims), power)
            return
        self._exponent(made, *parts[0], power * product.coefficient)

    def _ramped(self, node: Node, dims: Dims) -> tuple[Key, float, float] | None:
        """A product of a tensor that does not change with time and the number of the token."""
        for base, ramp in (node.args[:2], node.args[1::-1]):
            found = self._ramp_of(ramp, dims)
            if found is not None and isinstance(base, Node):
                start, step, time = found
                base, labels, scale = _unscaled(base, broadcast(base, dims))
                return Key("exppow", base, labels, time), start * scale, step * scale
        return None

    def _decay(self, made: Monomial, ramped: tuple[Key, float, float], power: float) -> None:
        key, start, step = ramped
        made.times(key, step * power)
        if start:
            made.times(replace(key, kind="exp", time=None), start * power)

    def _ramp_of(self, value: Any, dims: Dims) -> tuple[float, float, Label] | None:
        """First value, step and label of a tensor that counts tokens."""
        if not isinstance(value, Node) or not is_ramp(value):
            return None
        labels = [label for dim in broadcast(value, dims) for label in dim]
        if len(labels) != 1:
            return None
        start, step = counted(value)
        return start, step, labels[0]

    def _running(self, node: Node, dims: Dims, kind: str) -> Key | None:
        """The running product that a node is: with ``expsum``, its logarithm."""
        source, front, along = node, 0, None
        while (found := padded(source, 1.0 if kind == "prod" else 0.0)) is not None:
            inner, dim, count = found
            if along not in (None, dim):
                return None
            source, along, front = inner, dim, front + count
        if opname(source) != ("cumprod" if kind == "prod" else "cumsum") or source is self.target:
            return None
        given = arguments(source)
        if not dims:
            return None
        dim = given["dim"] % len(dims)
        if along not in (None, dim) or len(dims[dim]) != 1:
            return None
        time = dims[dim][0]
        inside = None
        if front:
            inside = self.inner.setdefault((time, front), Label(shape(source)[dim]))
            dims = (*dims[:dim], (inside,), *dims[dim + 1 :])
        return rooted(Key(kind, given["self"], dims, time, front, inside))


def rooted(key: Key) -> Key:
    """The same running product of what is behind views, ``log`` and ``exp``."""
    node, dims = key.node, key.dims
    while node is not None and node.target in VIEWS:
        parts = VIEWS[node.target](node, resolved(dims), Product())
        if parts is None or any(len(dim) > 1 for dim in parts[0][1]):
            return replace(key, node=node, dims=dims)
        node, dims = parts[0]
    if node is not None and key.kind == "expsum" and node.target is aten.log.default:
        return rooted(replace(key, kind="prod", node=_first(node), dims=dims))
    if node is not None and key.kind == "prod" and node.target is aten.exp.default:
        return rooted(replace(key, kind="expsum", node=_first(node), dims=dims))
    return replace(key, node=node, dims=dims)


def _unscaled(node: Node, dims: Dims) -> tuple[Node, Dims, float]:
    """What is behind views, signs and numbers that multiply, and their product."""
    scale = 1.0
    while (rule := RULES.get(node.target)) is not None:
        product = Product()
        parts = rule(node, resolved(dims), product)
        if parts is None or len(parts) != 1 or product.summed:
            break
        (node, dims), scale = parts[0], scale * product.coefficient
    return node, dims, scale


def broadcast(node: Node, dims: Dims) -> Dims:
    """Labels of an operand that broadcasts to ``dims``. Raises Unreadable for a size."""
    if not isinstance(node.meta.get("val"), Tensor):
        raise Unreadable
    sizes = shape(node)
    own = dims[len(dims) - len(sizes) :] if sizes else ()
    return tuple(() if s == 1 else d for s, d in zip(sizes, own, strict=True))


def _number(value: Any) -> float:
    if not isinstance(value, int | float):
        raise Unreadable
    return float(value)


def _first(node: Node) -> Node:
    source = node.args[0]
    assert isinstance(source, Node)
    return source


def padded(node: Node, fill: float) -> tuple[Node, int, int] | None:
    """The source of a node that puts ``fill`` in front of it, along which dim, how many."""
    if opname(node) in PADS:
        given = arguments(node)
        amounts = list(given["pad"])
        used = [i for i, amount in enumerate(amounts) if not isinstance(amount, int) or amount]
        value = given["value"] or 0.0
        plain = given.get("mode", "constant") == "constant" and value == fill
        if not plain or len(used) != 1 or used[0] % 2 or not isinstance(amounts[used[0]], int):
            return None
        rank = len(shape(node))
        count = amounts[used[0]]
        return (given["self"], rank - 1 - used[0] // 2, count) if count > 0 else None
    if opname(node) == "cat":
        given = arguments(node)
        parts = given["tensors"]
        dim = given["dim"] % len(shape(node))
        front = len(parts) == 2 and (is_zero(parts[0]) if fill == 0 else _is_one(parts[0]))
        if front and isinstance(shape(parts[0])[dim], int):
            return parts[1], dim, shape(parts[0])[dim]
    return None


def _is_one(node: Node) -> bool:
    return opname(node) in ("ones", "ones_like", "new_ones") and not written(node)


def floating(node: Node) -> bool:
    """Whether a node is a tensor of floats."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()
