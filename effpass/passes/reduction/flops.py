"""What a graph costs as a function of how many tokens each of its parts sees."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch.fx import GraphModule, Node

from effpass.axes.contraction import contraction
from effpass.axes.labels import EXPANDS, KEEPS, PERMUTES, RESHAPES, opname
from effpass.axes.relation import arguments, is_tensor, values
from effpass.passes.reduction.blocks import Block, ancestors, depths
from effpass.passes.reduction.stream import ATTENTION, VARLEN, Holds, Stream, effpass_op

VIEWS = (*KEEPS, *PERMUTES, *RESHAPES, *EXPANDS, "slice", "split", "split_with_sizes", "chunk")
SCAN = {"selective_scan": 8, "ssd_scan": 6, "linear_recurrence": 2}  # operations a state element


@dataclass(frozen=True)
class Cost:
    """Operations of one row behind each number of blocks: ``linear[d] n + pairs[d] n ** 2``.

    Depth 0 is what comes before the first block's output. The stack ends with the last sum into
    the stream: the embedding and the head do not count. ``width`` is the elements a token that the
    stack's tensors hold at each depth, for activations.
    """

    linear: tuple[float, ...]
    pairs: tuple[float, ...]
    width: tuple[float, ...]

    def total(self, lengths: Sequence[int], anchors: Sequence[int]) -> float:
        """All operations, ``lengths[s]`` tokens behind the first ``s`` of the anchor blocks."""
        seen = [self._tokens(d, lengths, anchors) for d in range(len(self.linear))]
        rows = zip(self.linear, self.pairs, seen, strict=True)
        return sum(linear * n + pairs * n * n for linear, pairs, n in rows)

    def saved(self, lengths: Sequence[int], anchors: Sequence[int]) -> float:
        """The share of operations that is not done."""
        return 1 - self.total(lengths, anchors) / self.total([lengths[0]] * len(lengths), anchors)

    def activations(self, lengths: Sequence[int], anchors: Sequence[int]) -> float:
        """Elements that all tensors of the stack hold, a row."""
        seen = [self._tokens(d, lengths, anchors) for d in range(len(self.width))]
        return sum(width * n for width, n in zip(self.width, seen, strict=True))

    def _tokens(self, depth: int, lengths: Sequence[int], anchors: Sequence[int]) -> int:
        return lengths[sum(anchor < depth for anchor in anchors)]


def cost(gm: GraphModule, stream: Stream, blocks: list[Block], content: set[Node]) -> Cost:
    """The cost of a graph's stack, from the sizes it was captured with.

    Of ``content`` alone: tables of positions and masks are made for all tokens, whoever leaves. So
    a packed row costs what its sequences cost.
    """
    depth, count = depths(gm, blocks), len(blocks) + 1
    linear, pairs, width = ([0.0] * count for _ in range(3))
    above, inside = ancestors(gm), _stack(gm, blocks)
    nodes = list(gm.graph.nodes)
    last = above[inside]
    for i, node in enumerate(nodes):
        if not last >> i & 1 or node not in content or not (opname(node) or effpass_op(node)):
            continue
        if opname(node) in VIEWS or not stream.holds_tokens(node):
            continue
        tokens = _tokens(node, stream)
        if tokens == 0:
            continue
        done, power = _operations(node)
        (pairs if power == 2 else linear)[depth[node]] += done / tokens**power
        full = sum(_hint(v.shape) for i, v in enumerate(values(node)) if _is_full(stream, node, i))
        width[depth[node]] += full / tokens
    rows = _hint(values(blocks[0].add)[0].shape[:1]) if not stream.one_row else 1
    scaled = (tuple(v / rows for v in each) for each in (linear, pairs, width))
    return Cost(*scaled)


def _stack(gm: GraphModule, blocks: list[Block]) -> Node:
    """The last sum of the stream's shape: the end of the last block."""
    above, nodes = ancestors(gm), list(gm.graph.nodes)
    shape, first = values(blocks[-1].add)[0].shape, nodes.index(blocks[-1].add)
    ends = [
        n
        for n in nodes[first:]
        if opname(n) == "add" and values(n)[0].shape == shape and above[n] >> first & 1
    ]
    return ends[-1]


def _tokens(node: Node, stream: Stream) -> int:
    """How many tokens a node's tensors hold."""
    for i, value in enumerate(values(node)):
        dims = stream.solution.dims(node, i)
        for d, dim in enumerate(dims):
            if any((label,) == stream.token for label in dim):
                rest = 1
                for label in dim:
                    if (label,) != stream.token:
                        rest *= _number(stream.solution.classes.sizes[label])
                return _hint(value.shape[d : d + 1]) // rest
    return 0


def _is_full(stream: Stream, node: Node, output: int) -> bool:
    return stream.of(node, output).holds is Holds.TOKENS


def _operations(node: Node) -> tuple[float, int]:
    """Operations of a node, and the power of the tokens they grow with."""
    name, op, given = opname(node), effpass_op(node), arguments(node)
    if name == "linear":
        return 2.0 * _size(node) * _hint(values(given["weight"])[0].shape[-1:]), 1
    if name == ATTENTION:
        q, k, v = (values(given[n])[0].shape for n in ("query", "key", "value"))
        return 2.0 * _hint(q[:-1]) * _hint(k[-2:-1]) * (_hint(q[-1:]) + _hint(v[-1:])), 2
    if op == VARLEN:  # within one sequence: pairs of its own tokens
        q, v = (values(given[n])[0].shape for n in ("q", "v"))
        return 2.0 * _hint(q[:2]) * _hint(q[:1]) * (_hint(q[-1:]) + _hint(v[-1:])), 2
    if op == "causal_conv1d":
        return 2.0 * _size(node) * _hint(values(given["weight"])[0].shape[-1:]), 1
    if op in SCAN:
        states = given.get("B")
        wide = _hint(values(states)[0].shape[-1:]) if is_tensor(states) else 1
        return float(SCAN[op] * _size(node) * wide), 1
    found = contraction(node) if name in ("matmul", "mm", "bmm", "addmm", "baddbmm") else None
    if found is None:
        return 0.0, 1
    return 2.0 * _size(node) * _hint(values(found.left)[0].shape[-1:]), 1


def _size(node: Node) -> int:
    return _hint(values(node)[0].shape)


def _hint(shape: Sequence[object]) -> int:
    """The number of elements, of symbols what they were at capture."""
    product = 1
    for size in shape:
        product *= size if isinstance(size, int) else int(size.node.hint)  # type: ignore[attr-defined]
    return product


def _number(size: object) -> int:
    return int(size) if getattr(size, "is_Integer", False) else 1  # type: ignore[call-overload]
