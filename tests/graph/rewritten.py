"""Captures a function, brings its graph into functional form, and compares it with eager."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.utils import _pytree as pytree

from effpass.capture.dynamo import capture
from effpass.graph.emit import storage_key
from effpass.graph.functional import functional
from effpass.graph.storages import Storages
from effpass.graph.writes import writes
from tests.tolerances import close


class Rewritten:
    """A function under ``torch.compile``: its graph in functional form runs. ``count``: writes
    rewritten; ``left``: writes that stayed; ``problems``: why, by storage."""

    def __init__(self, function: Callable[..., Any], **options: Any) -> None:
        self.graphs: list[GraphModule] = []
        self.inputs: list[Any] = []
        self.count = 0
        self.problems: list[str] = []
        torch._dynamo.reset()
        self.run = torch.compile(function, backend=self._backend, fullgraph=True, **options)

    def __call__(self, *args: Any) -> Any:
        return self.run(*args)

    def _backend(self, gm: GraphModule, inputs: Sequence[Any]) -> Any:
        graph = capture(gm, inputs)
        self.problems += [s.problem for s in Storages(graph) if s.written]
        self.count += functional(graph)
        graph.graph.lint()
        graph.recompile()
        self.graphs.append(graph)
        self.inputs = [_sample(v) for v in inputs]
        return graph.forward

    @property
    def graph(self) -> GraphModule:
        """The only graph."""
        (graph,) = self.graphs
        return graph

    @property
    def left(self) -> int:
        """Writes that are still there."""
        return sum(bool(writes(n)) for g in self.graphs for n in g.graph.nodes)

    def nodes(self, *names: str) -> int:
        """Nodes of the only graph that call one of these ops."""
        targets = [node.target for node in self.graph.graph.nodes]
        return sum(getattr(t, "_opname", "") in names for t in targets)


def equal(
    function: Callable[..., Any], *inputs: Tensor, training: bool = True, **options: Any
) -> Rewritten:
    """Outputs, their strides, and gradients are those of eager; fake values say what is."""
    mine, theirs = [leaf(x, training) for x in inputs], [leaf(x, training) for x in inputs]
    compiled = Rewritten(function, **options)
    same(pytree.tree_leaves(compiled(*mine)), mine, pytree.tree_leaves(function(*theirs)), theirs)
    with torch.no_grad():
        Checked(compiled.graph).run(*compiled.inputs)
    return compiled


def same(actual: list[Any], mine: list[Any], expected: list[Any], theirs: list[Any]) -> None:
    """Equal outputs, and equal gradients of the same inputs."""
    for a, e in zip(actual, expected, strict=True):
        close(a, e, "model_fp32")
        assert a.requires_grad == e.requires_grad
        wide = [d for d, n in enumerate(e.shape) if n != 1 and e.numel()]
        assert [a.stride(d) for d in wide] == [e.stride(d) for d in wide]
    for a, e in zip(gradients(actual, mine), gradients(expected, theirs), strict=True):
        assert (a is None) == (e is None)
        if a is not None and e is not None:
            close(a, e, "model_gradient_fp32")


def leaf(value: Tensor, training: bool = True) -> Tensor:
    """A copy that takes gradients where it can."""
    copied = value.detach().clone()
    return copied.requires_grad_(training) if copied.is_floating_point() else copied


def gradients(outputs: list[Any], inputs: list[Any]) -> Sequence[Tensor | None]:
    """Gradients of a sum in which every element of every output counts differently."""
    parts = [
        (o.double() * torch.linspace(0.5, 1.5 + i, o.numel()).view(o.shape)).sum()
        for i, o in enumerate(outputs)
        if o.requires_grad
    ]
    if not parts:
        return []
    wanted = [x for x in inputs if x.requires_grad]
    return torch.autograd.grad(torch.stack(parts).sum(), wanted, allow_unused=True)


def _sample(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value.node.hint


class Checked(Interpreter):
    """Runs a graph, and compares each value, and who shares memory with whom, with the fakes."""

    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm)
        self.actual: dict[int, set[int]] = {}
        self.kept: list[Any] = []  # memory that is freed may come back

    def run_node(self, n: Node) -> Any:
        value = super().run_node(n)
        self.kept.append(value)
        real = [v for v in pytree.tree_leaves(value) if isinstance(v, Tensor)]
        fake = [v for v in pytree.tree_leaves(n.meta.get("val")) if isinstance(v, Tensor)]
        for have, said in zip(real, fake, strict=n.op != "output"):
            self._compare(n, have, said)
        return value

    def _compare(self, n: Node, have: Tensor, said: Tensor) -> None:
        hint = lambda s: s.node.hint if isinstance(s, torch.SymInt) else s  # noqa: E731
        assert have.dtype == said.dtype, n
        assert list(have.shape) == [hint(s) for s in said.shape], n
        wide = [d for d, size in enumerate(have.shape) if size != 1 and have.numel()]
        assert [have.stride(d) for d in wide] == [hint(said.stride(d)) for d in wide], n
        if have.numel():
            key = storage_key(said)
            assert key is not None
            memory = have.untyped_storage().data_ptr()
            self.actual.setdefault(key, set()).add(memory)
            assert len(self.actual[key]) == 1, f"{n} does not lie where its fake value says"
