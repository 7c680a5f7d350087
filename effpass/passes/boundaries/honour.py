"""Builds the graph of one packed row: every node that mixes tokens gets the boundaries."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.fx import Graph, GraphModule, Node

from effpass.axes.labels import expression, is_attention, opname, single
from effpass.axes.relation import Kind, arguments, is_tensor, values
from effpass.axes.solve import Solution, solve
from effpass.graph.source import keep_source
from effpass.graph.writes import writes
from effpass.ops import OPS
from effpass.ops.nodes import called, takes_boundaries
from effpass.passes.boundaries.marks import Marks, RowError
from effpass.passes.boundaries.samples import RowSamples, seen_in_rows
from effpass.passes.boundaries.written import apart
from effpass.passes.packing.masks import Seen

aten = torch.ops.aten
CHECKPOINT = torch.ops.higher_order.tag_activation_checkpoint
CACHE = "pass use_cache=False: a cache holds one state a row, not one a sequence"
UNCHECKED = "turn checkpointing off, or pad the sequences"
APART = "pad the sequences, or give every sequence by itself"
BY_INDEX = ("index", "index_put", "index_add", "index_select", "gather", "scatter", "scatter_add")
LIKE = ("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like")
BESIDE = ("new_zeros", "new_ones", "new_full", "new_empty")
SIZED = (*LIKE, *BESIDE, "sym_size", "sym_numel")  # they read a size, and no value
AS_OTHER = ("expand_as", "view_as", "reshape_as", "type_as")
EXPERTS = ("one_hot", "nonzero", "bincount", "histc")


@dataclass(frozen=True)
class Mixer:
    """A node that mixes tokens: an effpass op, or torch's attention with what its mask shows.

    ``apart``: its own mask keeps sequences apart, so that it may stay as it is.
    """

    node: Node
    seen: Seen | None = None
    apart: bool = False


def mixers(gm: GraphModule, marks: Marks) -> tuple[list[Mixer], int | None]:
    """What of a graph must know the boundaries of its row; the longest row whose masks were read.

    Raises RowError for what mixes tokens and cannot be told where sequences begin.
    """
    found = [_scan(n) for n in gm.graph.nodes if takes_boundaries(n)]
    samples = RowSamples(gm, marks) if marks.shaped else None
    for node in gm.graph.nodes:
        if is_attention(node):
            found.append(_attention(node, samples))
        elif isinstance(node.target, HigherOrderOperator):
            _check_body(gm, node, samples)
    known = {each.node for each in found}
    if samples is not None:
        known |= apart(gm, samples)
    refuse_others(gm, known, marks.inputs(gm).values())
    return found, samples.longest if samples else None


def _check_body(gm: GraphModule, call: Node, samples: RowSamples | None) -> None:
    """Raises RowError unless a body (a checkpointed layer) mixes tokens by masks that are apart.

    Its attention is left as it is; an op inside it would have to be handed the boundaries.
    """
    bodies = [n for n in call.all_input_nodes if n.op == "get_attr" and not is_tensor(n)]
    if len(bodies) != 1:
        raise RowError(call, f"{call.target} has several bodies of its own", APART)
    body = gm.get_submodule(str(bodies[0].target))
    assert isinstance(body, GraphModule)
    operands = [arg for arg in call.args if arg is not bodies[0]]
    outside = dict(zip(body.graph.find_nodes(op="placeholder"), operands, strict=False))
    known: set[Node] = set()
    for node in body.graph.nodes:
        if takes_boundaries(node):
            raise RowError(node, "a scan or convolution under activation checkpointing", UNCHECKED)
        if is_attention(node):
            mask = outside.get(arguments(node)["attn_mask"])
            if samples is None or not isinstance(mask, Node):
                raise RowError(node, "attention under activation checkpointing", UNCHECKED)
            if not seen_in_rows(node, mask, bool(arguments(node)["is_causal"]), samples)[1]:
                raise RowError(node, "its mask is made without the boundaries", UNCHECKED)
            known.add(node)
    refuse_others(body, known)


def _scan(node: Node) -> Mixer:
    op = called(node)
    assert op is not None
    given = op.bind(*node.args, **node.kwargs)
    first = values(given[op.tensor_names[0]])[0]
    if given["cu_seqlens"] is not None:
        return Mixer(node, apart=True)
    if not single(first.shape[0]):
        raise RowError(node, f"{op.name} runs on {first.shape[0]} rows", "pack all into one row")
    states = [u for u in node.users if u.target is operator.getitem and u.args[1] != 0 and u.users]
    if given.get("initial_state") is not None or states:
        raise RowError(node, f"{op.name} reads or keeps a state", CACHE)
    return Mixer(node)


def _attention(node: Node, samples: RowSamples | None) -> Mixer:
    given = arguments(node)
    mask, causal = given["attn_mask"], bool(given["is_causal"])
    seen, kept = Seen(-1, 0) if causal else Seen(), False
    if is_tensor(mask):
        if samples is None:
            reason = "it has a mask, and neither position_ids nor seq_idx is an input"
            raise RowError(node, reason, "pass position_ids as well")
        seen, kept = seen_in_rows(node, mask, causal, samples)
    reason = not_varlen(node)
    if reason is not None and not kept:
        raise RowError(node, reason, CACHE if "keys" in reason else APART)
    return Mixer(node, seen, kept)


def not_varlen(node: Node) -> str | None:
    """Why an attention cannot run as ``varlen_attention`` of one row; None where it can."""
    given = arguments(node)
    query, key = values(given["query"])[0], values(given["key"])[0]
    if given["dropout_p"]:
        return "dropout is active inside this attention"
    if query.dim() != 4 or not single(query.shape[0]):
        return f"its queries have shape {tuple(query.shape)}, not (1, heads, tokens, channels)"
    if expression(query.shape[2]) != expression(key.shape[2]):
        return f"it has {key.shape[2]} keys for {query.shape[2]} queries"
    return None


def refuse_others(gm: GraphModule, known: set[Node], told: Iterable[Node] = ()) -> None:
    """Raises RowError for nodes that mix tokens of floats in a way nobody can bound.

    ``known``: nodes that mix them and are cared for; ``told``: inputs (1, T) or (S + 1,).
    """
    solution = solve(gm)
    tokens = {label for node in gm.graph.nodes for label in _tokens(node, solution)}
    for node in told:
        if values(node)[0].dim() == 2:
            tokens.update(solution.dims(node)[1])
    if not tokens:  # a piece of a model, between graph breaks
        rows = [n for n in gm.graph.find_nodes(op="placeholder") if _is_row(n)]
        tokens.update(label for node in rows for label in solution.dims(node)[1])
    floats = _Heavy(known)
    for node in gm.graph.nodes:
        if node in known or node.op != "call_function" or not floats.heavy(node):
            continue
        kinds = solution.kinds(node, sorted(tokens)) - {Kind.FREE}
        name = opname(node) or str(node.target)
        if isinstance(node.target, HigherOrderOperator):
            if node.target is not CHECKPOINT:
                raise RowError(node, f"{name} has a body of its own", APART)
            continue
        if not kinds or _routes(name, node, floats):
            continue
        if kinds == {Kind.BOUND} and _picks_only(node, floats):
            continue
        if not _loss(node):
            raise RowError(node, f"{name} is {', '.join(sorted(kinds))} along the tokens", APART)


def _routes(name: str, node: Node, floats: _Heavy) -> bool:
    """Whether a node sends tokens to experts and back, each token for itself.

    The order of integers (which expert a token chose) moves tokens; that of floats would let tokens
    compete for an expert. Indices that tokens chose send them; fixed ones would shift them.
    """
    if name in ("sort", "argsort"):
        return not values(node.args[0])[0].is_floating_point()  # type: ignore[arg-type]
    if name in BY_INDEX:
        given = arguments(node)
        indices = given["indices"] if "indices" in given else [given["index"]]
        return all(floats.heavy(index) for index in indices if is_tensor(index))
    return name in EXPERTS or "grouped_mm" in name


def _is_row(node: Node) -> bool:
    """Whether an input may be hidden states (1, T, d)."""
    value = node.meta.get("val")
    given = isinstance(value, Tensor) and not node.meta.get("effpass_parameter")
    return given and value.dim() == 3 and single(value.shape[0])  # type: ignore[union-attr]


def _tokens(node: Node, solution: Solution) -> tuple[int, ...]:
    """The token axis of a mixer, or of what is looked up in a table for each token."""
    if takes_boundaries(node):
        source, at = node.args[0], 1
    elif is_attention(node):
        source, at = arguments(node)["query"], -2
    elif opname(node) == "embedding" and values(node)[0].dim() == 3:
        source, at = node, 1
    else:
        return ()
    assert isinstance(source, Node)
    return solution.dims(source)[at] if source in solution else ()


class _Heavy:
    """Which values are floats made of tokens: what sequences must not share."""

    def __init__(self, known: set[Node]) -> None:
        self._heavy: dict[Node, bool] = dict.fromkeys(known, True)

    def heavy(self, node: Node) -> bool:
        """Whether a value is made of embedded or given floats, not of parameters alone."""
        if node not in self._heavy:
            self._heavy[node] = self._is_heavy(node)
        return self._heavy[node]

    def _is_heavy(self, node: Node) -> bool:
        if node.op == "placeholder":
            value = node.meta.get("val")
            given = isinstance(value, Tensor) and value.is_floating_point()
            return given and not node.meta.get("effpass_parameter")
        name = opname(node)
        if name == "embedding":
            return True
        read = [] if name in SIZED else node.all_input_nodes[: 1 if name in AS_OTHER else None]
        return any(self.heavy(source) for source in read)


def _picks_only(node: Node, floats: _Heavy) -> bool:
    """Whether what a node cuts out of the tokens meets no other tokens afterwards."""
    below = _descendants(node)
    return not any(
        floats.heavy(source) and source not in below and source is not node
        for each in below
        for source in each.all_input_nodes
    ) and not any(takes_boundaries(n) or is_attention(n) or writes(n) for n in below)


def _loss(node: Node) -> bool:
    """Whether all that a node leads to is a number for all tokens: a loss."""
    below = (node, *_descendants(node))
    ends = [n for n in below if any(user.op == "output" for user in n.users)]
    return not any(map(writes, below)) and all(v.dim() == 0 for n in ends for v in values(n))


def _descendants(node: Node) -> set[Node]:
    found: set[Node] = set()
    pending = [*node.users]
    while pending:
        each = pending.pop()
        if each not in found and each.op != "output":
            found.add(each)
            pending += each.users
    return found


def row_form(gm: GraphModule, found: list[Mixer], varlen: bool) -> GraphModule:
    """The graph of one packed row: inputs as before, then ``cu_seqlens``, int32 (S + 1,).

    ``varlen``: attention whose own mask keeps sequences apart becomes ``varlen_attention``, too.
    """
    graph, env = Graph(), dict[Node, Node]()
    by_node = {each.node: each for each in found}
    for node in gm.graph.find_nodes(op="placeholder"):
        env[node] = graph.node_copy(node)
    cu_seqlens = graph.placeholder("row_cu_seqlens")
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            continue
        mixer = by_node.get(node)
        if mixer is None or _stays(mixer, varlen):
            env[node] = graph.node_copy(node, env.__getitem__)
        elif takes_boundaries(node):
            env[node] = graph.node_copy(node, env.__getitem__)
            op = called(node)
            assert op is not None
            given = op.bind(*env[node].args, **env[node].kwargs)
            env[node].args = tuple((given | {"cu_seqlens": cu_seqlens}).values())
            env[node].kwargs = {}
        else:
            env[node] = _varlen(graph, node, mixer.seen or Seen(), cu_seqlens, env)
    made = GraphModule(gm, graph)
    graph.eliminate_dead_code()
    graph.lint()
    made.recompile()
    return made


def _stays(mixer: Mixer, varlen: bool) -> bool:
    """Whether a mixer keeps sequences apart by itself, and is not to be varlen_attention."""
    attends = not takes_boundaries(mixer.node)
    return mixer.apart and not (varlen and attends and not_varlen(mixer.node) is None)


def _varlen(graph: Graph, node: Node, seen: Seen, cu_seqlens: Node, env: dict[Node, Node]) -> Node:
    given = arguments(node)
    heads = []
    for name in ("query", "key", "value"):
        row = graph.call_function(aten.squeeze.dim, (env[given[name]], 0))
        heads.append(graph.call_function(aten.transpose.int, (row, 0, 1)))
    tokens = graph.call_function(aten.sym_size.int, (heads[0], 0))
    scale = given["scale"]
    made = graph.call_function(
        OPS["varlen_attention"].overload,
        (*heads, cu_seqlens, tokens),
        {
            "causal": seen.causal,
            "window": [seen.left, -1 if seen.causal else seen.right],
            "scale": env.get(scale, scale),
        },
    )
    keep_source(node, made)
    first = graph.call_function(aten.transpose.int, (made, 0, 1))
    return graph.call_function(aten.unsqueeze.default, (first, 0))
