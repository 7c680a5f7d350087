"""PackVarlen: no compute on padding, in inference and in training. Exact at real tokens.

Real tokens are gathered once, run end to end as one row with the boundaries of sequences, and put
back (PackMamba, arXiv 2408.03865; Effective Transformer). What the user's model computes at padding
tokens is not computed: outputs are zero there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import SymInt, Tensor
from torch._dynamo import maybe_mark_dynamic
from torch.fx import Graph, GraphModule, Node

from effpass.axes.labels import expression
from effpass.passes.packing.find import packed_form
from effpass.passes.packing.places import Unpackable
from effpass.passes.packing.prologue import Needs, Packed
from effpass.passes.packing.rewrite import Rewriter
from effpass.report import Applied, Declined

Compile = Callable[[GraphModule, Sequence[Any]], Callable[..., Any]]


@dataclass(frozen=True)
class PackVarlen:
    """``options={"pack_varlen": True}``: runs padded batches without their padding.

    Exact: real tokens are what they were, in float rounding; padding tokens of outputs are zero
    (or made of zeros). A batch without padding, or with padding that the model's own code treats in
    a way that packing cannot keep, runs as it was.
    """

    name = "pack_varlen"

    def apply(self, gm: GraphModule, compile: Compile) -> tuple[Packed | None, Applied | Declined]:
        """The two forms of a graph as one callable, or the reason why there is but one.

        ``compile`` makes a callable of a graph, when it is first run.
        """
        try:
            rewriter, packed = packed_form(gm)
        except Unpackable as reason:
            code = f"{self.name}:{reason.code}"
            return None, Declined(code, reason.where, reason.reason, reason.hint)
        inputs = gm.graph.find_nodes(op="placeholder")
        made = Packed(
            list(inputs).index(rewriter.places.mask),
            needs(rewriter),
            _compiled(gm, compile),
            _compiled(packed, compile),
            {"plain": 0, "packed": 0},
        )
        what = f"tokens of {rewriter.places.mask.target}"
        return made, Applied(self.name, what, rewriter.mixers)


def needs(rewriter: Rewriter) -> Needs:
    """What the packed form needs of a batch."""
    readers = rewriter.readers
    return Needs(
        rewriter.contiguous,
        rewriter.right,
        tuple(sorted(readers.columns)),
        rewriter.samples.longest,
        _picks(rewriter.gm, readers.picks) if readers.picks else None,
    )


def _picks(gm: GraphModule, pairs: Sequence[tuple[Node, Node]]) -> GraphModule:
    """The graph's own code for rows and positions that are read."""
    wanted: set[Node] = set()
    pending = [node for pair in pairs for node in pair]
    while pending:
        node = pending.pop()
        if node not in wanted:
            wanted.add(node)
            pending += node.all_input_nodes
    graph, env = Graph(), dict[Node, Node]()
    for node in gm.graph.nodes:
        if node.op == "placeholder" or node in wanted:
            env[node] = graph.node_copy(node, env.__getitem__)
    graph.output([(env[rows], env[positions]) for rows, positions in pairs])
    return GraphModule(gm, graph)


def _compiled(gm: GraphModule, compile: Compile) -> Callable[..., Any]:
    """A graph as a function that is compiled when it is first called, once for all sizes.

    Dims that the graph has as symbols are symbols from its first call. Sizes among its inputs are
    read from a tensor, where one has them: an integer would be a constant at first.
    """
    inputs = gm.graph.find_nodes(op="placeholder")
    values = [node.meta.get("val") for node in inputs]
    tensors = {i: v for i, v in enumerate(values) if not isinstance(v, SymInt)}
    symbolic = {
        i: [d for d, size in enumerate(v.shape) if isinstance(size, SymInt)]
        for i, v in tensors.items()
        if isinstance(v, Tensor)
    }
    read = {i: _size_of(v, values, symbolic) for i, v in enumerate(values) if i not in tensors}

    def run(*given: Any) -> Any:
        every = list(given)
        for i, place in read.items():
            if place is not None:
                every[i] = given[place[0]].shape[place[1]]
        return gm(*every)  # Dynamo skips a GraphModule that it is given itself

    made = torch.compile(run, backend=compile)

    def call(*given: Any) -> Any:
        every = [None if read.get(i) is not None else v for i, v in enumerate(given)]
        for i, dims in symbolic.items():
            if dims:
                every[i] = given[i].view_as(given[i])  # the user's tensor stays unmarked
                maybe_mark_dynamic(every[i], dims)
        return made(*every)

    return call


def _size_of(
    size: SymInt, values: Sequence[Any], symbolic: dict[int, list[int]]
) -> tuple[int, int] | None:
    """A tensor among the inputs, and its dim, of this size."""
    for i, dims in symbolic.items():
        for d in dims:
            if expression(values[i].shape[d]) == expression(size):
                return i, d
    return None
