"""Captures a module as the backend does, raises it with proof, and compares it with eager."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from effpass.capture.dynamo import capture
from effpass.graph.clean import clean
from effpass.patterns.proposal import Idiom
from effpass.patterns.raising import Raising, raise_ops
from tests.tolerances import close


class Raiser:
    """A module under ``torch.compile``; keeps the rewritten graphs and what was raised in them."""

    def __init__(self, module: Any, idioms: Sequence[Idiom] | None = None, **options: Any) -> None:
        self.graphs: list[GraphModule] = []
        self.outcomes: list[Raising] = []
        self.idioms = idioms
        torch._dynamo.reset()
        self.run = torch.compile(module, backend=self._backend, fullgraph=True, **options)

    def __call__(self, *args: Any) -> Any:
        return self.run(*args)

    def _backend(self, gm: GraphModule, inputs: Sequence[Any]) -> Any:
        graph = capture(gm, inputs)
        clean(graph)
        self.outcomes.append(raise_ops(graph, proving=True, idioms=self.idioms, strict=True))
        graph.graph.lint()
        self.graphs.append(graph)
        return graph.forward

    def count(self, op: str) -> int:
        """How many of the op were raised."""
        return sum(r.op == op for outcome in self.outcomes for r in outcome.raised)

    def nodes(self, op: str) -> int:
        """How many nodes of an op of effpass, or of aten, the graphs hold."""
        targets = [n.target for g in self.graphs for n in g.graph.nodes]
        return sum(getattr(t, "_opname", "") == op for t in targets)

    @property
    def reasons(self) -> list[str]:
        """Why what was seen was not raised."""
        return [m.reason for outcome in self.outcomes for m in outcome.misses]


def equal(module: nn.Module, inputs: Sequence[Tensor], idioms: Sequence[Idiom] | None) -> Raiser:
    """Outputs and gradients of a module, raised, are those of eager; answers what was raised."""
    mine, theirs = copy.deepcopy(module), copy.deepcopy(module)
    compiled = Raiser(mine, idioms)
    given = [leaf(x) for x in inputs]
    wanted = [leaf(x) for x in inputs]
    actual, expected = tensors(compiled(*given)), tensors(theirs(*wanted))
    assert len(actual) == len(expected)
    for a, e in zip(actual, expected, strict=True):
        close(a, e, "model_fp32")
    total(actual).backward()
    total(expected).backward()
    pairs = [*zip(given, wanted, strict=True)]
    pairs += zip(mine.parameters(), theirs.parameters(), strict=True)
    for a, e in pairs:
        assert (a.grad is None) == (e.grad is None)
        if e.grad is not None and a.grad is not None:
            close(a.grad, e.grad, "model_gradient_fp32")
    return compiled


def leaf(value: Any) -> Any:
    """A copy that takes gradients where it can."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.detach().clone().requires_grad_()


def tensors(output: Any) -> list[Tensor]:
    """The floating outputs of a model."""
    leaves = torch.utils._pytree.tree_leaves(output)
    return [v for v in leaves if isinstance(v, Tensor) and v.is_floating_point()]


def total(outputs: Sequence[Tensor]) -> Tensor:
    """A scalar in which every element of every output counts differently."""
    parts = [(o * torch.linspace(0.5, 1.5, o.numel()).view(o.shape).to(o)).sum() for o in outputs]
    return torch.stack([p.double() for p in parts]).sum()
