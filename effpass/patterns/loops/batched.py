"""Runs a function of one step for all steps at once: traced through vmap into plain operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from effpass.graph.region import evaluate

aten = torch.ops.aten


class Batched:
    """``function`` over the leading dim of those ``values`` that are ``stepped``.

    Made from fake values before the graph is rewritten (vmap cannot be traced pre-dispatch in every
    version of torch); called with fake or real ones, in float64 too.
    """

    def __init__(
        self,
        function: Callable[..., Sequence[Tensor]],
        values: Sequence[Tensor],
        stepped: Sequence[bool],
    ) -> None:
        fakes = [
            torch.empty_strided(v.size(), v.stride(), dtype=v.dtype, device=v.device)
            for v in values
        ]
        dims = tuple(0 if s else None for s in stepped)
        run = torch.vmap(lambda *a: tuple(function(*a)), dims) if any(stepped) else function
        self.traced: GraphModule = make_fx(lambda *a: list(run(*a)))(*fakes)
        for node in self.traced.graph.nodes:
            if node.target in (aten.view.default, aten._unsafe_view.default):
                node.target = aten.reshape.default  # later values may be laid out otherwise

    def __call__(self, *values: Tensor) -> list[Any]:
        graph = self.traced.graph
        inputs = graph.find_nodes(op="placeholder")
        inner = [n for n in graph.nodes if n.op not in ("placeholder", "output")]
        double = any(v.dtype is torch.float64 for v in values)
        outputs = list(graph.output_node().args[0])  # type: ignore[arg-type]
        return evaluate(inner, outputs, dict(zip(inputs, values, strict=True)), double)

    def shape(self, output: int) -> Tensor:
        """The fake value of one output, as it was traced."""
        return self.traced.graph.output_node().args[0][output].meta["val"]  # type: ignore[index,union-attr]


def same_shape(a: Tensor, b: Tensor) -> bool:
    """Equal sizes, symbolic ones by their expression."""
    return [str(s) for s in a.shape] == [str(s) for s in b.shape]
