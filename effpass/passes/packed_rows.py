"""Packed rows that the user brings: sequences end to end in one row never see each other.

What ``DataCollatorWithFlattening`` and ``effpass.pack`` emit: ``input_ids`` (1, T) with
``position_ids`` that restart, perhaps ``seq_idx`` and ``cu_seq_lens_q``. Convolutions and scans
start anew at every boundary (PackMamba, arXiv 2408.03865, section 3), attention stays inside its
sequence. Not an option: where boundaries are given, a graph honours them or is an error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from torch._dynamo import maybe_mark_dynamic
from torch.fx import GraphModule, Node

from effpass.axes.labels import expression
from effpass.axes.relation import arguments, values
from effpass.ops.nodes import takes_boundaries
from effpass.passes.boundaries.honour import mixers, row_form
from effpass.passes.boundaries.marks import (
    Marks,
    RowError,
    given_to_frame,
    take,
    told_by,
    unread,
)
from effpass.passes.boundaries.offsets import offsets
from effpass.passes.pack_varlen import Compile, compiled
from effpass.report import Applied, Declined

Run = Callable[..., Any]
NAME = "packed_rows"
PAD = "pad the sequences"
UNREAD = "the graph could not be captured (see the report)"
__all__ = ["NAME", "Rows", "broken", "find_rows", "take"]


@dataclass
class Rows:
    """A graph whose inputs may tell that its row is packed.

    ``tells`` answers what they tell of one batch, ``names`` what each is; ``tokens`` is an input
    with a dim of tokens. ``row`` runs packed rows of up to ``longest`` tokens (None: of any
    length), ``masked`` longer ones, with the model's own attention masks. ``why_not``: neither is
    possible; rows of one sequence run all the same. ``counts`` says how often each form ran.
    """

    tells: GraphModule
    names: tuple[str, ...]
    tokens: tuple[int, int] | None
    plain: Run
    row: Run | None = None
    masked: Run | None = None
    longest: int | None = None
    why_not: RowError | None = None
    what: Applied | None = None
    counts: dict[str, int] = field(default_factory=lambda: {"plain": 0, NAME: 0})

    def __call__(self, *inputs: Any) -> Any:
        """Outputs of the graph for these inputs; ValueError for boundaries that disagree."""
        given = dict(zip(self.names, self.tells(*inputs), strict=True))
        place = self.tokens
        tokens = None if place is None else inputs[place[0]].shape[place[1]]
        found = offsets(given, tokens)
        if found is None:
            self.counts["plain"] += 1
            return self.plain(*inputs)
        if self.row is None:
            raise ValueError(str(self.why_not))
        self.counts[NAME] += 1
        device = given[self.names[0]].device
        cu_seqlens = found.to(device, non_blocking=True)
        maybe_mark_dynamic(cu_seqlens, 0)
        run = self.row
        if self.masked is not None and (tokens is None or tokens > (self.longest or 0)):
            run = self.masked
        return run(*inputs, cu_seqlens)


def find_rows(
    gm: GraphModule, marks: Marks, compile: Callable[[str], Compile], plain: Callable[[], Run]
) -> Rows | None:
    """What runs a graph whose inputs ``marks`` tell boundaries; None where none need be honoured.

    ``compile`` makes a callable of a form's graph when it is first run; ``plain`` makes the graph's
    own at once. Raises RowError where boundaries are given and cannot be honoured.
    """
    lost = unread(marks)
    if marks.tells is None and not lost:
        return None
    try:
        if not all("val" in n.meta for n in gm.graph.find_nodes(op="placeholder")):
            raise RowError(None, UNREAD, PAD)
        found, longest = mixers(gm, marks)
        told = [each for each in found if not (each.apart and takes_boundaries(each.node))]
        if told and marks.tells is None:
            raise RowError(told[0].node, "it mixes tokens", PAD)
    except RowError as reason:
        if marks.tells is None:
            raise _never_read(lost, reason) from reason
        return Rows(marks.tells, marks.names, None, plain(), why_not=reason)
    if marks.tells is None or not told:
        return None  # the model's own code keeps sequences apart, or nothing mixes tokens
    return Rows(
        marks.tells,
        marks.names,
        _token_input(gm, told[0].node),
        compiled(gm, compile("plain")),
        compiled(row_form(gm, found, varlen=True), compile(NAME)),
        compiled(row_form(gm, found, varlen=False), compile(NAME)) if longest else None,
        longest,
        what=Applied(NAME, f"boundaries told by {', '.join(marks.names)}", len(told)),
    )


def broken(gm: GraphModule, marks: Marks) -> list[Declined]:
    """That Dynamo's graph ``gm`` ends at a graph break, where boundaries are given.

    What runs between two graphs is the model's own code, run eagerly: nobody looks at it.
    """
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is None or not reason.graph_break:
        return []
    if not marks.names and not told_by(given_to_frame(), marks.padded):
        return []
    stack = reason.user_stack
    where = f"{Path(stack[-1].filename).name}:{stack[-1].lineno}" if stack else ""
    text = f"what runs eagerly in this graph break is not checked ({reason.reason.splitlines()[0]})"
    return [Declined(f"{NAME}:graph_break", where, text, "fullgraph=True forbids graph breaks")]


def _never_read(lost: list[str], reason: RowError) -> RowError:
    hint = PAD if "position_ids" in lost else f"pass position_ids as well, or {PAD}"
    given = f"the model was given {', '.join(lost)}, and its code never reads it"
    return RowError(reason.node, f"{given}, but {reason.reason}", hint)


def _token_input(gm: GraphModule, mixer: Node) -> tuple[int, int] | None:
    """An input, by its place, and the dim in which it has one entry a token of the row."""
    source, at = (mixer.args[0], 1) if takes_boundaries(mixer) else (arguments(mixer)["query"], -2)
    assert isinstance(source, Node)
    size = expression(values(source)[0].shape[at])
    for i, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        value = node.meta.get("val")
        if isinstance(value, Tensor) and value.dim() > 1 and not node.meta.get("effpass_parameter"):
            if expression(value.shape[1]) == size:
                return i, 1
    return None
