"""Rules of what adds and multiplies: products, sums, contractions, convolutions, activations."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from effpass.axes.relation import arguments
from effpass.patterns.taps.shift_follow import Follower, is_zero, rule
from effpass.patterns.taps.shift_moves import padded
from effpass.patterns.taps.shifted import (
    Coefficient,
    Factor,
    Lost,
    Pick,
    Term,
    Value,
    added,
    constants,
    summed,
)

aten = torch.ops.aten


@rule(aten.mul.Tensor, aten.mul.Scalar)
def _mul(f: Follower, node: Node) -> Value:
    return product(f, node.args[0], node.args[1])


def product(f: Follower, a: Any, b: Any) -> Value:
    """A value times a number, a mask, or a tensor that is not followed; x sigmoid(x)."""
    if f.known(a) and f.known(b):
        return _swish(f.value(a), f.value(b))
    value, other = (f.value(a), b) if f.known(a) else (f.value(b), a)
    if not isinstance(other, Node) or not isinstance(other.meta.get("val"), Tensor):
        return value.times(Coefficient(f.scalar(other)))
    return _times(f, value, other)


def _swish(a: Value, b: Value) -> Value:
    a, b = (a, b) if b.activation == "sigmoid" else (b, a)
    if a.activation is not None or b.activation != "sigmoid" or not a.same(b):
        raise Lost
    return replace(a, activation="silu")


def _times(f: Follower, value: Value, other: Node) -> Value:
    shape = f.shape(other)
    value = value.linear().raised_to(max(value.rank, len(shape)))
    offset = value.rank - len(shape)
    for dim, size in enumerate(shape, start=offset):
        value = value.grown(dim, size) if size != 1 else value
    known = f.constant(other)
    if known is None:
        return value.times(f.factor(other, value.rank))
    if known.numel() == 1:
        return value.times(Coefficient(float(known.item())))
    mask = _mask(known.reshape((1,) * offset + shape), value)
    return value.times(f.factor(other, value.rank)) if mask is None else value.masked(mask)


def _mask(known: Tensor, value: Value) -> Tensor | None:
    """Where a constant keeps the tokens; None where it does more than keep or zero whole tokens."""
    if not bool(((known == 0) | (known == 1)).all()):
        return None
    for dim, role in enumerate(value.roles):
        if role is None or known.shape[dim] == 1:
            continue
        first = known.narrow(dim, 0, 1)
        if not bool((known == first).all()):
            return None
        known = first
    return known != 0


@rule(aten.div.Tensor, aten.div.Scalar)
def _div(f: Follower, node: Node) -> Value:
    divisor: Any = node.args[1]
    if isinstance(divisor, Node) and isinstance(divisor.meta.get("val"), Tensor):
        known = f.constant(divisor)
        if known is None or known.numel() != 1:
            raise Lost
        divisor = known.item()
    if f.scalar(divisor) == 0:
        raise Lost
    return f.value(node.args[0]).times(Coefficient(1.0 / f.scalar(divisor)))


@rule(aten.neg.default)
def _neg(f: Follower, node: Node) -> Value:
    return f.value(node.args[0]).times(Coefficient(-1.0))


@rule(aten.add.Tensor, aten.add.Scalar)
def _add(f: Follower, node: Node) -> Value:
    return _plus(f, node.args[0], node.args[1], _alpha(f, node))


@rule(aten.sub.Tensor, aten.sub.Scalar)
def _sub(f: Follower, node: Node) -> Value:
    return _plus(f, node.args[0], node.args[1], -_alpha(f, node))


@rule(aten.rsub.Tensor, aten.rsub.Scalar)
def _rsub(f: Follower, node: Node) -> Value:
    return _plus(f, node.args[1], node.args[0], -_alpha(f, node))


def _alpha(f: Follower, node: Node) -> float:
    return f.scalar(arguments(node)["alpha"])


def _plus(f: Follower, a: Any, b: Any, scale: float) -> Value:
    """a + scale b, at least one of them followed."""
    if f.known(a) and f.known(b):
        return added(f.value(a), f.value(b).times(Coefficient(scale)))
    if f.known(b):
        return _biased(f, f.value(b).times(Coefficient(scale)), a, 1.0)
    return _biased(f, f.value(a), b, scale)


def _biased(f: Follower, value: Value, other: Any, scale: float) -> Value:
    """A value plus ``scale`` times a number, or a tensor that changes along dims of x only."""
    value.linear()
    if isinstance(other, Node) and is_zero(other):
        return added(value, f.value(other))
    if not isinstance(other, Node) or not isinstance(other.meta.get("val"), Tensor):
        number = f.scalar(other) * scale
        more = (constants(value.rank, Coefficient(number)),) if number else ()
        return replace(value, terms=(*value.terms, *more))
    shape = f.shape(other)
    value = value.raised_to(max(value.rank, len(shape)))
    bias = f.factor(other, value.rank)
    own = {d for d, n in enumerate(value.shape) if value.roles[d] is not None and n != 1}
    whole = len(own) > 1 and own <= bias.dims
    alone = any(n == 1 for d, n in enumerate(value.shape) if value.roles[d] is not None)
    if whole or bias.dims - own or (alone and not _of_one_parameter(other)):
        raise Lost
    return replace(
        value, terms=(*value.terms, constants(value.rank, Coefficient(scale).times(bias)))
    )


def _of_one_parameter(node: Node) -> bool:
    """Whether a tensor is a graph input, but for views and elementwise functions of it alone."""
    while node.op == "call_function" and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return node.op in ("placeholder", "get_attr")


@rule(aten.addcmul.default)
def _addcmul(f: Follower, node: Node) -> Value:
    given = arguments(node)
    value = product(f, given["tensor1"], given["tensor2"])
    value = value.times(Coefficient(f.scalar(given["value"])))
    if f.known(given["self"]):
        return added(f.value(given["self"]), value)
    return _biased(f, value, given["self"], 1.0)


@rule(aten.lerp.Tensor, aten.lerp.Scalar)
def _lerp(f: Follower, node: Node) -> Value:
    start, end, weight = f.value(node.args[0]), f.value(node.args[1]), node.args[2]
    step = added(end, start.times(Coefficient(-1.0)))
    if isinstance(weight, Node):
        return added(start, _times(f, step, weight))
    return added(start, step.times(Coefficient(f.scalar(weight))))


@rule(aten.sum.dim_IntList)
def _sum(f: Follower, node: Node) -> Value:
    given = arguments(node)
    value = f.value(given["self"])
    dims = [value.dim(d) for d in given["dim"] or range(value.rank)]
    for dim in dims:
        value = summed(value, dim)
    if given["keepdim"]:
        return value
    return value.moved([d for d in range(value.rank) if d not in dims])


@rule(aten.where.self, aten.where.ScalarOther)
def _where(f: Follower, node: Node) -> Value:
    condition, a, b = node.args
    known = f.constant(condition)
    if known is None:
        raise Lost
    if f.known(b):
        a, b, known = b, a, ~known
    if not (is_zero(b) if isinstance(b, Node) else b == 0):
        raise Lost
    return _kept(f.value(a), known)


@rule(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def _masked_fill(f: Follower, node: Node) -> Value:
    value, mask, fill = node.args
    known = f.constant(mask)
    if known is None or not (is_zero(fill) if isinstance(fill, Node) else fill == 0):
        raise Lost
    return _kept(f.value(value), ~known)


def _kept(value: Value, keep: Tensor) -> Value:
    if keep.dim() > value.rank:
        raise Lost
    keep = keep.reshape((1,) * (value.rank - keep.dim()) + tuple(keep.shape))
    for dim, size in enumerate(keep.shape):
        value = value.grown(dim, size) if size != 1 else value
    mask = _mask(keep, value)
    if mask is None:
        raise Lost
    return value.masked(mask)


@rule(aten.einsum.default)
def _einsum(f: Follower, node: Node) -> Value:
    given = arguments(node)
    operands: Any = given["tensors"]
    left, arrow, out = given["equation"].replace(" ", "").partition("->")
    labels = left.split(",")
    if not arrow or "." in left or len(operands) != 2:
        raise Lost
    return contracted(f, operands, labels, out)


@rule(aten.matmul.default, aten.bmm.default)
def _matmul(f: Follower, node: Node) -> Value:
    a, b = node.args
    assert isinstance(a, Node) and isinstance(b, Node)
    ranks = [a.meta["val"].dim(), b.meta["val"].dim()]
    batch = "abcdefgh"[: max(*ranks, 2) - 2]
    left = "k" if ranks[0] == 1 else batch[len(batch) - ranks[0] + 2 :] + "nk"
    right = "k" if ranks[1] == 1 else batch[len(batch) - ranks[1] + 2 :] + "km"
    out = batch + ("n" if ranks[0] > 1 else "") + ("m" if ranks[1] > 1 else "")
    return contracted(f, [a, b], [left, right], out)


def contracted(f: Follower, operands: Any, labels: list[str], out: str) -> Value:
    """An einsum of a value and a tensor that is not followed."""
    a, b = operands
    if f.known(a) == f.known(b):
        raise Lost
    if not f.known(a):
        (a, b), labels = (b, a), labels[::-1]
    mine, theirs = labels
    if any(len(set(text)) != len(text) for text in (mine, theirs, out)):
        raise Lost
    every = out + "".join(dict.fromkeys(c for c in mine + theirs if c not in out))
    value = f.value(a).linear().moved([mine.index(c) if c in mine else None for c in every])
    shape = f.shape(b)
    for label, size in zip(theirs, shape, strict=True):
        value = value.grown(every.index(label), size) if size != 1 else value
    picks = [Pick(None if n == 1 else every.index(c)) for c, n in zip(theirs, shape, strict=True)]
    value = value.times(Coefficient(1.0, (Factor(b, tuple(picks)),)))
    for dim in range(len(out), len(every)):
        value = summed(value, dim)
    return value.moved(range(len(out)))


@dataclass(frozen=True)
class Geometry:
    """A convolution over one dim: its arguments as numbers."""

    source: Node
    weight: Node
    bias: Node | None
    stride: int
    left: int
    right: int
    dilation: int
    groups: int


def geometry(node: Node) -> Geometry | None:
    """Of a convolution node; None where it runs over other dims than one, or is transposed."""
    given = arguments(node)
    source, weight = given["input"], given["weight"]
    if weight.meta["val"].dim() != 3 or given.get("transposed"):
        return None
    stride, dilation = _one(given["stride"]), _one(given["dilation"])
    padding, reach = given["padding"], dilation * (weight.meta["val"].shape[2] - 1)
    if padding == "same":
        left, right = reach // 2, reach - reach // 2
    else:
        left = right = 0 if padding == "valid" else _one(padding)
    return Geometry(source, weight, given["bias"], stride, left, right, dilation, given["groups"])


def _one(value: Any) -> int:
    return value[0] if isinstance(value, list | tuple) else value


@rule(aten.conv1d.default, aten.conv1d.padding, aten.convolution.default)
def _conv1d(f: Follower, node: Node) -> Value:
    g = geometry(node)
    value = f.value(node.args[0]).linear()
    if g is None or g.stride != 1 or len(value.terms) != 1 or value.rank not in (2, 3):
        raise Lost
    channels, each, width = f.shape(g.weight)
    channel, dim = value.rank - 2, value.token_dim(-1)
    pure = value.terms[0].coefficient == Coefficient() and value.roles[channel] is not None
    if not pure or each != 1 or g.groups != channels or value.shape[channel] != channels:
        raise Lost
    tokens = padded(value.filled(dim).terms[0].tokens, dim, g.left, g.right)
    length = tokens.shape[dim] - g.dilation * (width - 1)
    along = Pick(None if channels == 1 else channel)
    terms = []
    for j in range(width):
        weight = Factor(g.weight, (along, Pick(None), Pick(None, j)))
        span = tokens.narrow(dim, j * g.dilation, length)
        terms.append(Term(span, Coefficient(1.0, (weight,))))
    if g.bias is not None:
        bias = Factor(g.bias, (along,))
        terms.append(constants(value.rank, Coefficient(1.0, (bias,))))
    return Value((*value.shape[:-1], length), value.roles, tuple(terms))


@rule(aten.silu.default)
def _silu(f: Follower, node: Node) -> Value:
    return replace(f.value(node.args[0]).linear(), activation="silu")


@rule(aten.sigmoid.default)
def _sigmoid(f: Follower, node: Node) -> Value:
    return replace(f.value(node.args[0]).linear(), activation="sigmoid")
