"""Solves axes over a graph: which dims of which tensors are one axis.

Every dim of every tensor is a variable; an op's relation (``effpass.axes.relation``) equates some
and a union-find merges them. A dim may be a product of axes: merging the batch into the tokens, or
splitting channels into heads, cuts an axis into its parts wherever it occurs. What is named
anywhere (by an op, by a caller) is named everywhere it reaches, up and down the graph.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import networkx as nx
from torch.fx import GraphModule, Node

from effpass.axes import rules  # noqa: F401  registers them
from effpass.axes.labels import Dim, Dims, Labels, quotient
from effpass.axes.relation import Kind, Relation, relation, values

Value = tuple[Node, int]  # a node, and which of its outputs
Place = tuple[Node, int, int]  # a value's dim


class Classes(Labels):
    """Labels of which some turn out to be the same."""

    def __init__(self) -> None:
        super().__init__()
        self._into: dict[int, int] = {}

    def root(self, label: int) -> int:
        """The label that stands for all that are the same."""
        while label in self._into:
            label = self._into[label]
        return label

    def resolve(self, labels: Iterable[int]) -> Dim:
        """The labels, each by its root, those that were cut by their parts."""
        found: list[int] = []
        for label in map(self.root, labels):
            found += self.resolve(self.parts[label]) if label in self.parts else (label,)
        return tuple(found)

    def join(self, first: Dim, second: Dim) -> bool:
        """Makes two dims the same axes; False where their sizes do not let them."""
        a, b = self.resolve(first), self.resolve(second)
        while a and b:
            x, y = a[0], b[0]
            if x != y and not self._meet(x, y):
                return False
            a, b = self.resolve(a), self.resolve(b)
            a, b = a[1:], b[1:]
        return not a and not b

    def _meet(self, x: int, y: int) -> bool:
        """Makes the first part of each of two labels the same."""
        if self.sizes[x] == self.sizes[y]:
            self._into[max(x, y)] = min(x, y)
            return True
        for whole, part in ((x, y), (y, x)):
            rest = quotient(self.sizes[whole], self.sizes[part])
            if rest is not None:
                outer, _ = self.cut(whole, self.sizes[part], rest)
                return self._meet(outer, part)
        return False


@dataclass(frozen=True)
class Conflict:
    """Two dims that one op takes for the same axis, though they cannot be."""

    node: Node
    dims: tuple[tuple[str, ...], tuple[str, ...]]


@dataclass
class Solution:
    """Axes of all tensors of one graph."""

    classes: Classes = field(default_factory=Classes)
    relations: dict[Node, Relation] = field(default_factory=dict)
    conflicts: list[Conflict] = field(default_factory=list)
    _dims: dict[Value, Dims] = field(default_factory=dict)
    _names: list[tuple[Dim, str]] = field(default_factory=list)

    def __contains__(self, node: Node) -> bool:
        return (node, 0) in self._dims

    def dims(self, node: Node, output: int = 0) -> Dims:
        """The axes of every dim of a tensor."""
        return self.classes.resolved(self._dims[node, output])

    def name(self, dim: Dim, name: str) -> None:
        """Names an axis, and with it all dims that are the same."""
        self._names.append((dim, name))

    def names(self) -> dict[int, str]:
        """Names by axis; an axis with several has them joined: ``token/position``."""
        found: dict[int, list[str]] = {}
        for dim, name in self._names:
            for label in self.classes.resolve(dim):
                each = found.setdefault(label, [])
                each += [] if name in each else [name]
        return {label: "/".join(each) for label, each in found.items()}

    def text(self, node: Node, output: int = 0) -> str:
        """The dims of a tensor by name: ``batch token . 4``."""
        names = self.names()
        words = []
        for dim in self.dims(node, output):
            each = [names.get(label, str(self.classes.sizes[label])) for label in dim]
            words.append("·".join(each) or "1")
        return " ".join(words)

    def why(self, node: Node, dim: int, name: str) -> list[Node]:
        """Nodes along which a dim got its name, from where it was given; empty if it has none."""
        wanted = {label for d, n in self._names if n == name for label in self.classes.resolve(d)}
        graph = nx.Graph()
        for each in self.relations.values():
            for places in meetings(each):
                graph.add_edges_from((places[0], place) for place in places[1:])
        here = (node, 0, dim)
        if here not in graph or not wanted.intersection(self.dims(node)[dim]):
            return []
        starts = [p for p in self._given(name) if p in graph and nx.has_path(graph, p, here)]
        if not starts:
            return []
        path = min((nx.shortest_path(graph, s, here) for s in starts), key=len)
        return list(dict.fromkeys(place[0] for place in path))

    def _given(self, name: str) -> Iterator[Place]:
        given = [d for d, n in self._names if n == name]
        for (node, output), dims in self._dims.items():
            if output == 0:
                yield from ((node, 0, i) for i, dim in enumerate(dims) if dim in given)

    def add(self, node: Node) -> None:
        """Takes in one more node, after those it reads."""
        if node.target is operator.getitem and isinstance(node.args[0], Node):
            source: Value = (node.args[0], node.args[1])  # type: ignore[assignment]
            if source in self._dims and values(node):
                self._dims[node, 0] = self._dims[source]
            return
        found = relation(node)
        if found is None:
            return
        self.relations[node] = found
        axes: dict[int, Dim] = {}
        for source_node, dims in found.inputs:
            self._meet(found, self._dims[source_node, 0], dims, axes)
        for i, dims in enumerate(found.outputs):
            self._dims[node, i] = tuple(self._made(found, dim, axes) for dim in dims)
        for label, letter in found.names.items():
            if letter in NAMED:
                self.name(axes[label], NAMED[letter])

    def _meet(self, found: Relation, have: Dims, dims: Dims, axes: dict[int, Dim]) -> None:
        for own, local in zip(have, dims, strict=True):
            sizes = [found.labels.sizes[label] for label in local]
            parts = self.classes.regroup((own,), sizes) if len(local) != 1 else (own,)
            if parts is None:
                self._conflict(found.node, own, own)  # it does not divide as the op wants it
                continue
            for label, part in zip(local, parts, strict=True):
                if not self.classes.join(axes.setdefault(label, part), part):
                    self._conflict(found.node, axes[label], part)

    def _conflict(self, node: Node, first: Dim, second: Dim) -> None:
        names = self.names()
        both = [
            tuple(names.get(r, str(self.classes.sizes[r])) for r in self.classes.resolve(dim))
            for dim in (first, second)
        ]
        self.conflicts.append(Conflict(node, (both[0], both[1])))

    def _made(self, found: Relation, dim: Dim, axes: dict[int, Dim]) -> Dim:
        made: list[int] = []
        for label in dim:
            if label not in axes:
                axes[label] = self.classes.fresh(found.labels.sizes[label])
            made += axes[label]
        return tuple(made)

    def kinds(self, node: Node, axes: Sequence[int]) -> set[Kind]:
        """What a node does along any of these axes."""
        found = self.relations.get(node)
        if found is None:
            return set()
        wanted, kinds = set(axes), set()
        for value, dims in self._tensors(found):
            for own, local in zip(self._dims[value], dims, strict=True):
                sizes = [found.labels.sizes[label] for label in local]
                parts = self.classes.regroup((own,), sizes) or (own,) * len(local)
                for label, part in zip(local, parts, strict=True):
                    if wanted.intersection(self.classes.resolve(part)):
                        kinds.add(found.kind(label))
        return kinds

    def _tensors(self, found: Relation) -> Iterator[tuple[Value, Dims]]:
        yield from (((node, 0), dims) for node, dims in found.inputs)
        yield from (((found.node, i), dims) for i, dims in enumerate(found.outputs))


NAMED = {"b": "batch", "t": "token"}


def solve(gm: GraphModule) -> Solution:
    """The axes of every tensor of a captured graph."""
    found = Solution()
    for node in gm.graph.nodes:
        found.add(node)
    return found


def meetings(found: Relation) -> Iterator[list[Place]]:
    """Dims of one node's tensors that share an axis."""
    places: dict[int, list[Place]] = {}
    tensors: list[tuple[Any, Dims]] = [((n, 0), dims) for n, dims in found.inputs]
    tensors += [((found.node, i), dims) for i, dims in enumerate(found.outputs)]
    for (node, output), dims in tensors:
        for i, dim in enumerate(dims):
            for label in dim:
                places.setdefault(label, []).append((node, output, i))
    yield from (each for each in places.values() if len(each) > 1)
