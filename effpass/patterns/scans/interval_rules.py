"""What ATen operations do to intervals of time: views and copies move them, sums and products join.

A rule answers the value of a node (a list for ``split`` and the like), or None where the elements
can no longer be followed: the dims of channels and batch may be moved and merged, never cut.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from itertools import accumulate, chain, count
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from effpass.axes.relation import arguments
from effpass.graph.region import constant as constant_value
from effpass.patterns.scans.intervals import (
    FREE,
    ONE,
    TIME,
    UNKNOWN,
    ZERO,
    Atom,
    Value,
    added,
    along,
    combined,
    constant,
    expanded,
    joined,
    multiplied,
    permuted,
    reshaped,
    scattered,
)

aten = torch.ops.aten
Result = Value | list[Value | None] | None
SAME = "clone contiguous alias lift_fresh_copy _to_copy to type_as"
SHAPED = "view reshape _unsafe_view flatten unflatten squeeze unsqueeze view_as reshape_as"
ORDERED = "transpose permute movedim moveaxis swapaxes swapdims t mT numpy_T"
PIECES = frozenset((*SAME.split(), *SHAPED.split(), *ORDERED.split(), "slice", "expand"))
FILLED = {
    **dict.fromkeys(("zeros", "zeros_like", "new_zeros"), ZERO),
    **dict.fromkeys(("ones", "ones_like", "new_ones"), ONE),
    **dict.fromkeys(("empty", "empty_like", "new_empty", "empty_strided"), UNKNOWN),
}
FULL = ("full", "full_like", "new_full", "scalar_tensor")
# stand for sizes that are not fixed: no product of usual sizes is one of usual sizes and these
PRIMES = (1000003, 1000033, 1000037, 1000039, 1000081, 1000099, 1000117, 1000121)


class Sight:
    """The values of nodes as far as they are known; constants are read when they are needed."""

    def __init__(self, leaves: Mapping[Node, Value], sizes: Sight | None = None) -> None:
        """``sizes``: another whose sizes that are not fixed are the same."""
        self.values: dict[Node, Result] = dict(leaves)
        self.symbols: dict[Any, int] = {} if sizes is None else sizes.symbols
        self.primes = chain(PRIMES, count(2000003, 2)) if sizes is None else sizes.primes

    def shape(self, node: Node) -> list[int]:
        """The sizes of a node's tensor, primes for those that are not fixed."""
        return [self._size(size) for size in node.meta["val"].shape]

    def of(self, argument: Any, like: Node) -> Value | None:
        """The value of an argument of ``like``: a node, or a number."""
        if isinstance(argument, Node):
            if argument not in self.values:
                self.values[argument] = self._constant(argument)
            found = self.values[argument]
            return found if isinstance(found, Value) else None
        return constant(_filled(argument), []) if isinstance(argument, int | float) else None

    def follow(self, node: Node) -> Result:
        """The value of a node by the rule of its target; kept."""
        self.values[node] = found = self._ruled(node)
        return found

    def _ruled(self, node: Node) -> Result:
        if node.target is operator.getitem:
            source, index = node.args
            parts = self.values.get(source)  # type: ignore[arg-type]
            return parts[index] if isinstance(parts, list) else None  # type: ignore[index]
        if getattr(node.target, "namespace", "") != "aten":
            return None
        if created(node) is not None:
            return self._constant(node)
        if not isinstance(node.meta.get("val"), Tensor | list | tuple):
            return None
        rule = RULES.get(node.target._opname)  # type: ignore[union-attr]
        return None if rule is None else rule(self, node, arguments(node))

    def _constant(self, node: Node) -> Value | None:
        if not isinstance(node.meta.get("val"), Tensor):
            return None
        code = created(node)
        if code is not None:
            return constant(code, self.shape(node))
        if getattr(node.target, "_opname", "") in PIECES:
            moved = self._ruled(node)
            return moved if isinstance(moved, Value) else None
        found = constant_value(node, 1 << 16)
        if found is None or not bool(((found == 0) | (found == 1)).all()):
            return None
        codes, dims = torch.where(found == 0, ZERO, ONE), []
        for size in reversed(found.shape):
            first = codes[..., :1]
            same = size != 0 and bool((codes == first).all())
            codes = first[..., 0] if same else codes.movedim(-1, 0)
            dims.append((Atom(FREE if same else TIME, 0, size),) if size != 1 else ())
        return Value(tuple(reversed(dims)), codes)

    def _size(self, size: Any) -> int:
        if isinstance(size, int):
            return size
        expression = size.node.expr
        for symbol in sorted(expression.free_symbols, key=str):
            self.symbols.setdefault(symbol, next(self.primes))
        return int(expression.subs(self.symbols))


def created(node: Node) -> int | None:
    """The element that a node fills a new tensor with; None for any other node."""
    name = getattr(node.target, "_opname", "")
    if name in FULL:
        fill = arguments(node).get("fill_value", arguments(node).get("s"))
        return _filled(fill)
    return FILLED.get(name)


def _filled(number: Any) -> int:
    if not isinstance(number, int | float):
        return UNKNOWN
    return ZERO if number == 0 else ONE if number == 1 else UNKNOWN


