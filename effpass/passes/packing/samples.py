"""Sample masks, and the values that a graph's own mask code makes of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import SymInt, Tensor
from torch.fx import Node

from effpass.axes.labels import expression
from effpass.axes.relation import values
from effpass.graph.region import ancestors, evaluate
from effpass.graph.writes import writes

LARGEST = 1 << 24  # elements of one mask that is looked at
LONGER = 512  # with lengths that change, masks are looked at up to this length, or the captured one


class Samples:
    """Masks of several shapes and paddings; values of nodes that depend on inputs alone.

    ``lightness``: a node is light when it depends on the mask, on other integers and on sizes, but
    on no weight: the code of masks and of positions. ``read`` keeps what readers of masks found.
    """

    def __init__(self, mask: Node, inverted: bool = False) -> None:
        self.mask, self.inverted = mask, inverted
        self._light: dict[Node, bool] = {}
        self._values: dict[tuple[Node, int], Any] = {}
        self.read: dict[tuple[Node, bool], Any] = {}
        self.masks = list(self._drawn())

    @property
    def longest(self) -> int | None:
        """The greatest length looked at, where lengths may change."""
        fixed = isinstance(values(self.mask)[0].shape[1], int)
        return None if fixed else max(m.shape[1] for m in self.masks)

    def light(self, node: Node) -> bool:
        """Whether a node depends on inputs of integers, and on nothing else but sizes."""
        if node not in self._light:
            self._light[node] = self._is_light(node)
        return self._light[node]

    def _is_light(self, node: Node) -> bool:
        value = node.meta.get("val")
        if node.op == "placeholder":
            if not isinstance(value, Tensor):
                return isinstance(value, int | SymInt)
            return node is self.mask or not (value.is_floating_point() or value.is_complex())
        if node.op == "get_attr":
            return isinstance(value, Tensor)
        if node.op != "call_function" or writes(node):
            return False
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            return False
        return all(self.light(source) for source in node.all_input_nodes)

    def value(self, node: Node, sample: int) -> Any:
        """What a light node makes of one sample mask."""
        if (node, sample) not in self._values:
            self._values[node, sample] = self._evaluated(node, self.masks[sample])
        return self._values[node, sample]

    def _evaluated(self, node: Node, mask: Tensor) -> Any:
        found = ancestors([node])
        given = {n: self.given(n, mask) for n in found if n.op == "placeholder"}
        inside = sorted(found - set(given))
        with torch.no_grad():
            return evaluate(inside, [node], given)[0] if inside else given[node]

    def given(self, node: Node, mask: Tensor) -> Any:
        """A value for one input of the graph, when ``mask`` (1: a real token) is the padding."""
        value = node.meta["val"]
        if node is self.mask:
            return (1 - mask if self.inverted else mask).to(value.dtype)
        own = self.own(mask)
        if not isinstance(value, Tensor):
            return size_of(value, own)
        shape = [size_of(size, own) for size in value.shape]
        generator = torch.Generator().manual_seed(mask.numel())
        return torch.randint(0, 2, shape, generator=generator).to(value.dtype)

    def own(self, mask: Tensor) -> dict[str, int]:
        """Sizes by the symbols that the graph has for them."""
        return dict(zip(map(str, values(self.mask)[0].shape), mask.shape, strict=True))

    def _drawn(self) -> Iterator[Tensor]:
        shape = values(self.mask)[0].shape
        rows, tokens = (size_of(size, {}) for size in shape)
        generator = torch.Generator().manual_seed(0)
        yield from _masks(rows, tokens, generator)
        if isinstance(shape[1], SymInt):
            few = rows if isinstance(shape[0], int) else min(rows, 2)
            for longer in (2 * tokens + 1, LONGER):
                if longer > tokens and few * longer * longer <= LARGEST:
                    yield from _masks(few, longer, generator)


def _masks(rows: int, tokens: int, generator: torch.Generator) -> Iterator[Tensor]:
    """No padding, on the right, on the left, anywhere; every row keeps a token."""
    columns = torch.arange(tokens)
    yield torch.ones(rows, tokens, dtype=torch.long)
    for _ in range(2):
        lengths = torch.randint(1, tokens + 1, (rows, 1), generator=generator)
        yield (columns < lengths).long()
        yield (columns >= tokens - lengths).long()
    scattered = torch.randint(0, 2, (rows, tokens), generator=generator)
    scattered[:, torch.randint(0, tokens, (1,), generator=generator)] = 1
    yield scattered


def size_of(size: Any, own: dict[str, int]) -> int:
    """A size as a number: by the symbols that are known, or as it was captured."""
    if isinstance(size, int):
        return size
    made = expression(size)
    known = made.subs({s: own[str(s)] for s in made.free_symbols if str(s) in own})
    if known.is_Integer:
        return int(known)
    return int(size.node.hint) if isinstance(size, SymInt) else int(size)
