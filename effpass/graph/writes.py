"""What a node writes to in place."""

from __future__ import annotations

from torch.fx import Node
from torch.utils import _pytree as pytree


def writes(node: Node) -> list[Node]:
    """The nodes that this one's op writes to, by its schema or, in Dynamo's form, by its name."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
        in_place = str(name).endswith("_") and not str(name).endswith("__")
        return node.all_input_nodes if in_place or "out" in node.kwargs else []
    if not schema.is_mutable:
        return []
    written: list[Node] = []
    for position, argument in enumerate(schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        given = node.kwargs.get(argument.name)
        given = node.args[position] if position < len(node.args) else given
        written += [v for v in pytree.tree_leaves(given) if isinstance(v, Node)]
    return written
