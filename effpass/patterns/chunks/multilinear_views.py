"""How dims move through views, copies, slices, pads and joins."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.fx import Node

from effpass.axes.relation import arguments
from effpass.patterns.chunks import factors
from effpass.patterns.chunks.factors import Dim, Dims, Factor, Unreadable
from effpass.patterns.chunks.multilinear import Reader, Rule, Value, added, opname, sizes

KEEPS = ("clone", "contiguous", "alias", "to", "_to_copy", "type_as", "dropout")
PERMUTES = (
    *("transpose", "swapaxes", "swapdims", "permute", "movedim", "moveaxis"),
    *("t", "mT", "adjoint", "numpy_T"),
)
RESHAPES = (
    *("view", "reshape", "_unsafe_view", "view_as", "reshape_as", "flatten", "unflatten"),
    *("unsqueeze", "squeeze"),
)
EXPANDS = ("expand", "expand_as", "broadcast_to")
REPEATS = ("repeat", "tile", "repeat_interleave")
SLICES = ("slice", "narrow", "select", "getitem")
PIECES = ("split", "split_with_sizes", "chunk", "tensor_split")
PADS = ("pad", "constant_pad_nd")
PRIMES = (2, 3, 5, 7, 11, 13, 17, 19, 23, 29)


def sliced(node: Node) -> tuple[Node, int, int | None] | None:
    """A slice's source and dim, and the index where the dim is dropped; None for no slice."""
    name, given = opname(node), arguments(node)
    if name == "getitem":
        pieces = node.args[0]
        if not isinstance(pieces, Node) or opname(pieces) not in (*PIECES, "unbind"):
            return None
        given = arguments(pieces)
        index = node.args[1] if opname(pieces) == "unbind" else None
    elif name in ("slice", "narrow", "select"):
        index = given.get("index")
    else:
        return None
    source = given.get("self", given.get("input"))
    if not isinstance(source, Node) or given.get("step", 1) != 1:
        return None
    if index is not None and not isinstance(index, int):
        return None
    return source, int(given["dim"]) % source.meta["val"].dim(), index


def rounds(node: Node) -> bool:
    """Whether a node is a cast to fewer digits."""
    if opname(node) not in ("to", "_to_copy", "type_as"):
        return False
    before, after = node.args[0].meta["val"].dtype, node.meta["val"].dtype  # type: ignore[union-attr]
    return torch.promote_types(before, after) != after


def _kept(reader: Reader, node: Node, given: dict[str, Any]) -> Value:
    if given.get("train"):
        raise Unreadable("dropout is active")
    if rounds(node):
        reader.rounded.add(node)
    return reader.value(node.args[0])


def _permuted(reader: Reader, node: Node, given: dict[str, Any]) -> Value:
    terms, dims = reader.value(node.args[0])
    probe = torch.empty(PRIMES[: len(dims)], device="meta")
    shape = node.target(probe, *node.args[1:], **node.kwargs).shape  # type: ignore[operator]
    return Value(terms, tuple(dims[PRIMES.index(size)] for size in shape))


def _reshaped(reader: Reader, node: Node, given: dict[str, Any]) -> Value:
    terms, dims = reader.value(node.args[0])
    return Value(terms, factors.regroup(dims, sizes(node)))


def _expanded(reader: Reader, node: Node, given: dict[str, Any]) -> Value:
    terms, dims = reader.value(node.args[0])
    shape = sizes(node)
    padded = ((),) * (len(shape) - len(dims)) + dims
    return Value(terms, tuple(d or _new(size) for d, size in zip(padded, shape, strict=True)))


def _new(size: int) -> Dim:
    return (Factor(size),) if size != 1 else ()


