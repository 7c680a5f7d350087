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
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from effpass.axes.labels import expression
from effpass.axes.relation import draws
from effpass.graph.region import subgraph
from effpass.graph.source import layer
from effpass.graph.verify import cannot_run, difference, run_copy
from effpass.passes.packing.find import packed_form
from effpass.passes.packing.modes import write_contexts
from effpass.passes.packing.moves import clear
from effpass.passes.packing.places import Unpackable
from effpass.passes.packing.prologue import Needs, Packed, indices
from effpass.passes.packing.readers import Readers
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
    what: tuple[Applied, ...]

    def verify(self, inputs: Sequence[Any]) -> str:
        """Compares both forms on copies of ``inputs``, at real tokens; answers how close they are.

        Raises VerificationError. Answers "not run: ..." where they cannot be compared.
        """
        reason = cannot_run(self.plain, inputs)
        if reason is not None:
            return f"not run: {reason}"
        mask = inputs[self.run.mask]
        real = self.run.real(mask)
        total = self.run.fits(mask, real, inputs)
        if not total:
            return "not run: this batch has no padding, or such that the plain graph runs"
        if any(map(draws, self.plain.graph.nodes)):
            return "not run: the graph draws random numbers, for other tokens when it runs packed"
        count = len(pytree.tree_leaves(self.plain.graph.output_node().args[0]))
        expected = run_copy(self.plain, inputs)
        actual = run_copy(self.packed, [*inputs, *indices(real, total)])
        worst = 0.0
        for i, (want, have) in enumerate(zip(expected, actual, strict=False)):
            if isinstance(want, Tensor) and i < count:
                worst = max(worst, difference(i, self._real(i, want, real), have))
        return f"equal within {worst:.1e} of the largest value, at real tokens"

    def _real(self, output: int, value: Tensor, real: Tensor) -> Tensor:
        """An output of the plain graph, zero at padding where it holds tokens."""
        outputs: Any = self.plain.graph.output_node().args[0]
        node = pytree.tree_leaves(outputs)[output]
        return clear(value, node, self.rewriter.places, real)


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
        made = [Applied(self.name, what, rewriter.mixers)]
        if rewriter.proven:
            parts = "parts that run with their padding"
            made.append(Applied(self.name, parts, len(rewriter.proven), layer(rewriter.proven[0])))
        return Forms(rewriter, gm, packed, run, tuple(made))


def needs(rewriter: Rewriter) -> Needs:
    """What the packed form needs of a batch."""
    readers = rewriter.readers
    return Needs(
        rewriter.contiguous,
        rewriter.left,
        rewriter.right,
        tuple(sorted(readers.columns)),
        rewriter.samples.longest,
        _picks(rewriter.gm, readers) if readers.picks or readers.ignored else None,
        tuple((each.index, each.first) for each in readers.ignored),
        rewriter.samples.inverted,
    )


def _picks(gm: GraphModule, readers: Readers) -> GraphModule:
    """The graph's own code for rows and positions that are read, and for targets."""
    targets = [each.target for each in readers.ignored]
    graph, env = subgraph(gm, [*(node for pair in readers.picks for node in pair), *targets])
    pairs = [(env[rows], env[positions]) for rows, positions in readers.picks]
    graph.output((pairs, [env[target] for target in targets]))
    return GraphModule(gm, graph)


def compiled(gm: GraphModule, compile: Compile) -> Callable[..., Any]:
    """A graph as a function that is compiled when it is first called, once for all sizes.

    Dims that the graph has as symbols are symbols from its first call. Sizes among its inputs are
    read from a tensor, where one has them: an integer would be a constant at first.
    """
    write_contexts(gm)
    assert gm.code  # a lazy module writes its code now: Dynamo would not look into it
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
