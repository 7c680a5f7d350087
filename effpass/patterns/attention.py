"""Eager attention: ``softmax(scale * q k^T + mask) v``, found from its softmax.

The scores are read back to the product of queries and keys, the weights forward to the product
with the values; both through views, casts and factors. Raised to ``scaled_dot_product_attention``;
scores that are capped by tanh, for which that op has no argument, are recorded.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from effpass.axes.contraction import contraction, is_float
from effpass.axes.labels import Dim, Dims, Labels, argument, opname
from effpass.graph.emit import same_sizes
from effpass.patterns.proposal import Idiom, Missed, Proposal
from effpass.patterns.softmax.bounds import fixed_value
from effpass.patterns.softmax.mask_facts import Setting, settle
from effpass.patterns.softmax.masks import Operand, operands
from effpass.patterns.softmax.scores import CASTS, Reader, Scores, dropout, number
from effpass.patterns.softmax.sdpa import Attention, Placing, group
from effpass.patterns.softmax.softmax import Softmax, is_softmax, softmax

# these read the shape of a tensor alone
BY_SIZE = ("sym_size", "zeros_like", "ones_like", "full_like")
MULTIPLIED = "the attention weights are multiplied by a tensor before they meet the values"


@dataclass(frozen=True)
class _Result:
    """The product with the values, and the nodes on the way to it."""

    node: Node
    value: Operand
    out: Dims
    factor: float
    path: tuple[Node, ...]


def find(graph: Graph) -> Iterable[Node]:
    """Every softmax, in whatever spelling."""
    return [node for node in graph.nodes if is_softmax(node)]


def check(node: Node) -> Proposal | None:
    """Attention that the op can express."""
    found = _read(node)
    if found is None:
        return None
    attention, out = found
    if attention.cap is not None:
        raise Missed(
            f"the scores are capped by tanh (soft cap {attention.cap:g}), which "
            "scaled_dot_product_attention cannot",
            node,
        )
    return _proposal("sdpa", attention, out)


def check_capped(node: Node) -> Proposal | None:
    """Attention with a soft cap."""
    try:
        found = _read(node)
    except Missed:
        return None  # the other idiom says so
    if found is None or found[0].cap is None:
        return None
    return _proposal("attention_softcap", *found)


def _proposal(op: str, attention: Attention, out: Node) -> Proposal:
    inputs = attention.inputs()
    fixed = {o.node: fixed_value(o.node) for o in operands(attention.mask.steps)}
    draw = {
        node: lambda drawn, value=value: value.to(drawn.dtype)
        for node, value in fixed.items()
        if value is not None
    }
    attributes = {
        "query": attention.query.node,
        "key": attention.key.node,
        "value": attention.value.node,
        "mask": tuple(o.node for o in operands(attention.mask.steps)),
        "causal": attention.mask.causal,
        "scale": attention.scale if attention.cap is None else attention.scale * attention.cap,
        "softcap": attention.cap,
    }
    read = (*inputs, *_sizes_read(inputs, out))
    return Proposal(op, read, (out,), attention.compute, draw=draw, attributes=attributes)


def _read(node: Node) -> tuple[Attention, Node] | None:
    """The attention around a softmax, and its last node. Raises Missed."""
    soft = softmax(node)
    if soft is None or not is_float(soft.scores):
        return None
    labels = Labels()
    dims = labels.of(soft.scores)
    keys = dims[soft.axis]
    if not keys:
        return None  # one key
    scores = _attempt(lambda: Reader(labels, keys).read(soft.scores, dims))
    result = None if scores is None else _attempt(lambda: _follow(labels, soft.weights, dims, keys))
    for part in (scores, result):
        if part is None:
            return None
    for part in (scores, result):
        if isinstance(part, Missed):
            raise part
    if soft.flaw is not None:
        raise Missed(soft.flaw, node)
    return _assemble(labels, dims, keys, scores, soft, result)  # type: ignore[arg-type]


def _attempt(function: Any) -> Any:
    try:
        return function()
    except Missed as miss:
        return miss


def _assemble(
    labels: Labels, dims: Dims, keys: Dim, scores: Scores, soft: Softmax, result: _Result
) -> tuple[Attention, Node] | None:
    _check_users({*scores.path, *soft.nodes, *result.path}, result.node)
    node, region = soft.weights, soft.weights.meta.get("effpass_region")
    value, weight = _peeled(labels, result.value, None, region)
    dtype = value.node.meta["val"].dtype
    for step in result.path[:-1]:
        if torch.promote_types(_dtype(step), dtype) != _dtype(step):
            raise Missed(f"the attention weights are rounded to {_dtype(step)}", step)
    query, first = _peeled(labels, scores.query, dtype, region)
    key, second = _peeled(labels, scores.key, dtype, region)
    steps = scores.steps
    vectors = [o.dims for o in (query, key, value)]
    biases = [o.dims for o in operands(steps)]
    for spread in (False, True):
        groups = group(labels, dims, keys, vectors, biases, spread)
        if groups is None:
            raise Missed("the axes of queries, keys and values are not those of attention", node)
        mask = settle(steps, Placing(labels, groups), _setting(query, scores, soft), node)
        # only the CPU's fused kernel takes both a mask and grouped queries
        if not mask.steps or value.node.meta["val"].device.type == "cpu":
            break
    last, out = _last(labels, result)
    attention = Attention(
        labels=labels,
        groups=groups.resolved(labels),
        query=query,
        key=key,
        value=value,
        multipliers=scores.multipliers,
        scale=scores.scale * first * second,
        cap=scores.cap,
        mask=mask,
        weight=result.factor * weight,
        out=out,
    )
    return attention, last


def _setting(query: Operand, scores: Scores, soft: Softmax) -> Setting:
    dtypes = _dtype(query.node), _dtype(scores.path[0])
    product = torch.float16 if torch.float16 in dtypes else dtypes[1]
    return Setting(product, _dtype(soft.scores), torch.is_grad_enabled())


def _follow(labels: Labels, node: Node, dims: Dims, keys: Dim) -> _Result | None:
    """The product that the weights go into; None where they do not."""
    path, factor = [], 1.0
    while True:
        path.append(node)
        users = [user for user in node.users if not _dead(user)]
        if len(users) != 1:
            if any(_leads(user) for user in users):
                other = next((u for u in users if not _leads(u)), users[-1])
                what = "returned" if other.op == "output" else f"used by {other.name}"
                raise Missed(f"the attention weights are also {what}", node)
            return None
        user = users[0]
        summed = next(iter(user.users)) if opname(user) == "mul" and len(user.users) == 1 else user
        product = summed if opname(summed) == "sum" else user
        if contraction(product) is not None:
            path += [] if product is user else [user]
            return _product(labels, product, Operand(node, dims), keys, factor, path)
        step = _passed(labels, user, node, dims)
        if step is None:
            if _leads(user):
                name = opname(user) or user.name
                what = f"between the softmax and the values is {name}"
                raise Missed(MULTIPLIED if name in ("mul", "div") else what, user)
            return None
        node, (dims, more) = user, step
        factor *= more


def _passed(labels: Labels, user: Node, node: Node, dims: Dims) -> tuple[Dims, float] | None:
    """Dims and factor behind a node that leaves the weights as they are."""
    name = opname(user)
    if not is_float(user):
        return None
    if name in CASTS and user.args[0] is node:
        return dims, 1.0
    if name == "dropout":
        if (active := dropout(user)) is not None and _leads(user):
            raise Missed(active, user)
        return dims, 1.0
    if name in ("mul", "div") and len(user.args) == 2 and not user.kwargs:
        other = argument(user, 1 if user.args[0] is node else 0)
        fixed = number(other)
        if fixed is None or (name == "div" and user.args[0] is not node):
            return None
        if isinstance(other, Node) and other.meta["val"].dim() > len(dims):
            return None
        return dims, 1.0 / fixed if name == "div" else fixed
    moved = labels.through(user, dims) if user.args[0] is node else None
    return None if moved is None else (moved, 1.0)


def _product(
    labels: Labels, product: Node, weights: Operand, keys: Dim, factor: float, path: list[Node]
) -> _Result | None:
    found = contraction(product)
    assert found is not None
    if found.left is found.right:
        return None
    left, right, out = found.labelled(labels, operand=(weights.node, weights.dims))
    first = found.left is weights.node
    other = Operand(found.right, right) if first else Operand(found.left, left)
    given, shown, held = (
        set(labels.resolve(x for dim in each for x in dim))
        for each in (weights.dims, out, other.dims)
    )
    summed = (given & held) - shown
    if summed != set(labels.resolve(keys)):
        raise Missed(
            "the softmax runs over one axis, the product with the values sums over another", product
        )
    if found.addend is not None:
        raise Missed("something is added to the product with the values", product)
    return _Result(product, other, out, factor * found.factor, (*path, product))


def _dead(node: Node, distance: int = 8) -> bool:
    """Whether nothing reads what a node computes."""
    if node.op != "call_function" or node.is_impure() or not distance:
        return False
    return all(_dead(user, distance - 1) for user in node.users)


def _leads(node: Node, distance: int = 4) -> bool:
    """Whether a product is one of the next few nodes."""
    if contraction(node) is not None:
        return True
    return distance > 0 and any(_leads(user, distance - 1) for user in node.users)


def _check_users(inside: set[Node], last: Node) -> None:
    """What lies inside is used inside only: else it would be computed twice."""
    for node in sorted(inside):
        for user in node.users:
            outside = user not in inside and opname(user) not in BY_SIZE
            if node is not last and outside and not _dead(user):
                what = "returned" if user.op == "output" else f"used by {user.name}"
                raise Missed(f"the scores are also {what}", node)


def _peeled(
    labels: Labels, operand: Operand, dtype: torch.dtype | None, region: Any
) -> tuple[Operand, float]:
    """What an operand is a view of, times a number; casts that widened ``dtype`` are undone.

    Views made in another region, of grad mode say, stay.
    """
    node, dims, factor = operand.node, operand.dims, 1.0
    while node.args and node.meta.get("effpass_region") == region:
        source = argument(node, 0)
        behind = labels.behind(node, dims)
        if behind is not None:
            node, dims = source, behind
        elif opname(node) in CASTS and is_float(source) and _dtype(source) == dtype:
            node = source
        elif (scale := _scale(node)) is not None:
            node, factor = source, factor * scale
        else:
            break
    return Operand(node, dims), factor


def _dtype(node: Node) -> torch.dtype:
    return node.meta["val"].dtype


def _scale(node: Node) -> float | None:
    """The number by which a node multiplies its first argument."""
    if opname(node) not in ("mul", "div") or len(node.args) != 2 or node.kwargs:
        return None
    source, other = argument(node, 0), argument(node, 1)
    same = is_float(source) and same_sizes(source.meta["val"].shape, node.meta["val"].shape)
    fixed = number(other) if same and _dtype(source) == _dtype(node) else None
    if not fixed:
        return None
    return 1.0 / fixed if opname(node) == "div" else fixed


def _last(labels: Labels, result: _Result) -> tuple[Node, Dims]:
    """The last contiguous node behind the product that only arranges it anew, and its dims."""
    node, dims = result.node, result.out
    found = (node, dims)
    while len(node.users) == 1:
        user = next(iter(node.users))
        moved = labels.through(user, dims) if user.args and user.args[0] is node else None
        if moved is None or user.meta.get("effpass_region") != node.meta.get("effpass_region"):
            break
        node, dims = user, moved
        value = node.meta["val"]
        if isinstance(value, Tensor) and value.is_contiguous():
            found = (node, dims)
    return found


def _sizes_read(inputs: Iterable[Node], out: Node) -> list[Node]:
    """Sizes that change, read by nodes between ``inputs`` and ``out``."""
    seen, found, pending = set(inputs), [], [out]
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if isinstance(node.meta.get("val"), torch.SymInt):
            found.append(node)
        else:
            pending += node.all_input_nodes
    return found


IDIOM = Idiom("attention", find, check)
SOFTCAP = Idiom("attention with a soft cap", find, check_capped, records=True)
IDIOMS = (IDIOM, SOFTCAP)
