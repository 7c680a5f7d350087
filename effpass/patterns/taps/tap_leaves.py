"""Which tensor a convolution may be a convolution of: its sources, from the nearest upwards.

All of it is guesses, checked afterwards by following the tokens of the guessed tensor.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from torch.fx import Node

from effpass.axes.labels import opname
from effpass.axes.relation import arguments
from effpass.patterns.taps.shift_follow import is_zero, permutation
from effpass.patterns.taps.taps import Leaf

FARTHEST = 24
KEPT = ("contiguous", "clone", "alias")
SHIFTED = ("to", "_to_copy", "roll", "pad", "constant_pad_nd", "slice", "narrow")


@dataclass(frozen=True)
class _Spot:
    """A node, its dim of tokens, and perhaps a state whose dims are those of the node."""

    node: Node
    time: int | None
    state: Node | None = None
    roles: tuple[int | None, ...] = ()

    def behind(self, node: Node, dims: list[int | None]) -> _Spot | None:
        """The spot one step up: ``dims`` gives for each dim of this node that of ``node``."""
        roles = tuple(None if r is None else dims[r] for r in self.roles)
        if self.state is not None and roles.count(None) != 1:
            return None
        time = None if self.time is None else dims[self.time]
        return replace(self, node=node, time=time, roles=roles)


def leaves(anchor: Node) -> Iterator[Leaf]:
    """Candidates, nearest first; none is only a permutation of another tensor."""
    spot = _first(anchor)
    for _ in range(FARTHEST):
        if spot is None:
            return
        while (plain := _permuted(spot)) is not None:
            spot = plain
        yield Leaf(spot.node, spot.time, spot.state, spot.roles)
        spot = _up(spot)


def _first(anchor: Node) -> _Spot | None:
    source: Any = anchor.args[0]
    name = opname(anchor)
    if name in ("conv1d", "convolution"):
        return _Spot(source, _rank(source) - 1)
    rank = _rank(anchor)
    if name in ("pad", "constant_pad_nd"):
        amounts: Any = anchor.args[1]
        dims = {rank - 1 - i // 2 for i, amount in enumerate(amounts) if amount != 0}
        return _up(_Spot(anchor, dims.pop())) if len(dims) == 1 else None
    if name == "roll":
        dims = arguments(anchor)["dims"]
        return _up(_Spot(anchor, dims[0] % rank)) if dims else None
    if name == "unfold":
        return _up(_Spot(anchor, arguments(anchor)["dimension"] % (rank - 1)))
    return _up(_Spot(anchor, arguments(anchor)["dim"] % rank))


def _rank(node: Node) -> int:
    return node.meta["val"].dim()


def _permuted(spot: _Spot) -> _Spot | None:
    node = spot.node
    if node.op != "call_function" or not isinstance(node.meta.get("val"), Tensor):
        return None
    source: Any = node.args[0] if node.args else None
    if opname(node) in KEPT:
        return spot.behind(source, list(range(_rank(node))))
    order = permutation(node, _rank(node))
    return None if order is None else spot.behind(source, list(order))


def _up(spot: _Spot) -> _Spot | None:
    node, name = spot.node, opname(spot.node)
    if node.op != "call_function" or not isinstance(node.meta.get("val"), Tensor):
        return None
    rank = _rank(node)
    same: list[int | None] = list(range(rank))
    source: Any = node.args[0] if node.args else None
    if name in ("unsqueeze", "squeeze") and len(node.args) == 2 and isinstance(node.args[1], int):
        return _resized(spot, source)
    if name == "cat":
        return _joined(spot)
    if name == "select_scatter":
        return _written(spot)
    if name == "slice_scatter":
        return spot.behind(node.args[1] if is_zero(source) else source, same)  # type: ignore[arg-type]
    if name == "mul":
        return _weighted(spot)
    if name == "unfold":
        return spot.behind(source, [*range(rank - 1), None]) if spot.time != rank - 1 else None
    if name in ("slice", "narrow") and arguments(node)["dim"] % rank != spot.time:
        return None
    return spot.behind(source, same) if name in SHIFTED else None


def _resized(spot: _Spot, source: Node) -> _Spot | None:
    """Through a dim of size 1 that comes or goes."""
    where: Any = spot.node.args[1]
    if opname(spot.node) == "unsqueeze":
        where %= _rank(spot.node)
        return spot.behind(source, [*range(where), None, *range(where, _rank(source))])
    where %= _rank(source)
    if source.meta["val"].shape[where] != 1:
        return None
    return spot.behind(source, [d for d in range(_rank(source)) if d != where])


def _joined(spot: _Spot) -> _Spot | None:
    """Zeros or a state in front, along the tokens."""
    given = arguments(spot.node)
    rank = _rank(spot.node)
    parts = [p for p in given["tensors"] if not is_zero(p)]
    if spot.time is None or given["dim"] % rank != spot.time or not 1 <= len(parts) <= 2:
        return None
    if len(parts) == 2:
        if spot.state is not None:
            return None
        roles = tuple(None if d == spot.time else d for d in range(rank))
        spot = replace(spot, state=parts[0], roles=roles)
    return spot.behind(parts[-1], list(range(rank)))


def _written(spot: _Spot) -> _Spot | None:
    """One token written at the end of a state that has been moved up."""
    given = arguments(spot.node)
    rank = _rank(spot.node)
    dim = given["dim"] % rank
    if dim != spot.time or spot.state is not None or is_zero(given["src"]):
        return None
    state = given["self"]
    while opname(state) in ("roll", "slice_scatter", *KEPT):
        state = state.args[0]
    places: list[int | None] = [None if d == dim else d - (d > dim) for d in range(rank)]
    return _Spot(given["src"], None, state, tuple(places))


def _weighted(spot: _Spot) -> _Spot | None:
    """A product: the operand of the whole shape, if the other is smaller."""
    shape = spot.node.meta["val"].shape
    operands = [o for o in spot.node.args if isinstance(o, Node)]
    whole = [o for o in operands if o.meta["val"].shape == shape]
    if len(whole) != 1:
        return None
    return spot.behind(whole[0], list(range(len(shape))))
