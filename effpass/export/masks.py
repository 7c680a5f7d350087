"""What the mask of one attention lets a token see, found by evaluating it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from effpass.export.program import ExportError, Program, resized
from effpass.graph.region import ancestors
from effpass.graph.source import layer

LONGEST = 4096  # tokens of a mask that is evaluated
CLOSED = -1e4  # what is added to a score that shall not count is at most this


def reach(made: Program, attention: Node) -> int | None:
    """How many tokens one sees, itself included; None: all before it. Raises ExportError."""
    given: dict[str, Any] = (
        dict(
            zip(
                ("query", "key", "value", "attn_mask", "dropout_p", "is_causal"),
                attention.args,
                strict=False,
            )
        )
        | attention.kwargs
    )
    sizes = [given[n].meta["val"].shape[2] for n in ("query", "key")]
    where = layer(attention)
    if str(sizes[0]) != str(sizes[1]) or isinstance(sizes[0], int):
        raise ExportError(
            f"stateful: expected attention of tokens to the same tokens at {where}, found "
            f"{sizes[0]} queries and {sizes[1]} keys"
        )
    mask = given.get("attn_mask")
    if mask is None:
        if given.get("is_causal"):
            return None
        raise ExportError(f"stateful: expected causal attention at {where}, found none masked")
    allowed = _evaluated(made, mask, where)
    length = allowed.shape[-1]
    ahead = torch.arange(length) - torch.arange(length)[:, None]
    last = int(allowed[0, 0, -1].sum())
    window = None if last == length else last
    expected = ahead <= 0
    if window is not None:
        expected = expected & (ahead > -window)
    if not bool((allowed == expected).all()):
        raise ExportError(
            f"stateful: expected every token to see those before it, or a window of them, at "
            f"{where}, found another mask"
        )
    return window


def _evaluated(made: Program, mask: Node, where: str) -> Tensor:
    """The mask (batch, heads, queries, keys) as booleans, longer than any number in its making."""
    wanted = ancestors([mask])
    inputs = [n for n in wanted if n.op == "placeholder"]
    names = {n.name for n in inputs}
    if not names <= set(made.kwargs):
        raise ExportError(f"stateful: the mask at {where} is made of weights")
    numbers: list[int] = [int(a) for n in wanted for a in _numbers(n)]
    length = max([a for a in numbers if a < 2**31 - 1] + [16]) + 3
    if length > LONGEST:
        raise ExportError(
            f"stateful: the mask at {where} has a window of {length - 3}, beyond what is evaluated "
            f"({LONGEST})"
        )
    graph, env = Graph(), dict[Node, Node]()
    for node in mask.graph.nodes:
        if node in wanted:
            env[node] = graph.node_copy(node, env.__getitem__)
    graph.output(env[mask])
    given = []
    for node in graph.find_nodes(op="placeholder"):
        value = made.kwargs[str(node.target)]
        for dim, called in made.open.get(str(node.target), {}).items():
            value = resized(value, dim, length if called == "length" else 2)
        given.append(value)
    with torch.no_grad():
        found: Tensor = GraphModule(made.program.graph_module, graph)(*given)
    found = found if found.dtype == torch.bool else found > CLOSED
    return found.reshape((1,) * (4 - found.dim()) + tuple(found.shape))


def _numbers(node: Node) -> list[Any]:
    return [abs(a) for a in node.args if isinstance(a, int) and not isinstance(a, bool)]
