"""A rolled-up loop: what does not depend on the state for all steps at once, then the state."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_arg

from effpass.patterns.loops.affine import Affine, parts, step
from effpass.patterns.loops.batched import Batched, same_shape
from effpass.patterns.loops.loop import Gather, Loop, free
from effpass.patterns.loops.steps import Row
from effpass.patterns.proposal import Missed

aten = torch.ops.aten
ZEROS = (aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default)


@dataclass(frozen=True)
class Slices:
    """The slices of a leaf row in all steps, ``back`` steps earlier."""

    row: Row
    back: int


class Rolled:
    """The loop as a function of whole tensors; traced once, when it is made.

    ``inputs`` are the nodes it reads. Raises Missed where the loop is not an affine recurrence.
    """

    def __init__(self, loop: Loop) -> None:
        self.loop = loop
        self.state: Tensor = loop.carry.members[loop.last].meta["val"]
        self.inputs: dict[Node, None] = {}
        self.wanted = [loop.steps.rows[n] for n in self._wanted()]
        self._check_free()
        with self.state.fake_mode:  # type: ignore[attr-defined]
            self._trace()
        ends = [n for g in loop.gathers for n in (*g.before, *g.after)]
        self.zeros = self._starts_from_zeros()
        for node in (loop.initial, *ends):
            if isinstance(node, Node):
                self.inputs[node] = None

    def _wanted(self) -> list[int]:
        """Rows behind the state whose values are used outside."""
        used = [g.row for g in self.loop.gathers] + [row for row, _, _ in self.loop.singles]
        numbers = dict.fromkeys(row.number for row in used)
        return [n for n in numbers if n != self.loop.carry.number]

    def _check_free(self) -> None:
        for number in self.loop.cycle:
            row = self.loop.steps.rows[number]
            for argument, source, _ in self.loop.reads(row):
                if source is None or source.number in self.loop.cycle:
                    continue
                if not free(self.loop, source):
                    raise Missed(
                        "what is added to the state is not computed alike in all steps", argument
                    )

    def _trace(self) -> None:
        loop = self.loop
        before: dict[Any, None] = {}
        for number in loop.cycle:
            self._leaves(loop.steps.rows[number], loop.cycle, before)
        self.before = list(before)
        self.coefficients = self._batched(self.before, [], lambda env: self._step(env))
        self._check_shape()
        self.after: list[Any] = []
        if self.wanted:
            after: dict[Any, None] = {}
            for row in self.wanted:
                self._leaves(row, frozenset((loop.carry.number,)), after)
            self.after = list(after)
            states = [self._stacked(self.state)] * 2
            self.readout = self._batched(self.after, states, self._outputs)

    def _leaves(self, row: Row, stop: frozenset[int], found: dict[Any, None]) -> None:
        """Slices and invariants from which a row is computed, the state aside."""
        pending, seen = [row], set()
        while pending:
            each = pending.pop()
            if each.number in seen or (each is self.loop.carry and row is not each):
                continue
            seen.add(each.number)
            for argument, source, back in self.loop.reads(each):
                if source is None:
                    found[argument] = None
                elif source.source is not None:
                    found[Slices(source, back)] = None
                elif source is not self.loop.carry:
                    pending.append(source)

    def _batched(
        self,
        leaves: Sequence[Any],
        more: Sequence[Tensor],
        function: Callable[..., Sequence[Tensor]],
    ) -> Batched:
        values = [self._fake(leaf) for leaf in leaves]
        stepped = [isinstance(leaf, Slices) for leaf in leaves] + [True] * len(more)
        tensors = [v for v in values if isinstance(v, Tensor)]
        if len(tensors) != len(values):
            at = next(n for n, v in zip(leaves, values, strict=True) if not isinstance(v, Tensor))
            raise Missed("a size or number that is not a tensor enters every step", at)

        def run(*given: Tensor) -> Sequence[Tensor]:
            env = dict(zip(leaves, given[: len(leaves)], strict=True))
            return function(env, *given[len(leaves) :])

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")  # vmap warns where it would loop over the steps
                return Batched(run, [*values, *more], stepped)
        except (RuntimeError, UserWarning, NotImplementedError) as error:
            reason = f"its steps cannot be computed all at once: {error}"
            raise Missed(reason, self.loop.carry.last) from error

    def _fake(self, leaf: Any) -> Any:
        if isinstance(leaf, Slices):
            self.inputs[leaf.row.source] = None  # type: ignore[index]
            return self._slices(leaf, leaf.row.source.meta["val"])  # type: ignore[union-attr]
        self.inputs[leaf] = None
        return leaf.meta["val"]

    def _slices(self, leaf: Slices, source: Tensor) -> Tensor:
        first, count = self.loop.first - leaf.back, self.loop.last - self.loop.first + 1
        if count < source.shape[leaf.row.dim]:
            source = source.narrow(leaf.row.dim, first, count)
        slices = source.movedim(leaf.row.dim, 0)
        return slices.unsqueeze(leaf.row.dim + 1) if leaf.row.keep else slices

    def _stacked(self, value: Tensor) -> Tensor:
        return value.new_empty((self.loop.last - self.loop.first + 1, *value.shape))

    def _step(self, env: dict[Any, Tensor]) -> Sequence[Tensor]:
        """Decay and addend of one step."""
        carry = self.loop.carry
        value = self._value(carry, env, {(carry.number, 1): Affine(1.0, None)})
        like = next(v for v in env.values() if v.is_floating_point())
        dtype = like.dtype if like.dtype is torch.float64 else self.state.dtype
        try:
            return parts(value, like.to(dtype))
        except ValueError as error:
            raise Missed("the new state does not depend on the old one", carry.last) from error

    def _outputs(self, env: dict[Any, Tensor], now: Tensor, before: Tensor) -> Sequence[Tensor]:
        number = self.loop.carry.number
        known = {(number, 0): now, (number, 1): before}
        return [self._value(row, env, known) for row in self.wanted]

    def _value(self, row: Row, env: dict[Any, Tensor], known: dict[tuple[int, int], Any]) -> Any:
        """The value of a row in one step, from slices and invariants and the state."""
        if (row.number, 0) in known:
            return known[row.number, 0]
        node = row.members[self.loop.last]
        values = {}
        for argument, source, back in self.loop.reads(row):
            if source is None:
                values[argument] = env[argument]
            elif source.source is not None:
                values[argument] = env[Slices(source, back)]
            elif back:
                if (source.number, back) not in known:
                    raise Missed("a value of the step before is read that is not the state", node)
                values[argument] = known[source.number, back]
            else:
                values[argument] = self._value(source, env, known)
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: values[n])
        if any(isinstance(v, Affine) for v in values.values()):
            known[row.number, 0] = step(node, args, kwargs)
        else:
            known[row.number, 0] = node.target(*args, **kwargs)  # type: ignore[operator]
        return known[row.number, 0]

    def _check_shape(self) -> None:
        if self.coefficients.shape(0).dim() != self.state.dim() + 1:
            raise Missed("the state changes its shape in the loop", self.loop.carry.last)

    def _starts_from_zeros(self) -> bool:
        """Zeros made in the graph, no larger than the coefficients: nothing to read."""
        initial = self.loop.initial
        if not isinstance(initial, Node) or initial.target not in ZEROS:
            return False
        return same_shape(self.coefficients.shape(0)[0], self.state)

    def __call__(self, values: dict[Node, Tensor]) -> list[Tensor]:
        """The outputs of the loop from real or fake inputs, in the order of the proposal."""
        decay, add = self.coefficients(*(self._given(leaf, values) for leaf in self.before))
        start = self._start(values, decay)
        if start is not None and start.shape != decay.shape[1:]:
            full = start.shape
            decay, add = (v.expand(v.shape[0], *full) for v in (decay, add))
        states, final = _recurrence(decay, add, start)
        rows = {self.loop.carry.number: states}
        if self.wanted:
            first = torch.zeros_like(states[:1]) if start is None else start.unsqueeze(0)
            before = torch.cat([first, states[:-1]])
            given = [self._given(leaf, values) for leaf in self.after]
            made = self.readout(*given, states, before)
            rows |= {row.number: v for row, v in zip(self.wanted, made, strict=True)}
        outputs = []
        for gather in self.loop.gathers:
            steps = rows[gather.row.number]
            first, count = gather.first - self.loop.first, gather.last - gather.first + 1
            steps = steps if count == steps.shape[0] else steps[first : first + count]
            outputs.append(_gathered(gather, steps, values))
        alone = sum(row is self.loop.carry for row, _, _ in self.loop.singles) == 1
        for row, time, node in self.loop.singles:
            ends = alone and row is self.loop.carry and time == self.loop.last
            value = final if ends else rows[row.number][time - self.loop.first]
            outputs.append(value.to(_dtype(node, value)))
        return outputs

    def _start(self, values: dict[Node, Tensor], like: Tensor) -> Tensor | None:
        """The initial state, as one step of ``like``; None for zeros."""
        if self.zeros or self.loop.initial == 0:
            return None
        if not isinstance(self.loop.initial, Node):
            return torch.full_like(like[0], self.loop.initial)
        start = values[self.loop.initial].to(like.dtype)
        full = torch.broadcast_shapes(like.shape[1:], start.shape)
        return start if start.shape == full else start.expand(full)

    def _given(self, leaf: Any, values: dict[Node, Tensor]) -> Tensor:
        if isinstance(leaf, Slices):
            return self._slices(leaf, values[leaf.row.source])  # type: ignore[index]
        return values[leaf]


def _recurrence(decay: Tensor, add: Tensor, start: Tensor | None) -> tuple[Tensor, Tensor]:
    """States (t, *state) and the last one, of coefficients (t, *state) and the initial state."""
    if decay.dim() < 3:  # no batch, or one number is the state
        start = None if start is None else start.unsqueeze(0)
        states, final = _recurrence(decay.unsqueeze(1), add.unsqueeze(1), start)
        return states.squeeze(1), final.squeeze(0)
    a, b = decay.movedim(0, 1).flatten(2), add.movedim(0, 1).flatten(2)
    start = None if start is None else start.flatten(1)
    h, last = torch.ops.effpass.linear_recurrence(a, b, start)
    return h.unflatten(2, decay.shape[2:]).movedim(0, 1), last.unflatten(1, decay.shape[2:])


def _gathered(gather: Gather, steps: Tensor, values: dict[Node, Tensor]) -> Tensor:
    """What the gather stacks or cats."""
    node = gather.node
    rank = node.meta["val"].dim()
    dim = (node.args[1] if len(node.args) > 1 else 0) % rank  # type: ignore[operator]
    before, after = [values[n] for n in gather.before], [values[n] for n in gather.after]
    if node.target is aten.stack.default:
        ends = [[torch.stack(items, dim)] if items else [] for items in (before, after)]
        pieces = [*ends[0], steps.movedim(0, dim), *ends[1]]
    else:
        pieces = [*before, steps.movedim(0, dim).flatten(dim, dim + 1), *after]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)


def _dtype(node: Node, value: Tensor) -> torch.dtype:
    """The dtype of a node; float64 in a proof."""
    return value.dtype if value.dtype is torch.float64 else node.meta["val"].dtype