def _place(dim: int, value: Value) -> int:
    return dim % max(len(value.dims), 1)


def _same(sight: Sight, node: Node, given: dict[str, Any]) -> Result:
    source = given["self"]
    kept = source.meta["val"].dtype == node.meta["val"].dtype
    return sight.of(source, node) if kept else None


def _shaped(sight: Sight, node: Node, given: dict[str, Any]) -> Result:
    value = sight.of(given["self"], node)
    return None if value is None else reshaped(value, sight.shape(node))


def _ordered(sight: Sight, node: Node, given: dict[str, Any]) -> Result:
    """Transposes of any name: what it does to dims of sizes 2, 3, 4 .. says the order."""
    value = sight.of(given["self"], node)
    if value is None:
        return None
    probe = torch.empty([*range(2, 2 + len(value.dims))], device="meta")
    order = node.target(probe, *node.args[1:], **node.kwargs).shape  # type: ignore[operator]
    return permuted(value, [size - 2 for size in order])


def _expanded(sight: Sight, node: Node, given: dict[str, Any]) -> Result:
    value = sight.of(given.get("self", given.get("src")), node)
    return None if value is None else expanded(value, sight.shape(node))


def _slice(sight: Sight, node: Node, given: dict[str, Any]) -> Result:
    value = sight.of(given["self"], node)
    if value is None or sight.shape(node) == value.shape:
        return value
    where = [given[name] for name in ("start", "end", "step")]
    if not all(isinstance(bound, int | None) for bound in where):
        return None
    dim = _place(given["dim"], value)
    return along(value, dim, lambda codes: aten.slice.Tensor(codes, 0, *where))


def _narrow(sight: Sight, node: Node, given: dict[str, Any]) -> Result:
    start, length = given["start"], given["length"]
    value = sight.of(given["self"], node)
    if value is None or not isinstance(start, int) or not isinstance(length, int):
        return None
    return along(value, _place(given["dim"], value), lambda codes: codes.narrow(0, start, length))


def _select(sight: Sight, node: Node, given: dict[str, Any]) -> Result:
    value, index = sight.of(given["self"], node), given["index"]
    if value is None or not isinstance(index, int):
        return None
    return _picked(value, _place(given["dim"], value), index)


def _picked(value: Value, dim: int, index: int) -> Value | None:
    one = along(value, dim, lambda codes: codes[index][None])
    shape = value.shape
    return None if one is None else reshaped(one, shape[:dim] + shape[dim + 1 :])


def _unbind(sight: Sight, node: Node, given: dict[str, Any]) -> Result:
    value = sight.of(given["self"], node)
    if value is None:
        return None
    dim = _place(given["dim"], value)
    return [_picked(value, dim, i) for i in range(len(node.meta["val"]))]


def _split(sight: Sight, node: Node, given: dict[str, Any]) -> Result:
    """``split``, ``chunk`` and their kin: the sizes are those of the parts."""
    value = sight.of(given["self"], node)
    if value is None:
        return None
    dim = _place(given["dim"], value)
    sizes = [part.shape[dim] for part in node.meta["val"]]
    if not all(isinstance(size, int) for size in sizes):
        return None
    starts = [0, *accumulate(sizes)]
    return [
        along(value, dim, lambda codes, i=i: codes[starts[i] : starts[i + 1]])
        for i in range(len(sizes))
    ]


def _several(sight: Sight, node: Node, tensors: Any) -> list[Value]:
    """The values of a list of tensors, or none of them."""
    found = [sight.of(tensor, node) for tensor in tensors]
    known = [value for value in found if value is not None]
    return known if len(known) == len(found) else []


def _cat(sight: Sight, node: Node, given: dict[str, Any]) -> Result:
    values = _several(sight, node, given["tensors"])
    return joined(values, _place(given["dim"], values[0])) if values else None


def _stack(sight: Sight, node: Node, given: dict[str, Any]) -> Result:
    values = _several(sight, node, given["tensors"])
    dim = given["dim"] % len(node.meta["val"].shape)
    rows = [reshaped(v, [*v.shape[:dim], 1, *v.shape[dim:]]) for v in values]
    known = [row for row in rows if row is not None]
    return joined(known, dim) if known and len(known) == len(rows) else None


def _flip(sight: Sight, node: Node, given: dict[str, Any]) -> Result:
    value = sight.of(given["self"], node)
    for dim in given["dims"]:
        value = value and along(value, _place(dim, value), lambda codes: codes.flip(0))
    return value


def _roll(sight: Sight, node: Node, given: dict[str, Any]) -> Result:
    value = sight.of(given["self"], node)
    if not given["dims"] or not all(isinstance(shift, int) for shift in given["shifts"]):
        return None
    for dim, shift in zip(given["dims"], given["shifts"], strict=True):
        turn = lambda codes, by=shift: codes.roll(by, 0)  # noqa: E731
        value = value and along(value, _place(dim, value), turn)
    return value


