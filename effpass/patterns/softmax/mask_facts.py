"""What is known of a mask before it runs: causal, idle, which rows may see nothing."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.fx import Graph, Node

from effpass.axes.labels import Dims
from effpass.patterns.proposal import Missed
from effpass.patterns.softmax.bounds import fixed_value, lowest, terms, values
from effpass.patterns.softmax.masks import Added, Filled, Floor, Operand, Step, bias, operands

HIDES = -5e3  # a score this far below another has no weight: exp underflows
SWALLOWS = -1e20  # adding a score to this changes nothing, not even in float64
MODERATE = 1e3
CLASH = (
    "one mask is added and another overwrites scores with a moderate number: rows without any "
    "visible key would change (-inf or finfo(dtype).min would do)"
)
BOTH = (
    "while training, a mask is added and scores are overwritten too: rows without any visible key "
    "would get other gradients (one boolean mask would do)"
)


@dataclass(frozen=True)
class Mask:
    """What the steps come to.

    Queries rest in rows without visible keys where scores are overwritten, where the op would see
    what eager's dtypes swallow, and where gradients may be needed: fused kernels recompute weights
    from the logarithm of their sum, which a bias far from 0 swallows. ``swallowed``: scores are so
    in eager's dtypes too, and have gradients all the same. ``weighing`` holds the steps by which
    all such rows weigh keys, none if they do so evenly; None: it depends on the row.

    ``causal``: exactly that no key is later than its query. ``rests``: some rows may have no
    visible key, their queries are to be zeroed. ``empty``: some rows may be all -inf.
    ``plain``: it says which keys are visible, and nothing else.
    """

    steps: tuple[Step, ...] = ()
    causal: bool = False
    rests: bool = False
    empty: bool = False
    plain: bool = False
    swallowed: bool = False
    weighing: tuple[Step, ...] | None = None


class Setting(NamedTuple):
    """Dtypes of the product and of the scores, and whether gradients may be needed."""

    product: torch.dtype
    scores: torch.dtype
    trains: bool

    @property
    def half(self) -> bool:
        """Whether scores are in float16, where no number is so low that it swallows a score."""
        return self.product is torch.float16

    @property
    def narrow(self) -> bool:
        """Whether moderate numbers swallow scores that the op, in float32, still sees."""
        return self.scores in (torch.float16, torch.bfloat16)


class Place(Protocol):
    """Brings a constant of the given dims into (batch, head, query, key)."""

    def __call__(self, value: Tensor, dims: Dims) -> Tensor:
        """The constant, arranged; KeyError where it is broadcast over a size that changes."""
        ...

    def key(self, dims: Dims) -> Hashable:
        """Equal where constants of these dims are arranged in the same way."""
        ...

    def varies(self, dims: Dims) -> bool:
        """Whether what has these dims differs from query to query."""
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


def settle(steps: Sequence[Step], place: Place, setting: Setting, at: Node) -> Mask:
    """Decides what can be known before running. Raises Missed where no bias gives the same."""
    half = setting.half
    steps = [step for step in steps if not _idle(step, at)]
    _check_floors(steps, half, at)
    fixed = [step for step in steps if not isinstance(step, Floor) and _constant(step) is not None]
    known = _known(fixed, place, at.graph) if fixed else None
    fixed = fixed if known is not None else []
    certain = len(fixed) == len(steps)
    _check_fills(steps, fixed, known, at)
    if known is not None and certain and (known.causal or known.zero):
        return Mask(causal=known.causal)
    mild = [s.value for s in steps if isinstance(s, Filled) and _mild(s.value, half)]
    if mild and (known.mixed if known is not None and certain else _clash(steps, max(mild))):
        raise Missed(CLASH, at)
    low, least = _lowest(steps), torch.finfo(torch.float16 if half else torch.float32).min
    blind, empty = low <= HIDES, low < least
    if known is not None:
        lowest_other = _lowest([step for step in steps if step not in fixed])
        blind = blind and (known.unseen or lowest_other <= HIDES)
        empty = empty and (known.unseen or lowest_other < least)
    swallowing = blind and setting.trains and _swallowing(steps, setting.scores)
    filled = any(isinstance(step, Filled | Floor) for step in steps)
    seen = setting.narrow and any(map(_moderate, steps))
    rests = blind and (bool(mild) or seen or (setting.trains and (filled or swallowing)))
    if swallowing and filled:
        raise Missed(BOTH, at)
    weighing = _weighing(steps, place) if swallowing else None
    plain = all(map(_plain, steps))
    return Mask(tuple(steps), False, rests, empty, plain, swallowing, weighing)


def lost(dtype: torch.dtype) -> float:
    """A bias to which scores can be added in ``dtype`` without being seen."""
    return -4.0 / torch.finfo(dtype).eps


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


def _swallowing(steps: Sequence[Step], dtype: torch.dtype) -> bool:
    """Whether something may be added beside which scores in ``dtype`` are lost."""
    held = [v for step in steps for v in _hiding(step)]
    return any(v is None or -math.inf < v <= lost(dtype) for v in held)


def _weighing(steps: Sequence[Step], place: Place) -> tuple[Step, ...] | None:
    """The steps by which all rows that see nothing weigh keys; None where it depends on the row."""
    hiding = {step: held for step in steps if (held := _hiding(step))}
    if not any(place.varies(o.dims) for o in operands(tuple(hiding))):
        return tuple(hiding)
    numbers = [v for held in hiding.values() for v in held]
    return () if len(numbers) == 1 and numbers[0] is not None else None


def _hiding(step: Step) -> list[float | None]:
    """The numbers that a step adds to hide keys, None for those that are not known."""
    if not isinstance(step, Added) or not isinstance(step.value, Operand):
        return []
    found: list[float | None] = []
    for node, factor in terms(step.value.node, step.factor):
        held = values(node)
        if held is None:
            found += [None] if lowest(node, factor) <= HIDES else []
        else:
            found += [v * factor for v in held if v * factor <= HIDES]
    return found


def _moderate(step: Step) -> bool:
    """Whether a mask is added that hides keys without swallowing their scores in float32."""
    if not isinstance(step, Added) or not isinstance(step.value, Operand):
        return False
    held = values(step.value.node)
    if held is None:
        return lowest(step.value.node) <= HIDES
    return any(SWALLOWS < v * step.factor <= HIDES for v in held)


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
