"""Attention, scans and convolutions on the tokens that are left."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from effpass.axes.labels import EXPANDS, KEEPS, PERMUTES, RESHAPES, opname
from effpass.axes.relation import arguments, is_tensor, values
from effpass.graph.source import keep_source
from effpass.ops import OPS
from effpass.passes.reduction import steps
from effpass.passes.reduction.stream import (
    VARLEN,
    Holds,
    Irreducible,
    attends,
    effpass_op,
)

if TYPE_CHECKING:
    from effpass.passes.reduction.rewrite import Reducer

MOVES = (
    *KEEPS,
    *PERMUTES,
    *RESHAPES,
    *EXPANDS,
    "to",
    "_to_copy",
    "cat",
    "slice",
    "index_copy",
    "copy",
)
PADS = ("constant_pad_nd", "pad")
ALIGNMENTS = ("hold", "repeat", "bias_gap")
Cached = Callable[["Reducer", int], Node]


def attention(reducer: Reducer, node: Node, stage: int) -> Node:
    """``scaled_dot_product_attention`` of the tokens at a stage; its mask is gathered."""
    given = arguments(node)
    if not stage:
        return reducer.graph.node_copy(node, reducer.env.__getitem__)
    for name in ("query", "key", "value"):
        _check_operand(reducer, node, name, given[name])
    args = [reducer.at(given[n], stage, node) for n in ("query", "key", "value")]
    mask, causal = given["attn_mask"], bool(given["is_causal"])
    made = reducer.pairs(mask, stage, node) if is_tensor(mask) else None
    if reducer.settings.weighted:
        sizes = reducer.stages[stage].sizes
        made, causal = reducer.call(steps.weighted_mask, made, sizes, causal, args[0]), False
    extra = {k: v for k, v in node.kwargs.items() if k in ("scale", "enable_gqa")}
    made_args = (*args, made, given["dropout_p"], causal)
    return reducer.graph.create_node("call_function", node.target, made_args, extra)


def _check_operand(reducer: Reducer, node: Node, name: str, source: Node) -> None:
    place = reducer.stream.of(source)
    batch = None if reducer.stream.one_row else 0
    if values(source)[0].dim() == 4 and place.holds is Holds.TOKENS and place.alone:
        if place.token == 2 and place.batch == batch:
            return
    text = reducer.stream.solution.text(source)
    reason = f"its {name} is not (batch, heads, tokens, channels) of these tokens, but {text}"
    raise Irreducible("layout", node, reason)


def varlen(reducer: Reducer, node: Node, stage: int) -> Node:
    """``varlen_attention`` of the tokens at a stage; windows count in their first positions."""
    if not stage:
        return reducer.graph.node_copy(node, reducer.env.__getitem__)
    op, here = OPS[VARLEN], reducer.stages[stage]
    given = op.bind(*node.args, **node.kwargs)
    for name in ("q", "k", "v"):
        place = reducer.stream.of(given[name])
        if place.token != 0 or not place.alone:
            text = reducer.stream.solution.text(given[name])
            reason = f"its {name} is not (tokens, heads, channels) of these tokens, but {text}"
            raise Irreducible("layout", node, reason)
    if given["bias"] is not None and values(given["bias"])[0].dim() != 1:
        raise Irreducible("layout", node, "its bias is not one a token")
    made = {name: _varlen_operand(reducer, node, stage, value) for name, value in given.items()}
    made["cu_seqlens"] = here.offsets
    if made["q_pos"] is None and max(given["window"]) >= 0:
        made["q_pos"] = made["k_pos"] = reducer.call(
            torch.ops.aten.select.int, here.positions, 0, 0
        )
    if reducer.settings.weighted:
        made["bias"] = reducer.call(steps.weights_of_keys, made["bias"], here.sizes)
    return keep_source(node, reducer.graph.call_function(op.overload, tuple(made.values())))


def _varlen_operand(reducer: Reducer, node: Node, stage: int, value: Any) -> Any:
    if not isinstance(value, Node):
        return value
    held = is_tensor(value) and reducer.stream.holds_tokens(value)
    return reducer.at(value, stage, node) if held else reducer.env[value]


def scan(reducer: Reducer, node: Node, stage: int, gate: bool = True) -> Node:
    """A scan or convolution of the tokens at a stage; without its gate where that is wanted."""
    name = effpass_op(node)
    op = OPS[name]
    given = op.bind(*node.args, **node.kwargs)
    for key, value in given.items():
        if is_tensor(value):
            held = reducer.stream.holds_tokens(value)
            given[key] = reducer.at(value, stage, node) if held else reducer.env[value]
    packed = stage > 0 and given.get("cu_seqlens") is not None
    if packed:
        given["cu_seqlens"] = reducer.stages[stage].offsets
    if not gate and "z" in given:
        given["z"] = None
    mode = reducer.settings.alignment
    if not stage or mode == "hold" or name == "causal_conv1d":
        return keep_source(node, reducer.graph.call_function(op.overload, tuple(given.values())))
    if name not in ("selective_scan", "ssd_scan"):
        reason = f"alignment {mode!r} needs step sizes, which {name} does not have"
        raise Irreducible("alignment", node, reason, "alignment='hold'")
    if mode == "bias_gap" and (given["dt_bias"] is None or not given["dt_softplus"]):
        reason = "alignment 'bias_gap' needs the bias of its step sizes, which is not its own here"
        raise Irreducible("alignment", node, reason, "alignment='repeat' or 'hold'")
    at, first = reducer.stages[stage].positions, reducer.stages[0].offsets
    return reducer.call(steps.aligned_scan, name, mode, at, given, first if packed else None)


def keys_and_values(gm: GraphModule) -> set[Node]:
    """Values that are an attention's keys or values, perhaps moved: what a cache holds."""
    given = [arguments(node) for node in gm.graph.nodes if attends(node)]
    return _moved(
        [each[n] for each in given for n in ("key", "value", "k", "v") if n in each], MOVES
    )


