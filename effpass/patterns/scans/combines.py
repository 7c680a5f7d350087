"""Combines: sums that join two pieces of time of one tensor, and how they may be read.

Where a parallel scan begins is the first ``a2 * b1 + b2``: a piece of a tensor, and something times
another piece of it. Reading it means to say which tensors are a and b, and which dim is time;
following it means to derive what every node behind them is, in intervals of time.
"""

from __future__ import annotations

import heapq
import operator
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from effpass.axes.relation import arguments
from effpass.patterns.scans.interval_rules import ORDERED, SAME, SHAPED, Sight, created
from effpass.patterns.scans.intervals import (
    BITS,
    SUM,
    TIME,
    Atom,
    Value,
    fields,
    products,
    sums,
)

MANY = 32
MOVES = frozenset(
    (
        *(SAME.split() + SHAPED.split() + ORDERED.split()),
        *("slice", "narrow", "select", "unbind", "split", "split_with_sizes", "chunk"),
        *("tensor_split", "flip", "roll", "pad", "constant_pad_nd", "expand", "expand_as"),
        *("broadcast_to", "cat", "concat", "concatenate", "slice_scatter", "select_scatter"),
    )
)


@dataclass(frozen=True)
class Combine:
    """``gain * before + rest``, where ``before`` and ``rest`` are pieces of the same tensor.

    ``sources`` are tensors that both are pieces of, and ``gains`` those that ``gain`` is one of,
    nearest first.
    """

    total: Node
    sources: tuple[Node, ...]
    gains: tuple[Node, ...]


@dataclass(frozen=True)
class Leaves:
    """A reading of a combine: which tensors are a and b, and which dim of b is time."""

    a: Node
    b: Node
    time: int
    backwards: bool = False


def first_combines(graph: Graph) -> Iterator[Node]:
    """Sums that read as a combine, except those that go on from the results of another."""
    roots: dict[Node, frozenset[Node]] = {}  # what a node is made of by moves, products and sums
    begun: dict[Node, frozenset[Node]] = {}  # the first combines among that
    gains: dict[Node, frozenset[Node]] = {}  # roots of the gains of a first combine
    for node in graph.nodes:
        inside = _moved(node) is not None or _is_product(node) or _is_sum(node)
        inputs = node.all_input_nodes if inside else []
        roots[node] = _few(roots, inputs) or frozenset((node,))
        begun[node] = _few(begun, inputs)
        first = []
        for combine in combines(node):
            made_of = _few(roots, combine.gains)
            before = _few(begun, combine.sources)
            if not any(gains[anchor] & made_of for anchor in before):
                first.append(made_of)
        if first:
            begun[node] |= {node}
            gains[node] = frozenset().union(*first)
            yield node


def _few(sets: dict[Node, frozenset[Node]], nodes: Iterable[Node]) -> frozenset[Node]:
    """The union; none where it grows large, as along a residual stream."""
    union = frozenset().union(*(sets[node] for node in nodes))
    return union if len(union) <= MANY else frozenset()


def combines(node: Node) -> Iterator[Combine]:
    """Every way in which this sum reads as ``gain * before + rest``."""
    name = getattr(node.target, "_opname", "")
    if name == "addcmul":
        rest, *factors = node.args[:3]
        found = [(rest, factors)]
    elif name == "add" and len(node.args) == 2:
        pairs = (node.args, node.args[::-1])
        found = [(rest, list(p.args[:2])) for p, rest in pairs if _is_product(p)]  # type: ignore[union-attr]
    else:
        return
    for rest, factors in found:
        for gain, before in (factors, factors[::-1]):
            nodes = (rest, gain, before)
            if before is rest or not all(isinstance(each, Node) for each in nodes):
                continue
            trail = set(_trail(before))  # type: ignore[arg-type]
            sources = tuple(source for source in _trail(rest) if source in trail)  # type: ignore[arg-type]
            if sources:
                yield Combine(node, sources, tuple(_trail(gain)))  # type: ignore[arg-type]


def _is_product(node: Any) -> bool:
    return isinstance(node, Node) and getattr(node.target, "_opname", "") in ("mul", "multiply")


def _is_sum(node: Node) -> bool:
    return getattr(node.target, "_opname", "") in ("add", "addcmul")


def _trail(node: Node) -> Iterator[Node]:
    """The tensors that this one is a piece of, nearest first."""
    source: Any = node
    while isinstance(source, Node) and isinstance(source.meta.get("val"), Tensor | list | tuple):
        yield source
        source = _moved(source)


def _moved(node: Node) -> Any:
    if node.target is operator.getitem:
        return node.args[0]
    name = getattr(node.target, "_opname", "")
    if name not in MOVES or getattr(node.target, "namespace", "") != "aten":
        return None
    given = arguments(node)
    if name.endswith("_scatter"):
        return given["src"] if created(given["self"]) is not None else None
    if "tensors" not in given:
        return given["self"]
    pieces = [tensor for tensor in given["tensors"] if created(tensor) is None]
    return pieces[0] if len(pieces) == 1 else None


def readings(combine: Combine, backwards: bool = False) -> Iterator[Leaves]:
    """What may be a and b, from the graph's inputs on, so that the combine holds."""
    for b in reversed(combine.sources):
        for a in reversed(combine.gains):
            for time in range(rank(b)):
                leaves = Leaves(a, b, time, backwards)
                if _compatible(leaves) and _holds(combine, leaves):
                    yield leaves


