"""Splice: trace a function on a graph's own values and put its nodes into the graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx

KEPT = ("stack_trace", "nn_module_stack", "effpass_region")


class SpliceError(Exception):
    """The replacement cannot be traced here, or gives another dtype or shape: the text says."""


def insert(
    function: Callable[..., Sequence[Any]], inputs: Sequence[Node], after: Node, origin: Node
) -> list[Node]:
    """Inserts the traced ``function(*inputs)`` behind ``after``; answers the nodes of its outputs.

    The nodes get their source line and layer from ``origin``, which also says under which autocast
    the function is traced.
    """
    tensors = [node.meta["val"] for node in inputs]
    mode = next(t.fake_mode for t in tensors if isinstance(t, Tensor))  # type: ignore[attr-defined]
    with ExitStack() as stack:
        stack.enter_context(mode)
        for region in autocasts(origin):
            stack.enter_context(region)
        traced = make_fx(lambda *values: list(function(*values)), pre_dispatch=True)(*tensors)
    traced.graph.eliminate_dead_code()
    env: dict[Node, Node] = dict(
        zip(traced.graph.find_nodes(op="placeholder"), inputs, strict=True)
    )
    meta = {key: origin.meta[key] for key in KEPT if key in origin.meta}
    place = after
    for node in traced.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        if node.op == "get_attr":
            raise SpliceError(f"it would need the constant {node.target}")
        with after.graph.inserting_after(place):
            place = env[node] = after.graph.node_copy(node, lambda n: env[n])
        place.meta.update(meta)
    return [env[out] for out in traced.graph.output_node().args[0]]  # type: ignore[union-attr]


def replace(outputs: Sequence[Node], made: Sequence[Node], nodes: Sequence[Node]) -> None:
    """Users of ``outputs`` read ``made`` instead; of ``nodes``, those no longer used are erased."""
    for old, new in zip(outputs, made, strict=True):
        laid_out = as_laid_out(old.meta["val"], new)
        old.replace_all_uses_with(
            laid_out, delete_user_cb=lambda user, own=set(nodes): user not in own
        )
    for node in reversed(nodes):
        if not node.users:
            node.graph.erase_node(node)


def as_laid_out(old: Tensor, new: Node) -> Node:
    """``new`` with the strides of ``old``: views and callers behind it may depend on them."""
    value = new.meta["val"]
    if value.dtype != old.dtype or not _same(value.shape, old.shape):
        raise SpliceError(
            f"expected {old.dtype} of shape {tuple(old.shape)}, "
            f"found {value.dtype} of shape {tuple(value.shape)}"
        )
    if _same(value.stride(), old.stride()) or not old.numel():
        return new
    order = sorted(range(old.dim()), key=lambda d: (-_hint(old.stride(d)), d))
    back = [order.index(d) for d in range(old.dim())]

    def copy(x: Tensor) -> list[Tensor]:
        dense = x.permute(order).clone(memory_format=torch.contiguous_format)
        return [dense.permute(back)]

    return insert(copy, [new], new, new)[0]


def autocasts(node: Node) -> list[torch.autocast]:
    """The autocast regions that a node lies in, outermost first."""
    opened: list[Node] = []
    each = node.graph._root.next
    while each is not node:
        if each.target is _enter_autocast:
            opened.append(each)
        elif each.target is _exit_autocast:
            opened.remove(each.args[0])  # type: ignore[arg-type]
        each = each.next
    return [autocast(enter) for enter in opened]


def autocast(enter: Node) -> torch.autocast:
    """The autocast region that a node enters; without its cache, which would outlive the trace."""
    device, dtype, enabled, _ = enter.args
    return torch.autocast(device, dtype, enabled, cache_enabled=False)  # type: ignore[arg-type]


def _hint(size: Any) -> int:
    return size.node.hint if isinstance(size, torch.SymInt) else size


def _same(a: Sequence[Any], b: Sequence[Any]) -> bool:
    return len(a) == len(b) and all(_hint(x) == _hint(y) for x, y in zip(a, b, strict=True))
