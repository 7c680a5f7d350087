"""Which dim of a value is the batch and which holds the tokens, and why: records, table, chains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches

from rich.table import Table

SHOWN = 4  # kinds of dims that one row of the table lists


@dataclass(frozen=True)
class Axes:
    """The dims of one value of a graph by name, ``batch token 32``, and how it knows them.

    ``via``: by name ("batch", "token"), the value that it has the name from. ``given``: by name,
    what gave it, where it begins. Dims without a name are told by their size.
    """

    value: str
    axes: str
    where: str
    source: str
    via: dict[str, str] = field(default_factory=dict)
    given: dict[str, str] = field(default_factory=dict)


def chain(axes: Sequence[Axes], value: str, name: str) -> list[Axes]:
    """Values along which ``value`` has the name of its batch or token dim, the giver first.

    Empty where it has no such dim. Raises ValueError for a name that is none, KeyError for a value
    that is not there, with the nearest.
    """
    if name not in ("batch", "token"):
        raise ValueError(f"expected the name of a dim, 'batch' or 'token', found {name!r}")
    every = {each.value: each for each in axes}
    if value not in every:
        near = ", ".join(get_close_matches(value, every, cutoff=0.3)) or "none"
        raise KeyError(
            f"expected the name of a value of this graph, found {value!r}; the nearest: {near}; "
            "the table of all values tells their names"
        )
    found = [every[value]]
    while name in found[0].via:
        found.insert(0, every[found[0].via[name]])
    return found if name in found[0].given else []


def chain_text(axes: Sequence[Axes], value: str, name: str) -> str:
    """``chain`` as text, one line a value."""
    found = chain(axes, value, name)
    if not found:
        own = next(each.axes for each in axes if each.value == value)
        return f"no dim of {value} ({own}) is known to be the {name}"
    lines = [f"{found[0].value} ({found[0].axes}): {found[0].given[name]}"]
    for each in found[1:]:
        place = " ".join(filter(None, (each.where, each.source)))
        lines.append(f"-> {each.value} ({each.axes})" + (f", {place}" if place else ""))
    return "\n".join(lines)


def axes_table(axes: Sequence[Axes], every: bool = False) -> Table:
    """A row for each layer, like layers in one; with ``every``, a row for each value."""
    table = Table(title="axes", title_justify="left", show_lines=False)
    columns = (
        ("value", "dims", "layer", "source") if every else ("layer", "dims", "values", "first")
    )
    for column in columns:
        table.add_column(column, overflow="fold")
    if every:
        for each in axes:
            table.add_row(each.value, each.axes, each.where, each.source)
        return table
    layers: dict[str, list[Axes]] = {}
    for each in axes:
        if each.via or each.given:
            layers.setdefault(_numbered(each.where), []).append(each)
    for where, members in layers.items():
        kinds = list(dict.fromkeys(each.axes for each in members))
        more = f" | {len(kinds) - SHOWN} more" if len(kinds) > SHOWN else ""
        dims = " | ".join(kinds[:SHOWN]) + more
        table.add_row(where or "(the model itself)", dims, str(len(members)), members[0].value)
    table.add_row("", "neither batch nor token", str(sum(map(_unnamed, axes))), "")
    return table


def _unnamed(each: Axes) -> bool:
    return not (each.via or each.given)


def _numbered(where: str) -> str:
    """Layers alike by one name: ``layers.*.mixer``."""
    return ".".join("*" if part.isdigit() else part for part in where.split("."))
