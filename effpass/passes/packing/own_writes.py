"""In-place writes to memory that nobody else sees, as operations that make a new tensor."""

from __future__ import annotations

import operator

from torch import Tensor
from torch.fx import GraphModule, Node

from effpass.axes.relation import is_tensor, values
from effpass.graph.emit import storage_key
from effpass.graph.storages import out_of_place
from effpass.graph.writes import writes


def make_new(gm: GraphModule) -> int:
    """Replaces ``x.div_(y)`` by ``x.div(y)`` where only its result is read afterwards.

    Exact. Answers how many there were. Other writes stay as they are.
    """
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    count = 0
    for node in list(gm.graph.nodes):
        targets = writes(node)
        if len(targets) == 1 and _alone(node, targets[0], order) and _same_dtypes(node):
            made = out_of_place(node.target)  # type: ignore[arg-type]
            if made is not None:
                node.target = made
                count += 1
    if count:
        gm.recompile()
    return count


def _alone(write: Node, target: Node, order: dict[Node, int]) -> bool:
    """Whether no other tensor shares the target's memory, and it is read before the write alone."""
    if target.op != "call_function" or not write.args or write.args[0] is not target:
        return False
    memory = storage_key(target.meta["val"])
    source = target.args[0] if target.target is operator.getitem else target
    earlier = (node for node in order if order[node] < order[write])
    shared = any(
        node not in (target, source) and any(storage_key(v) == memory for v in values(node))
        for node in earlier
    )
    return not shared and all(order[user] <= order[write] for user in target.users)


def _same_dtypes(node: Node) -> bool:
    """Whether numbers of other dtypes take part, which would change that of a new result."""
    tensors = [n for n in node.all_input_nodes if is_tensor(n)]
    floats = {n.meta["val"].dtype for n in tensors if n.meta["val"].is_floating_point()}
    made = node.meta.get("val")
    return isinstance(made, Tensor) and floats <= {made.dtype}
