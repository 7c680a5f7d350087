"""Axes through effpass's ops, read from their own axis strings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from effpass.axes.labels import Dim, Dims, single
from effpass.axes.notation import Axes
from effpass.axes.relation import RULES, Each, Kind, Relation, is_tensor, values


def register(name: str, axes: Axes, kinds: Mapping[str, Kind]) -> None:
    """Gives ``effpass::<name>`` the rule that its axis string spells.

    ``kinds`` are those of axes that are neither free nor folded; an axis that is missing from the
    first output is folded.
    """

    def rule(found: Relation, given: Mapping[str, Any]) -> Each:
        known: dict[str, Dim] = {}
        packed = given.get("cu_seqlens") is not None

        def dims(letters: tuple[str, ...], shape: Any) -> Dims:
            made = []
            for letter, size in zip(letters, shape, strict=True):
                # without packing every row is one sequence
                key = "b" if letter == "s" and not packed else letter
                if key not in known and not single(size):
                    known[key] = found.labels.fresh(size)
                made.append(() if single(size) else known[key])
            return tuple(made)

        for argument, letters in axes.inputs.items():
            source = given.get(argument)
            if is_tensor(source):
                shape = source.meta["val"].shape  # may lack its first dimension, the heads
                found.read(source, dims(letters[len(letters) - len(shape) :], shape))
        made = [
            dims(letters, value.shape)
            for letters, value in zip(axes.output_dims, values(found.node), strict=True)
        ]
        for letter, dim in known.items():
            found.names |= {label: letter for label in dim}
            if letter in kinds:
                found.mark(dim, kinds[letter])
            elif letter not in axes.output_dims[0]:
                found.mark(dim, Kind.FOLDED)
        return Each(tuple(made))

    RULES[f"effpass::{name}"] = rule