def _pad(sight: Sight, node: Node, given: dict[str, Any]) -> Result:
    value, pads = sight.of(given["self"], node), given["pad"]
    if given.get("mode", "constant") != "constant" or not all(isinstance(n, int) for n in pads):
        return None
    code = _filled(given["value"] or 0)
    for i in range(0, len(pads), 2):
        if value is not None and (pads[i] or pads[i + 1]):
            dim = len(value.dims) - 1 - i // 2
            value = along(value, dim, lambda c, i=i: _padded(c, pads[i], pads[i + 1], code))
    return value


def _padded(codes: Tensor, left: int, right: int, code: int) -> Tensor:
    kept = codes[max(-left, 0) : codes.shape[0] - max(-right, 0)]
    ends = [kept.new_full((max(n, 0), *kept.shape[1:]), code) for n in (left, right)]
    return torch.cat([ends[0], kept, ends[1]])


def _repeat(sight: Sight, node: Node, given: dict[str, Any]) -> Result:
    value, times = sight.of(given["self"], node), given["repeats"]
    if value is not None:
        value = reshaped(value, [1] * (len(times) - len(value.dims)) + value.shape)
    for dim, n in enumerate(times):
        if value is None or n == 1:
            continue
        shape = value.shape
        if shape[dim] == 1:
            value = expanded(value, [*shape[:dim], sight.shape(node)[dim], *shape[dim + 1 :]])
        elif isinstance(n, int):
            value = along(value, dim, lambda codes, n=n: torch.cat([codes] * n))
        else:
            return None
    return value


def _slice_scatter(sight: Sight, node: Node, given: dict[str, Any]) -> Result:
    base, part = sight.of(given["self"], node), sight.of(given["src"], node)
    where = [given[name] for name in ("start", "end", "step")]
    if base is None or part is None or not all(isinstance(bound, int | None) for bound in where):
        return None
    if part.shape == base.shape:
        return part
    dim = _place(given["dim"], base)
    return scattered(base, part, dim, lambda b, p: aten.slice_scatter(b, p, 0, *where))


def _select_scatter(sight: Sight, node: Node, given: dict[str, Any]) -> Result:
    base, part = sight.of(given["self"], node), sight.of(given["src"], node)
    if base is None or part is None or not isinstance(given["index"], int):
        return None
    dim = _place(given["dim"], base)
    row = reshaped(part, [*part.shape[:dim], 1, *part.shape[dim:]])
    write = lambda b, p: aten.select_scatter(b, p[0], 0, given["index"])  # noqa: E731
    return None if row is None else scattered(base, row, dim, write)


def _copy(sight: Sight, node: Node, given: dict[str, Any]) -> Result:
    kept = given["src"].meta["val"].dtype == node.meta["val"].dtype
    return _expanded(sight, node, {"src": given["src"]}) if kept else None


def _where(sight: Sight, node: Node, given: dict[str, Any]) -> Result:
    """Of a constant mask."""
    mask = sight.of(given.get("condition", given.get("mask")), node)
    if "condition" in given:
        yes, no = sight.of(given["self"], node), sight.of(given["other"], node)
    else:
        yes, no = sight.of(given["value"], node), sight.of(given["self"], node)
    if mask is None or yes is None or no is None:
        return None

    def choose(m: Tensor, y: Tensor, n: Tensor) -> Tensor:
        return torch.where(m == ONE, y, torch.where(m == ZERO, n, UNKNOWN))

    return combined(choose, mask, yes, no)


def _mul(sight: Sight, node: Node, given: dict[str, Any]) -> Result:
    left, right = sight.of(given["self"], node), sight.of(given["other"], node)
    return None if left is None or right is None else multiplied(left, right)


def _add(sight: Sight, node: Node, given: dict[str, Any]) -> Result:
    left, right = sight.of(given["self"], node), sight.of(given["other"], node)
    if left is None or right is None or given.get("alpha", 1) != 1:
        return None
    return added(left, right)


def _addcmul(sight: Sight, node: Node, given: dict[str, Any]) -> Result:
    base, left, right = (sight.of(given[name], node) for name in ("self", "tensor1", "tensor2"))
    if base is None or left is None or right is None or given["value"] != 1:
        return None
    product = multiplied(left, right)
    return None if product is None else added(base, product)


Rule = Callable[[Sight, Node, dict[str, Any]], Result]
RULES: dict[str, Rule] = {
    **dict.fromkeys(SAME.split(), _same),
    **dict.fromkeys(SHAPED.split(), _shaped),
    **dict.fromkeys(ORDERED.split(), _ordered),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), _expanded),
    **dict.fromkeys(("cat", "concat", "concatenate"), _cat),
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "tensor_split"), _split),
    **dict.fromkeys(("pad", "constant_pad_nd"), _pad),
    **dict.fromkeys(("where", "masked_fill"), _where),
    **dict.fromkeys(("mul", "multiply"), _mul),
    "slice": _slice,
    "narrow": _narrow,
    "select": _select,
    "unbind": _unbind,
    "stack": _stack,
    "flip": _flip,
    "roll": _roll,
    "repeat": _repeat,
    "slice_scatter": _slice_scatter,
    "select_scatter": _select_scatter,
    "copy": _copy,
    "add": _add,
    "addcmul": _addcmul,
}
