"""Sample rows, and the masks that a graph's own code makes of their boundaries."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import SymInt, Tensor
from torch.fx import GraphModule, Node

from effpass.axes.relation import values
from effpass.passes.boundaries.marks import Marks, RowError
from effpass.passes.packing.masks import Seen, who_sees, window_of, within
from effpass.passes.packing.places import Unpackable
from effpass.passes.packing.samples import LONGER, Samples

HINT = "pad the sequences, or give every sequence by itself"


class RowSamples(Samples):
    """Rows of one and of several sequences, by the inputs that tell their boundaries.

    ``masks`` holds the number of each token's sequence, (1, T), one tensor a sample.
    """

    def __init__(self, gm: GraphModule, marks: Marks) -> None:
        self.marks = marks.inputs(gm)
        row = self.marks.get("position_ids", self.marks.get("seq_idx"))
        assert row is not None  # as marks.shaped says
        super().__init__(row)

    def _drawn(self) -> Iterator[Tensor]:
        size = values(self.mask)[0].shape[1]
        tokens = int(size.node.hint) if isinstance(size, SymInt) else int(size)
        lengths = [tokens, *((2 * tokens + 1, LONGER) if isinstance(size, SymInt) else ())]
        generator = torch.Generator().manual_seed(0)
        for n in lengths:
            yield torch.zeros(1, n, dtype=torch.long)
            for chance in (0.1, 0.4, 1.0):
                begins = torch.rand(1, n, generator=generator) < chance
                begins[:, 0] = False
                yield begins.cumsum(1)

    def given(self, node: Node, mask: Tensor) -> Any:
        """A value for one input, of a row whose sequences have the numbers ``mask``."""
        value = node.meta["val"]
        if node is self.marks.get("position_ids"):
            return positions(mask).to(value.dtype)
        if node is self.marks.get("seq_idx"):
            return mask.to(value.dtype)
        return super().given(node, mask)

    def own(self, mask: Tensor) -> dict[str, int]:
        """Sizes that are symbols: all that are as long as the row, by whatever symbol."""
        row = values(self.mask)[0].shape[1]
        if not isinstance(row, SymInt):
            return {}
        every = [size for n in self.mask.graph.find_nodes(op="placeholder") for size in _sizes(n)]
        alike = [s for s in every if isinstance(s, SymInt) and s.node.hint == row.node.hint]
        return dict.fromkeys(map(str, alike), mask.shape[1])


def _sizes(node: Node) -> list[Any]:
    value = node.meta.get("val")
    return list(value.shape) if isinstance(value, Tensor) else [value]


def positions(numbers: Tensor) -> Tensor:
    """(1, T): where each token stands in its sequence, whose number it has."""
    same = numbers[0][:, None] == numbers[0]
    return same.tril(-1).sum(1)[None]


def seen_in_rows(
    attention: Node, mask: Node, causal: bool, samples: RowSamples
) -> tuple[Seen, bool]:
    """The window of an attention, and whether its own mask keeps sequences apart.

    Raises RowError where the mask is neither that nor blind to boundaries.
    """
    if not samples.light(mask):
        raise RowError(attention, "its mask is made of weights, not of positions alone", HINT)
    key = (mask, causal)  # layers share their mask
    if key not in samples.read:
        samples.read[key] = _read(attention, mask, causal, samples)
    return samples.read[key]


def _read(attention: Node, mask: Node, causal: bool, samples: RowSamples) -> tuple[Seen, bool]:
    found: Seen | None = None
    apart = blind = True
    try:
        for i, numbers in enumerate(samples.masks):
            tokens = numbers.shape[1]
            sees = who_sees(attention, samples.value(mask, i), torch.ones(1, tokens))
            if causal:
                sees = sees & torch.ones(tokens, tokens, dtype=torch.bool).tril()
            if not bool(numbers.any()):
                found = window_of(attention, sees)
                continue
            assert found is not None  # the first sample of every length is one sequence
            near = within(found, tokens)
            own = near & (numbers[0][:, None] == numbers[0])
            apart = apart and bool((sees == own).all())
            blind = blind and bool((sees == near).all())
            if not apart and not blind:
                raise RowError(attention, "its mask lets tokens see other sequences", HINT)
    except (Unpackable, RuntimeError, IndexError) as error:
        raise RowError(attention, f"its mask cannot be read: {error}", HINT) from error
    assert found is not None
    return found, apart and not blind
