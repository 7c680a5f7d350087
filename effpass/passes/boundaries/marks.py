"""Which inputs of a graph tell where sequences begin: by their names, or by a mark on a value."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.symbolic_convert import InstructionTranslator
from torch.fx import GraphModule, Node

from effpass.axes.labels import single
from effpass.graph.clean import graphs
from effpass.graph.source import layer, line
from effpass.ops.packed_row import MARK

EXPLICIT = {"cu_seqlens": "cu_seqlens", "cu_seq_lens_q": "cu_seqlens", "seq_idx": "seq_idx"}
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
        self.reason, self.hint = reason, hint


@dataclass(frozen=True)
class Marks:
    """Nodes that tell the boundaries of one row, each None where none does.

    ``cu_seqlens`` int (S + 1,); ``seq_idx``, ``position_ids`` int (1, T). ``padded``: a padding
    mask is among the inputs, so that positions alone say nothing (padding restarts them).
    """

    cu_seqlens: Node | None = None
    seq_idx: Node | None = None
    position_ids: Node | None = None
    padded: bool = False

    @property
    def explicit(self) -> bool:
        """Whether boundaries were given as such, not by positions that restart."""
        return self.cu_seqlens is not None or self.seq_idx is not None

    @property
    def nodes(self) -> dict[str, Node]:
        """The nodes by what they tell."""
        names = ("cu_seqlens", "seq_idx", "position_ids")
        found = {name: getattr(self, name) for name in names}
        if self.padded and not self.explicit:
            del found["position_ids"]
        return {name: node for name, node in found.items() if node is not None}


def take(gm: GraphModule, names: Sequence[str]) -> Marks:
    """Takes ``packed_row`` out of a graph, and answers what tells its boundaries.

    ``names``: what Dynamo called each input, after the argument that it is.
    Raises RowError where two rows are in one graph, or a mark is in a body of its own.
    """
    found = Marks()
    for body in graphs(gm):
        for node in body.graph.find_nodes(op="call_function", target=MARK):
            if body is not gm:
                raise RowError(
                    node, "a packed row in a body of its own (a checkpointed layer?)", ALONE
                )
            found = _with(found, node, dict(zip(tuple(EXPLICIT_ARGS), node.args[1:], strict=True)))
            node.replace_all_uses_with(node.args[0])  # type: ignore[arg-type]
            body.graph.erase_node(node)
    for node, full in zip(gm.graph.find_nodes(op="placeholder"), names, strict=True):
        name = _NAME.search(full)
        if _PADDING.search(full):
            found = replace(found, padded=True)
        elif name and not _STATE.search(full) and _tells(node, NAMES[name[1]]):
            if getattr(found, NAMES[name[1]]) is None:
                found = replace(found, **{NAMES[name[1]]: node})
    gm.recompile()
    return found


EXPLICIT_ARGS = ("cu_seqlens", "seq_idx", "position_ids")
ALONE = "turn checkpointing off, or pad the sequences"


def _with(marks: Marks, at: Node, given: Mapping[str, Any]) -> Marks:
    for name, node in given.items():
        if not isinstance(node, Node):
            continue
        before = getattr(marks, name)
        if before is not None and before is not node:
            raise RowError(at, f"two {name} in one graph: {before} and {node}", "compile one model")
        marks = replace(marks, **{name: node})
    return marks


def _tells(node: Node, what: str) -> bool:
    """Whether an input has the form of boundaries: integers, and more than one token."""
    value = node.meta.get("val", node.meta.get("example_value"))
    if not isinstance(value, Tensor) or value.is_floating_point() or value.dtype == torch.bool:
        return False
    if what == "cu_seqlens":
        return value.dim() == 1
    return value.dim() == 2 and not single(value.shape[1])


def unread(marks: Marks) -> list[str]:
    """Explicit boundaries that the compiled function was given, where no graph input tells them.

    Dynamo leaves arguments out of a graph that the model's code never reads. Positions count where
    they restart.
    """
    if marks.explicit:
        return []
    given = dict(_arguments())
    masked = marks.padded or given.get("attention_mask") is not None
    found = [name for name in EXPLICIT if isinstance(given.get(name), Tensor)]
    positions = given.get("position_ids")
    if marks.position_ids is None and isinstance(positions, Tensor) and not masked:
        if positions.dim() == 2 and bool((positions[:, 1:] != positions[:, :-1] + 1).any()):
            found.append("position_ids")
    return found if marks.position_ids is None else []


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
