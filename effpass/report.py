"""What effpass did to a model, what it declined to do, and why: records, as text and as JSON."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from io import StringIO
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from effpass.chains import Axes, axes_table, chain_text
from effpass.token_report import Reduction, token_tables

# the ops that stand in graphs as nodes; whatever else is raised is torch's own, or only recorded
NODES = frozenset(
    ("selective_scan", "ssd_scan", "linear_recurrence", "causal_conv1d", "varlen_attention")
)


@dataclass(frozen=True)
class Applied:
    """A rewrite that ran: its pass, what it did, how often, and where first."""

    rewrite: str
    what: str
    count: int
    where: str = ""


@dataclass(frozen=True)
class Declined:
    """Something effpass did not do: a stable code, where, why, and what the user could do."""

    code: str
    where: str
    reason: str
    hint: str = ""


@dataclass(frozen=True)
class Miss:
    """Mathematics that was seen but not raised: the first failed condition and the user's line."""

    idiom: str
    where: str
    reason: str
    source: str = ""


@dataclass(frozen=True)
class Raised:
    """Mathematics that was recognised in plain nodes: which idiom, as what, and how it is proven.

    ``nodes`` is how many nodes expressed it; ``proof`` is "by structure", or what a comparison in
    numbers gave.
    """

    idiom: str
    op: str
    where: str
    source: str
    nodes: int
    proof: str


@dataclass(frozen=True)
class Called:
    """An op of torch's own that the model itself calls: there is nothing to raise."""

    op: str
    where: str
    source: str


@dataclass(frozen=True)
class Chosen:
    """The implementation that one op node got, and those that refused before it."""

    op: str
    where: str
    implementation: str
    refused: tuple[tuple[str, str], ...] = ()
    source: str = ""


@dataclass(frozen=True)
class Found:
    """An op in a layer, ``count`` times, and the idioms that made it, the first to see it first.

    Without idioms it came through a known library function, or the model calls it itself.
    """

    op: str
    idioms: tuple[str, ...] = ()
    count: int = 1

    def __str__(self) -> str:
        number = f"{self.count} " if self.count > 1 else ""
        return number + " <- ".join((self.op, *reversed(self.idioms)))


@dataclass(frozen=True)
class Coverage:
    """What was found in one layer, or in ``layers`` layers alike, and what nearly was.

    ``where`` is the layer's path, numbers of like layers joined: ``layers.0-3,5.mixer``.
    ``nearest`` is the first miss, ``others`` how many more there are.
    """

    where: str
    layers: int
    found: tuple[Found, ...]
    nearest: Miss | None = None
    others: int = 0


@dataclass
class GraphReport:
    """All records of one compiled graph; ``seconds`` are effpass's own, without the compiler's."""

    name: str
    compiler: str
    nodes_before: int = 0
    nodes_after: int = 0
    seconds: float = 0.0
    verified: str = "not asked"
    applied: list[Applied] = field(default_factory=list)
    declined: list[Declined] = field(default_factory=list)
    called: list[Called] = field(default_factory=list)
    raised: list[Raised] = field(default_factory=list)
    misses: list[Miss] = field(default_factory=list)
    chosen: list[Chosen] = field(default_factory=list)
    forms: dict[str, int] = field(default_factory=dict)  # calls of each form of a packed graph
    axes: list[Axes] = field(default_factory=list)  # of every value; only ``explain`` asks for it
    reductions: list[Reduction] = field(default_factory=list)

    @property
    def coverage(self) -> list[Coverage]:
        """One row a layer in which something was found or missed, like layers folded."""
        wheres = {r.where for r in (*self.chosen, *self.called, *self.raised, *self.misses)}
        rows = [self._layer(where) for where in sorted(wheres, key=_natural)]
        return _folded([row for row in rows if row.found or row.nearest])

    def _layer(self, where: str) -> Coverage:
        ops = Counter(r.op for r in (*self.chosen, *self.called) if r.where == where)
        misses = [r for r in self.misses if r.where == where]
        found = _found(ops, [r for r in self.raised if r.where == where])
        nearest = misses[0] if misses else None
        return Coverage(where, 1, found, nearest, max(0, len(misses) - 1))

    def summary(self) -> str:
        """One line for the log."""
        ops = Counter((c.op, c.implementation) for c in self.chosen)
        found = ", ".join(f"{n} {op} on {how}" for (op, how), n in sorted(ops.items()))
        return (
            f"{self.name}: {self.nodes_before} -> {self.nodes_after} nodes, "
            f"{found or 'no op found'}, {len(self.declined)} declined, {len(self.misses)} missed"
        )


