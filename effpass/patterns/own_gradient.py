"""An ``autograd.Function`` that is a parallel scan with its gradient by hand (mamba.py's way).

Forward, h[t] = a[t] h[t-1] + b[t] in any tree; backward, by the same tree,

    db[t] = g[t] + a[t+1] db[t+1];   da[t] = db[t] h[t-1]

Both are followed in intervals of time, so the recurrence, which has that gradient itself, may stand
for the whole function. A backward that computes anything else keeps it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, GraphModule, Node

from effpass.graph.clean import number_regions
from effpass.graph.functional import functional
from effpass.patterns.associative import proposal
from effpass.patterns.proposal import Idiom, Missed, Proposal
from effpass.patterns.scans.combines import (
    Leaves,
    combines,
    first_combines,
    follow,
    followed,
    is_state,
    readings,
    sight_of,
)
from effpass.patterns.scans.interval_rules import Sight
from effpass.patterns.scans.intervals import (
    PRODUCT,
    SUM,
    UNKNOWN,
    ZERO,
    Value,
    combined,
    fields,
    products,
    sums,
)

aten = torch.ops.aten
FUNCTION = torch.ops.higher_order.autograd_function_apply


def find(graph: Graph) -> Iterator[Node]:
    """Every function with a gradient of its own."""
    return iter(graph.find_nodes(op="call_function", target=FUNCTION))


def check(node: Node) -> Proposal | None:
    """The recurrence; Missed where only the forward is one."""
    read = [user for user in node.users if user.target is operator.getitem and user.users]
    if len(read) != 1 or node.kwargs.get("non_differentiable_idx") or node.kwargs.get("dirty_idx"):
        return None
    forward = _forward(node, int(read[0].args[1]))  # type: ignore[arg-type]
    if forward is None:
        return None
    _prove_backward(node, forward)
    a, b = (
        node.args[2 + forward.inputs.index(leaf)] for leaf in (forward.leaves.a, forward.leaves.b)
    )
    assert isinstance(a, Node) and isinstance(b, Node)
    return proposal(forward.leaves, forward.state, forward.sight, (a, b), read[0], {})


IDIOM = Idiom("scan with its own gradient", find, check)


@dataclass(frozen=True)
class _Forward:
    """A forward body that is a scan: its inputs, what it saves, how many outputs, which is h."""

    inputs: list[Node]
    saved: list[Any]
    outputs: int
    index: int
    leaves: Leaves
    state: Node
    sight: Sight


def _forward(node: Node, index: int) -> _Forward | None:
    body = _body(node, 0)
    if body is None:
        return None
    outputs, saved = body.graph.output_node().args[0]  # type: ignore[misc]
    _returning(body, (outputs[index], *saved))  # type: ignore[index, misc]
    functional(body)
    state, *kept = body.graph.output_node().args[0]  # type: ignore[misc]
    assert isinstance(state, Node)
    inputs = body.graph.find_nodes(op="placeholder")
    if len(inputs) != 2 or len(node.args) != 4:
        return None
    for first in first_combines(body.graph):
        for leaves in (leaves for combine in combines(first) for leaves in readings(combine)):
            if {leaves.a, leaves.b} != set(inputs) or followed(leaves)[1] is None:
                continue
            sight = sight_of(leaves)
            follow(sight, inputs)
            value = sight.values.get(state)
            if isinstance(value, Value) and is_state(value, leaves, sight):
                count = len(outputs)  # type: ignore[arg-type]
                return _Forward(inputs, list[Any](kept), count, index, leaves, state, sight)
    return None


def _body(node: Node, which: int) -> GraphModule | None:
    """A copy of the forward (0) or backward (1) body; None where it was not captured."""
    attribute = node.args[which]
    assert isinstance(attribute, Node)
    body = getattr(node.graph.owning_module, str(attribute.target))
    graph, env = Graph(), {}
    for each in body.graph.nodes:
        if each.op == "call_method":
            return None
        env[each] = graph.node_copy(each, env.__getitem__)
    made = GraphModule(body, graph)
    number_regions(made)
    return made


def _returning(body: GraphModule, outputs: Any) -> None:
    """Lets a copy of a body return copies: no two outputs share memory that it writes to."""
    graph, copies = body.graph, []
    with graph.inserting_before(graph.output_node()):
        for output in outputs:
            value = output.meta.get("val") if isinstance(output, Node) else None
            if isinstance(value, FakeTensor):
                output = graph.call_function(aten.clone.default, (output,))
                with value.fake_mode:
                    output.meta["val"] = value.clone()
            copies.append(output)
    graph.output_node().args = (tuple(copies),)


def _prove_backward(node: Node, forward: _Forward) -> None:
    """Raises Missed unless the backward body is the gradient of the recurrence."""
    body = _body(node, 1)
    if body is None:
        raise Missed("its backward was not captured", node)
    _returning(body, body.graph.output_node().args[0])
    functional(body)
    given = body.graph.find_nodes(op="placeholder")
    made = body.graph.output_node().args[0]
    grads, saved = given[: forward.outputs], given[forward.outputs :]
    others = [grad for i, grad in enumerate(grads) if i != forward.index]
    proven = (
        isinstance(made, Sequence)
        and len(made) == 2
        and len(saved) == len(forward.saved)
        and not any(other.users for other in others)
        and _is_gradient(forward, grads[forward.index], saved, made)
    )
    if not proven:
        raise Missed("its backward is not seen to be the gradient of its forward", node)


def _is_gradient(forward: _Forward, grad: Node, saved: Sequence[Node], made: Sequence[Any]) -> bool:
    """Whether ``made`` are da and db, from the gradient of h and the saved a and h."""
    fore = forward.sight.values
    a, b, h = (fore[n] for n in (forward.leaves.a, forward.leaves.b, forward.state))
    assert isinstance(a, Value) and isinstance(b, Value) and isinstance(h, Value)
    times = torch.arange(h.codes.numel())
    pairs = zip(saved, (fore.get(node) for node in forward.saved), strict=True)
    kept = [(node, value) for node, value in pairs if isinstance(value, Value)]
    back, states = Sight({}, forward.sight), Sight({}, forward.sight)
    for node, value in kept:
        back.values[node] = Value(value.dims, _coefficients(value.codes, len(times)))
        states.values[node] = Value(value.dims, _states(value.codes))
    back.values[grad] = Value(h.dims, _mirrored(h.codes, len(times)))
    follow(back, [grad, *saved])
    follow(states, saved)
    da, db = (made[forward.inputs.index(leaf)] for leaf in (forward.leaves.a, forward.leaves.b))
    ends = times.flip(0)
    if not _equal(back.values.get(db), b, sums(torch.zeros_like(ends), ends, ends)):
        return False
    gains = Sight({}, forward.sight)
    for node in grad.graph.nodes:
        if getattr(node.target, "_opname", "") == "mul":
            gains.values[node] = _product(node, back, states, len(times))
    follow(gains, [node for node in gains.values])
    return _equal(gains.values.get(da), a, torch.where(times == 0, ZERO, products(times)))


def _equal(value: Any, like: Value, codes: Tensor) -> bool:
    return isinstance(value, Value) and value.dims == like.dims and torch.equal(value.codes, codes)


def _coefficients(codes: Tensor, length: int) -> Tensor:
    """a[t], as the coefficient of the scan that runs back from the last token: step length - t."""
    kind, first, _, upto = fields(codes)
    return torch.where((kind == PRODUCT) & (first == upto), products(length - first), UNKNOWN)


def _mirrored(codes: Tensor, length: int) -> Tensor:
    """The gradient of h[t], what that scan adds in step length - 1 - t."""
    steps = length - 1 - fields(codes)[3]
    return sums(steps, steps, steps)


def _states(codes: Tensor) -> Tensor:
    """h[t], as the element t of a tensor of its own; zeros stay."""
    kind, first, last, upto = fields(codes)
    whole = (kind == SUM) & (first == 0) & (last == upto)
    return torch.where(whole, sums(upto, upto, upto), torch.where(codes == ZERO, ZERO, UNKNOWN))


def _product(node: Node, back: Sight, states: Sight, length: int) -> Value | None:
    """db[t] h[t-1] as the code of a[t], where a product is that."""

    def rule(gradient: Tensor, state: Tensor) -> Tensor:
        (kg, first, last, upto), (ks, t, same, also) = fields(gradient), fields(state)
        whole = (
            (kg == SUM) & (ks == SUM) & (first == 0) & (last == upto) & (t == same) & (t == also)
        )
        found = torch.where(whole & (t + 1 == length - 1 - upto), products(t + 1), UNKNOWN)
        nothing = ((gradient == ZERO) & (state >= 0)) | ((state == ZERO) & (gradient >= 0))
        return torch.where(nothing, ZERO, found)

    for gradient, state in (node.args[:2], node.args[1::-1]):
        left, right = back.values.get(gradient), states.values.get(state)  # type: ignore[arg-type]
        found = (
            combined(rule, left, right)
            if isinstance(left, Value) and isinstance(right, Value)
            else None
        )
        if found is not None and bool((found.codes >= 0).any()):
            return found
    return None
