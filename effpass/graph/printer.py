"""The one stable text form of a graph: a line a node, with its shape, dtype and layer."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import GraphModule, Node

from effpass.graph.clean import graphs
from effpass.graph.source import layer, line

SHORT = {torch.float32: "f32", torch.float64: "f64", torch.bfloat16: "bf16", torch.float16: "f16"}


def text(gm: GraphModule) -> str:
    """The graph, then the bodies inside it, as text."""
    names = {id(module): name or "graph" for name, module in gm.named_modules()}
    return "\n".join(_graph_text(names[id(body)], body) for body in graphs(gm))


def _graph_text(name: str, gm: GraphModule) -> str:
    return "\n".join([f"{name}:", *(f"  {_node_text(node)}" for node in gm.graph.nodes), ""])


def _node_text(node: Node) -> str:
    value = node.meta.get("val", node.meta.get("example_value"))
    target = str(node.target) if node.op != "call_function" else _callee(node.target)
    args = ", ".join(
        [
            *(_argument(a) for a in node.args),
            *(f"{k}={_argument(v)}" for k, v in node.kwargs.items()),
        ]
    )
    call = f"{node.op} {target}" if node.op in ("placeholder", "get_attr") else f"{target}({args})"
    call = f"return {args}" if node.op == "output" else call
    where = " ".join(part for part in (layer(node), line(node)) if part)
    return f"{node.name}: {_type(value)} = {call}" + (f"  # {where}" if where else "")


def _callee(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    return getattr(target, "__name__", str(target))


def _argument(arg: Any) -> str:
    if isinstance(arg, (list, tuple)):
        return "[" + ", ".join(_argument(a) for a in arg) + "]"
    return arg.name if isinstance(arg, Node) else repr(arg)


def _type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        dtype = SHORT.get(value.dtype, str(value.dtype).removeprefix("torch."))
        return f"{dtype}[{', '.join(str(s) for s in value.shape)}]"
    if isinstance(value, (list, tuple)):
        return "(" + ", ".join(_type(v) for v in value) + ")"
    return type(value).__name__
