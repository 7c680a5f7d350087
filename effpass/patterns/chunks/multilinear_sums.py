"""How terms and dims combine in sums, products, masks and decays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from torch.fx import Node

from effpass.patterns.chunks import factors
from effpass.patterns.chunks.factors import Dims, Unreadable
from effpass.patterns.chunks.multilinear import (
    ONE,
    Reader,
    Rule,
    Value,
    added,
    is_constant,
    multiplied,
    scaled,
    sizes,
)

LINEAR = (
    *("neg", "tril", "triu", "masked_fill", "where", "cumsum", "sum"),
    *("add", "sub", "subtract", "rsub"),
)
PRODUCTS = (
    *("mul", "multiply", "div", "divide", "true_divide", "einsum", "matmul", "bmm", "mm", "mv"),
    *("baddbmm", "addcmul"),
)
VANISHES = (0, -math.inf)  # what masks fill in: nothing, also behind exp


def _operand(reader: Reader, value: Any) -> Value:
    """A tensor, or a number."""
    if isinstance(value, Node):
        return reader.value(value)
    if isinstance(value, int | float):
        return Value({ONE: float(value)} if value else {}, ())
    raise Unreadable("an operand is no tensor")


def _negated(reader: Reader, node: Node, given: dict[str, Any]) -> Value:
    terms, dims = reader.value(node.args[0])
    return Value(scaled(terms, -1.0), dims)


def _same(reader: Reader, node: Node, given: dict[str, Any]) -> Value:
    return reader.value(node.args[0])


def _summed_up(reader: Reader, node: Node, given: dict[str, Any]) -> Value:
    """cumsum: the dim is one in which order matters."""
    terms, dims = reader.value(node.args[0])
    at = given["dim"] % len(dims)
    keys = factors.sources(dims[at])
    reader.ordered |= keys
    reader.summed_rates.update(c for term, c in terms.items() if term == reader.exponent)
    if not keys:
        made = reader.order(factors.count(dims[at]))
        dims = (*dims[:at], made, *dims[at + 1 :])
    return Value(terms, dims)


def _masked(reader: Reader, node: Node, given: dict[str, Any]) -> Value:
    source, mask = reader.value(given["self"]), _mask(reader, given["mask"])
    other = _filled(given["value"])
    return Value(added(source.terms, other), _spread(reader, source.dims, mask))


def _where(reader: Reader, node: Node, given: dict[str, Any]) -> Value:
    mask = _mask(reader, given["condition"])
    sides = [given["self"], given["other"]]
    values = [reader.value(v) for v in sides if isinstance(v, Node)]
    filled = [_filled(v) for v in sides if not isinstance(v, Node)]
    terms = added(*(v.terms for v in values), *filled)
    return Value(terms, _spread(reader, *(v.dims for v in values), mask))


def _mask(reader: Reader, node: Any) -> Dims:
    if not isinstance(node, Node) or not is_constant(node):
        raise Unreadable("a mask depends on data")
    return reader.value(node).dims


def _filled(value: Any) -> dict[frozenset[int], float]:
    if not isinstance(value, int | float):
        raise Unreadable("a mask fills in a tensor")
    return {} if value in VANISHES or value <= -1e4 else {ONE: 1.0}


def _spread(reader: Reader, *dims: Dims) -> Dims:
    return factors.broadcast(dims, reader.classes)


def _added(sign: float, reverse: bool = False) -> Rule:
    def rule(reader: Reader, node: Node, given: dict[str, Any]) -> Value:
        names = ("self", "other")
        left, right = (_operand(reader, given[name]) for name in names)
        factor = sign * given.get("alpha", 1)
        terms = added(left.terms, scaled(right.terms, factor))
        if reverse:
            terms = added(right.terms, scaled(left.terms, factor))
        return Value(terms, _spread(reader, left.dims, right.dims))

    return rule


def _multiplied(reader: Reader, node: Node, given: dict[str, Any]) -> Value:
    left, right = _operand(reader, given["self"]), _operand(reader, given["other"])
    return Value(multiplied(left.terms, right.terms), _spread(reader, left.dims, right.dims))


def _divided(reader: Reader, node: Node, given: dict[str, Any]) -> Value:
    """Division by a number or a constant."""
    by = given["other"]
    if given.get("rounding_mode") or (isinstance(by, Node) and not is_constant(by)):
        raise Unreadable("it is divided by something computed")
    left = reader.value(given["self"])
    if isinstance(by, Node):
        return Value(left.terms, _spread(reader, left.dims, reader.value(by).dims))
    return Value(scaled(left.terms, 1.0 / by), left.dims)


def _add_product(reader: Reader, node: Node, given: dict[str, Any]) -> Value:
    base = reader.value(given["self"])
    left, right = reader.value(given["tensor1"]), reader.value(given["tensor2"])
    product = scaled(multiplied(left.terms, right.terms), given.get("value", 1))
    return Value(added(base.terms, product), _spread(reader, base.dims, left.dims, right.dims))


def _exp(reader: Reader, node: Node, given: dict[str, Any]) -> Value:
    terms, dims = reader.value(node.args[0])
    if set(terms) - {ONE} != {reader.exponent}:
        raise Unreadable("exp is taken of something else than the log of the decay")
    reader.rates.add(terms[reader.exponent])
    return Value({ONE: 1.0}, dims)


def _sum(reader: Reader, node: Node, given: dict[str, Any]) -> Value:
    terms, dims = reader.value(node.args[0])
    if not isinstance(given.get("dim"), list | tuple) or not given["dim"]:
        raise Unreadable("everything is summed")
    summed = {d % len(dims) for d in given["dim"]}
    kept = () if not given.get("keepdim") else ((),)
    parts = [kept if i in summed else (dim,) for i, dim in enumerate(dims)]
    return Value(terms, tuple(dim for part in parts for dim in part))


def _einsum(reader: Reader, node: Node, given: dict[str, Any]) -> Value:
    values = [reader.value(operand) for operand in given["tensors"]]
    inputs, arrow, result = given["equation"].replace(" ", "").partition("->")
    labels = [_spelled_out(t, len(v.dims)) for t, v in zip(inputs.split(","), values, strict=True)]
    every = [label for each in labels for label in each]
    if any(len(set(each)) != len(each) for each in labels):
        raise Unreadable("einsum takes a diagonal")
    if not arrow:
        result = "".join(sorted(c for c in set(every) if every.count(c) == 1))
    return _contracted(reader, values, labels, _spelled_out(result, len(sizes(node))))


def _spelled_out(labels: str, rank: int) -> list[str]:
    """Labels one by one; the dims of an ellipsis are numbered from the right."""
    before, dots, after = labels.partition("...")
    missing = rank - len(before) - len(after) if dots else 0
    return [*before, *(f"-{i}" for i in range(missing, 0, -1)), *after]


def _contracted(
    reader: Reader, values: Sequence[Value], labels: Sequence[Sequence[str]], result: Sequence[str]
) -> Value:
    found: dict[str, list[factors.Dim]] = {}
    for value, each in zip(values, labels, strict=True):
        for label, dim in zip(each, value.dims, strict=True):
            found.setdefault(label, []).append(dim)
    merged = {label: factors.overlaid(dims, reader.classes) for label, dims in found.items()}
    terms = multiplied(*(v.terms for v in values))
    return Value(terms, tuple(merged[label] for label in result))


def _matmul(reader: Reader, node: Node, given: dict[str, Any]) -> Value:
    left, right = (reader.value(v) for v in list(given.values())[:2])
    return _matrices(reader, left, right)


def _matrices(reader: Reader, left: Value, right: Value) -> Value:
    a, b = len(left.dims), len(right.dims)
    first = [f"-{i}" for i in range(a - 2, 0, -1)] + ["i"] * (a > 1) + ["k"]
    second = [f"-{i}" for i in range(b - 2, 0, -1)] + ["k"] + ["j"] * (b > 1)
    batch = [f"-{i}" for i in range(max(a, b) - 2, 0, -1)]
    result = [*batch, *["i"] * (a > 1), *["j"] * (b > 1)]
    return _contracted(reader, (left, right), (first, second), result)


def _add_matrices(reader: Reader, node: Node, given: dict[str, Any]) -> Value:
    base = reader.value(given["self"])
    product = _matrices(reader, reader.value(given["batch1"]), reader.value(given["batch2"]))
    terms = added(
        scaled(base.terms, given.get("beta", 1)), scaled(product.terms, given.get("alpha", 1))
    )
    return Value(terms, _spread(reader, base.dims, product.dims))


RULES: dict[str, Rule] = {
    "neg": _negated,
    **dict.fromkeys(("tril", "triu"), _same),
    "cumsum": _summed_up,
    "masked_fill": _masked,
    "where": _where,
    "add": _added(1.0),
    **dict.fromkeys(("sub", "subtract"), _added(-1.0)),
    "rsub": _added(-1.0, reverse=True),
    **dict.fromkeys(("mul", "multiply"), _multiplied),
    **dict.fromkeys(("div", "divide", "true_divide"), _divided),
    "addcmul": _add_product,
    "exp": _exp,
    "sum": _sum,
    "einsum": _einsum,
    **dict.fromkeys(("matmul", "bmm", "mm", "mv"), _matmul),
    "baddbmm": _add_matrices,
}
