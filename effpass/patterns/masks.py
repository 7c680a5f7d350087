"""Masks of attention: steps from scores to what softmax sees, as one bias that is added to them.

Adding is adding. Overwriting a score is not: ``where(mask, fill, s)`` becomes ``s + fill``, which
is the same where the fill leaves no weight beside a visible key, and in a row without visible keys
only if ``s`` is 0 there. So the queries of such rows are zeroed while running (unless the fill is
so low that adding a score to it changes nothing). Rows of -inf alone are NaN, as in softmax.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.fx import Graph, Node

from effpass.patterns.bounds import fixed_value, lowest, values
from effpass.patterns.labels import Dims
from effpass.patterns.proposal import Missed

HIDES = -5e3  # a score this far below another has no weight: exp underflows
SWALLOWS = -1e20  # adding a score to this changes nothing, not even in float64
MODERATE = 1e3
CLASH = (
    "one mask is added and another overwrites scores with a moderate number: rows without any "
    "visible key would change (-inf or finfo(dtype).min would do)"
)


@dataclass(frozen=True)
class Operand:
    """A node whose dims are labelled."""

    node: Node
    dims: Dims


@dataclass(frozen=True)
class Added:
    """``scores + factor * value``."""

    value: Operand | float
    factor: float

    def scaled(self, factor: float) -> Added:
        """The step in front of a multiplication."""
        return replace(self, factor=self.factor * factor)


@dataclass(frozen=True)
class Filled:
    """``value`` where the mask is true; with ``inverted``, where it is false (or 0)."""

    mask: Operand
    inverted: bool
    value: float

    def scaled(self, factor: float) -> Filled:
        """The step in front of a multiplication."""
        return replace(self, value=self.value * factor)


@dataclass(frozen=True)
class Floor:
    """No score is lower than ``value``."""

    value: float

    def scaled(self, factor: float) -> Floor:
        """The step in front of a multiplication."""
        return replace(self, value=self.value * factor)


Step = Added | Filled | Floor
Arrange = Callable[[Operand], Tensor]


@dataclass(frozen=True)
class Mask:
    """What the steps come to.

    ``causal``: exactly that no key is later than its query. ``rests``: some rows may have no
    visible key, so that their queries are to be zeroed. ``empty``: some rows may be all -inf.
    ``plain``: it says which keys are visible, and nothing else.
    """

    steps: tuple[Step, ...] = ()
    causal: bool = False
    rests: bool = False
    empty: bool = False
    plain: bool = False


class Place(Protocol):
    """Brings a constant of the given dims into (batch, head, query, key)."""

    def __call__(self, value: Tensor, dims: Dims) -> Tensor:
        """The constant, arranged; KeyError where it is broadcast over a size that changes."""
        ...

    def key(self, dims: Dims) -> Hashable:
        """Equal where constants of these dims are arranged in the same way."""
        ...


class _Known(NamedTuple):
    """What the constant steps alone come to.

    ``zero``: nothing at all. ``unseen``: some row has no visible key; ``mixed``: in such a row some
    scores are overwritten, others are not. ``highest``: the largest bias of an overwritten score.
    """

    zero: bool
    causal: bool
    unseen: bool
    mixed: bool
    highest: float


# by names of nodes, which would keep their graph alive
_KNOWN: WeakKeyDictionary[Graph, dict[Hashable, _Known | None]] = WeakKeyDictionary()


def operands(steps: Sequence[Step]) -> list[Operand]:
    """The tensors that steps read."""
    found = [
        s.mask if isinstance(s, Filled) else s.value for s in steps if not isinstance(s, Floor)
    ]
    return [operand for operand in found if isinstance(operand, Operand)]


def bias(
    steps: Sequence[Step], arrange: Arrange, like: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """What is added to scores, and where they are overwritten; None for nowhere.

    ``arrange`` brings an operand into (batch, head, query, key); ``like`` has the dtype of a bias
    that is made of numbers.
    """
    total: Tensor | None = None
    filled: Tensor | None = None
    for step in steps:
        if isinstance(step, Floor):
            total = None if total is None else total.clamp(min=step.value)
        elif isinstance(step, Filled):
            mask = _mask(step, arrange)
            filled = mask if filled is None else filled | mask
            before = like.new_zeros(()) if total is None else total
            total = torch.where(mask, fits(step.value, before.dtype), before)
        else:
            assert isinstance(step.value, Operand)
            value = arrange(step.value)
            value = value.to(torch.promote_types(value.dtype, like.dtype))
            value = value if step.factor == 1 else value * step.factor
            total = value if total is None else total + value
    return total, filled


def fits(value: float, dtype: torch.dtype) -> float:
    """``value``, or the lowest number of ``dtype`` instead of a lower one; -inf stays."""
    return value if math.isinf(value) else max(value, torch.finfo(dtype).min)


def settle(steps: Sequence[Step], place: Place, half: bool, at: Node) -> Mask:
    """Decides what can be known before running. Raises Missed where no bias gives the same.

    ``half``: scores are in float16, where no number is so low that it swallows a score.
    """
    steps = [step for step in steps if not _idle(step, at)]
    _check_floors(steps, half, at)
    fixed = [step for step in steps if not isinstance(step, Floor) and _constant(step) is not None]
    known = _known(fixed, place, at.graph) if fixed else None
    fixed = fixed if known is not None else []
    certain = len(fixed) == len(steps)
    if known is not None and certain and (known.causal or known.zero):
        return Mask(causal=known.causal)
    _check_fills(steps, fixed, known, at)
    mild = [s.value for s in steps if isinstance(s, Filled) and _mild(s.value, half)]
    if mild and (known.mixed if known is not None and certain else _clash(steps, max(mild))):
        raise Missed(CLASH, at)
    low, least = _lowest(steps), torch.finfo(torch.float16 if half else torch.float32).min
    rests, empty = bool(mild), low < least
    if known is not None:
        others = [step for step in steps if step not in fixed]
        bounded = _lowest(others) >= least
        dynamic = any(isinstance(step, Filled) for step in others)
        rests = rests and (known.unseen or dynamic or not bounded)
        empty = empty and (known.unseen or not bounded)
    return Mask(tuple(steps), False, rests, empty, all(map(_plain, steps)))


def _mask(step: Filled, arrange: Arrange) -> Tensor:
    value = arrange(step.mask)
    if value.dtype is not torch.bool:
        value = value != 0
    return ~value if step.inverted else value


def _constant(step: Step) -> Tensor | None:
    held = operands((step,))
    return fixed_value(held[0].node) if held else None


def _known(fixed: Sequence[Step], place: Place, graph: Graph) -> _Known | None:
    cache = _KNOWN.setdefault(graph, {})
    key = tuple((_name(step), place.key(o.dims)) for step in fixed for o in operands((step,)))
    if key not in cache:
        cache[key] = _evaluated(fixed, place)
    return cache[key]


def _name(step: Step) -> Hashable:
    if isinstance(step, Filled):
        return (step.mask.node.name, step.inverted, step.value)
    assert isinstance(step, Added) and isinstance(step.value, Operand)
    return (step.value.node.name, step.factor)


def _evaluated(fixed: Sequence[Step], place: Place) -> _Known | None:
    def value(operand: Operand) -> Tensor:
        found = fixed_value(operand.node)
        assert found is not None
        return place(found, operand.dims)

    try:
        total, filled = bias(fixed, value, torch.zeros(()))
    except KeyError:
        return None
    assert total is not None
    filled = torch.zeros((), dtype=torch.bool) if filled is None else filled
    total, filled = torch.broadcast_tensors(total, filled)
    visible, finite = (total > HIDES) & ~filled, total > -math.inf
    unseen = ~visible.any(-1)
    mixed = (filled & finite).any(-1) & (~filled & finite).any(-1) & unseen
    highest = float(total[filled].max()) if filled.any() else -math.inf
    zero = not bool(total.any()) and not bool(filled.any())
    return _Known(zero, _causal(total, visible), bool(unseen.any()), bool(mixed.any()), highest)


def _causal(total: Tensor, visible: Tensor) -> bool:
    """Square, every key up to its query has bias 0, every later one is hidden."""
    queries, keys = total.shape[-2:] if total.dim() > 1 else (0, 1)
    if queries != keys:
        return False
    allowed = torch.ones(queries, keys, dtype=torch.bool).tril()
    return bool((visible == allowed).all()) and not bool(total.where(allowed, 0).any())


def _idle(step: Step, at: Node) -> bool:
    """Whether a step changes nothing."""
    if isinstance(step, Added) and isinstance(step.value, float):
        if abs(step.value * step.factor) > MODERATE:
            raise Missed(f"{step.value * step.factor:g} is added to all scores", at)
        return True  # the same for all keys
    fixed = _constant(step)
    if fixed is None:
        return False
    masks = ((fixed != 0) != step.inverted) if isinstance(step, Filled) else fixed != 0
    return not bool(masks.any())


def _plain(step: Step) -> bool:
    if not isinstance(step, Added) or not isinstance(step.value, Operand):
        return True
    held = values(step.value.node)
    return held is not None and all(v == 0 or v * step.factor <= HIDES for v in held)


def _check_floors(steps: Sequence[Step], half: bool, at: Node) -> None:
    for step in steps:
        if isinstance(step, Floor) and (half or step.value > SWALLOWS):
            raise Missed(f"the scores are clamped to {step.value:g} and more", at)


def _check_fills(
    steps: Sequence[Step], fixed: Sequence[Step], known: _Known | None, at: Node
) -> None:
    """A key that is overwritten must be without weight."""
    for step in steps:
        if isinstance(step, Filled):
            value = known.highest if known is not None and step in fixed else step.value
            if value > HIDES or math.isnan(value):
                what = f"masked scores are set to {step.value:g}"
                raise Missed(f"{what}: such a key keeps some weight", at)


def _clash(steps: Sequence[Step], fill: float) -> bool:
    """Whether a mask is added, next to one that overwrites with a number that does not swallow."""
    for step in steps:
        if not isinstance(step, Added) or not isinstance(step.value, Operand):
            continue
        held = values(step.value.node)
        scaled = [v * step.factor for v in held] if held else [_lowest((step,))]
        if not all((v == -math.inf and held) or v >= fill / 2 for v in scaled):
            return True
    return False


def _mild(value: float, half: bool) -> bool:
    """Whether a score that is added to a fill can be seen in the sum."""
    return value > (-math.inf if half else SWALLOWS)


def _lowest(steps: Sequence[Step]) -> float:
    """The lowest bias that steps can make, as far as is known."""
    low = 0.0
    for step in steps:
        if isinstance(step, Floor):
            low = max(low, step.value)
        elif isinstance(step, Filled):
            low = min(low, step.value)
        elif isinstance(step.value, Operand):
            low += lowest(step.value.node, step.factor)
    return low
