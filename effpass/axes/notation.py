"""The axis notation of ops, e.g. ``"x: b t d; A: d n -> y: b t d; final_state: s d n"``.

One string names every dimension of every tensor of an op. It is read three times: to check the
shapes a caller gave, to make the shapes of the outputs, and (later) to solve axes over a graph.
``b`` is batch, ``t`` token, ``s`` sequence (``b``, or the number of packed sequences), the rest are
channels. A dimension may be written ``w-1``. Length-1 dimensions do not broadcast.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

Shape = Sequence[Any]  # ints or SymInts


@dataclass(frozen=True)
class Axes:
    """A parsed axis string: names of the dimensions of each argument and of each output."""

    text: str
    inputs: Mapping[str, tuple[str, ...]]
    outputs: Mapping[str, tuple[str, ...]]

    @staticmethod
    def parse(text: str) -> Axes:
        """Reads ``"arg: dims; ... -> output: dims; ..."``; raises ValueError when malformed."""
        left, arrow, right = text.partition("->")
        if not arrow:
            raise ValueError(f"expected 'inputs -> outputs' in the axis string, found {text!r}")
        return Axes(text, _side(left, text), _side(right, text))

    @cached_property
    def output_dims(self) -> list[tuple[str, ...]]:
        """Dimensions of each output, in order."""
        return list(self.outputs.values())

    def bind(self, op: str, shapes: Mapping[str, Shape | None], **known: Any) -> dict[str, Any]:
        """Sizes of all axes, from the arguments' shapes; ValueError names what disagrees.

        ``shapes`` maps an argument's name to its shape, or to None when it was not given. ``known``
        gives sizes that no shape may contradict.
        """
        sizes: dict[str, Any] = dict(known)
        seen = {axis: "given" for axis in known}
        for name, dims in self.inputs.items():
            shape = shapes.get(name)
            if shape is None:
                continue
            self._rank(op, name, dims, shape)
            for axis, size in zip(dims, shape, strict=True):
                expected = _size(axis, sizes)
                if expected is None:
                    sizes[axis], seen[axis] = size, name
                elif expected != size:
                    raise ValueError(
                        f"{op}: expected {name} ({' '.join(dims)}) to have {axis} = {expected} "
                        f"(from {seen[axis.split('-')[0]]}), found {size} in shape {tuple(shape)}"
                    )
        return sizes

    def output_shapes(self, sizes: Mapping[str, Any]) -> list[tuple[Any, ...]]:
        """Shapes of the outputs once all axes have sizes."""
        return [tuple(_size(axis, sizes) for axis in dims) for dims in self.output_dims]

    def _rank(self, op: str, name: str, dims: tuple[str, ...], shape: Shape) -> None:
        if len(shape) != len(dims):
            raise ValueError(
                f"{op}: expected {name} to have {len(dims)} dimensions ({' '.join(dims)}), "
                f"found shape {tuple(shape)}"
            )


def _side(text: str, whole: str) -> dict[str, tuple[str, ...]]:
    side = {}
    for part in text.split(";"):
        name, colon, dims = part.partition(":")
        if not colon or not dims.split():
            raise ValueError(f"expected 'name: dims' in {part!r} of the axis string {whole!r}")
        side[name.strip()] = tuple(dims.split())
    return side


def _size(axis: str, sizes: Mapping[str, Any]) -> Any:
    base, _, less = axis.partition("-")
    if base not in sizes:
        return None
    return sizes[base] - int(less) if less else sizes[base]
