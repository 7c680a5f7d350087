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
from torch.utils import _pytree as pytree

from effpass.axes.labels import expression
from effpass.axes.relation import arguments
from effpass.graph.region import ancestors
from effpass.graph.verify import cannot_run, difference, run_copy
from effpass.passes.packing.find import packed_form
from effpass.passes.packing.places import Holds, Unpackable
from effpass.passes.packing.prologue import Needs, Packed, indices
from effpass.passes.packing.rewrite import Rewriter
from effpass.report import Applied, Declined

Compile = Callable[[GraphModule, Sequence[Any]], Callable[..., Any]]


@dataclass(frozen=True)
class Forms:
    """A graph that may run packed. ``run`` chooses by the padding; ``what``: the record of it."""

    rewriter: Rewriter
    plain: GraphModule
    packed: GraphModule
    run: Packed
    what: Applied

    def verify(self, inputs: Sequence[Any]) -> str:
        """Compares both forms on copies of ``inputs``, at real tokens; answers how close they are.

        Raises VerificationError. Answers "not run: ..." where they cannot be compared.
        """
        reason = cannot_run(self.plain, inputs)
        if reason is not None:
            return f"not run: {reason}"
        mask = inputs[self.run.mask]
        real = mask != 0
        if not self.run.fits(mask, real, inputs):
            return "not run: this batch has no padding, or such that the plain graph runs"
        if any(map(_random, self.plain.graph.nodes)):
            return "not run: the graph draws random numbers, for other tokens when it runs packed"
        count = len(pytree.tree_leaves(self.plain.graph.output_node().args[0]))
        expected = run_copy(self.plain, inputs)
        actual = run_copy(self.packed, [*inputs, *indices(real)])
        worst = 0.0
        for i, (want, have) in enumerate(zip(expected, actual, strict=False)):
            if isinstance(want, Tensor) and i < count:
                worst = max(worst, difference(i, self._real(i, want, real), have))
        return f"equal within {worst:.1e} of the largest value, at real tokens"

    def _real(self, output: int, value: Tensor, real: Tensor) -> Tensor:
        """An output of the plain graph, zero at padding where it holds tokens."""
        outputs: Any = self.plain.graph.output_node().args[0]
        node = pytree.tree_leaves(outputs)[output]
        place = self.rewriter.place(node)
        if place.holds is not Holds.TOKENS or place.token is None:
            return value
        shape = [1] * value.dim()
        if place.batch == place.token:
            keep = real.flatten()
            shape[place.token] = keep.numel()
            return value * keep.view(shape)
        shape[place.token] = real.shape[1]
        if place.batch is not None:
            shape[place.batch] = real.shape[0]
            real = real.t() if place.batch > place.token else real
        return torch.where(real.reshape(shape), value, torch.zeros_like(value))


@dataclass(frozen=True)
class PackVarlen:
    """``options={"pack_varlen": True}``: runs padded batches without their padding.

    Exact: real tokens are what they were, in float rounding; padding tokens of outputs are zero
    (or made of zeros). A batch without padding, or with padding that the model's own code treats in
    a way that packing cannot keep, runs as it was.
    """

    name = "pack_varlen"

    def apply(self, gm: GraphModule, compile: Callable[[str], Compile]) -> Forms | Declined:
        """The two forms of a graph, or the reason why there is but one.

        ``compile`` of the name of a form makes a callable of its graph, when it is first run.
        """
        try:
            rewriter, packed = packed_form(gm)
        except Unpackable as reason:
            code = f"{self.name}:{reason.code}"
            return Declined(code, reason.where, reason.reason, reason.hint)
        inputs = gm.graph.find_nodes(op="placeholder")
        run = Packed(
            list(inputs).index(rewriter.places.mask),
            needs(rewriter),
            compiled(gm, compile("plain")),
            compiled(packed, compile("packed")),
            {"plain": 0, "packed": 0},
        )
        what = f"tokens of {rewriter.places.mask.target}"
        return Forms(rewriter, gm, packed, run, Applied(self.name, what, rewriter.mixers))


def _random(node: Node) -> bool:
    """Whether a node draws random numbers: an idle dropout does not."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    given = arguments(node)
    return bool(given.get("train", True)) and given.get("dropout_p") != 0.0


def needs(rewriter: Rewriter) -> Needs:
    """What the packed form needs of a batch."""
    readers = rewriter.readers
    return Needs(
        rewriter.contiguous,
        rewriter.left,
        rewriter.right,
        tuple(sorted(readers.columns)),
        rewriter.samples.longest,
        _picks(rewriter.gm, readers.picks) if readers.picks else None,
    )


def _picks(gm: GraphModule, pairs: Sequence[tuple[Node, Node]]) -> GraphModule:
    """The graph's own code for rows and positions that are read."""
    wanted = ancestors(node for pair in pairs for node in pair)
    graph, env = Graph(), dict[Node, Node]()
    for node in gm.graph.nodes:
        if node.op == "placeholder" or node in wanted:
            env[node] = graph.node_copy(node, env.__getitem__)
    graph.output([(env[rows], env[positions]) for rows, positions in pairs])
    return GraphModule(gm, graph)


def compiled(gm: GraphModule, compile: Compile) -> Callable[..., Any]:
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
