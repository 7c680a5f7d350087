"""Attention, scans and convolutions on packed tokens: no sequence sees another."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import GraphModule, Node

from effpass.axes.labels import is_attention
from effpass.axes.relation import arguments, is_tensor, values
from effpass.graph.source import keep_source
from effpass.ops import OPS
from effpass.ops.nodes import called, takes_boundaries
from effpass.passes.packing.masks import seen
from effpass.passes.packing.places import Holds, Unpackable

if TYPE_CHECKING:
    from effpass.passes.packing.rewrite import Rewriter

aten = torch.ops.aten


Handler = Callable[["Rewriter", Node], tuple[Node, ...]]


def handler(node: Node) -> Handler | None:
    """How a node that mixes tokens runs on packed ones; None where it does not."""
    if node.op != "call_function":
        return None
    if is_attention(node):
        return attention
    return scan if takes_boundaries(node) else None


def attentions(gm: GraphModule) -> list[Node]:
    """Calls of torch's attention."""
    return [n for n in gm.graph.nodes if is_attention(n)]


def attention(rewriter: Rewriter, node: Node) -> tuple[Node, ...]:
    """``scaled_dot_product_attention`` as ``varlen_attention``."""
    given = arguments(node)
    if given["dropout_p"]:
        raise Unpackable("dropout", node, "dropout is active inside this attention")
    mask = given["attn_mask"] if is_tensor(given["attn_mask"]) else None
    window = seen(node, mask, bool(given["is_causal"]), rewriter.samples)
    packed = [_heads_last(rewriter, node, given[name]) for name in ("query", "key", "value")]
    if window is None:
        rewriter.right = True  # causal alone: padding behind a token is never seen
    else:
        rewriter.proofs += 1
    left, right = (-1, 0) if window is None else (window.left, window.right)
    causal = right == 0
    positions = rewriter.index["columns"] if left >= 0 or right > 0 else None
    scale = given["scale"]
    if scale is None:
        scale = float(values(given["query"])[0].shape[-1]) ** -0.5
    made = rewriter.graph.call_function(
        OPS["varlen_attention"].overload,
        (*packed, rewriter.index["cu_seqlens"], rewriter.t),
        {
            "causal": causal,
            "window": [left, -1 if causal else right],
            "scale": scale,
            "q_pos": positions,
            "k_pos": positions,
        },
    )
    keep_source(node, made)
    if values(node)[0].dim() == 4:
        heads_first = rewriter.call(aten.transpose.int, made, 0, 1)
        return (rewriter.call(aten.unsqueeze.default, heads_first, 0),)
    return (rewriter.call(aten.transpose.int, made, 0, 1),)


def _heads_last(rewriter: Rewriter, node: Node, source: Node) -> Node:
    """(b, h, t, d) or (b, t, d), packed, as (t, h, d)."""
    place, rank = rewriter.place(source), values(source)[0].dim()
    rows = 0 if not rewriter.places.one_row else None
    if place.holds is not Holds.TOKENS or place.token != rank - 2 or place.batch != rows:
        dims = rewriter.places.solution.text(source)
        raise Unpackable(
            "layout", node, f"it expects (batch, heads, tokens, channels), found {dims}"
        )
    packed = rewriter.packed(source)
    if rank == 4:
        packed = rewriter.call(aten.squeeze.dim, packed, 0)
    elif rank != 3:
        raise Unpackable("layout", node, f"its operands have {rank} dims, not 3 or 4")
    return rewriter.call(aten.transpose.int, packed, 0, 1)


def scan(rewriter: Rewriter, node: Node) -> tuple[Node, ...]:
    """An op that takes ``cu_seqlens``; its final states are one a row."""
    op = called(node)
    assert op is not None
    given = op.bind(*node.args, **node.kwargs)
    if given["cu_seqlens"] is not None:
        raise Unpackable("packed", node, "it is packed already")
    first = given[op.tensor_names[0]]
    zero = rewriter.zeros.at_padding(first)
    arguments_: dict[str, Any] = {}
    for name, value in given.items():
        if not is_tensor(value):
            arguments_[name] = value
        elif op.axes.inputs.get(name, ())[:2] == ("b", "t"):
            arguments_[name] = _operand(rewriter, node, name, value)
        else:
            arguments_[name] = rewriter.whole(value)
    rewriter.contiguous = True
    rewriter.proofs += zero
    if not zero or given.get("initial_state") is not None:
        rewriter.right = True  # padding in front would reach the state
    arguments_["cu_seqlens"] = rewriter.index["cu_seqlens"]
    made = rewriter.graph.call_function(node.target, tuple(arguments_.values()))  # type: ignore[arg-type]
    keep_source(node, made)
    return tuple(rewriter.call(operator.getitem, made, i) for i in range(len(values(node))))


def _operand(rewriter: Rewriter, node: Node, name: str, value: Node) -> Node:
    place = rewriter.place(value)
    if place.holds is Holds.TOKENS and (place.batch in (0, None)) and place.token == 1:
        return rewriter.packed(value)
    raise Unpackable("layout", node, f"its {name} does not have one value a token")