def _repeated(reader: Reader, node: Node, given: dict[str, Any]) -> Value:
    """Copies one behind the other: the copy is the outer factor."""
    terms, dims = reader.value(node.args[0])
    shape = sizes(node)
    padded = ((),) * (len(shape) - len(dims)) + dims
    pairs = zip(padded, shape, strict=True)
    return Value(terms, tuple((*_new(size // factors.count(d)), *d) for d, size in pairs))


def _interleaved(reader: Reader, node: Node, given: dict[str, Any]) -> Value:
    """Each index repeated in place: the copy is the inner factor."""
    terms, dims = reader.value(node.args[0])
    repeats, dim = given.get("repeats"), given.get("dim")
    if not isinstance(repeats, int) or dim is None:
        raise Unreadable("repeat_interleave is given a tensor")
    at = dim % len(dims)
    return Value(terms, _replaced(dims, at, (*dims[at], *_new(repeats))))


def _replaced(dims: Dims, at: int, *by: Dim) -> Dims:
    return (*dims[:at], *by, *dims[at + 1 :])


def _cut(reader: Reader, node: Node, given: dict[str, Any]) -> Value:
    found = sliced(node)
    if found is None:
        raise Unreadable(f"{opname(node)} is applied")
    source, at, index = found
    terms, dims = reader.value(source)
    if index is not None:
        reader.ordered |= factors.sources(dims[at])
        return Value(terms, _replaced(dims, at))
    size = sizes(node)[at]
    if size == factors.count(dims[at]):
        return Value(terms, dims)
    return Value(terms, _replaced(dims, at, reader.cut(dims[at], size)))


def _padded(reader: Reader, node: Node, given: dict[str, Any]) -> Value:
    if given.get("mode", "constant") != "constant" or given.get("value") not in (None, 0):
        raise Unreadable("it is padded with something else than zeros")
    terms, dims = reader.value(node.args[0])
    pairs = zip(dims, sizes(node), strict=True)
    return Value(
        terms,
        tuple(d if factors.count(d) == size else reader.cut(d, size) for d, size in pairs),
    )


def _joined(reader: Reader, node: Node, given: dict[str, Any]) -> Value:
    """cat and stack: pieces along a dim, one behind the other."""
    values = [reader.value(part) for part in node.args[0]]  # type: ignore[union-attr]
    shape = sizes(node)
    at = given["dim"] % len(shape)
    terms = added(*(v.terms for v in values))
    if opname(node) == "stack":
        dims = factors.broadcast([v.dims for v in values], reader.classes)
        return Value(terms, (*dims[:at], reader.order(shape[at]), *dims[at:]))
    dims = factors.broadcast([_replaced(v.dims, at, ()) for v in values], reader.classes)
    made = _chained(reader, [v.dims[at] for v in values], shape[at])
    return Value(terms, _replaced(dims, at, made))


def _scattered(reader: Reader, node: Node, given: dict[str, Any]) -> Value:
    """A piece written into a larger tensor."""
    base, piece = reader.value(given["self"]), reader.value(given["src"])
    at = given["dim"] % len(base.dims)
    own = piece.dims
    if opname(node) == "select_scatter":
        own = (*own[:at], (), *own[at:])
    dims = factors.broadcast([_replaced(d, at, ()) for d in (base.dims, own)], reader.classes)
    made = _chained(reader, [base.dims[at], own[at]], factors.count(base.dims[at]))
    return Value(added(base.terms, piece.terms), _replaced(dims, at, made))


def _chained(reader: Reader, pieces: Sequence[Dim], size: int) -> Dim:
    """A dim of ``size`` in which the pieces lie one behind the other."""
    every = frozenset().union(*map(factors.sources, pieces))
    keys = factors.sources(reader.order(size))
    keys |= factors.sources(reader.cut((Factor(size, every),), size))
    reader.ordered |= every
    reader.classes.join(keys)
    return (Factor(size, keys),) if size != 1 else ()


RULES: dict[str, Rule] = {
    **dict.fromkeys(KEEPS, _kept),
    **dict.fromkeys(PERMUTES, _permuted),
    **dict.fromkeys(RESHAPES, _reshaped),
    **dict.fromkeys(EXPANDS, _expanded),
    **dict.fromkeys(("repeat", "tile"), _repeated),
    "repeat_interleave": _interleaved,
    **dict.fromkeys(SLICES, _cut),
    **dict.fromkeys(PADS, _padded),
    **dict.fromkeys(("cat", "concat", "stack"), _joined),
    **dict.fromkeys(("slice_scatter", "select_scatter"), _scattered),
}
