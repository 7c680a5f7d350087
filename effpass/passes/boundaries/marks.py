"""Which inputs of a graph tell where sequences begin: by their names, or by a mark on a value."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch.fx import GraphModule, Node

from effpass.axes.labels import single
from effpass.graph.clean import graphs
from effpass.graph.region import ancestors, subgraph
from effpass.graph.source import layer, line
from effpass.ops.packed_row import MARK

EXPLICIT = {"cu_seq_lens_q": "cu_seqlens", "seq_idx": "seq_idx"}  # as transformers names them
TOLD = ("cu_seqlens", "seq_idx", "position_ids")
NAMES = EXPLICIT | {"position_ids": "position_ids"}
_NAME = re.compile(rf"(?:^|_)({'|'.join(NAMES)})_?$")
_STATE = re.compile(r"_(buffers|parameters)_|^l_self_", re.IGNORECASE)
_PADDING = re.compile(r"(^|_)attention_mask_?$")


class RowError(ValueError):
    """A packed row whose sequences cannot be kept apart."""

    def __init__(self, node: Node | None, reason: str, hint: str) -> None:
        where = "" if node is None else " ".join(filter(None, (layer(node), line(node))))
        at = f" ({where})" if where else ""
        super().__init__(f"packed_rows: {reason}{at}. {hint[0].upper()}{hint[1:]}.")
        self.node, self.reason, self.hint = node, reason, hint


@dataclass(frozen=True)
class Marks:
    """What tells the boundaries of one row.

    ``names``: which of ``cu_seqlens`` int (S + 1,), ``seq_idx`` and ``position_ids`` int (b, T) are
    told; ``tells``: a graph of the inputs that answers them, in that order; ``places``: those that
    are inputs themselves, by their place. ``padded``: a padding mask is among the inputs, so that
    positions alone say nothing (padding restarts them).
    """

    names: tuple[str, ...] = ()
    tells: GraphModule | None = None
    places: Mapping[str, int] = field(default_factory=dict)
    padded: bool = False

    @property
    def explicit(self) -> bool:
        """Whether boundaries were given as such, not by positions that restart."""
        return any(name != "position_ids" for name in self.names)

    @property
    def shaped(self) -> bool:
        """Whether an input tells the boundaries with one number a token."""
        return any(name in self.places for name in ("position_ids", "seq_idx"))

    def inputs(self, gm: GraphModule) -> dict[str, Node]:
        """Those that are inputs themselves, in a later form of the graph."""
        every = list(gm.graph.find_nodes(op="placeholder"))
        return {name: every[place] for name, place in self.places.items()}


def take(gm: GraphModule, arguments: Sequence[str]) -> Marks:
    """Takes ``packed_row`` out of a graph, and answers what tells its boundaries.

    ``arguments``: what Dynamo called each input, after the argument that it is.
    Raises RowError where two rows are in one graph, or a mark is in a body of its own.
    """
    found: dict[str, Node] = {}
    for body in graphs(gm):
        for node in body.graph.find_nodes(op="call_function", target=MARK):
            if body is not gm:
                reason = "a packed row in a body of its own (a checkpointed layer?)"
                raise RowError(node, reason, "turn checkpointing off, or pad the sequences")
            for name, value in zip(TOLD, node.args[1:], strict=True):
                if isinstance(value, Node) and _tells(value, name):
                    if found.setdefault(name, value) is not value:
                        reason = f"two {name} in one graph: {found[name]} and {value}"
                        raise RowError(node, reason, "compile one model at a time")
            node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
            body.graph.erase_node(node)
    inputs = list(gm.graph.find_nodes(op="placeholder"))
    padded = any(map(_PADDING.search, arguments))
    for node, full in zip(inputs, arguments, strict=True):
        name = _NAME.search(full)
        if name and not _STATE.search(full) and _tells(node, NAMES[name[1]]):
            found.setdefault(NAMES[name[1]], node)
    gm.recompile()
    found = {name: node for name, node in found.items() if _given(node)}
    if not found or (padded and list(found) == ["position_ids"]):
        return Marks(padded=padded)
    places = {name: inputs.index(node) for name, node in found.items() if node in inputs}
    graph, env = subgraph(gm, found.values())
    graph.output([env[node] for node in found.values()])
    return Marks(tuple(found), GraphModule(gm, graph), places, padded)


def _given(node: Node) -> bool:
    """Whether a value depends on what the caller gave, not on sizes alone."""
    inputs = (n for n in ancestors([node]) if n.op == "placeholder")
    return any(isinstance(n.meta.get("val", n.meta.get("example_value")), Tensor) for n in inputs)


def _tells(node: Node, what: str) -> bool:
    """Whether an input has the form of boundaries: integers, and more than one token."""
    value = node.meta.get("val", node.meta.get("example_value"))
    if not isinstance(value, Tensor) or value.is_floating_point() or value.dtype == torch.bool:
        return False
    if what == "cu_seqlens":
        return value.dim() == 1
    return value.dim() == 2 and not single(value.shape[1])


def unread(marks: Marks) -> list[str]:
    """Boundaries that the compiled function was given, where no graph input tells any.

    Dynamo leaves arguments out of a graph that the model's code never reads.
    """
    return [] if marks.names else told_by(given_to_frame(), marks.padded)


def told_by(given: Mapping[str, Any], padded: bool = False) -> list[str]:
    """Names of arguments that tell boundaries.

    Positions do where they restart and no padding mask is with them.
    """
    found = [name for name in EXPLICIT if isinstance(given.get(name), Tensor)]
    positions = given.get("position_ids")
    masked = padded or given.get("attention_mask") is not None
    if not masked and isinstance(positions, Tensor) and positions.dim() == 2:
        if bool((positions[:, 1:] != positions[:, :-1] + 1).any()):
            found.append("position_ids")
    return found


def given_to_frame() -> dict[str, Any]:
    """Arguments of the function that Dynamo compiles now, those in ``**kwargs`` too, by name."""
    return dict(_arguments())


def _arguments() -> Iterator[tuple[str, Any]]:
    """Arguments of the function that Dynamo compiles, those in ``**kwargs`` too."""
    try:
        frame: Any = InstructionTranslator.current_tx()
    except AttributeError:  # called by hand, not by Dynamo
        return
    while getattr(frame, "parent", None) is not None:
        frame = frame.parent
    for name, value in getattr(frame, "f_locals", {}).items():
        yield name, value
        if isinstance(value, dict):
            yield from ((str(key), each) for key, each in value.items())
