"""Which dims of a graph are the batch and the tokens, and from where each value knows it.

The solver says which dims are one axis; this names the axes. Who names them, the surest first:

- effpass's own ops, whose axis strings have ``b`` and ``t``;
- integers (b, t) among the inputs that are looked up in a table: token ids;
- torch's attention (b, h, t, d), where nothing else has named a batch.

Every other value has its names from a neighbour that shares the axis. ``via`` tells from which, so
that following it leads to the operation that gave the name, by the shortest way.
"""

from __future__ import annotations

import operator
from collections import deque
from dataclasses import dataclass, field

from torch.fx import GraphModule, Node

from effpass.axes.labels import Dim, is_attention, opname, single
from effpass.axes.relation import arguments, is_tensor, values
from effpass.axes.solve import Place, Solution, meetings, solve

NAMES = ("batch", "token")


@dataclass(frozen=True)
class Origin:
    """The dims of one value by name; ``via``: by name, the value it has the name from.

    ``given``: by name, who gave it; a name is in ``via`` or in ``given``.
    """

    node: Node
    text: str
    via: dict[str, Node] = field(default_factory=dict)
    given: dict[str, str] = field(default_factory=dict)


def origins(gm: GraphModule) -> list[Origin]:
    """Every tensor of a graph with the names of its dims, in the order of the graph."""
    solution = solve(gm)
    given = _given_by_ops(solution) + _given_by_ids(solution)
    if not any(name == "batch" for _, name, _ in given):
        given += _given_by_attention(solution)
    neighbours = _neighbours(solution)
    found = {
        node: Origin(node, solution.text(node))
        for node in gm.graph.nodes
        if node in solution and is_tensor(node)
    }
    for name in NAMES:
        sources = {place: who for place, each, who in given if each == name}
        named = {label for label, each in solution.names().items() if name in each.split("/")}
        before = _walk(solution, neighbours, list(sources), named)
        for place in before:
            origin = found.get(place[0])
            if origin is None or name in origin.via or name in origin.given:
                continue
            earlier = before[place]
            while earlier is not None and (earlier[0] not in found or earlier[0] is place[0]):
                place, earlier = earlier, before[earlier]  # one that makes several is not shown
            if earlier is not None:
                origin.via[name] = earlier[0]
            else:
                origin.given[name] = sources[place]
    return list(found.values())


Given = tuple[Place, str, str]  # a place, the name of its axis, and who says so


def _given_by_ops(solution: Solution) -> list[Given]:
    """Names that ops have for their own dims; the solver has taken them in already."""
    found: list[Given] = []
    letters = {"b": "batch", "t": "token"}
    for node, relation in solution.relations.items():
        tensors = [((n, 0), dims) for n, dims in relation.inputs]
        tensors += [((node, i), dims) for i, dims in enumerate(relation.outputs)]
        for (source, output), dims in tensors:
            for d, dim in enumerate(dims):
                names = {letters.get(relation.names.get(label, "")) for label in dim} - {None}
                place = (source, output, d)
                found += [(place, name, f"{node.target} names it") for name in names if name]
    return found


def _given_by_ids(solution: Solution) -> list[Given]:
    """Integers (b, t) that are given to the graph and looked up in a table."""
    found: list[Given] = []
    for node in solution.relations:
        if opname(node) != "embedding":
            continue
        ids = arguments(node)["indices"]
        if is_tensor(ids) and ids.op == "placeholder" and values(ids)[0].dim() == 2:
            found += _named(solution, ids, (0, 1), "ids that are looked up in a table")
    return found


def _given_by_attention(solution: Solution) -> list[Given]:
    """Queries (b, h, t, d) whose first dim is one axis."""
    found: list[Given] = []
    for node in solution.relations:
        if not is_attention(node):
            continue
        query = arguments(node)["query"]
        if values(query)[0].dim() == 4:
            found += _named(solution, query, (0, 2), "queries (batch, heads, tokens, channels)")
    return found


def _named(solution: Solution, node: Node, dims: tuple[int, int], who: str) -> list[Given]:
    found: list[Given] = []
    for d, name in zip(dims, NAMES, strict=True):
        dim: Dim = solution.dims(node)[d]
        if len(dim) == 1 and not single(values(node)[0].shape[d]):
            solution.name(dim, name)
            found.append(((node, 0, d), name, who))
    return found


def _neighbours(solution: Solution) -> dict[Place, list[Place]]:
    """Places that one node says are the same axis."""
    found: dict[Place, list[Place]] = {}

    def join(first: Place, second: Place) -> None:
        found.setdefault(first, []).append(second)
        found.setdefault(second, []).append(first)

    for relation in solution.relations.values():
        for places in meetings(relation):
            for place in places[1:]:
                join(places[0], place)
        for user in relation.node.users:
            if user.target is operator.getitem and user in solution:
                output = user.args[1]
                for d in range(len(solution.dims(user))):
                    join((relation.node, output, d), (user, 0, d))  # type: ignore[arg-type]
    return found


def _walk(
    solution: Solution, neighbours: dict[Place, list[Place]], starts: list[Place], axes: set[int]
) -> dict[Place, Place | None]:
    """Places of these axes that are reached, each with the one before it on a shortest way."""
    before: dict[Place, Place | None] = dict.fromkeys(starts)
    pending = deque(starts)
    while pending:
        place = pending.popleft()
        for node, output, d in neighbours.get(place, ()):
            each = (node, output, d)
            if each not in before and axes.intersection(solution.dims(node, output)[d]):
                before[each] = place
                pending.append(each)
    return before