def convolved(gm: GraphModule) -> set[Node]:
    """Values that a convolution reads, perhaps moved and cut: what it keeps for a next call."""
    convolutions = [n for n in gm.graph.nodes if effpass_op(n) == "causal_conv1d"]
    return _moved([arguments(n)["x"] for n in convolutions], (*MOVES, *PADS))


def _moved(values: list[Node], moves: tuple[str, ...]) -> set[Node]:
    """Values, what they are moved from, and whither."""
    found: set[Node] = set()
    pending = list(values)
    while pending:
        source = pending.pop()
        if source not in found:
            found.add(source)
            pending += source.all_input_nodes if opname(source) in moves else []
    users = [u for n in found for u in n.users if opname(u) in moves]
    while users:
        user = users.pop()
        if user not in found:
            found.add(user)
            users += [u for u in user.users if opname(u) in moves]
    return found


def cached_inputs(gm: GraphModule) -> dict[Node, Cached]:
    """The last few inputs of a convolution, kept for a next call: cut from the reduced stream."""
    inputs: set[Node] = set()
    for node in gm.graph.nodes:
        if effpass_op(node) == "causal_conv1d":
            source: Any = arguments(node)["x"]
            while is_tensor(source):
                inputs.add(source)
                source = source.args[0] if opname(source) in MOVES and source.args else None
    found: dict[Node, Cached] = {}
    for node in gm.graph.nodes:
        source = node.args[0] if node.args else None
        if opname(node) in ("slice", *PADS) and is_tensor(source):
            if source in inputs and (dim := _tail(node, source)) is not None:
                found[node] = _Tail(node, source, dim, int(values(node)[0].shape[dim]))
    return found


def _tail(node: Node, source: Node) -> int | None:
    """The dim of which a node takes a fixed number of last entries, zeros in front if needed."""
    given, whole, made = arguments(node), values(source)[0].shape, values(node)[0].shape
    if opname(node) == "slice":
        dim = given["dim"] % len(whole)
        changed = made[dim] is not whole[dim] and isinstance(made[dim], int)
        return dim if changed and _ends(given, whole[dim], made[dim]) else None
    padded = list(given["pad"])
    dim = len(whole) - 1
    behind = padded[1] == 0 and all(p == 0 for p in padded[2:]) and len(padded) >= 2
    crops = behind and isinstance(made[dim], int) and not isinstance(padded[0], float)
    return dim if crops else None


def _ends(given: dict[str, Any], whole: Any, made: int) -> bool:
    """Whether a slice goes to the end, with steps of 1."""
    start, end = given["start"], given["end"]
    if given["step"] != 1 or not isinstance(start, int):
        return False
    to_the_end = end is None or (isinstance(end, int) and end >= 2**31)
    to_the_end = to_the_end or (isinstance(whole, int) and end == whole)
    from_behind = start == -made or (isinstance(whole, int) and start == whole - made)
    return to_the_end and from_behind


class _Tail:
    """Takes the last entries of what the convolution reads."""

    def __init__(self, node: Node, source: Node, dim: int, size: int) -> None:
        self.node, self.source, self.dim, self.size = node, source, dim, size

    def __call__(self, reducer: Reducer, stage: int) -> Node:
        if reducer.stream.of(self.source).token != self.dim:
            reason = "it cuts what a convolution reads, but not along tokens"
            raise Irreducible("cache", self.node, reason)
        value = reducer.at(self.source, stage, self.node)
        return reducer.call(last_entries, value, self.dim, self.size)


def last_entries(x: Tensor, dim: int, size: int) -> Tensor:
    """The last ``size`` entries along a dim, zeros in front where there are fewer."""
    front = x.new_zeros((*x.shape[:dim], size, *x.shape[dim + 1 :]))
    return torch.cat([front, x], dim).narrow(dim, x.shape[dim], size)
