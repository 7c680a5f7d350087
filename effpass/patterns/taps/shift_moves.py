"""Rules of what moves tokens: views, slices, pads, rolls, windows, stacks, writes into slices."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from effpass.axes.relation import arguments
from effpass.patterns.taps.shift_follow import Follower, permutation, rule
from effpass.patterns.taps.shifted import ZERO, Lost, Pick, Term, Value, joined

aten = torch.ops.aten
MOST_PARTS = 4096


@rule(aten.transpose.int, aten.permute.default, aten.t.default, aten.mT.default)
@rule(aten.swapaxes.default, aten.numpy_T.default, aten.movedim.int, aten.movedim.intlist)
def _permute(f: Follower, node: Node) -> Value:
    value = f.value(node.args[0])
    order = permutation(node, value.rank)
    if order is None:
        raise Lost
    return value.moved(order)


@rule(aten.unsqueeze.default)
def _unsqueeze(f: Follower, node: Node) -> Value:
    value = f.value(node.args[0])
    order: list[int | None] = list(range(value.rank))
    order.insert(f.number(node.args[1]) % (value.rank + 1), None)
    return value.moved(order)


@rule(aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default)
@rule(aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.flatten.using_ints)
def _reshape(f: Follower, node: Node) -> Value:
    """Only where dims of size 1 come and go."""
    value, shape = f.value(node.args[0]), f.shape(node)
    if [n for n in value.shape if n != 1] != [n for n in shape if n != 1]:
        raise Lost
    order: list[int | None] = []
    left = list(range(value.rank))
    for size in shape:
        if size != 1:
            while value.shape[left[0]] == 1:
                left.pop(0)
        order.append(left.pop(0) if left and value.shape[left[0]] == size else None)
    return value.moved(order)


@rule(aten.expand.default, aten.expand_as.default)
def _expand(f: Follower, node: Node) -> Value:
    shape = f.shape(node)
    value = f.value(node.args[0]).raised_to(len(shape))
    for dim, size in enumerate(shape):
        value = value.grown(dim, size)
    return value


@rule(aten.contiguous.default, aten.clone.default, aten.alias.default, aten.lift_fresh_copy.default)
def _same(f: Follower, node: Node) -> Value:
    return f.value(node.args[0])


@rule(aten.to.dtype, aten._to_copy.default, aten.type_as.default, aten.to.other)
def _cast(f: Follower, node: Node) -> Value:
    """Only to a wider dtype."""
    source = node.args[0]
    value = f.value(source)
    assert isinstance(source, Node)
    before, after = source.meta["val"], node.meta["val"]
    wider = torch.promote_types(before.dtype, after.dtype) == after.dtype
    if not wider or before.device != after.device:
        raise Lost
    return value


@rule(aten.slice.Tensor)
def _slice(f: Follower, node: Node) -> Value:
    given = arguments(node)
    value = f.value(given["self"])
    dim = value.dim(given["dim"])
    start, end, step = span(f, given, value.shape[dim])
    if (start, end, step) == (0, value.shape[dim], 1):
        return value
    return value.narrowed(value.token_dim(dim), start, max(0, -(-(end - start) // step)), step)


def span(f: Follower, given: Mapping[str, Any], size: int) -> tuple[int, int, int]:
    """Start, end and step of a slice, as numbers from the front."""
    start = 0 if given["start"] is None else f.number(given["start"])
    end = size if given["end"] is None else f.number(given["end"])
    start, end, step = slice(start, end, f.number(given["step"])).indices(size)
    return start, max(start, end), step


@rule(aten.narrow.default)
def _narrow(f: Follower, node: Node) -> Value:
    given = arguments(node)
    value = f.value(given["input" if "input" in given else "self"])
    dim = value.token_dim(given["dim"])
    start = f.number(given["start"]) % max(1, value.shape[dim])
    return value.narrowed(dim, start, f.number(given["length"]))


@rule(aten.select.int)
def _select(f: Follower, node: Node) -> Value:
    value = f.value(node.args[0])
    dim = value.token_dim(f.number(node.args[1]))
    index = f.number(node.args[2]) % value.shape[dim]
    order = [d for d in range(value.rank) if d != dim]
    return value.narrowed(dim, index, 1).moved(order)


@rule(aten.unbind.int)
def _unbind(f: Follower, node: Node) -> list[Value]:
    given = arguments(node)
    value = f.value(given["self"])
    dim = value.token_dim(given["dim"])
    order = [d for d in range(value.rank) if d != dim]
    return [
        value.narrowed(dim, i, 1).moved(order) for i in range(min(value.shape[dim], MOST_PARTS))
    ]


@rule(aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)
def _split(f: Follower, node: Node) -> list[Value]:
    value = f.value(node.args[0])
    dim, start, parts = value.token_dim(arguments(node)["dim"]), 0, []
    for part in node.meta["val"]:
        length = f.number(part.shape[dim])
        parts.append(value.narrowed(dim, start, length))
        start += length
    return parts


@rule(operator.getitem)
def _getitem(f: Follower, node: Node) -> Value:
    parts, index = f.env.get(node.args[0]), node.args[1]  # type: ignore[arg-type]
    if not isinstance(parts, list) or not isinstance(index, int) or index >= len(parts):
        raise Lost
    return parts[index]


@rule(aten.flip.default)
def _flip(f: Follower, node: Node) -> Value:
    value = f.value(node.args[0])
    for dim in node.args[1]:  # type: ignore[union-attr]
        dim = value.token_dim(dim)  # type: ignore[arg-type]
        value = value.narrowed(dim, value.shape[dim] - 1, value.shape[dim], -1)
    return value


@rule(aten.roll.default)
def _roll(f: Follower, node: Node) -> Value:
    given = arguments(node)
    value = single(f.value(given["self"]))
    if len(given["dims"] or ()) != len(given["shifts"]):
        raise Lost
    for shift, dim in zip(given["shifts"], given["dims"], strict=True):
        dim, shift = value.token_dim(dim), f.number(shift)
        value = value.mapped(dim, lambda t, s=shift, d=dim: t.roll(s, d))
    return value


@rule(aten.unfold.default)
def _unfold(f: Follower, node: Node) -> Value:
    value = single(f.value(node.args[0]))
    given = arguments(node)
    dim = value.token_dim(f.number(given["dimension"]))
    size, step = int(f.number(given["size"])), int(f.number(given["step"]))
    filled = value.linear().filled(dim)
    terms = tuple(Term(t.tokens.unfold(dim, size, step), t.coefficient) for t in filled.terms)
    windows = (value.shape[dim] - size) // step + 1
    shape = (*value.shape[:dim], windows, *value.shape[dim + 1 :], size)
    return Value(shape, (*value.roles, None), terms)


@rule(aten.pad.default, aten.constant_pad_nd.default)
def _pad(f: Follower, node: Node) -> Value:
    given = arguments(node)
    value = single(f.value(given["self"])).linear()
    if given.get("mode", "constant") != "constant" or given["value"] not in (None, 0, 0.0):
        raise Lost
    amounts = [f.number(p) for p in given["pad"]]
    for i, (left, right) in enumerate(zip(amounts[::2], amounts[1::2], strict=True)):
        if left or right:
            dim = value.token_dim(-1 - i)
            value = value.mapped(dim, lambda t, d=dim, p=(left, right): padded(t, d, *p))
    return value


def padded(tokens: Tensor, dim: int, left: int, right: int) -> Tensor:
    """Tokens with ZERO around them, or with less of them, along one dim."""
    if tokens.shape[dim] + min(left, 0) + min(right, 0) < 0:
        raise Lost  # as eager, which refuses so few
    after = (tokens.dim() - 1 - dim) * [0, 0]
    return torch.nn.functional.pad(tokens, [*after, left, right], value=ZERO)


@rule(aten.cat.default)
def _cat(f: Follower, node: Node) -> Value:
    given = arguments(node)
    parts = [f.value(part) for part in given["tensors"]]
    if not all(part.terms for part in parts):
        parts = [single(part) for part in parts]
    return joined(parts, given["dim"])


def single(value: Value) -> Value:
    """Itself; Lost where it is a sum, whose shift would be the next convolution's."""
    if len(value.terms) > 1:
        raise Lost
    return value


