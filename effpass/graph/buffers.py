"""Buffers that are filled piece by piece become what they hold. Exact, gradients included.

Along one dim of a buffer, a chain of ``select_scatter`` and ``slice_scatter`` is followed. To read
a piece back is to read what was written (or the buffer behind, where nothing was). A chain that
nobody reads in between, and that covers every index, is a ``stack`` of the pieces, or a ``cat``.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import Graph, GraphModule, Node

from effpass.graph.emit import Emitter, row_major, same_layout
from effpass.graph.reach import Reach
from effpass.graph.regions import region
from effpass.graph.storages import Storages, removable
from effpass.graph.writes import writes

aten = torch.ops.aten
# a view where they can, else a copy
LAZY = ("reshape", "reshape_as", "flatten", "ravel", "contiguous", "to", "type_as", "einsum")
# what writes, and what reads, a piece
SCATTERS = {
    aten.select_scatter.default: aten.select.int,
    aten.slice_scatter.default: aten.slice.Tensor,
}


def tidy(gm: GraphModule, mode: FakeTensorMode) -> int:
    """Rewrites one graph; answers how many reads and buffers were replaced."""
    if not any(node.target in SCATTERS for node in gm.graph.nodes):
        return 0
    found, emit = Storages(gm), Emitter(gm.graph, mode)
    count = read_back(gm, found, emit) + joined(gm, found, emit)
    bases = {n.args[0] for n in gm.graph.nodes if n.target in SCATTERS}
    for node in reversed(list(gm.graph.nodes)):
        if not node.users and (node in bases or node.target in SCATTERS) and removable(node):
            gm.graph.erase_node(node)
    return count


@dataclass(frozen=True)
class _Piece:
    """Indices ``start`` to ``end`` of ``dim``, of ``size``, that ``node`` reads or writes; a
    ``single`` index without that dim."""

    node: Node
    dim: int
    start: int
    end: int
    size: int
    single: bool

    @property
    def value(self) -> Node:
        """What is written there."""
        return self.node.args[1]  # type: ignore[return-value]


def _written(node: Node) -> _Piece | None:
    return _piece(node, node.args[2:]) if node.target in SCATTERS else None


def _piece(node: Node, place: Sequence[Any]) -> _Piece | None:
    """The part of its first operand that a node reads or writes; None if not plain numbers."""
    if node.kwargs or not all(isinstance(n, int | None) for n in place):
        return None
    whole: Tensor = node.args[0].meta["val"]  # type: ignore[union-attr]
    dim, *bounds = place or (0,)
    size = whole.shape[dim]
    if not isinstance(size, int):
        return None
    if node.target in (aten.select.int, aten.select_scatter.default):
        start = bounds[0] % size
        return _Piece(node, dim % whole.dim(), start, start + 1, size, True)
    start, end, step = slice(*(*bounds, None, None, None)[:3]).indices(size)
    if step != 1:
        return None
    return _Piece(node, dim % whole.dim(), start, max(start, end), size, False)


@dataclass
class _Chain:
    """Pieces of one index written one after the other: for each index, when and by which node."""

    base: Node
    dim: int
    last: Node
    length: int = 0
    cells: dict[int, tuple[list[int], list[Node]]] = field(default_factory=dict)

    def add(self, node: Node, piece: _Piece) -> None:
        self.last, self.length = node, self.length + 1
        times, nodes = self.cells.setdefault(piece.start, ([], []))
        times.append(self.length)
        nodes.append(node)

    def writer(self, index: int, time: int) -> Node | None:
        """The last node that wrote to ``index`` up to ``time``."""
        times, nodes = self.cells.get(index, ([], []))
        place = bisect.bisect_right(times, time)
        return nodes[place - 1] if place else None


def read_back(gm: GraphModule, found: Storages, emit: Emitter) -> int:
    """Reads of single indices of a chain read what was written there, or the chain's base."""
    if any(s.writes and s.base.op == "call_function" for s in found):
        return 0  # a read that was a copy, say by reshape, could become a view of written memory
    chains: dict[Node, tuple[_Chain, int]] = {}
    returned = _returned(gm.graph, found)  # the graph returns its own tensors
    instead: dict[Node, Node] = {}
    behind: dict[Node, Node] = {}
    for node in gm.graph.nodes:
        _follow(node, chains)
        if node.target in SCATTERS.values() and node.args[0] in chains:
            chain, time = chains[node.args[0]]
            piece = _piece(node, node.args[1:])
            if piece is None or piece.dim != chain.dim or piece.end - piece.start != 1:
                continue
            writer = chain.writer(piece.start, time)
            if writer is not None and node not in returned and _replaces(writer, node, found):
                value: Node = writer.args[1]  # type: ignore[assignment]
                instead[node] = instead.get(value, value)
            elif writer is None and _same_memory(chain.base, node, found):
                behind[node] = chain.base
    moved = {*instead, *behind}
    if not moved or not _same_gradients(gm.graph, found, instead, behind):
        return 0
    for node, base in behind.items():
        node.replace_input_with(node.args[0], base)  # type: ignore[arg-type]
    for node, value in instead.items():
        node.replace_all_uses_with(value)
        gm.graph.erase_node(node)
    _revalue(gm.graph, found, moved, emit)
    return len(moved)