def rank(node: Node) -> int:
    """Dims of a floating tensor; 0 for anything else."""
    value = node.meta["val"]
    return value.dim() if isinstance(value, Tensor) and value.is_floating_point() else 0


def _compatible(leaves: Leaves) -> bool:
    """Whether b broadcasts with a, and both have the same, fixed time."""
    a, b = leaves.a.meta["val"], leaves.b.meta["val"]
    if leaves.a is leaves.b or not rank(leaves.a):
        return False
    from_right = leaves.time - b.dim()
    length = b.shape[leaves.time]
    if not isinstance(length, int) or not 2 <= length < 1 << BITS or a.dim() < -from_right:
        return False
    pairs = zip(a.shape[::-1], b.shape[::-1], strict=False)
    same_time = isinstance(a.shape[from_right], int) and a.shape[from_right] == length
    return same_time and all(_fits(m, n) for m, n in pairs)


def _fits(m: Any, n: Any) -> bool:
    if isinstance(m, int) and isinstance(n, int):
        return m == n or 1 in (m, n)
    return str(m) == str(n) or (isinstance(m, int) and m == 1) or (isinstance(n, int) and n == 1)


def sight_of(leaves: Leaves) -> Sight:
    """Nothing but what a and b are."""
    sight = Sight({})
    times = _times(leaves)
    from_right = rank(leaves.b) - leaves.time
    for node, codes in ((leaves.a, products(times)), (leaves.b, sums(times, times, times))):
        sight.values[node] = _leaf(sight.shape(node), from_right, codes)
    return sight


def _times(leaves: Leaves) -> Tensor:
    times = torch.arange(leaves.b.meta["val"].shape[leaves.time])
    return times.flip(0) if leaves.backwards else times


def _leaf(shape: list[int], from_right: int, codes: Tensor) -> Value:
    dims = []
    for place, size in zip(range(len(shape), 0, -1), shape, strict=True):
        atom = Atom(TIME, 0, size) if place == from_right else Atom(f"dim {place}", 1, size)
        dims.append((atom,) if size != 1 else ())
    return Value(tuple(dims), codes)


def _holds(combine: Combine, leaves: Leaves) -> bool:
    """Whether the combine joins two pieces of time under this reading."""
    sight, nodes = sight_of(leaves), {combine.total}
    pending = list(combine.total.all_input_nodes)
    while pending:
        node = pending.pop()
        if node not in nodes and node not in sight.values and (_moved(node) or _is_product(node)):
            nodes.add(node)
            pending += node.all_input_nodes
    for node in sorted(nodes):
        sight.follow(node)
    return widest(sight.values[combine.total], SUM) > 1


def widest(value: Any, kind: int) -> int:
    """The longest interval of this kind among the elements."""
    if not isinstance(value, Value) or not value.codes.numel():
        return 0
    kinds, first, last, upto = fields(value.codes)
    width = (last if kind == SUM else upto) - first + 1
    return int(torch.where(kinds == kind, width, 0).max())


def followed(leaves: Leaves) -> tuple[Sight, Node | None]:
    """Follows everything behind a and b, up to the first node that is all of h."""
    sight = sight_of(leaves)
    state = follow(sight, (leaves.a, leaves.b), lambda value: is_state(value, leaves, sight))
    return sight, state


def follow(
    sight: Sight, starts: Collection[Node], stop: Callable[[Value], bool] | None = None
) -> Node | None:
    """Follows everything behind ``starts``; answers the first node whose value says ``stop``."""
    pending = [user for start in starts for user in start.users]
    heapq.heapify(pending)
    last = None
    while pending:
        node = heapq.heappop(pending)
        if node is last or node.op != "call_function" or node in starts:
            continue
        last = node
        value = sight.follow(node)
        if stop is not None and isinstance(value, Value) and stop(value):
            return node
        if isinstance(value, list) or (value is not None and known(value)):
            for user in node.users:
                heapq.heappush(pending, user)
    return None


def known(value: Value) -> bool:
    """Whether any element is known, or there is none."""
    return not value.codes.numel() or bool((value.codes >= 0).any())


def is_state(value: Value, leaves: Leaves, sight: Sight) -> bool:
    """Whether this is W(0, t, t) at every t, with every other dim whole."""
    if any(len(dim) > 1 for dim in value.dims):
        return False
    atoms = [atom for dim in value.dims for atom in dim]
    wanted = {atom for atom in whole(leaves, sight) if atom.size != 1}
    if len(atoms) != len(wanted) or set(atoms) != wanted:
        return False
    times = _times(leaves)
    return bool((value.codes == sums(torch.zeros_like(times), times, times)).all())


def whole(leaves: Leaves, sight: Sight) -> list[Atom]:
    """The dims of a and b broadcast together, outermost first."""
    found: dict[int, Atom] = {}
    for leaf in (leaves.a, leaves.b):
        value = sight.values[leaf]
        assert isinstance(value, Value)
        for place, dim in zip(range(len(value.dims), 0, -1), value.dims, strict=True):
            one = Atom("", 0, 1)
            found[place] = dim[0] if dim else found.get(place, one)
    return [found[place] for place in sorted(found, reverse=True)]
