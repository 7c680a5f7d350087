"""Axes through operations that mix along a dim: reductions, norms, softmax, scans, sorting."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from effpass.axes.labels import Dim, Dims, opname
from effpass.axes.relation import Each, Kind, Relation, is_tensor, rule, values

INDICES = ("max", "min", "argmax", "argmin", "median")  # they answer where, too
REDUCTIONS = (
    *("sum", "mean", "amax", "amin", "prod", "var", "std", "any", "all", "norm", "logsumexp"),
    *("nansum", "linalg_vector_norm", "max", "min", "argmax", "argmin", "count_nonzero", "median"),
    *("var_mean", "std_mean"),
)


@rule(*REDUCTIONS)
def reduction(found: Relation, given: Mapping[str, Any]) -> Dims | Each | None:
    """Some dims, or all, are folded away; with keepdim they stay with size 1."""
    source = _first(found)
    if any(is_tensor(v) and v is not source for v in given.values()):
        return None  # max and min of two tensors
    dims = found.take(source)
    chosen = given.get("dim", None)
    folded = _chosen(chosen, len(dims))
    for d in folded:
        found.mark(dims[d], Kind.BOUND if opname(found.node) in INDICES else Kind.FOLDED)
    keep = bool(given.get("keepdim", False))
    left = [() if i in folded else dim for i, dim in enumerate(dims) if keep or i not in folded]
    return Each((tuple(left),) * len(values(found.node)))


@rule("softmax", "_softmax", "log_softmax", "_log_softmax", "_safe_softmax")
def softmax(found: Relation, given: Mapping[str, Any]) -> Dims:
    """Mixed along one dim, blind to order."""
    dims = found.take(_first(found))
    found.mark(dims[given["dim"]], Kind.SET)
    return dims


@rule("cumsum", "cumprod", "logcumsumexp", "cummax", "cummin")
def cumulative(found: Relation, given: Mapping[str, Any]) -> Dims | Each:
    """Mixed along one dim, the past only."""
    dims = found.take(_first(found))
    found.mark(dims[given["dim"]], Kind.ORDERED)
    return Each((dims,) * len(values(found.node)))


@rule("sort", "argsort")
def sorting(found: Relation, given: Mapping[str, Any]) -> Dims | Each:
    """The result's order is another: both are bound."""
    dims = found.take(_first(found))
    found.mark(dims[given.get("dim", -1)], Kind.BOUND)
    return Each((dims,) * len(values(found.node)))


@rule("topk")
def topk(found: Relation, given: Mapping[str, Any]) -> Each:
    """The best few along a dim."""
    dims = found.take(_first(found))
    d = given["dim"] % len(dims)
    found.mark(dims[d], Kind.BOUND)
    best: Dim = found.fresh()[d]
    found.mark(best, Kind.BOUND)
    return Each(((*dims[:d], best, *dims[d + 1 :]),) * 2)


@rule("layer_norm", "rms_norm", "native_layer_norm", "_fused_rms_norm")
def norm(found: Relation, given: Mapping[str, Any]) -> Dims | None:
    """Mixed over the last dims."""
    dims = found.take(given["input"])
    over = dims[len(dims) - len(given["normalized_shape"]) :]
    for name in ("weight", "bias"):
        if is_tensor(given.get(name)):
            found.read(given[name], over)
    for dim in over:
        found.mark(dim, Kind.SET)
    return dims if len(values(found.node)) == 1 else None


@rule("group_norm")
def group_norm(found: Relation, given: Mapping[str, Any]) -> Dims:
    """Mixed over everything but the batch."""
    dims = found.take(given["input"])
    for name in ("weight", "bias"):
        if is_tensor(given.get(name)):
            found.read(given[name], dims[1:2])
    for dim in dims[1:]:
        found.mark(dim, Kind.BOUND)
    return dims


@rule("glu")
def glu(found: Relation, given: Mapping[str, Any]) -> Dims:
    """One half of a dim gates the other."""
    dims = found.take(_first(found))
    d = given["dim"] % len(dims)
    found.mark(dims[d], Kind.BOUND)
    half = found.fresh()[d]
    found.mark(half, Kind.BOUND)
    return (*dims[:d], half, *dims[d + 1 :])


def _first(found: Relation) -> Any:
    return found.node.args[0]


def _chosen(dim: Any, rank: int) -> set[int]:
    if dim is None or dim == []:
        return set(range(rank))
    return {d % rank for d in (dim if isinstance(dim, list | tuple) else (dim,))}
