"""Layout: brings a tensor whose dims are labelled into the dims that an op wants."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from effpass.axes.labels import Dim, Dims, Labels, expression

Sizes = Mapping[int, Any]


def sizes(labels: Labels, tensors: Iterable[tuple[Tensor, Dims]]) -> dict[int, Any]:
    """The size of every label: numbers where they are fixed, else read from the tensors."""
    known: dict[int, Any] = {
        label: int(size) for label, size in enumerate(labels.sizes) if size.is_number
    }
    pairs = [pair for x, dims in tensors for pair in zip(x.shape, dims, strict=True)]
    for _ in range(2):
        for size, dim in pairs:
            missing = [label for label in dim if label not in known]
            if len(missing) == 1:
                known[missing[0]] = size // _product(known, set(dim) - set(missing))
    return known


def arrange(x: Tensor, dims: Dims, groups: Dims, known: Sizes, whole: str = "") -> Tensor:
    """``x`` with one dim a group of labels; ``dims`` are those of ``x``, all labels uncut.

    A group of which ``x`` has nothing becomes a dim of size 1, or of full size where ``whole`` has
    a "1" at its place; a group of which it has a part is broadcast over the rest.
    """
    x, units = _split(x, dims, groups, known)
    order = [units.index(unit) for group in groups for unit in _units(group, units)]
    assert len(order) == len(units), f"labels {units} are not all in {groups}"
    if order != sorted(order):
        x = x.permute(order)
    pieces, full, merged = _target(units, groups, known, whole)
    if not _equal(x.shape, pieces):
        x = x.reshape(pieces)
    if not _equal(x.shape, full):
        x = x.expand(full)
    return x if _equal(x.shape, merged) else x.reshape(merged)


def _split(x: Tensor, dims: Dims, groups: Dims, known: Sizes) -> tuple[Tensor, list[Dim]]:
    """Cuts dims whose labels do not stay together, drops those of size 1."""
    units, shape = [], []
    for size, dim in zip(x.shape, dims, strict=True):
        if len(dim) <= 1 or any(_runs_in(dim, group) for group in groups):
            units += [dim] if dim else []
            shape += [size] if dim else []
        else:
            units += [(label,) for label in dim]
            shape += [known[label] for label in dim]
    return (x if _equal(x.shape, shape) else x.reshape(shape)), units


def _target(
    units: list[Dim], groups: Dims, known: Sizes, whole: str
) -> tuple[list[Any], list[Any], list[Any]]:
    """Shapes on the way: with a 1 for every missing label, with its full size, and grouped."""
    pieces, full, merged = [], [], []
    for i, group in enumerate(groups):
        present = _units(group, units)
        if not present and whole[i : i + 1] != "1":
            pieces, full, merged = [*pieces, 1], [*full, 1], [*merged, 1]
            continue
        held = {unit[0]: unit for unit in present}
        inside = {label for unit in present for label in unit[1:]}
        for label in group:
            if label in inside:
                continue
            pieces.append(_product(known, held[label]) if label in held else 1)
            full.append(pieces[-1] if label in held else known[label])
        pieces += [] if group else [1]
        full += [] if group else [1]
        merged.append(_product(known, group))
    return pieces, full, merged


def _units(group: Dim, units: Sequence[Dim]) -> list[Dim]:
    return sorted((u for u in units if u[0] in group), key=lambda u: group.index(u[0]))


def _runs_in(dim: Dim, group: Dim) -> bool:
    return any(group[i : i + len(dim)] == dim for i in range(len(group)))


def _product(known: Sizes, labels: Iterable[int]) -> Any:
    return math.prod(known[label] for label in labels)


def _equal(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return [expression(x) for x in a] == [expression(y) for y in b]
