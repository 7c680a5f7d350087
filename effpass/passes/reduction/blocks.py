"""Blocks: ``residual + mixer(norm(residual))``, wherever a graph has them, however spelled."""

from __future__ import annotations

from dataclasses import dataclass

from torch.fx import GraphModule, Node

from effpass.axes.labels import opname
from effpass.axes.relation import is_tensor, values
from effpass.passes.reduction.stream import VARLEN, Irreducible, Stream, effpass_op, is_mixer

THROUGH = ("to", "_to_copy", "dropout", "alias", "clone", "contiguous", "detach")


@dataclass(frozen=True)
class Block:
    """One block. ``add`` is the sum of ``residual`` and ``branch``, which ``mixer`` made.

    ``mixer`` is what the block's tokens are judged by: its scan, else its attention, else its
    convolution. What follows the sum up to the next mixer (a feed-forward part) belongs to it.
    """

    add: Node
    residual: Node
    branch: Node
    mixer: Node


def find_blocks(gm: GraphModule, stream: Stream) -> list[Block]:
    """All blocks in order. Raises Irreducible where there are none."""
    above = ancestors(gm)
    bits = {node: 1 << i for i, node in enumerate(gm.graph.nodes)}
    mixers = [n for n in gm.graph.nodes if is_mixer(n) and stream.holds_tokens(n)]
    sums = [n for n in gm.graph.nodes if _is_sum(n, stream)]
    found: dict[Node, list[Node]] = {}
    for mixer in mixers:
        for add in sums:
            if _operands(add, mixer, above, bits) is not None:
                found.setdefault(add, []).append(mixer)
                break
    if not found:
        reason = "no sum of a residual and what a mixer makes of it was found"
        raise Irreducible("no_block", mixers[0] if mixers else None, reason)
    return [_block(add, each, above, bits) for add, each in sorted(found.items())]


def ancestors(gm: GraphModule) -> dict[Node, int]:
    """What each node depends on, itself among it, as a bit a node in the graph's order."""
    found: dict[Node, int] = {}
    for i, node in enumerate(gm.graph.nodes):
        found[node] = 1 << i
        for source in node.all_input_nodes:
            found[node] |= found[source]
    return found


def depths(gm: GraphModule, blocks: list[Block]) -> dict[Node, int]:
    """Of how many blocks' outputs, one behind the other, each node is made."""
    ends, found = {block.add: i + 1 for i, block in enumerate(blocks)}, dict[Node, int]()
    for node in gm.graph.nodes:
        inherited = max((found[source] for source in node.all_input_nodes), default=0)
        found[node] = ends.get(node, inherited)
    return found


def content(gm: GraphModule, stream: Stream, blocks: list[Block]) -> set[Node]:
    """Values that are made of tokens, other than those of positions and masks alone.

    They are the first residual, what it is made of token by token, and all that depends on these.
    """
    above, found = ancestors(gm), set[Node]()
    nodes = list(gm.graph.nodes)
    start = above[blocks[0].residual]
    for i, node in enumerate(nodes):
        inside = start >> i & 1 and node.op == "call_function" and stream.full(node)
        floating = values(node)[:1] and values(node)[0].is_floating_point()
        begins = node is blocks[0].residual or (inside and floating)
        if begins or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def _is_sum(node: Node, stream: Stream) -> bool:
    if opname(node) != "add" or not all(is_tensor(a) for a in node.args[:2]):
        return False
    shapes = [values(a)[0].shape for a in node.args[:2]]  # type: ignore[arg-type]
    return stream.full(node) and len(shapes[0]) == len(shapes[1])


def _operands(
    add: Node, mixer: Node, above: dict[Node, int], bits: dict[Node, int]
) -> tuple[Node, Node] | None:
    """Residual and branch, if this sum is where a mixer's branch ends."""
    for residual, branch in (add.args[:2], add.args[1::-1]):
        assert isinstance(residual, Node) and isinstance(branch, Node)
        made_of_it = above[branch] & bits[mixer] and not above[residual] & bits[mixer]
        if made_of_it and above[mixer] & bits[_source(residual)]:
            return residual, branch
    return None


def _source(node: Node) -> Node:
    while opname(node) in THROUGH:
        node = node.all_input_nodes[0]
    return node


def _block(add: Node, mixers: list[Node], above: dict[Node, int], bits: dict[Node, int]) -> Block:
    ranked = sorted(mixers, key=lambda n: (_rank(n), n))
    operands = _operands(add, mixers[0], above, bits)
    assert operands is not None
    return Block(add, *operands, ranked[-1])


def _rank(mixer: Node) -> int:
    return {"causal_conv1d": 0, "": 1, VARLEN: 1}.get(effpass_op(mixer), 2)
