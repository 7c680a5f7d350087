"""Steps: the rows of an unrolled loop, found in straight-line code.

A loop over time leaves one copy of its body a step. Every copy reads the slices of that step
(``x[:, t]``) and values of the step before. A *row* is the same node in all copies: equal target,
equal constants, arguments in equal rows. Rows are found in one pass over the graph by hashing;
what a node reads from an earlier step only marks its place in the hash, and is compared afterwards.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.fx.node import map_arg

aten = torch.ops.aten
FEWEST = 3  # steps: two alike are no loop
GATHERS = (aten.stack.default, aten.cat.default)


@dataclass(eq=False)
class Row:
    """The same node in all steps: ``members[time]``. A leaf is a slice of ``source``."""

    number: int
    members: dict[int, Node] = field(default_factory=dict)
    source: Node | None = None
    dim: int = 0
    keep: bool = False
    backwards: bool = False  # taken from the last to the first: times count from the end

    @property
    def last(self) -> Node:
        """The member of the last step: what stands for the row."""
        return self.members[max(self.members)]


@dataclass
class Steps:
    """Rows by number, the row and time of every member, and which slices it is stepped with."""

    rows: list[Row] = field(default_factory=list)
    where: dict[Node, tuple[int, int]] = field(default_factory=dict)
    groups: _Groups = field(default_factory=lambda: _Groups())

    def arguments(self, node: Node) -> Iterator[tuple[Node, Row | None, int]]:
        """``(argument, its row, steps back)`` of a member; no row for what is invariant.

        In the order in which they are written, as often as they are.
        """
        _, time = self.where[node]
        written: list[Node] = []
        map_arg((node.args, node.kwargs), written.append)
        for argument in written:
            place = self.where.get(argument)
            if place is None or self.groups.find(argument) != self.groups.find(node):
                yield argument, None, 0
            else:
                yield argument, self.rows[place[0]], time - place[1]

    def refresh(self) -> None:
        """Reads the sources of leaves again: a loop may have been replaced in front of another."""
        for row in self.rows:
            slot = None if row.source is None or row.last._erased else slot_of(row.last)
            if slot is not None:
                row.source = slot.source


def steps_of(graph: Graph) -> Steps:
    """Finds the rows of every loop of a graph. Nodes of no loop are in rows of their own."""
    slots = _slots(graph)
    found, numbers = Steps(), {}
    groups = found.groups
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        slot, timed = slots.get(node), [a for a in node.all_input_nodes if a in found.where]
        if node.target in GATHERS and len({found.where[a][1] for a in timed}) >= FEWEST:
            continue  # collects steps: of no step itself
        if slot is not None:
            key: Any = ("leaf", slot.source, slot.dim, slot.keep)
            groups.add(node, key)
            index = slot.index
        elif timed:
            index = groups.join(node, timed, found.where)
            key = _key(node, index, found.where, groups)
        else:
            continue
        number = numbers.setdefault(key, len(found.rows))
        while number < len(found.rows) and index in found.rows[number].members:
            key = (key, "again")  # the same twice in one step
            number = numbers.setdefault(key, len(found.rows))
        if number == len(found.rows):
            found.rows.append(Row(number) if slot is None else slot.row(number))
        found.rows[number].members[index] = node
        found.where[node] = (number, index)
    _retime(found)
    return found


@dataclass(frozen=True)
class Slot:
    """One element of ``source`` along ``dim``; ``keep``: as a dim of size 1."""

    source: Node
    dim: int
    index: int
    keep: bool
    backwards: bool = False  # the index counts from the end

    def row(self, number: int) -> Row:
        """An empty row of such slices."""
        return Row(number, {}, self.source, self.dim, self.keep, self.backwards)


def slot_of(node: Node) -> Slot | None:
    """What a node takes, if it takes one element along a dim."""
    source = node.args[0] if node.op == "call_function" and node.args else None
    if not isinstance(source, Node):
        return None
    args: Any = node.args
    if node.target is operator.getitem:
        return _piece(source, args[1])
    value = source.meta.get("val")
    if not isinstance(value, Tensor) or not value.dim():
        return None
    if not all(isinstance(a, int | None) for a in args[1:]):
        return None
    dim = args[1] % value.dim() if len(args) > 1 else 0
    size = value.shape[dim]
    if not isinstance(size, int):
        return None
    if node.target is aten.select.int:
        return Slot(source, dim, args[2] % size, False)
    if node.target is aten.slice.Tensor:
        start, end, step = (*args[2:], *(None, None, 1)[len(args) - 2 :])
        first, last, _ = slice(start, end).indices(size)
        return Slot(source, dim, first, True) if last - first == 1 and step == 1 else None
    if node.target is aten.narrow.default and args[3] == 1:
        return Slot(source, dim, args[2] % size, True)
    return None


def _piece(source: Node, index: int) -> Slot | None:
    """An element of ``unbind``, or of a split into single elements."""
    args: Any = source.args
    whole = args[0] if args else None
    if not isinstance(whole, Node) or not isinstance(whole.meta.get("val"), Tensor):
        return None
    rank = whole.meta["val"].dim()
    if source.target is aten.unbind.int:
        return Slot(whole, args[1] % rank if len(args) > 1 else 0, index, False)
    if source.target in (aten.split.Tensor, aten.chunk.default):
        dim = args[2] % rank if len(args) > 2 else 0
        if all(piece.shape[dim] == 1 for piece in source.meta["val"]):
            return Slot(whole, dim, index, True)
    return None


def _slots(graph: Graph) -> dict[Node, Slot]:
    """Slices of tensors of which several neighbours are taken."""
    found: dict[Any, list[tuple[Node, Slot]]] = {}
    for node in graph.nodes:
        slot = slot_of(node)
        if slot is not None and node.users:
            found.setdefault((slot.source, slot.dim, slot.keep), []).append((node, slot))
    made: dict[Node, Slot] = {}
    for taken in found.values():
        if len({slot.index for _, slot in taken}) >= FEWEST:
            made |= _forwards(taken)
    return made


def _forwards(taken: list[tuple[Node, Slot]]) -> dict[Node, Slot]:
    """Slices that are used from the last to the first count from the end."""
    order = [slot.index for _, slot in sorted(taken, key=lambda pair: min(pair[0].users))]
    if any(a <= b for a, b in pairwise(order)):
        return dict(taken)
    return {
        node: replace(slot, index=max(order) - slot.index, backwards=True) for node, slot in taken
    }


class _Groups:
    """Which slices are stepped through together; a value of another loop counts as invariant."""

    def __init__(self) -> None:
        self.parent: dict[Any, Any] = {}
        self.of: dict[Node, Any] = {}

    def add(self, node: Node, key: Any) -> None:
        self.parent.setdefault(key, key)
        self.of[node] = key

    def find(self, node: Node) -> Any:
        key = self.of[node]
        while self.parent[key] != key:
            self.parent[key] = self.parent[self.parent[key]]
            key = self.parent[key]
        return key

    def join(self, node: Node, timed: list[Node], where: dict[Node, tuple[int, int]]) -> int:
        """The time of a node that reads ``timed``: that of its latest argument in its own loop."""
        newest = max(timed, key=lambda a: where[a][1] if self._own(a, timed, where) else -1)
        time = where[newest][1]
        for argument in timed:
            if where[argument][1] in (time, time - 1):
                self.parent[self.find(argument)] = self.find(newest)
        self.of[node] = self.find(newest)
        return time

    def _own(self, node: Node, timed: list[Node], where: dict[Node, tuple[int, int]]) -> bool:
        """Not the last value of a loop that ended before this one began."""
        time, group = where[node][1], self.find(node)
        others = [a for a in timed if self.find(a) != group]
        return not others or all(where[a][1] >= time - 1 for a in others)


def _key(node: Node, time: int, where: dict[Node, tuple[int, int]], groups: _Groups) -> Any:
    def token(argument: Node) -> Any:
        place = where.get(argument)
        if place is None or groups.find(argument) != groups.find(node):
            return f"%{argument.name}"
        return f"%row{place[0]}" if place[1] == time else f"%back{time - place[1]}"

    value = node.meta.get("val")
    shape = (tuple(map(str, value.shape)), value.dtype) if isinstance(value, Tensor) else None
    return node.target, str(map_arg((node.args, node.kwargs), _token(token))), shape


def _token(token: Any) -> Any:
    class Spelled(str):
        def __repr__(self) -> str:
            return str(self)

    return lambda n: Spelled(token(n))


def _retime(steps: Steps) -> None:
    """``decay * h`` of the step before belongs to the step that adds to it."""
    for row in reversed(steps.rows):
        if row.source is not None or len(row.members) < FEWEST:
            continue
        members = list(row.members.items())
        if all(_only_later(steps, node, time) for time, node in members):
            row.members = {time + 1: node for time, node in members}
            for time, node in members:
                steps.where[node] = (row.number, time + 1)


def _only_later(steps: Steps, node: Node, time: int) -> bool:
    users = [steps.where.get(user) for user in node.users]
    return bool(users) and all(place is not None and place[1] > time for place in users)
