"""Boundaries that a model was given, where a compiled piece of it cannot see them: an error.

A model that is compiled layer by layer, or cut by hooks (FSDP2), by DDP or by a graph break, is
several graphs. A layer that is not handed the boundaries is compiled without them, perhaps for a
batch that had none, and would carry one sequence's state into the next. Nothing in its graph tells;
Python's own stack does: the calls of modules that this call lies in, with their arguments.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from torch.fx import GraphModule, Node
from torch.nn import Module

from effpass.axes.labels import is_attention
from effpass.axes.relation import arguments
from effpass.graph.source import layer, line
from effpass.ops.nodes import called, takes_boundaries
from effpass.passes.boundaries.honour import refuse_others
from effpass.passes.boundaries.marks import RowError, given_to_frame, told_by

Run = Callable[..., Any]
CALLS = frozenset(
    getattr(Module, name).__code__ for name in ("_call_impl", "_wrapped_call_impl")
)  # both take (self, *args, **kwargs)


def watched(gm: GraphModule, make: Callable[[], Run]) -> Run:
    """What ``make`` makes of ``gm``, a graph that sees no boundaries.

    Where it mixes tokens, it raises ValueError when a module that is calling it was given some.
    What is no op of effpass is watched where the compiled function itself has ``position_ids`` that
    the graph does not read: elsewhere it may mix other tokens, say of an image. A few microseconds
    a call.
    """
    positions = "position_ids" in given_to_frame()
    blind = next((n for n in gm.graph.nodes if _is_blind(n, positions)), None)
    if blind is None and positions:
        blind = _other(gm)
    if blind is None:
        return make()
    where, run = " ".join(filter(None, (layer(blind), line(blind)))), make()

    def call(*inputs: Any) -> Any:
        lost = given_above()
        if lost:
            raise ValueError(
                f"packed_rows: a module was given {', '.join(lost)}, which does not reach a layer "
                f"that is compiled by itself ({where}). Compile the model in one piece (not layer "
                "by layer, nor under FSDP2), or pad the sequences."
            )
        return run(*inputs)

    return call


def given_above() -> list[str]:
    """Names of boundaries that the modules being called were given by keyword."""
    every = (told_by(kwargs) for kwargs in _keywords(sys._getframe(1)))
    return next((found for found in every if found), [])


def _keywords(frame: FrameType | None) -> Iterator[dict[str, Any]]:
    """Keyword arguments of the modules that are being called, the innermost first."""
    while frame is not None:
        if frame.f_code in CALLS:
            yield frame.f_locals["kwargs"]
        frame = frame.f_back


def _other(gm: GraphModule) -> Node | None:
    """A node that mixes tokens and is neither attention nor an op."""
    known = {n for n in gm.graph.nodes if is_attention(n) or takes_boundaries(n)}
    try:
        refuse_others(gm, known)
    except RowError as reason:
        return reason.node
    return None


def _is_blind(node: Node, attention: bool) -> bool:
    """Whether a node mixes tokens of one row, without being told of boundaries."""
    if is_attention(node):
        return attention and arguments(node)["attn_mask"] is None
    op = called(node)
    if op is None or not takes_boundaries(node):
        return False
    return op.bind(*node.args, **node.kwargs)["cu_seqlens"] is None
