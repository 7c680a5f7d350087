"""Axes through operations that move, cut, join and repeat."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.fx import Node

from effpass.axes.labels import EXPANDS, KEEPS, PERMUTES, RESHAPES, Dim, Dims, expression
from effpass.axes.relation import Each, Kind, Relation, elementwise, is_tensor, rule, values

COPIES = ("to", "_to_copy", "detach", "type_as", "dropout", "native_dropout", "alpha_dropout")
FILLED_LIKE = ("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like")
MADE = ("zeros", "ones", "full", "empty", "rand", "randn", "randint")
COUNTED = ("arange", "linspace", "eye")
MADE_BESIDE = ("new_zeros", "new_ones", "new_full", "new_empty", "scalar_tensor")


@rule(*KEEPS, *PERMUTES, *RESHAPES)
def moved(found: Relation, given: Mapping[str, Any]) -> Dims | None:
    """Permutations and reshapes: axes move, split and merge."""
    source = _source(found)
    return found.labels.through(found.node, found.take(source))


@rule(*COPIES, *FILLED_LIKE)
def same(found: Relation, given: Mapping[str, Any]) -> Dims | Each:
    """Every dim is that of the first operand."""
    dims = found.take(_source(found))
    return Each((dims,) * len(values(found.node)))


@rule(*MADE, *MADE_BESIDE)
def made(found: Relation, given: Mapping[str, Any]) -> Dims:
    """Made from sizes alone: its axes are whatever they meet later."""
    return found.fresh()


@rule(*COUNTED)
def counted(found: Relation, given: Mapping[str, Any]) -> Dims:
    """Made from sizes alone, and different at every index."""
    dims = found.fresh()
    for dim in dims:
        found.mark(dim, Kind.BOUND)
    return dims


@rule(*EXPANDS)
def expanded(found: Relation, given: Mapping[str, Any]) -> Dims:
    """Dims of size 1 are repeated, new ones are put in front."""
    return elementwise(found, {"self": _source(found)})


@rule("slice", "narrow")
def sliced(found: Relation, given: Mapping[str, Any]) -> Dims:
    """A whole slice keeps the axis; any other is bound to where it lies."""
    dims = found.take(_source(found))
    return _resized(found, dims, given["dim"])


@rule("select")
def selected(found: Relation, given: Mapping[str, Any]) -> Dims:
    """One index of a dim."""
    dims = found.take(_source(found))
    d = given["dim"] % len(dims)
    found.mark(dims[d], Kind.BOUND)
    return (*dims[:d], *dims[d + 1 :])


@rule("split", "split_with_sizes", "chunk", "tensor_split")
def pieces(found: Relation, given: Mapping[str, Any]) -> Each:
    """A dim cut in pieces."""
    dims = found.take(_source(found))
    count = len(values(found.node))
    return Each(tuple(_resized(found, dims, given["dim"], i) for i in range(count)))


@rule("unbind")
def unbound(found: Relation, given: Mapping[str, Any]) -> Each:
    """All indices of a dim, each as a tensor."""
    dims = found.take(_source(found))
    d = given["dim"] % len(dims)
    found.mark(dims[d], Kind.BOUND)
    return Each(((*dims[:d], *dims[d + 1 :]),) * len(values(found.node)))


@rule("cat", "concat", "concatenate")
def joined(found: Relation, given: Mapping[str, Any]) -> Dims | None:
    """Tensors end to end: all other dims are the same axes."""
    sources = [s for s in given["tensors"] if tuple(s.meta["val"].shape) != (0,)]  # of old, skipped
    result = list(found.fresh())
    d = given["dim"] % len(result)
    if not sources:
        return tuple(result)
    parts = []
    for source in sources:
        part = found.labels.fresh(source.meta["val"].shape[d])
        found.read(source, (*result[:d], part, *result[d + 1 :]))
        parts.append(part)
    if len(sources) == 1:
        result[d] = parts[0]
    else:
        for dim in (*parts, result[d]):
            found.mark(dim, Kind.BOUND)
    return tuple(result)


@rule("stack")
def stacked(found: Relation, given: Mapping[str, Any]) -> Dims:
    """Tensors side by side along a new dim."""
    result = found.fresh()
    d = given["dim"] % len(result)
    for source in given["tensors"]:
        found.read(source, (*result[:d], *result[d + 1 :]))
    found.mark(result[d], Kind.BOUND)
    return result


@rule("pad", "constant_pad_nd", "roll", "flip", "tril", "triu", "diagonal", "repeat")
def bound(found: Relation, given: Mapping[str, Any]) -> Dims | None:
    """What depends on an index: bound along the dims it concerns, free along the others."""
    source = _source(found)
    dims, touched = found.take(source), _touched(found.node, source, given)
    if touched is None:
        return None
    result = list(found.fresh())
    fewer = len(result) - len(dims)
    if fewer < 0:
        return None
    for d, dim in enumerate(dims):
        if d in touched:
            found.mark(dim, Kind.BOUND)
            found.mark(result[d + fewer], Kind.BOUND)
        else:
            result[d + fewer] = dim
    return tuple(result)


@rule("repeat_interleave")
def repeated(found: Relation, given: Mapping[str, Any]) -> Dims | None:
    """Each index repeated in place: the repeats are an axis inside the dim."""
    source, repeats = _source(found), given.get("repeats")
    if not isinstance(repeats, int) or not isinstance(given.get("dim"), int):
        return None
    dims = found.take(source)
    d = given["dim"] % len(dims)
    return (*dims[:d], (*dims[d], *found.labels.fresh(repeats)), *dims[d + 1 :])


@rule("one_hot")
def one_hot(found: Relation, given: Mapping[str, Any]) -> Dims:
    """A new last dim."""
    return (*found.take(_source(found)), found.fresh()[-1])


@rule("index_select", "take_along_dim", "gather")
def picked(found: Relation, given: Mapping[str, Any]) -> Dims | None:
    """Indices of one dim; the others are free where they are whole."""
    dims, d = found.take(given["self"]), given["dim"]
    if d is None:
        return None
    d %= len(dims)
    found.mark(dims[d], Kind.BOUND)
    index, shape = given.get("index", given.get("indices")), found.node.meta["val"].shape
    if index.meta["val"].dim() != len(dims):
        chosen = found.take(index)
        return (*dims[:d], *chosen, *dims[d + 1 :])
    result = [
        dim if expression(size) == expression(was) and i != d else found.labels.fresh(size)
        for i, (dim, size, was) in enumerate(
            zip(dims, shape, given["self"].meta["val"].shape, strict=True)
        )
    ]
    for i, dim in enumerate(dims):
        if i != d and result[i] != dim:
            found.mark(dim, Kind.BOUND)
    found.read(index, tuple(result))
    return tuple(result)


@rule("index", "_unsafe_index")
def indexed(found: Relation, given: Mapping[str, Any]) -> Dims | None:
    """``x[i, j]`` with index tensors side by side: those dims are bound, the rest is free."""
    dims, indices = found.take(given["self"]), list(given["indices"])
    places = [i for i, each in enumerate(indices) if each is not None]
    if not places or places != list(range(places[0], places[-1] + 1)):
        return None
    if any(not is_tensor(indices[i]) or _is_mask(indices[i]) for i in places):
        return None
    for i in places:
        found.mark(dims[i], Kind.BOUND)
    rest = len(dims) - len(places)
    result = found.fresh()
    chosen = result[places[0] : len(result) - rest + places[0]]
    for i in places:
        shape = indices[i].meta["val"].shape
        last = chosen[len(chosen) - len(shape) :]
        found.read(
            indices[i],
            tuple(() if expression(s) == 1 else dim for s, dim in zip(shape, last, strict=True)),
        )
    return (*dims[: places[0]], *chosen, *dims[places[-1] + 1 :])


def _is_mask(node: Node) -> bool:
    return not node.meta["val"].dtype.is_floating_point and node.meta["val"].dtype.itemsize == 1


def _source(found: Relation) -> Any:
    source = found.node.args[0] if found.node.args else found.node.kwargs["self"]
    assert isinstance(source, Node)
    return source


def _resized(found: Relation, dims: Dims, dim: int, output: int = 0) -> Dims:
    """``dims`` with one of another size, unless that is whole."""
    d = dim % len(dims)
    size = values(found.node)[output].shape[d]
    whole: Any = _source(found).meta["val"].shape[d]
    if expression(size) == expression(whole):
        return dims
    part: Dim = found.labels.fresh(size)
    found.mark(dims[d], Kind.BOUND)
    found.mark(part, Kind.BOUND)
    return (*dims[:d], part, *dims[d + 1 :])


def _touched(node: Node, source: Node, given: Mapping[str, Any]) -> set[int] | None:
    """Which dims of the source an operation moves, pads or repeats."""
    rank, name = source.meta["val"].dim(), getattr(node.target, "_opname", "")
    if name in ("tril", "triu"):
        return {rank - 2, rank - 1}
    if name in ("roll", "flip"):
        dims = given["dims"]
        return {d % rank for d in dims} if dims else None
    if name in ("pad", "constant_pad_nd"):
        padded = given["pad"]
        return {rank - 1 - i // 2 for i, size in enumerate(padded) if expression_of(size) != 0}
    if name == "repeat":
        times = list(given["repeats"])[-rank:] if rank else []
        return {d for d, n in enumerate(times) if expression_of(n) != 1}
    return None


def expression_of(size: Any) -> Any:
    """A size, or the node of one, as an expression."""
    return expression(size.meta["val"] if isinstance(size, Node) else size)


@rule("__and__", "__or__", "__xor__", "__lshift__", "__rshift__", "floor_divide", "where", "copy")
def untagged(found: Relation, given: Mapping[str, Any]) -> Dims:
    """Elementwise operations that torch does not tag as such."""
    return elementwise(found, given)
