"""What became of every token: which stay, merge or are dropped behind each anchor."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch.fx import Graph, GraphModule, Node

from effpass.graph.source import layer
from effpass.graph.verify import run_copy
from effpass.token_report import TokenStep

if TYPE_CHECKING:
    from effpass.passes.reduction.rewrite import Reducer


def token_map(reducer: Reducer, inputs: Sequence[Any], tokens: int) -> list[TokenStep]:
    """Runs a reduced graph up to its choices; a record for each anchor.

    It runs on copies of ``inputs``, all that the reduced graph reads; row 0 has so many ``tokens``.
    """
    graph, env = Graph(), dict[Node, Node]()
    graph.graph_copy(reducer.graph, env)
    choices = [stage.choice for stage in reducer.stages]
    graph.output([env[choice] for choice in choices if choice is not None])
    graph.eliminate_dead_code()
    made = run_copy(GraphModule(reducer.gm, graph), inputs)
    found, before = [], list(range(tokens))
    for i, anchor in enumerate(sorted(reducer.anchors.values(), key=lambda each: each.index)):
        kept, _, leaving, into, residual, mixer = (v[0].tolist() for v in made[6 * i : 6 * i + 6])
        edges = list(zip(leaving, into, residual, mixer, strict=True))
        merged = {before[g]: before[t] for g, t, *branches in edges if any(branches)}
        dropped = tuple(before[g] for g, _, *branches in edges if not any(branches))
        after = tuple(before[k] for k in kept)
        where = layer(anchor.block.add)
        found.append(TokenStep(anchor.index, where, len(before), after, merged, dropped))
        before = list(after)
    return found
