"""Islands: parts of a packed graph that run with the padding, as they were.

What mixes tokens in a way that has no packed form (scores with a soft cap or a learned bias,
sorting by expert, a recurrence written out) reads values that were put back in their rows, zero at
padding; what leaves it is gathered again. That is right exactly if real tokens do not depend on
what padding holds. This is not read off the nodes but tried: the island runs on random values, once
with numbers at padding and once with zeros there, for padding on each side and in between.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import SymInt, Tensor
from torch.fx import Node

from effpass.axes.relation import values
from effpass.graph.region import Region, evaluate
from effpass.passes.packing.moves import clear
from effpass.passes.packing.places import Places
from effpass.passes.packing.samples import Samples, size_of

# of the largest value; sums of other tokens come in another order, closed scores leave less
ALLOWED = {torch.float64: 1e-7, torch.float32: 1e-4}
NARROW = 5e-2
LOUDNESS = (1.0, 6.0)  # scales of what padding holds, that of real tokens is 1
LARGEST = 1 << 27  # elements of one value of an island that is tried
SIDES = ("right", "left", "scattered")


@dataclass(frozen=True)
class Verdict:
    """For which padding an island leaves real tokens as they are, by SIDES.

    ``masked``: whether that is the padding mask's doing, and not the island's own.
    """

    right: bool
    left: bool
    scattered: bool
    masked: bool


@dataclass(frozen=True)
class Island:
    """What computes ``target`` from ``shores``, values that exist packed, and from inputs.

    ``zeros``: shores that are zero at padding in the model itself. ``cleared``: integers inside,
    that are put back with zeros at padding.
    """

    target: Node
    shores: tuple[Node, ...]
    zeros: frozenset[Node]
    cleared: frozenset[Node]
    given: tuple[Node, ...]
    nodes: tuple[Node, ...]

    def key(self, mask: Node) -> tuple[Any, ...]:
        """Equal for islands that compute the same: layers alike are tried once."""
        ends = (*self.shores, *self.given)
        roles = tuple((n is mask, n in self.zeros) for n in ends)
        cleared = tuple(i for i, n in enumerate(self.nodes) if n in self.cleared)
        return Region(ends, (self.target,), self.nodes).key(), roles, cleared


class Islands:
    """Answers for one graph, remembered."""

    def __init__(self, places: Places, samples: Samples) -> None:
        self.places, self.samples = places, samples
        self.shores: set[Node] = set()  # values that are put back where they were, from packed ones
        self.zeros: set[Node] = set()  # those of them that are zero at padding in the model, too
        self._known: dict[tuple[Any, ...], Verdict | None] = {}

    def verdict(self, target: Node) -> Verdict | None:
        """What was found of the island that computes ``target``; None where it cannot be tried."""
        island = self._island(target)
        key = island.key(self.samples.mask)
        if key not in self._known:
            try:
                with torch.random.fork_rng(devices=[]):
                    self._known[key] = self._tried(island)
            except (RuntimeError, IndexError, ValueError, TypeError, KeyError, AssertionError):
                self._known[key] = None  # it cannot run on the side: nothing is known of it
        return self._known[key]

    def _island(self, target: Node) -> Island:
        inside, shores, given, cleared = set[Node](), set[Node](), set[Node](), set[Node]()
        pending = [target]
        while pending:
            node = pending.pop()
            if node in inside or node in shores or node in given:
                continue
            if node in self.shores and node is not target:
                if _floating(node):
                    shores.add(node)
                    continue
                cleared.add(node)  # other numbers than its own code makes could be none
            if node.op == "placeholder":
                given.add(node)
            else:
                inside.add(node)
                pending += node.all_input_nodes
        ends = tuple(sorted(shores)), tuple(sorted(given))
        zeros = frozenset(shores & self.zeros)
        return Island(target, ends[0], zeros, frozenset(cleared), ends[1], tuple(sorted(inside)))

    def _tried(self, island: Island) -> Verdict | None:
        found: dict[str, bool] = dict.fromkeys(SIDES, True)
        masked = False
        for side, mask in self._paddings():
            if self._too_large(island, mask):
                return None
            if found[side]:
                same = all(self._same(island, mask, mask, loud) for loud in LOUDNESS)
                found[side] = same
                if same and self.samples.mask in island.given:
                    masked |= not self._same(island, mask, torch.ones_like(mask), LOUDNESS[0])
        found["scattered"] &= found["right"] and found["left"]
        return Verdict(found["right"], found["left"], found["scattered"], masked)

    def _paddings(self) -> Iterator[tuple[str, Tensor]]:
        """Masks (b, t) with padding, of the captured size, and of another where it may change."""
        shape = values(self.samples.mask)[0].shape
        rows, tokens = (size_of(size, {}) for size in shape)
        yield from _padded(rows, tokens)
        if isinstance(shape[1], SymInt):
            yield from _padded(rows if isinstance(shape[0], int) else min(rows, 3), tokens + 3)

    def _too_large(self, island: Island, mask: Tensor) -> bool:
        own = self.samples.own(mask)
        sizes = [
            torch.Size(size_of(size, own) for size in value.shape).numel()
            for node in island.nodes
            for value in values(node)
        ]
        return max(sizes, default=0) > LARGEST

    def _same(self, island: Island, padding: Tensor, mask: Tensor, loud: float) -> bool:
        """Whether real tokens, and their gradients, are the same with zeros at ``padding``.

        The model is told ``mask``.
        """
        runs = []
        for quiet in (False, True):
            torch.manual_seed(0)
            env = {node: self.samples.given(node, mask) for node in island.given}
            env |= {node: _weight(env[node]) for node in island.given if _floating(node)}
            inputs = []
            for node in island.shores:
                drawn = self._drawn(node, padding, 0.0 if quiet or node in island.zeros else loud)
                env[node] = drawn.requires_grad_()
                inputs.append(drawn)
            made = self._run(island, env, padding if quiet else None)
            made = clear(made, island.target, self.places, padding.bool())
            runs.append([made.detach(), *self._gradients(island, made, inputs, env, padding)])
        return all(map(_close, *runs))

    def _run(self, island: Island, env: dict[Node, Any], padding: Tensor | None) -> Tensor:
        for node in island.nodes:
            (env[node],) = evaluate([node], [node], env)
            if padding is not None and node in island.cleared:
                env[node] = clear(env[node], node, self.places, padding.bool())
        return env[island.target]

    def _gradients(
        self,
        island: Island,
        made: Tensor,
        inputs: Sequence[Tensor],
        env: dict[Node, Any],
        padding: Tensor,
    ) -> list[Tensor]:
        """Of real tokens of every shore, and of weights."""
        weights = [env[node] for node in island.given if _floating(node)]
        if not made.requires_grad or not island.target.meta["val"].requires_grad:
            return []
        torch.manual_seed(1)
        wanted = [*inputs, *weights]
        grads = torch.autograd.grad(
            made, wanted, torch.randn_like(made), allow_unused=True, materialize_grads=True
        )
        real = [
            clear(grad, node, self.places, padding.bool())
            for grad, node in zip(grads, island.shores, strict=False)
        ]
        return [*real, *grads[len(inputs) :]]

    def _drawn(self, node: Node, padding: Tensor, loud: float) -> Tensor:
        """Random values, at padding ``loud`` times as large."""
        value, own = node.meta["val"], self.samples.own(padding)
        drawn = torch.randn([size_of(size, own) for size in value.shape]).to(value.dtype)
        return clear(drawn, node, self.places, padding.bool(), loud)


def _padded(rows: int, tokens: int) -> Iterator[tuple[str, Tensor]]:
    """Padding on every side, in every row but one of several."""
    at = torch.arange(tokens)
    lengths = torch.tensor([max(1, (tokens - 1) * (row + 1) // rows) for row in range(rows)])
    yield "right", (at < lengths[:, None]).long()
    yield "left", (at >= tokens - lengths[:, None]).long()
    yield "scattered", torch.stack([(at + row) % 3 != 1 for row in range(rows)]).long()


def _weight(value: Tensor) -> Tensor:
    """Random numbers in place of a weight."""
    drawn = torch.randn(value.shape) * (0.5 if value.dim() > 1 else 1.0)
    return drawn.to(value.dtype).requires_grad_()


def _floating(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


def _close(first: Tensor, second: Tensor) -> bool:
    """Equal but for rounding, and mostly finite."""
    if not first.is_floating_point():
        return torch.equal(first, second)
    a, b = first.double(), second.double()
    finite = a.isfinite()
    if not torch.equal(finite, b.isfinite()) or (a.numel() and not bool(finite.any())):
        return False
    if not torch.equal(a[~finite].nan_to_num(), b[~finite].nan_to_num()):
        return False
    a, b = a[finite], b[finite]
    if not a.numel():
        return True
    allowed = ALLOWED.get(first.dtype, NARROW) * a.abs().max()
    return bool((a - b).abs().max() <= allowed)
