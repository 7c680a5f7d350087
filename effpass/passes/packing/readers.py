"""Who reads padding: values that were scattered back hold zeros where they held something else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.fx import Node

from effpass.axes.labels import Dim, opname
from effpass.axes.relation import Kind, arguments, is_tensor
from effpass.passes.packing.places import Places, Unpackable
from effpass.passes.packing.samples import Samples


class Readers:
    """Follows values that differ at padding until nobody looks at it any more.

    ``columns``: positions that a head reads, which must be real tokens in every row (of a batch
    for which the packed graph runs).
    """

    def __init__(self, places: Places, samples: Samples) -> None:
        self.places, self.samples = places, samples
        self.columns: set[int] = set()
        self.picks: list[tuple[Node, Node]] = []  # light (rows, positions) that are read
        self.mixed: dict[Node, Unpackable] = {}  # made of padding and real tokens, and where
        self._tainted: dict[Node, Dim] = {}

    def tainted(self, node: Node) -> bool:
        """Whether a plain value differs at padding from what it was, or was mixed with such."""
        return node in self._tainted or node in self.mixed

    def taint(self, node: Node) -> None:
        """From now on the plain form of ``node`` is zero at padding, and was not."""
        self._tainted[node] = self.places.token

    def read(
        self, node: Node, plain: Callable[[Node], Any], why: Unpackable | None = None
    ) -> None:
        """A node reads plain values; it is ``mixed`` where padding may change its result.

        ``why``: the reason why it has no packed form, where there is one.
        """
        for source in node.all_input_nodes:
            plain(source)
        before = [self.mixed[n] for n in node.all_input_nodes if n in self.mixed]
        if before:
            self.mixed[node] = before[0]
            return
        tainted = [n for n in node.all_input_nodes if n in self._tainted]
        if not tainted:
            return
        if len(tainted) == 1 and self._selects(node, tainted[0]):
            return
        along = tuple(label for n in tainted for label in self._tainted[n])
        kinds = self.places.solution.kinds(node, along)
        name = opname(node)
        if kinds <= {Kind.FREE}:
            self._tainted[node] = along
            return
        if name in ("slice", "narrow") and node in self.places.solution:
            d = arguments(node)["dim"]
            part = self.places.solution.dims(node)[d]
            self._tainted[node] = tuple(dict.fromkeys((*along, *part)))
            return
        self.mixed[node] = why or Unpackable(
            "reads_padding",
            node,
            f"{name or node.target} mixes padding tokens with real ones "
            f"({', '.join(sorted(kinds))} along them)",
            "mask the values first, or exclude this model from pack_varlen",
        )

    def _selects(self, node: Node, source: Node) -> bool:
        """One position of every row: it must be a real token."""
        place = self.places.of(source)
        given = arguments(node) if opname(node) else {}
        if self._tainted[source] != self.places.token or place.token is None:
            return False
        rank = len(self.places.solution.dims(source))
        if opname(node) == "select" and place.batch != place.token:
            if given["dim"] % rank == place.token and isinstance(given["index"], int):
                self.columns.add(given["index"])
                return True
        if opname(node) == "index" and (place.batch, place.token) == (0, 1):
            indices = list(given["indices"])
            pair = indices[:2]
            if len(indices) == 2 and all(
                is_tensor(i) and self.samples.light(i) and not i.meta["val"].is_floating_point()
                for i in pair
            ):
                self.picks.append((pair[0], pair[1]))
                return True
        return False