def _revalue(graph: Graph, found: Storages, moved: set[Node], emit: Emitter) -> None:
    """Views of what was moved share memory with something else now."""
    for node in graph.nodes:
        if node in moved or found.parent.get(node) in moved:
            moved.add(node)
            emit.run(node)


def _follow(node: Node, chains: dict[Node, tuple[_Chain, int]]) -> None:
    """Adds a write of one index to the chain that it continues, or begins one."""
    piece = _written(node)
    if piece is None or piece.end - piece.start != 1:
        return
    buffer: Node = node.args[0]  # type: ignore[assignment]
    chain = chains[buffer][0] if buffer in chains else None
    if chain is None or chain.last is not buffer or chain.dim != piece.dim:
        chain = _Chain(buffer, piece.dim, buffer)
    chain.add(node, piece)
    chains[node] = (chain, chain.length)


def _replaces(writer: Node, read: Node, found: Storages) -> bool:
    """What was written may be read in place of ``read``: same form, same strides for who cares."""
    value: Node = writer.args[1]  # type: ignore[assignment]
    if read.target is not SCATTERS[writer.target] or region(read) != region(writer):  # type: ignore[index]
        return False
    if not _unchanging(value, found):
        return False
    mine, theirs = value.meta["val"], read.meta["val"]
    plain = row_major(mine) and row_major(read.args[0].meta["val"])  # type: ignore[union-attr]
    return mine.dtype == theirs.dtype and (plain or same_layout(mine, theirs))


def _returned(graph: Graph, found: Storages) -> set[Node]:
    """Outputs of the graph, and what they are views of, or would be if it lay otherwise."""
    known: set[Node] = set()
    pending = list(graph.output_node().all_input_nodes)
    while pending:
        node = pending.pop()
        if node not in known:
            known.add(node)
            view = found.rooted(node)
            pending += [found.parent[view]] if view in found.parent else []
            pending += node.all_input_nodes if getattr(node.target, "_opname", "") in LAZY else []
    return known


def _same_memory(base: Node, read: Node, found: Storages) -> bool:
    """The base may be read in place of the buffer that ``read`` reads."""
    buffer: Node = read.args[0]  # type: ignore[assignment]
    return _unchanging(base, found) and same_layout(base.meta["val"], buffer.meta["val"])


def _unchanging(node: Node, found: Storages) -> bool:
    return node not in found.of or not found.of[node].writes


def _same_gradients(
    graph: Graph, found: Storages, instead: dict[Node, Node], behind: dict[Node, Node]
) -> bool:
    """Every output still reaches every input, if only with gradients of zero."""
    ends = [*graph.output_node().all_input_nodes]
    ends += [n for node in graph.nodes if writes(node) for n in node.all_input_nodes]
    before, after = Reach(found), Reach(found, instead, behind)
    after.bits = before.bits
    return all(before.of(node) == after.of(node) for node in ends)


