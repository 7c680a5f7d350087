"""Who reads padding: values that were scattered back hold zeros where they held something else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.fx import Node

from effpass.axes.labels import Dim, opname
from effpass.axes.relation import Kind, arguments, is_tensor
from effpass.passes.packing.losses import Ignored, ignored, is_loss
from effpass.passes.packing.places import Places, Unpackable
from effpass.passes.packing.samples import Samples

# a position, or light (rows, positions), that are read as real tokens; targets that are ignored
Condition = int | tuple[Node, Node] | Ignored


class Readers:
    """Follows values that differ at padding until nobody looks at it any more.

    ``columns`` and ``picks``: positions that a head reads, which must be real tokens in every row
    (of a batch for which the packed graph runs).
    """

    def __init__(self, places: Places, samples: Samples) -> None:
        self.places, self.samples = places, samples
        self.columns: set[int] = set()
        self.picks: list[tuple[Node, Node]] = []
        self.ignored: list[Ignored] = []  # what must hold of targets
        self.mixed: dict[Node, Unpackable] = {}  # made of padding and real tokens, and where
        self.picked: dict[Node, frozenset[Condition]] = {}  # right where these are real tokens
        self._tainted: dict[Node, Dim] = {}

    def tainted(self, node: Node) -> bool:
        """Whether a plain value is, or may be, another than without packing."""
        return node in self._tainted or node in self.mixed or node in self.picked

    def taint(self, node: Node) -> None:
        """From now on the plain form of ``node`` is zero at padding, and was not."""
        self._tainted[node] = self.places.token

    def demand(self, node: Node) -> None:
        """A picked value is needed: what it reads must be real tokens."""
        for condition in self.picked[node]:
            if isinstance(condition, int):
                self.columns.add(condition)
            elif isinstance(condition, Ignored):
                self.ignored.append(condition)
            elif condition not in self.picks:
                self.picks.append(condition)

    def read(self, node: Node, plain: Callable[[Node], Any], why: Unpackable | None = None) -> None:
        """A node reads plain values; it is ``mixed`` where padding may change its result.

        ``why``: the reason why it has no packed form, where there is one.
        """
        for source in node.all_input_nodes:
            plain(source)
        sources = node.all_input_nodes
        mixed = [self.mixed[n] for n in sources if n in self.mixed]
        tainted = [n for n in sources if n in self._tainted]
        picked = [self.picked[n] for n in sources if n in self.picked]
        if mixed:
            self.mixed[node] = mixed[0]
        elif picked and not tainted:
            self.picked[node] = frozenset[Condition]().union(*picked)
        elif tainted and (picked or not self._follows(node, tainted)):
            self.mixed[node] = why or self._mixes(node, tainted)

    def _follows(self, node: Node, tainted: list[Node]) -> bool:
        """Whether it is known what a node makes of values that differ at padding alone."""
        found: Condition | None = None
        if len(tainted) == 1 and is_loss(node):
            found = ignored(node, self.places, self.samples)
        elif len(tainted) == 1:
            found = self._selects(node, tainted[0])
        if found is not None:
            self.picked[node] = frozenset((found,))
            return True
        along = self._along(tainted)
        if self.places.solution.kinds(node, along) <= {Kind.FREE}:
            self._tainted[node] = along
            return True
        if opname(node) in ("slice", "narrow") and node in self.places.solution:
            part = self.places.solution.dims(node)[arguments(node)["dim"]]
            self._tainted[node] = tuple(dict.fromkeys((*along, *part)))
            return True
        return False

    def _along(self, tainted: list[Node]) -> Dim:
        return tuple(label for n in tainted for label in self._tainted[n])

    def _mixes(self, node: Node, tainted: list[Node]) -> Unpackable:
        kinds = self.places.solution.kinds(node, self._along(tainted))
        return Unpackable(
            "reads_padding",
            node,
            f"{opname(node) or node.target} mixes padding tokens with real ones "
            f"({', '.join(sorted(kinds))} along them)",
            "mask the values first, or exclude this model from pack_varlen",
        )

    def _selects(self, node: Node, source: Node) -> Condition | None:
        """One position of every row, which must be a real token; None where it is no such."""
        place = self.places.of(source)
        given = arguments(node) if opname(node) else {}
        if self._tainted[source] != self.places.token or place.token is None:
            return None
        rank = len(self.places.solution.dims(source))
        if opname(node) == "select" and place.batch != place.token:
            if given["dim"] % rank == place.token and isinstance(given["index"], int):
                return given["index"]
        if opname(node) == "index" and (place.batch, place.token) == (0, 1):
            pair = list(given["indices"])[:2]
            if len(given["indices"]) == 2 and all(
                is_tensor(i) and self.samples.light(i) and not i.meta["val"].is_floating_point()
                for i in pair
            ):
                return pair[0], pair[1]
        return None
