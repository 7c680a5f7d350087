"""The ``associative_scan`` operator whose body is (a1, b1), (a2, b2) -> (a1 a2, a2 b1 + b2).

Its leading dim is time. The body may say it in any order and spelling; it is run on random numbers:
a body of nothing but products and sums is a polynomial, and two that agree there are the same.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from itertools import permutations
from typing import Any

import torch
from torch import Tensor
from torch._higher_order_ops.associative_scan import associative_scan_op
from torch.fx import Graph, GraphModule, Node

from effpass.patterns.associative import recurrence
from effpass.patterns.proposal import Idiom, Missed, Proposal

POLYNOMIAL = frozenset(
    ("mul", "add", "addcmul", "multiply", "clone", "alias", "__mul__", "__add__")
)


def find(graph: Graph) -> Iterator[Node]:
    """Every such operator."""
    return iter(graph.find_nodes(op="call_function", target=associative_scan_op))


def check(node: Node) -> Proposal | None:
    """The recurrence, when the values of the states are read."""
    body, tensors, others = _operands(node)
    if body is None or len(tensors) != 2:
        return None
    if others:
        raise Missed("the combine of the scan reads tensors of its own", node)
    order = _order(body, node)
    a, b = (tensors[i] for i in order)
    read = [user for user in node.users if user.target is operator.getitem and user.users]
    states = [user for user in read if user.args[1] == order[1]]
    if not states:
        return None

    def build(a: Tensor, b: Tensor) -> Sequence[Tensor]:
        return [recurrence(a, b, 0)] * len(states)

    tokens = {a: 0, b: 0}
    return Proposal(
        "linear_recurrence", (a, b), tuple(states), build, {}, tokens, (0,) * len(states)
    )


IDIOM = Idiom("associative scan operator", find, check)


def _operands(node: Node) -> tuple[GraphModule | None, list[Node], Sequence[Any]]:
    combine, tensors, others = node.args
    assert isinstance(combine, Node) and isinstance(tensors, list | tuple)
    body = getattr(node.graph.owning_module, str(combine.target), None)
    nodes = [tensor for tensor in tensors if isinstance(tensor, Node)]
    found = body if isinstance(body, GraphModule) and combine.op == "get_attr" else None
    return found, nodes, others  # type: ignore[return-value]


def _order(body: GraphModule, node: Node) -> tuple[int, ...]:
    """Which of the two tensors is a, and which b; raises Missed when neither way fits."""
    for inner in body.graph.nodes:
        name = getattr(inner.target, "_opname", getattr(inner.target, "__name__", inner.target))
        if inner.op.startswith("call") and str(name) not in POLYNOMIAL:
            raise Missed(f"the combine of the scan applies {name}", node)
        if inner.op == "get_attr":
            raise Missed("the combine of the scan reads tensors of its own", node)
    generator = torch.Generator().manual_seed(0)
    left, right = ([torch.randn(64, generator=generator).double() for _ in "ab"] for _ in "12")
    found = body(*left, *right)
    for order in permutations((0, 1)):
        (a1, b1), (a2, b2) = ([pair[i] for i in order] for pair in (left, right))
        wanted = a1 * a2, a2 * b1 + b2
        if all(_close(found[i], value) for i, value in zip(order, wanted, strict=True)):
            return order
    raise Missed("the combine of the scan is not (a1 a2, a2 b1 + b2)", node)


def _close(found: Tensor, wanted: Tensor) -> bool:
    return bool(((found - wanted).abs() <= 1e-12).all())