@dataclass
class _Run:
    """Writes of pieces, one after the other and read by nobody else in between."""

    nodes: list[Node] = field(default_factory=list)
    pieces: dict[tuple[int, int], _Piece] = field(default_factory=dict)
    covered: int = 0

    @property
    def base(self) -> Node:
        """What the first of them was written to."""
        return self.nodes[0].args[0]  # type: ignore[return-value]

    @property
    def values(self) -> list[Node]:
        """All that was written, also what was overwritten since."""
        return [node.args[1] for node in self.nodes]  # type: ignore[misc]

    def add(self, piece: _Piece) -> None:
        key = (piece.start, piece.end)
        self.covered += 0 if key in self.pieces else piece.end - piece.start
        self.pieces[key] = piece
        self.nodes.append(piece.node)

    def tiles(self) -> list[_Piece]:
        """The pieces in order if they cover everything once, else none."""
        ordered = [self.pieces[key] for key in sorted(self.pieces)]
        ends = [0, *(piece.end for piece in ordered)]
        touch = all(p.start == end for p, end in zip(ordered, ends, strict=False))
        whole = len(ordered) == 1 and not ordered[0].single
        return ordered if touch and ends[-1] == ordered[-1].size and not whole else []

    def gap(self) -> int | None:
        """The one index that was left out of at least two."""
        ordered = [self.pieces[key] for key in sorted(self.pieces)]
        size = ordered[0].size
        if len(ordered) < 2 or len(ordered) != size - 1 or not all(p.single for p in ordered):
            return None
        return next((i for i, p in enumerate(ordered) if p.start != i), size - 1)


def joined(gm: GraphModule, found: Storages, emit: Emitter) -> int:
    """Runs that cover their buffer, but for one index perhaps, become one ``stack`` or ``cat``."""
    reach, runs, count = Reach(found), dict[Node, _Run](), 0
    for node in list(gm.graph.nodes):
        piece = _written(node)
        if piece is None:
            continue
        buffer: Node = node.args[0]  # type: ignore[assignment]
        run = runs[buffer] if _continues(runs.get(buffer), node, piece) else _Run()
        run.add(piece)
        if run.covered < piece.size:
            runs[node] = run
            continue
        tiles = run.tiles()
        count += (
            bool(tiles)
            and _joinable(run, [p.value for p in tiles], found, reach)
            and _join(tiles, run, emit)
        )
    for node, run in runs.items():
        gap = run.gap() if run.nodes[-1] is node else None
        if gap is not None:
            count += _join_around(gap, run, found, emit, reach)
    for node in reversed(emit.made):
        if not node.users:
            gm.graph.erase_node(node)
    return count


def _continues(run: _Run | None, node: Node, piece: _Piece) -> bool:
    buffer: Node = node.args[0]  # type: ignore[assignment]
    if run is None or run.nodes[-1] is not buffer or region(buffer) != region(node):
        return False
    alone = len(buffer.users) == 1 and node.args[1] is not buffer
    return alone and next(iter(run.pieces.values())).dim == piece.dim


def _joinable(run: _Run, values: list[Node], found: Storages, reach: Reach) -> bool:
    """All values are what they were when written, and no gradient of zero gets lost."""
    node = run.nodes[-1]
    dtype = node.meta["val"].dtype
    if not all(_unchanging(v, found) and v.meta["val"].dtype == dtype for v in run.values):
        return False
    on = found.modes[region(node)].autocast.values()
    if on and dtype.is_floating_point and dtype not in (torch.float32, torch.float64, *on):
        return False  # autocast refuses to stack these
    return not reach.together([run.base, *run.values]) & ~reach.together(values)


def _join_around(gap: int, run: _Run, found: Storages, emit: Emitter, reach: Reach) -> bool:
    """Joins what was written with the one index that is still the base's."""
    node, first = run.nodes[-1], next(iter(run.pieces.values()))
    if not _unchanging(run.base, found):
        return False
    kept = emit.call(node, node, aten.select.int, run.base, first.dim, gap)
    values = [run.pieces[key].value for key in sorted(run.pieces)]
    values.insert(gap, kept)
    if not _joinable(run, values, found, reach):
        return False
    return _put(node, aten.stack.default, values, first.dim, emit)


def _join(tiles: list[_Piece], run: _Run, emit: Emitter) -> bool:
    node, dim = run.nodes[-1], tiles[0].dim
    if all(piece.single for piece in tiles):
        return _put(node, aten.stack.default, [piece.value for piece in tiles], dim, emit)
    add = aten.unsqueeze.default
    values = [emit.call(node, node, add, p.value, dim) if p.single else p.value for p in tiles]
    return _put(node, aten.cat.default, values, dim, emit)


def _put(node: Node, target: Any, values: list[Node], dim: int, emit: Emitter) -> bool:
    """Puts the joined values in place of ``node``, unless they would lie otherwise in memory."""
    made = emit.call(node, node, target, values, dim)
    if not same_layout(made.meta["val"], node.meta["val"]):
        return False
    made.meta["val"] = node.meta["val"]  # views of it share this memory
    node.replace_all_uses_with(made)
    return True
