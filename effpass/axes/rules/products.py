"""Axes through products: of matrices, einsum, lookups, convolutions, attention, losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from effpass.axes.contraction import contraction
from effpass.axes.labels import Dim, Dims, expression, single
from effpass.axes.relation import Kind, Relation, is_tensor, rule, values


@rule("linear")
def linear(found: Relation, given: Mapping[str, Any]) -> Dims:
    """``(..., i), (o, i), (o) -> (..., o)``"""
    x = found.take(given["input"])
    out = found.labels.fresh(given["weight"].meta["val"].shape[0])
    found.read(given["weight"], (out, x[-1]))
    if is_tensor(given["bias"]):
        found.read(given["bias"], (out,))
    found.mark(x[-1], Kind.FOLDED)
    return (*x[:-1], out)


@rule("matmul", "mm", "bmm", "mv", "dot", "addmm", "baddbmm")
def product(found: Relation, given: Mapping[str, Any]) -> Dims | None:
    """Products of two matrices, batched and broadcast."""
    made = contraction(found.node)
    if made is None:
        return None
    left, right, out = made.labelled(found.labels)
    found.read(made.left, left)
    found.read(made.right, right)
    if made.addend is not None:
        shape = made.addend.meta["val"].shape
        last = out[len(out) - len(shape) :]
        found.read(
            made.addend,
            tuple(() if single(s) else dim for s, dim in zip(shape, last, strict=True)),
        )
    _fold(found, (*left, *right), out)
    return out


@rule("einsum")
def einsum(found: Relation, given: Mapping[str, Any]) -> Dims | None:
    """Any number of operands, an axis a letter; an ellipsis is aligned from the right."""
    equation, operands = given["equation"].replace(" ", ""), given["tensors"]
    inputs, arrow, result = equation.partition("->")
    names = inputs.split(",")
    if not arrow:
        once = sorted(c for c in set(inputs) if c.isalpha() and inputs.count(c) == 1)
        result = "..." * ("..." in inputs) + "".join(once)
    ranks = [operand.meta["val"].dim() for operand in operands]
    dots = [rank - len(n.replace("...", "")) for rank, n in zip(ranks, names, strict=True)]
    spelled = [_letters(n, d) for n, d in zip(names, dots, strict=True)]
    if any(len(set(axes)) < len(axes) for axes in spelled):
        return None  # a diagonal
    axes: dict[Any, Dim] = {}
    for operand, letters in zip(operands, spelled, strict=True):
        for letter, size in zip(letters, operand.meta["val"].shape, strict=True):
            if not single(size) and letter not in axes:
                axes[letter] = found.labels.fresh(size)
    everything: list[Dim] = []
    for operand, letters in zip(operands, spelled, strict=True):
        shape = operand.meta["val"].shape
        dims = tuple(
            () if single(s) else axes[letter] for s, letter in zip(shape, letters, strict=True)
        )
        everything += found.read(operand, dims)
    out = tuple(axes.get(letter, ()) for letter in _letters(result, max(dots)))
    _fold(found, everything, out)
    return out


@rule("embedding")
def embedding(found: Relation, given: Mapping[str, Any]) -> Dims:
    """A row of a table for every index."""
    table = found.take(given["weight"])
    found.mark(table[0], Kind.BOUND)
    return (*found.take(given["indices"]), table[1])


@rule("scaled_dot_product_attention")
def attention(found: Relation, given: Mapping[str, Any]) -> Dims:
    """``q (.. h t d), k (.. hk s d), v (.. hk s e) -> (.. h t e)``; causal attention is ordered."""
    q = found.take(given["query"])
    keys, values_ = given["key"], given["value"]
    s = found.labels.fresh(keys.meta["val"].shape[-2])
    e = found.labels.fresh(values_.meta["val"].shape[-1])
    heads = tuple(
        dim if expression(size) == expression(own) else found.labels.fresh(size)
        for dim, size, own in zip(
            q[:-2], keys.meta["val"].shape, given["query"].meta["val"].shape, strict=False
        )
    )
    found.read(keys, (*heads, s, q[-1]))
    found.read(values_, (*heads, s, e))
    for dim, own in zip(heads, q[:-2], strict=True):
        if dim != own:  # grouped queries
            found.mark(dim, Kind.BOUND)
            found.mark(own, Kind.BOUND)
    if is_tensor(given["attn_mask"]):
        shape = given["attn_mask"].meta["val"].shape
        full = (*q[:-2], q[-2], s)
        last = full[len(full) - len(shape) :]
        found.read(
            given["attn_mask"],
            tuple(() if single(n) else dim for n, dim in zip(shape, last, strict=True)),
        )
    found.mark(q[-1], Kind.FOLDED)
    found.mark(s, Kind.ORDERED if given["is_causal"] else Kind.FOLDED)
    if given["is_causal"]:
        found.mark(q[-2], Kind.ORDERED)
    return (*q[:-1], e)


@rule("conv1d", "conv2d", "convolution")
def convolution(found: Relation, given: Mapping[str, Any]) -> Dims | None:
    """Batch is free; channels are mixed, positions bound to their neighbours."""
    if given.get("transposed"):
        return None
    x = found.take(given["input"])
    weight = found.take(given["weight"])
    out = list(found.fresh())
    if is_tensor(given["bias"]):
        found.read(given["bias"], (out[-len(x) + 1],))
    out[0] = x[0]
    for dim in (*x[1:], *weight[1:]):
        found.mark(dim, Kind.BOUND)
    found.mark(weight[0], Kind.BOUND)
    for dim in out[1:]:
        found.mark(dim, Kind.BOUND)
    return tuple(out)


@rule("cross_entropy_loss", "nll_loss", "nll_loss_nd")
def loss(found: Relation, given: Mapping[str, Any]) -> Dims | None:
    """``(n, c, ...), (n, ...) -> ()`` or ``(n, ...)``."""
    x = found.take(given["self"])
    target = given["target"]
    each = (*x[:1], *x[2:])  # but for the classes
    if len(x) < 2 or target.meta["val"].dim() != len(each):
        return None
    found.read(target, each)
    if is_tensor(given["weight"]):
        found.read(given["weight"], x[1:2])
    found.mark(x[1], Kind.BOUND)  # targets are indices of it
    if values(found.node)[0].dim() == len(each):
        return each
    for dim in each:
        found.mark(dim, Kind.FOLDED)
    return ()


def _fold(found: Relation, read: Sequence[Dim], made: Dims) -> None:
    kept = {label for dim in made for label in dim}
    for dim in read:
        if not kept.issuperset(dim):
            found.mark(dim, Kind.FOLDED)


def _letters(names: str, dots: int) -> list[Any]:
    before, ellipsis, after = names.partition("...")
    return [*before, *(range(-dots, 0) if ellipsis else ()), *after]