@rule(aten.index_select.default)
def _index_select(f: Follower, node: Node) -> Value:
    value = f.value(node.args[0])
    return _gathered(f, value, f.number(node.args[1]), node.args[2])


@rule(aten.index.Tensor)
def _index(f: Follower, node: Node) -> Value:
    """One tensor of constant indices."""
    value = f.value(node.args[0])
    given = [(dim, index) for dim, index in enumerate(node.args[1]) if index is not None]  # type: ignore[arg-type]
    if len(given) != 1:
        raise Lost
    return _gathered(f, value, *given[0])


def _gathered(f: Follower, value: Value, dim: int, index: Any) -> Value:
    """The entries of a dim of tokens that a constant tensor names; its dims replace that one."""
    known = f.constant(index)
    if known is None or known.dtype is torch.bool or known.dim() == 0:
        raise Lost
    dim, more = value.token_dim(dim), known.dim() - 1
    flat = value.linear().filled(dim)

    def pick(p: Pick) -> Pick:
        return replace(p, dim=p.dim + more) if p.dim is not None and p.dim > dim else p

    def tokens(t: Tensor) -> Tensor:
        entries = t.index_select(dim, known.flatten() % t.shape[dim])
        return entries.reshape(*t.shape[:dim], *known.shape, *t.shape[dim + 1 :])

    return Value(
        (*value.shape[:dim], *known.shape, *value.shape[dim + 1 :]),
        (*value.roles[:dim], *[None] * known.dim(), *value.roles[dim + 1 :]),
        tuple(Term(tokens(t.tokens), t.coefficient.repicked(pick)) for t in flat.terms),
    )


