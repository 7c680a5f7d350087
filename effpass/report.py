"""What effpass did to a model, what it declined to do, and why: records, as text and as JSON."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from io import StringIO
from typing import Any

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text


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
class Chosen:
    """The implementation that one op node got, and those that refused before it."""

    op: str
    where: str
    implementation: str
    refused: tuple[tuple[str, str], ...] = ()
    source: str = ""


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
    raised: list[Raised] = field(default_factory=list)
    misses: list[Miss] = field(default_factory=list)
    chosen: list[Chosen] = field(default_factory=list)

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

    def count(self, op: str) -> int:
        """How many of the named op the graphs hold.

        Ops of effpass are counted as nodes, ``"sdpa"`` and ``"ffn"`` as regions that were raised.
        """
        nodes = sum(record.op == op for record in self.chosen)
        return nodes or sum(record.op == op for record in self.raised)

    def to_json(self, indent: int | None = 2) -> str:
        """All records as JSON text."""
        return json.dumps({"graphs": [asdict(g) for g in self.graphs]}, indent=indent)

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
    if graph.chosen:
        yield _chosen_table(graph.chosen)
    else:
        yield Text("  no op was found in this graph: it is compiled as it was captured")
    yield from _rows(
        "raised", ("idiom", "op", "layer", "source", "nodes", "proof"), graph.raised
    )
    yield from _rows("rewrites", ("rewrite", "what", "count", "first at"), graph.applied)
    yield from _rows("declined", ("code", "where", "reason", "what to do"), graph.declined)
    yield from _rows(
        "not raised", ("idiom", "where", "first failed condition", "source"), graph.misses
    )


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
