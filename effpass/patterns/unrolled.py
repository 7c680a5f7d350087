"""Unrolled loops over time become one linear recurrence.

A Python loop ``for t in range(T): h = a_t * h + b_t; ys.append(f(h, t))`` reaches the graph as T
copies of its body. The copies are compared (``steps``, ``loop``); what does not depend on the state
is computed for all steps at once, the state by ``linear_recurrence``, the outputs for all steps at
once. Whatever the body is written with: where the state is used otherwise than in
``decay * state + add``, elementwise, the loop stays, with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator

import networkx
import torch
from torch import Tensor
from torch.fx import Graph, Node

from effpass.patterns.loops.loop import loop_of
from effpass.patterns.loops.rolled import Rolled
from effpass.patterns.loops.steps import FEWEST, steps_of
from effpass.patterns.proposal import Idiom, Proposal


def find(graph: Graph) -> Iterator[Node]:
    """A member of every cycle of rows: each is a recurrence over steps."""
    steps = steps_of(graph)
    rows = networkx.DiGraph()
    for row in steps.rows:
        if row.source is None and len(row.members) >= FEWEST:
            for _, source, back in steps.arguments(row.last):
                if source is not None and len(source.members) >= FEWEST:
                    rows.add_edge(source.number, row.number, back=back)
    for cycle in networkx.strongly_connected_components(rows):
        if len(cycle) > 1 or rows.has_edge(*(list(cycle) * 2)):
            anchor = min(steps.rows[n].last for n in cycle)
            anchor.meta["effpass_cycle"] = (steps, frozenset(cycle))
            yield anchor


def check(anchor: Node) -> Proposal | None:
    """The loop around a cycle, rolled up. Raises Missed where it is not an affine recurrence."""
    steps, cycle = anchor.meta.pop("effpass_cycle")
    loop = loop_of(steps, cycle)
    if not loop.gathers and not loop.singles:
        return None  # dead code
    rolled = Rolled(loop)
    inputs = tuple(rolled.inputs)
    outputs = tuple(g.node for g in loop.gathers) + tuple(node for _, _, node in loop.singles)

    def build(*values: Tensor) -> list[Tensor]:
        return rolled(dict(zip(inputs, values, strict=True)))

    draw = {n: torch.zeros_like for n in inputs if rolled.zeros and n is loop.initial}
    return Proposal("linear_recurrence", inputs, outputs, build, draw)


IDIOM = Idiom("unrolled loop", find, check)
