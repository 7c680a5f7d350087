"""Bounds: which numbers a tensor can hold, as far as its nodes tell; for masks, mostly two."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.fx import Graph, Node

from effpass.axes.labels import EXPANDS, KEEPS, PERMUTES, RESHAPES, argument, opname
from effpass.graph.region import constant

Values = frozenset[float]
# by name: nodes would keep their graph alive
_FIXED: WeakKeyDictionary[Graph, dict[str, Tensor | None]] = WeakKeyDictionary()
_HELD: WeakKeyDictionary[Graph, dict[str, Values]] = WeakKeyDictionary()
FARTHEST = 12
MOST = 64

PICKS = (*KEEPS, *PERMUTES, *RESHAPES, *EXPANDS, "slice", "select", "index", "repeat", "detach")
CASTS = ("to", "_to_copy", "type_as")
SUMS: dict[str, Callable[[float, float], float]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "rsub": lambda a, b: b - a,
    "mul": lambda a, b: a * b,
}


def fixed_value(node: Node) -> Tensor | None:
    """The value of a node that depends on no input; kept, since layers share their masks."""
    known = _FIXED.setdefault(node.graph, {})
    if node.name not in known:
        known[node.name] = constant(node)
    return known[node.name]


def values(node: Any, depth: int = FARTHEST) -> Values | None:
    """All numbers that a node's elements may be; None where that is not known."""
    if isinstance(node, int | float):
        return frozenset((float(node),))
    if not isinstance(node, Node) or not isinstance(node.meta.get("val"), Tensor) or not depth:
        return None
    if node.meta["val"].dtype is torch.bool:
        return frozenset((0.0, 1.0))
    fixed = fixed_value(node)
    if fixed is not None:
        return _held(node, fixed)
    found = _computed(node, opname(node), depth - 1)
    if found is None or len(found) > MOST:
        return None
    return _rounded(found, node.meta["val"].dtype)


def lowest(node: Node, factor: float = 1.0) -> float:
    """The lowest value of ``factor * node``: -inf where that is not known, 0 for what is learned.

    A learned bias is as moderate as the scores themselves, which are learned too.
    """
    held = values(node)
    if held is not None:
        return min((value * factor for value in held), default=0.0)
    parts = terms(node, factor)
    if parts != [(node, factor)]:
        return sum(lowest(part, sign) for part, sign in parts)
    return 0.0 if learned(node) else -math.inf


def terms(node: Node, factor: float = 1.0) -> list[tuple[Node, float]]:
    """Tensors, with factors, whose sum the elements of a node are, rearranged."""
    name, operands = opname(node), [argument(node, i) for i in range(2)]
    if name in PICKS or name in CASTS:
        return terms(operands[0], factor)
    if name not in ("add", "sub") or node.kwargs or not all(isinstance(o, Node) for o in operands):
        return [(node, factor)]
    sign = -factor if name == "sub" else factor
    return [*terms(operands[0], factor), *terms(operands[1], sign)]


def learned(node: Node) -> bool:
    """Whether a tensor depends on a parameter, from near: it is then no mask."""
    seen, pending = {node}, [node]
    while pending and len(seen) < MOST:
        each = pending.pop(0)
        if each.meta.get("effpass_parameter"):
            return True
        fresh = [n for n in each.all_input_nodes if n not in seen]
        seen.update(fresh)
        pending += fresh
    return False


def _held(node: Node, fixed: Tensor) -> Values | None:
    if fixed.is_complex():
        return None
    known = _HELD.setdefault(node.graph, {})
    if node.name not in known:
        known[node.name] = frozenset(fixed.double().unique().tolist())
    return known[node.name]


def _computed(node: Node, name: str, depth: int) -> Values | None:
    if name in PICKS or name in CASTS:
        return values(node.args[0], depth)
    if name in ("zeros_like", "new_zeros", "ones_like", "new_ones"):
        return frozenset((float("ones" in name),))
    if name in ("full_like", "new_full"):
        return values(node.args[-1], depth)
    if name in ("triu", "tril"):
        return _union(values(node.args[0], depth), frozenset((0.0,)))
    if name == "where" and len(node.args) == 3:
        return _union(values(node.args[1], depth), values(node.args[2], depth))
    if name == "masked_fill":
        return _union(values(node.args[0], depth), values(node.args[2], depth))
    if name == "neg":
        return _pairs(SUMS["mul"], values(node.args[0], depth), frozenset((-1.0,)))
    if name in SUMS and len(node.args) == 2 and not node.kwargs:
        return _pairs(SUMS[name], values(node.args[0], depth), values(node.args[1], depth))
    return None


def _union(a: Values | None, b: Values | None) -> Values | None:
    return None if a is None or b is None else a | b


def _pairs(
    function: Callable[[float, float], float], a: Values | None, b: Values | None
) -> Values | None:
    if a is None or b is None or len(a) * len(b) > MOST:
        return None
    made = frozenset(function(x, y) for x, y in product(a, b))
    return None if any(math.isnan(x) for x in made) else made


def _rounded(found: Values, dtype: torch.dtype) -> Values:
    """What a dtype makes of numbers: the lowest float32 is -inf in bfloat16."""
    return frozenset(torch.tensor(sorted(found), dtype=torch.float64).to(dtype).double().tolist())
