"""Where every tensor of a graph holds the batch and the tokens."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from torch.fx import Node

from effpass.axes.labels import Dim, single
from effpass.axes.relation import Kind, values
from effpass.axes.solve import Solution
from effpass.graph.source import layer, line


class Unpackable(Exception):
    """This graph cannot run on real tokens alone: where, why, and what could be done."""

    def __init__(self, code: str, node: Node | None, reason: str, hint: str = "") -> None:
        super().__init__(reason)
        self.code, self.reason, self.hint = code, reason, hint
        self.where = "" if node is None else " ".join(filter(None, (layer(node), line(node))))


class Holds(StrEnum):
    """What a tensor has one of."""

    TOKENS = "tokens"  # every token of every row
    POSITIONS = "positions"  # every position, for all rows
    ROWS = "rows"  # every row
    SQUARE = "square"  # every pair of tokens
    NEITHER = "neither"


@dataclass(frozen=True)
class Place:
    """The dims that hold the batch and the tokens; the same dim where they are merged."""

    holds: Holds
    batch: int | None = None
    token: int | None = None


class Places:
    """Places of all tensors of one graph, whose mask (b, t) is ``mask``."""

    def __init__(self, solution: Solution, mask: Node) -> None:
        self.solution, self.mask = solution, mask
        self._batch, self._token = solution.dims(mask)
        shape = values(mask)[0].shape
        self.one_row = single(shape[0])
        if len(self.token) != 1 or (len(self.batch) != 1 and not self.one_row):
            raise Unpackable("cut", mask, "a reshape cuts the batch or the tokens in parts")

    @property
    def token(self) -> Dim:
        """The axis of tokens."""
        return self.solution.classes.resolve(self._token)

    @property
    def batch(self) -> Dim:
        """The axis of rows; empty for a single row."""
        return self.solution.classes.resolve(self._batch)

    def of(self, node: Node, output: int = 0) -> Place:
        """Where one tensor holds batch and tokens."""
        dims = self.solution.dims(node, output)
        token = [i for i, dim in enumerate(dims) for label in dim if (label,) == self.token]
        batch = [i for i, dim in enumerate(dims) for label in dim if (label,) == self.batch]
        if len(token) > 1 or len(batch) > 1:
            return Place(Holds.SQUARE)
        if token and (batch or self.one_row):
            return Place(Holds.TOKENS, batch[0] if batch else None, token[0])
        if token:
            return Place(Holds.POSITIONS, None, token[0])
        return Place(Holds.ROWS, batch[0]) if batch else Place(Holds.NEITHER)

    def free(self, node: Node) -> bool:
        """Whether a node treats every row and every token by itself."""
        return self.kinds(node) <= {Kind.FREE}

    def kinds(self, node: Node) -> set[Kind]:
        """What a node does along rows and tokens."""
        return self.solution.kinds(node, [*self.token, *self.batch])

    def sizes(self, node: Node, output: int, tokens: Any) -> list[Any] | None:
        """Sizes of a tensor's packed form, ``tokens`` (a node) in place of the token axis.

        None where a size is neither known nor that of the tokens.
        """
        made: list[Any] = []
        for dim in self.solution.dims(node, output):
            rest: Any = 1
            for label in dim:
                if (label,) not in (self.token, self.batch):
                    size = self.solution.classes.sizes[label]
                    if not size.is_Integer:
                        return None
                    rest *= int(size)
            if not any((label,) == self.token for label in dim):
                made.append(rest)
            elif rest == 1:
                made.append(tokens)
            else:
                made.append((tokens, rest))
        return made
