"""Records of token reduction: what it saves, and what became of every token; how they print."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from rich.table import Table
from rich.text import Text

SHOWN = 256  # marks of a token map


@dataclass(frozen=True)
class TokenStep:
    """What became of the tokens of row 0 behind one anchor block; all by their first positions.

    ``before``: how many there were. ``merged``: each that left by where it went. ``dropped``: those
    that left without.
    """

    block: int
    where: str
    before: int
    kept: tuple[int, ...]
    merged: dict[int, int]
    dropped: tuple[int, ...]


@dataclass
class Reduction:
    """What token reduction saves, predicted for the length that a graph was compiled with.

    ``ratio``: the share asked for. ``saved``: the share of the stack's operations (embedding and
    head apart). ``operations`` and ``activation_bytes``: of one row's stack, before and after.
    ``lengths``: tokens in front of the first anchor and behind each. ``valid``: which rows may be
    believed. ``sequences``: how long those of a packed row were, which all that is said here is
    about, together; one number where rows are not packed. ``steps``: the token map, where the graph
    was verified (as ``explain`` does).
    """

    method: str
    ratio: float | None
    saved: float
    operations: tuple[float, float]
    activation_bytes: tuple[float, float]
    lengths: tuple[int, ...]
    valid: str
    sequences: tuple[int, ...] = ()
    steps: list[TokenStep] = field(default_factory=list)


def token_tables(reduction: Reduction) -> Iterable[Any]:
    """What a report prints of one reduction: its savings, and the map of row 0."""
    before, after = (f"{n / 1e9:.3g}" for n in reduction.operations)
    size, smaller = (f"{n / 2**20:.3g}" for n in reduction.activation_bytes)
    asked = "" if reduction.ratio is None else f" of {reduction.ratio:.1%} asked for"
    lengths = " -> ".join(map(str, reduction.lengths))
    packed = len(reduction.sequences) > 1
    of = f"{len(reduction.sequences)} packed sequences" if packed else "one row"
    yield Text(
        f"  tokens: {reduction.method}, {lengths}; predicted for {of}: {reduction.saved:.1%} of "
        f"the stack's operations saved{asked} ({before} -> {after} G), activations {size} -> "
        f"{smaller} MiB. {reduction.valid[0].upper()}{reduction.valid[1:]}."
    )
    if not reduction.steps:
        return
    row = "the packed row, sequences between |" if packed else "row 0"
    title = f"tokens of {row}: o stays, m is merged, x is dropped"
    table = Table(title=title, title_justify="left")
    for column in ("behind block", "layer", "tokens", "merged", "dropped", "map"):
        table.add_column(column, overflow="fold")
    for step in reduction.steps:
        counts = f"{step.before} -> {len(step.kept)}"
        numbers = (str(len(step.merged)), str(len(step.dropped)))
        table.add_row(str(step.block), step.where, counts, *numbers, _map(step, reduction))
    yield table


def _map(step: TokenStep, reduction: Reduction) -> str:
    tokens = reduction.lengths[0]
    marks = ["."] * tokens  # those that left before
    for positions, mark in ((step.kept, "o"), (step.merged, "m"), (step.dropped, "x")):
        for position in positions:
            marks[position] = mark
    ends = list(accumulate(reduction.sequences))[:-1]
    for end in reversed([end for end in ends if end <= SHOWN]):
        marks.insert(end, "|")
    return "".join(marks[:SHOWN]) + ("..." if len(marks) > SHOWN else "")