@dataclass
class Report:
    """One entry a graph. ``print()`` it, or take ``to_json()``."""

    graphs: list[GraphReport] = field(default_factory=list)

    @property
    def applied(self) -> list[Applied]:
        """Rewrites that ran, over all graphs."""
        return [r for g in self.graphs for r in g.applied]

    @property
    def declined(self) -> list[Declined]:
        """What was declined, over all graphs."""
        return [r for g in self.graphs for r in g.declined]

    @property
    def misses(self) -> list[Miss]:
        """Mathematics seen but not raised, over all graphs."""
        return [r for g in self.graphs for r in g.misses]

    @property
    def raised(self) -> list[Raised]:
        """Mathematics recognised in plain nodes, over all graphs."""
        return [r for g in self.graphs for r in g.raised]

    @property
    def chosen(self) -> list[Chosen]:
        """The implementation of every op node, over all graphs."""
        return [r for g in self.graphs for r in g.chosen]

    @property
    def coverage(self) -> list[Coverage]:
        """What was found and nearly found in each layer, over all graphs."""
        return [r for g in self.graphs for r in g.coverage]

    @property
    def axes(self) -> list[Axes]:
        """The dims of every value by name, over all graphs of ``effpass.explain``."""
        return [r for g in self.graphs for r in g.axes]

    def why(self, value: str, name: str = "token", graph: int = 0) -> str:
        """How a value of one graph got the name of its ``"batch"`` or ``"token"`` dim, as text.

        Raises KeyError for a value that is not there, IndexError for such a graph.
        """
        return chain_text(self.graphs[graph].axes, value, name)

    def count(self, op: str) -> int:
        """How many of the named op the graphs hold.

        Ops of effpass are counted as nodes, ``"sdpa"`` and ``"ffn"`` as regions that were raised.
        """
        records = self.chosen if op in NODES else self.raised
        return sum(record.op == op for record in records)

    def to_json(self, indent: int | None = 2) -> str:
        """All records as JSON text."""
        graphs = [asdict(g) | {"coverage": [asdict(r) for r in g.coverage]} for g in self.graphs]
        return json.dumps({"graphs": graphs}, indent=indent)

    def __str__(self) -> str:
        text = StringIO()
        Console(file=text, width=120, color_system=None).print(self)
        return text.getvalue()

    def __rich__(self) -> Any:
        if not self.graphs:
            return Text("effpass compiled no graph (has the model run?)")
        return Group(*(part for g in self.graphs for part in _graph_tables(g)))


def _graph_tables(graph: GraphReport) -> Iterable[Any]:
    yield Text(
        f"{graph.name}: {graph.nodes_before} nodes captured, {graph.nodes_after} after rewriting, "
        f"{graph.seconds:.2f} s in effpass, compiled by {graph.compiler}, "
        f"verification: {graph.verified}",
        style="bold",
    )
    if graph.forms:
        calls = ", ".join(f"{name} {count}" for name, count in graph.forms.items())
        yield Text(f"  calls of each form: {calls}")
    yield from (part for each in graph.reductions for part in token_tables(each))
    if graph.coverage:
        yield _coverage_table(graph.coverage)
    else:
        yield Text("  nothing was found, nor nearly: this graph is compiled as it was captured")
    if graph.chosen:
        yield _chosen_table(graph.chosen)
    yield from _rows("raised", ("idiom", "op", "layer", "source", "nodes", "proof"), graph.raised)
    yield from _rows("rewrites", ("rewrite", "what", "count", "first at"), graph.applied)
    yield from _rows("declined", ("code", "where", "reason", "what to do"), graph.declined)
    yield from _rows(
        "not raised", ("idiom", "where", "first failed condition", "source"), graph.misses
    )
    if graph.axes:
        yield axes_table(graph.axes)


