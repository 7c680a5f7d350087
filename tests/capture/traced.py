"""Compiles a function and keeps the graphs that Dynamo made of it."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule


class Traced:
    """``function`` compiled with a backend that runs the graph as it is; ``graphs`` fills up."""

    def __init__(self, function: Callable[..., Any], **options: Any) -> None:
        self.graphs: list[GraphModule] = []
        self.run = torch.compile(function, backend=self._keep, fullgraph=True, **options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(*args, **kwargs)

    def _keep(self, gm: GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        self.graphs.append(gm)
        return gm.forward

    def ops(self, graph: int = 0) -> Counter[str]:
        """Ops of effpass in one of the graphs, by name."""
        targets = (node.target for node in self.graphs[graph].graph.nodes)
        return Counter(t._opname for t in targets if getattr(t, "namespace", "") == "effpass")
