"""The logarithm of a decay: what lies under an ``exp`` that contains a cumulative sum.

``exp(cumsum(dt * A))``, ``exp(segment_sum(...))`` and their kin are followed back to the step sizes
``dt``, which depend on the token, and the rates ``A``, which do not.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

from torch.fx import Node

from effpass.patterns.chunks import multilinear_sums as sums
from effpass.patterns.chunks import multilinear_views as views
from effpass.patterns.chunks.factors import Key, Unreadable
from effpass.patterns.chunks.multilinear import ONE, Reader, data, is_zero, opname

RULES = views.RULES | sums.RULES
LAYOUT = frozenset(
    (*views.KEEPS, *views.PERMUTES, *views.RESHAPES, *views.EXPANDS, *views.REPEATS, *views.PADS)
)
JOINS = ("cat", "concat", "stack")
MASKS = ("masked_fill", "where", "tril", "triu", "neg")
ROUNDS = 24


class LogDecay(NamedTuple):
    """``step * rate``.

    ``step`` is None where the decay is the same at every token, ``rate`` where it is not apart.
    ``opened`` are slices of time on the way; ``pieces`` numbers of chunks that are indexed one by
    one.
    """

    step: Node | None
    rate: Node | None
    opened: frozenset[Node]
    pieces: frozenset[int]

    @property
    def tensors(self) -> tuple[Node, ...]:
        """The one or two tensors that it is made of."""
        return tuple(node for node in (self.step, self.rate) if node is not None)


def is_layout(node: Node) -> bool:
    """A view, a copy, a widening cast, zeros appended: it says where numbers lie, not which."""
    name = opname(node)
    if name in JOINS:
        parts = node.args[0]
        return sum(not is_zero(part) for part in parts) == 1 and name != "stack"  # type: ignore[union-attr]
    return name in LAYOUT and not views.rounds(node)


def timed(reader: Reader) -> set[Key]:
    """The classes of dims in which order matters."""
    return {reader.classes.of(key) for key in reader.ordered}


def times(reader: Reader) -> dict[int, dict[int, set[Key]]]:
    """Of each tensor, by number, the dims in which order matters, and their classes."""
    found: dict[int, dict[int, set[Key]]] = {}
    ordered = timed(reader)
    for key in reader.all_keys():
        if reader.classes.of(key) in ordered:
            found.setdefault(key.tensor, {}).setdefault(key.dim, set()).add(reader.classes.of(key))
    return found


def is_along(node: Node, dims: Collection[int]) -> bool:
    """Whether a node is a slice along one of these dims."""
    found = views.sliced(node)
    return found is not None and found[2] is None and found[1] in dims


def siblings(node: Node) -> list[Node]:
    """All the pieces of which an indexed piece is one; none where some index is not taken."""
    found = views.sliced(node)
    if found is None or found[2] is None:
        return []
    source, at, _ = found
    pieces: dict[int, Node] = {}
    for user in source.users:
        for each in (user, *(user.users if opname(user) == "unbind" else ())):
            other = views.sliced(each)
            if other is not None and other[:2] == (source, at) and other[2] is not None:
                size = source.meta["val"].shape[at]
                pieces[other[2] % size] = each
    whole = len(pieces) == source.meta["val"].shape[at] and len(pieces) > 1
    return list(pieces.values()) if whole else []


def log_decay(exp: Node) -> LogDecay | None:
    """The log decay under an ``exp``; None where there is no cumulative sum of one product."""
    opened: set[Node] = set()
    closed: set[Node] = set()
    pieces: set[int] = set()
    for _ in range(ROUNDS):
        found = _tensors(exp, opened)
        if found is None:
            return None
        reader, tensors = found
        dims = times(reader)
        steps = [t for t in tensors if reader.tensors.index(t) in dims]
        more = {t for t in steps if is_along(t, dims[reader.tensors.index(t)])}
        for tensor in steps:
            family = siblings(tensor)
            more |= {tensor} if family else set()
            pieces |= {len(family)} if family else set()
        product = next((t for t in tensors if opname(t) in sums.PRODUCTS and t not in closed), None)
        if more:
            opened |= more
        elif len(tensors) == 1 and product is not None:
            into = opened if _is_step_times_rate(exp, opened | {product}) else closed
            into.add(product)
        else:
            return _decay(steps, tensors, opened, pieces)
    return None


def _decay(
    steps: list[Node], tensors: list[Node], opened: set[Node], pieces: set[int]
) -> LogDecay | None:
    rates = [t for t in tensors if t not in steps]
    if len(steps) > 1 or len(rates) > 1:
        return None
    step, rate = (each[0] if each else None for each in (steps, rates))
    return LogDecay(step, rate, frozenset(opened), frozenset(pieces))


def _is_step_times_rate(exp: Node, opened: set[Node]) -> bool:
    found = _tensors(exp, opened)
    if found is None or len(found[1]) != 2:
        return False
    dims = times(found[0])
    return sum(found[0].tensors.index(t) in dims for t in found[1]) == 1


def _tensors(exp: Node, opened: set[Node]) -> tuple[Reader, list[Node]] | None:
    """The tensors of the one product under an ``exp``, and how they were read."""
    reader = Reader(RULES, lambda node: _follows(node, opened))
    try:
        terms = reader.value(exp.args[0]).terms
    except Unreadable:
        return None
    products = [term for term in terms if term != ONE]
    if not reader.ordered or len(products) != 1:
        return None
    return reader, [reader.tensors[i] for i in sorted(products[0])]


def _follows(node: Node, opened: set[Node]) -> bool:
    name = opname(node)
    if node in opened or is_layout(node) or is_summed(node):
        return True
    return len(data(node)) == 1 and (name in MASKS or name in sums.PRODUCTS)


def is_summed(node: Node) -> bool:
    """Whether a node is a cumulative sum seen through views, masks, differences and products."""
    return opname(node) == "cumsum" or cumulative_sum(node) is not None


def cumulative_sum(node: Node) -> Node | None:
    """The cumulative sum that the operand of a node is made of, if any."""
    for _ in range(16):
        before = data(node)
        if not before:
            return None
        node = before[0]
        if opname(node) == "cumsum":
            return node
        if opname(node) not in RULES or opname(node) == "exp":
            return None
    return None
