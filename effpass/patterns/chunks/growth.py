"""Growth: from a log decay forward to everything that is made with its decays.

Nodes are read in the order of the graph for as long as they are sums of products of few tensors
(``chunks.multilinear``). Operands that were not made with the decays are tensors, behind
whatever only lays them out. A second look may be needed: a tensor that turns out to span two
tokens is itself a product, one that turns out to be a slice of time is part of a longer one.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field

from torch.fx import Node

from effpass.patterns.chunks import multilinear_sums as sums
from effpass.patterns.chunks import multilinear_views as views
from effpass.patterns.chunks.factors import Unreadable
from effpass.patterns.chunks.log_decay import (
    RULES,
    LogDecay,
    is_along,
    is_layout,
    siblings,
    times,
)
from effpass.patterns.chunks.multilinear import Reader, Term, Value, data, opname

SEVERAL = (*views.PIECES, "unbind")  # operations with several results
LARGEST_TERM = 3
MULTIPLIED = "are multiplied"
ROUNDS = 24


@dataclass
class Growth:
    """What one log decay leads to.

    ``tensors`` are what was not read further; ``inside`` are nodes that were; ``grown`` those of
    them made with a decay, in order, with their values. ``broken`` are nodes made with a decay that
    cannot be read, each with the node that began it and the reason. ``pairs``: some decay is one
    between two tokens.
    """

    decay: LogDecay
    opened: set[Node]
    tensors: list[Node] = field(default_factory=list)
    inside: set[Node] = field(default_factory=set)
    grown: dict[Node, Value] = field(default_factory=dict)
    broken: dict[Node, tuple[Node, str]] = field(default_factory=dict)
    pairs: bool = False

    def reader(self) -> Reader:
        """A fresh reader of the same nodes, which numbers tensors as the last one did."""
        return Reader(RULES, self.follows, self.decay.tensors, self.tensors)

    def follows(self, node: Node) -> bool:
        """Whether a node is read, or is a tensor."""
        if node in self.decay.tensors:
            return False
        return node in self.inside or node in self.opened or is_layout(node)

    def without_decay(self, term: Term) -> Term:
        """The tensors of a term but for the step and the rate (numbers 0 and 1, if any)."""
        return frozenset(i for i in term if i >= len(self.decay.tensors))


def grow(decay: LogDecay) -> Growth:
    """Reads everything that is made with the decays of one log decay."""
    growth = Growth(decay, set(decay.opened))
    for _ in range(ROUNDS):
        reader = growth.reader()
        _grow(growth, reader, _exponentials(growth, reader))
        growth.tensors = reader.tensors
        more = _to_open(growth, reader)
        if not more:
            break
        growth = Growth(decay, growth.opened | more)
    return growth


def _exponentials(growth: Growth, reader: Reader) -> list[Node]:
    """The ``exp`` nodes taken of the log decay; what leads to them is now inside.

    So are products with the step, scaled or moved: they are read when a decay meets them.
    """
    found: list[Node] = []
    logs, stepped = set(growth.decay.tensors), set()
    queue: list[Node] = []
    for root in growth.decay.tensors:
        _push(queue, root)
    while queue:
        node = heapq.heappop(queue)
        if node in logs or node in stepped or node in found:
            continue
        operands = data(node)
        if not all(n in logs for n in operands):
            if _is_stepped(node, operands, stepped):
                stepped.add(node)
                _push(queue, node)
        elif opname(node) == "exp":
            found += [node] if _value(growth, reader, node) else []
        elif opname(node) in SEVERAL or _value(growth, reader, node) is not None:
            logs.add(node)
            _push(queue, node)
    growth.inside |= {node for node in stepped if opname(node) not in SEVERAL}
    return found


def _is_stepped(node: Node, operands: list[Node], stepped: set[Node]) -> bool:
    """A product of a log and something else, or such a product scaled or moved."""
    if len(operands) == 1 and operands[0] in stepped:
        return opname(node) in (*views.RULES, *SEVERAL, *sums.PRODUCTS, "neg")
    return opname(node) in sums.PRODUCTS and not any(n in stepped for n in operands)


def _push(queue: list[Node], node: Node) -> None:
    for user in node.users:
        heapq.heappush(queue, user)


def _value(growth: Growth, reader: Reader, node: Node) -> Value | None:
    """The value of a node that is now inside; None, and it is not, where it cannot be read."""
    if opname(node) not in RULES:
        return None
    growth.inside.add(node)
    try:
        return reader.value(node)
    except Unreadable:
        growth.inside.discard(node)
        return None


def _grow(growth: Growth, reader: Reader, exponentials: list[Node]) -> None:
    growth.grown = {node: reader.value(node) for node in exponentials}
    growth.pairs = any(_is_of_pairs(reader, value) for value in growth.grown.values())
    queue: list[Node] = []
    for node in exponentials:
        _push(queue, node)
    waiting, seen = set(queue), set(exponentials)  # waiting: users of what was read
    while waiting:
        node = heapq.heappop(queue)
        waiting.discard(node)
        if node in seen or node.op == "output":
            continue
        seen.add(node)
        made = _try(growth, reader, node)
        _push(queue, node)
        if made:
            waiting |= set(node.users)


def _try(growth: Growth, reader: Reader, node: Node) -> bool:
    """Reads one node made with a decay; says whether that went well."""
    cause = next((growth.broken[n] for n in node.all_input_nodes if n in growth.broken), None)
    if cause is not None:
        growth.broken[node] = cause
        return False
    if opname(node) in SEVERAL:
        return True
    growth.inside.add(node)
    try:
        value = reader.value(node)
        for term in map(growth.without_decay, value.terms):
            if len(term) > LARGEST_TERM:
                names = ", ".join(reader.tensors[i].name for i in sorted(term))
                raise Unreadable(f"{names} {MULTIPLIED}")
    except Unreadable as error:
        growth.inside.discard(node)
        reader.forget(node)
        growth.broken[node] = (node, str(error))
        return False
    growth.grown[node] = value
    return True


def _is_of_pairs(reader: Reader, value: Value) -> bool:
    """Whether a decay is one between two tokens: time runs along two of its dims."""
    factors = [factor for dim in value.dims for factor in dim]
    classes = {reader.classes.of(key) for factor in factors for key in factor.sources}
    return len(classes) < len(factors)


def _to_open(growth: Growth, reader: Reader) -> set[Node]:
    """Tensors that are products with both tokens of a pair, or slices of time."""
    found: set[Node] = set()
    numbers, dims = _numbers(growth), times(reader)
    for number, tensor in enumerate(reader.tensors):
        if number not in numbers or tensor in growth.decay.tensors:
            continue
        own = dims.get(number, {})
        classes = [c for each in own.values() for c in each]
        spans_pairs = len(classes) != len(set(classes)) and opname(tensor) in RULES
        is_piece = is_along(tensor, own) or len(siblings(tensor)) in growth.decay.pieces
        found |= {tensor} if spans_pairs or is_piece else set()
    return found


def _numbers(growth: Growth) -> set[int]:
    """The numbers of tensors that are multiplied with a decay."""
    return set().union(*(term for value in growth.grown.values() for term in value.terms))