@rule(aten.stack.default)
def _stack(f: Follower, node: Node) -> Value:
    given = arguments(node)
    parts = [f.value(part) for part in given["tensors"]]
    dim = given["dim"] % (parts[0].rank + 1)
    order: list[int | None] = list(range(parts[0].rank))
    order.insert(dim, None)
    return joined([part.moved(order) for part in parts], dim)


def _alone(f: Follower, node: Node) -> None:
    """Lost where elements share memory: torch writes one and changes all."""
    value = node.meta["val"]
    sizes = [(f.number(s), f.number(n)) for s, n in zip(value.stride(), value.shape, strict=True)]
    reach = 0
    for stride, size in sorted(pair for pair in sizes if pair[1] != 1):
        if stride <= reach:
            raise Lost
        reach += stride * (size - 1)


@rule(aten.slice_scatter.default)
def _slice_scatter(f: Follower, node: Node) -> Value:
    given = arguments(node)
    _alone(f, given["self"])
    whole, part = f.value(given["self"]), f.value(given["src"])
    dim = given["dim"] % whole.rank
    size = whole.shape[dim]
    start, end, step = span(f, given, size)
    if step != 1 or part.shape[dim] != end - start:
        raise Lost
    before, after = whole.narrowed(dim, 0, start), whole.narrowed(dim, end, size - end)
    return joined([p for p in (before, part, after) if p.shape[dim]], dim)


@rule(aten.select_scatter.default)
def _select_scatter(f: Follower, node: Node) -> Value:
    given = arguments(node)
    _alone(f, given["self"])
    whole, part = f.value(given["self"]), f.value(given["src"])
    dim = given["dim"] % whole.rank
    index, size = f.number(given["index"]) % whole.shape[dim], whole.shape[dim]
    order: list[int | None] = list(range(part.rank))
    order.insert(dim, None)
    before, after = whole.narrowed(dim, 0, index), whole.narrowed(dim, index + 1, size - index - 1)
    return joined([p for p in (before, part.moved(order), after) if p.shape[dim]], dim)