def _coverage_table(coverage: list[Coverage]) -> Table:
    table = _table("coverage", ("layer", "found", "nearest miss", "source"))
    for row in coverage:
        where = row.where or "(the model itself)"
        where += f" ({row.layers} layers)" if row.layers > 1 else ""
        found = ", ".join(map(str, row.found)) or "nothing"
        miss = f"{row.nearest.idiom}: {row.nearest.reason}" if row.nearest else ""
        miss += f" (and {row.others} more)" if row.others else ""
        table.add_row(where, found, miss, row.nearest.source if row.nearest else "")
    return table


def _chosen_table(chosen: list[Chosen]) -> Table:
    table = _table("ops", ("layer", "op", "implementation", "why not the others", "source"))
    for record in chosen:
        why = "; ".join(f"{target}: {reason}" for target, reason in record.refused)
        table.add_row(record.where, record.op, record.implementation, why, record.source)
    return table


def _rows(title: str, columns: tuple[str, ...], records: list[Any]) -> Iterable[Table]:
    if not records:
        return
    table = _table(title, columns)
    for record in records:
        table.add_row(*(str(value) for value in asdict(record).values()))
    yield table


def _table(title: str, columns: tuple[str, ...]) -> Table:
    table = Table(title=title, title_justify="left", show_lines=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _found(ops: Counter[str], raised: Sequence[Raised]) -> tuple[Found, ...]:
    """The ops of one layer, each with the idioms behind it.

    Where fewer of an op are left than were raised, a later idiom took them into its own.
    """
    taken = Counter(r.op for r in raised if r.op in NODES) - ops
    chains: list[tuple[str, tuple[str, ...]]] = []
    for record in raised:
        inside = [c for c in chains if taken[c[0]] and c[0] != record.op]
        earlier: tuple[str, ...] = ()
        if inside and record.op in NODES:
            chains.remove(inside[0])
            op, earlier = inside[0]
            taken[op] -= 1
        chains.append((record.op, (*earlier, record.idiom)))
    left = ops - Counter(op for op, _ in chains if op in NODES)
    plain: list[tuple[str, tuple[str, ...]]] = [(op, ()) for op in left.elements()]
    counted = Counter(plain + sorted(chains, key=lambda chain: chain[0] not in NODES))
    return tuple(Found(op, idioms, count) for (op, idioms), count in counted.items())


def _natural(path: str) -> list[tuple[int, str]]:
    """Sorts layer 2 before layer 10."""
    return [(int(p), "") if p.isdigit() else (-1, p) for p in path.split(".")]


def _folded(rows: Sequence[Coverage]) -> list[Coverage]:
    """Rows that differ in one number of their path become one row, for each place in the path."""
    depth = max((row.where.count(".") + 1 for row in rows), default=0)
    for place in range(depth):
        groups: dict[Any, list[Coverage]] = {}
        for row in rows:
            parts = row.where.split(".")
            numbered = place < len(parts) and parts[place].isdigit()
            rest = (*parts[:place], None, *parts[place + 1 :]) if numbered else row.where
            miss = row.nearest and replace(row.nearest, where="")
            groups.setdefault((rest, row.layers, row.found, miss, row.others), []).append(row)
        rows = [_joined(group, place) for group in groups.values()]
    return list(rows)


def _joined(rows: Sequence[Coverage], place: int) -> Coverage:
    if len(rows) == 1:
        return rows[0]
    parts = rows[0].where.split(".")
    parts[place] = _ranges([int(row.where.split(".")[place]) for row in rows])
    return replace(rows[0], where=".".join(parts), layers=sum(row.layers for row in rows))


def _ranges(numbers: Sequence[int]) -> str:
    """``[0, 1, 2, 5]`` -> ``0-2,5``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
