"""Packed export: one program of a row of sequences end to end, and of the offsets of each.

Every scan, convolution and attention is given the offsets (as in ``passes.packed_rows``), positions
are counted from them, and a row's first token is taken of every sequence. Verification runs several
rows beside the model on every sequence by itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import SymInt, Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.utils import _pytree as pytree

from effpass.export.again import exported_again
from effpass.export.check import (
    VerificationError,
    Verified,
    difference,
    eager,
    first_difference,
    tolerance,
)
from effpass.export.program import (
    ExportError,
    Program,
    exported,
    inputs_of,
    name_dims,
    named,
    outputs_of,
    rewrite,
)
from effpass.export.runner import OFFSETS
from effpass.lowering.ort.session import Session
from effpass.passes.boundaries.honour import mixers, row_form
from effpass.passes.boundaries.marks import RowError
from effpass.report import Applied, Declined, GraphReport

aten = torch.ops.aten
TOLD = ("attention_mask", "seq_idx", "cu_seq_lens_q", "cu_seq_lens_k")
ROWS = ((1, 2, 3), (5, 1, 8, 2), (3, 1, 17), (2, 2, 2, 11, 1), (1,), (9,))  # lengths of sequences
TOKEN, SEQUENCE = "token", "sequence"


@dataclass(frozen=True)
class Packed:
    """``inputs``: those with one entry a token; ``outputs``: what each holds an entry of, a token
    or a sequence; ``start``: the position of first tokens, ``counted`` whether the model was given
    positions at all; ``answers``: every output of the model itself, also those that are not in the
    file."""

    inputs: tuple[str, ...]
    outputs: dict[str, str]
    start: int
    counted: bool
    answers: tuple[str, ...]

    def record(self) -> dict[str, Any]:
        """What a model file says of it."""
        return {"inputs": self.inputs, "outputs": self.outputs, "position_start": self.start}


def capture_packed(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[Program, Packed]:
    """Exports ``model`` for packed rows; every row of the example is a sequence.

    Raises ExportError for what mixes tokens and cannot be told where sequences begin.
    """
    given = named(model, args, kwargs)
    counted, start = _start(given)
    batches = _batches(given)
    others = {name: value for name, value in given.items() if name not in batches}
    row = {name: value.flatten(0, 1)[None] for name, value in batches.items()}
    length = next(iter(batches.values())).shape[1]
    rows = next(iter(batches.values())).shape[0]
    offsets = (torch.arange(rows + 1) * length).int()
    positions = {}
    if counted or "position_ids" in inspect.signature(model.forward).parameters:
        positions = {"position_ids": positions_of(offsets, rows * length, start)}
    names = {name: {1: "tokens"} for name in (*row, *positions)}
    first = exported(model, others | row | positions, names)
    report = GraphReport("export", "onnx")
    marks = rewrite(first, report)
    try:
        found, _ = mixers(first.graph_module, marks)
    except RowError as error:
        raise ExportError(str(error)) from error
    graph = _first_tokens(row_form(first.graph_module, found, varlen=True))
    report.applied.append(Applied("packed_rows", "boundaries are an input", len(found)))

    def derive(inputs: dict[str, Any]) -> dict[str, Any]:
        values = {name: inputs[name] for name in row} | {"row_cu_seqlens": inputs[OFFSETS]}
        tokens = next(iter(values.values())).shape[1]
        counts = positions_of(inputs[OFFSETS], tokens, start)
        return values | ({"position_ids": counts} if positions else {})

    inputs = row | {OFFSETS: offsets}
    dims = {name: {1: "tokens"} for name in row} | {OFFSETS: {0: "offsets"}}
    program = exported_again(first, graph, inputs, dims, derive)
    made = Program(program, others | inputs, inputs_of(program), outputs_of(first), report)
    name_dims(made, dims, strict=True)
    answers = tuple(made.outputs)
    kinds = _keep_outputs(made)
    report.nodes_after = len(program.graph.nodes)
    return made, Packed(tuple(row), kinds, start, counted, answers)


def positions_of(cu_seqlens: Tensor, tokens: int, start: int) -> Tensor:
    """(1, T) int64: where each token stands in its sequence, counted from ``start``."""
    at = torch.arange(tokens, device=cu_seqlens.device)
    offsets = cu_seqlens.long()
    which = (offsets[1:][None] <= at[:, None]).sum(1)
    return (at - offsets[which] + start)[None]


def _start(given: dict[str, Any]) -> tuple[bool, int]:
    """Whether the example has positions, which are taken out of it, and the first of them."""
    for name in TOLD:
        if given.get(name) is not None:
            raise ExportError(
                f"packed: expected sequences without padding, found {name} among the example "
                f"inputs: leave it out, {OFFSETS} tells where sequences begin"
            )
        given.pop(name, None)
    positions = given.pop("position_ids", None)
    if positions is None:
        return False, 0
    start = int(positions.reshape(-1)[0])
    if not bool((positions == start + torch.arange(positions.shape[-1])).all()):
        raise ExportError(
            "packed: expected position_ids that count up in every row of the example, found others"
        )
    return True, start


def _batches(given: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors of the example, two rows at least, all of one batch and length."""
    found = {name: value for name, value in given.items() if isinstance(value, Tensor)}
    for name, value in found.items():
        first = next(iter(found.values()))
        if value.dim() < 2 or value.shape[:2] != first.shape[:2] or not value.numel():
            raise ExportError(
                f"packed: expected inputs of shape (batch, length, ...), as many rows and tokens "
                f"in each, found {name} of shape {tuple(value.shape)}"
            )
    return {
        n: v.repeat(2, *(1 for _ in v.shape[1:])) if len(v) == 1 else v for n, v in found.items()
    }


def _first_tokens(graph: GraphModule) -> GraphModule:
    """What a graph cuts out as the first token of its row is that of every sequence, (S, ...)."""
    offsets = next(n for n in graph.graph.nodes if n.target == "row_cu_seqlens")
    for node in list(graph.graph.nodes):
        if node.target is not aten.select.int or node.args[1:] != (1, 0):
            continue
        source = node.args[0]
        shape = source.meta["val"].shape
        if len(shape) < 3 or not isinstance(shape[1], SymInt) or shape[0] != 1:
            continue
        with graph.graph.inserting_before(node):
            node.replace_all_uses_with(_picked(graph.graph, source, offsets))
        graph.graph.erase_node(node)
    graph.recompile()
    return graph


def _picked(graph: Graph, source: Node, offsets: Node) -> Node:
    row = graph.call_function(aten.select.int, (source, 0, 0))
    firsts = graph.call_function(aten.slice.Tensor, (offsets, 0, 0, -1))
    return graph.call_function(aten.index_select.default, (row, 0, firsts))


def _keep_outputs(made: Program) -> dict[str, str]:
    """What each output holds one entry of; others are taken out, and a record says so."""
    program, output = made.program, made.program.graph.output_node()
    sizes = {called: symbol for symbol, called in made.dims.items()}
    kinds, kept, specs = {}, [], []
    leaves: Any = output.args[0]
    tensors = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Node)]
    for name, i in zip(made.outputs, tensors, strict=True):
        shape = [str(size) for size in leaves[i].meta["val"].shape]
        if len(shape) > 1 and shape[:2] == ["1", sizes["tokens"]]:
            kinds[name] = TOKEN
        elif shape and shape[0] == f"{sizes['offsets']} - 1":
            kinds[name] = SEQUENCE
        else:
            reason = f"output {name} of shape ({', '.join(shape)}) is one for a whole row"
            hint = "only what has one entry a token, or a sequence, is in the file"
            made.report.declined.append(Declined("packed", name, reason, hint))
            continue
        kept.append(leaves[i])
        specs.append(program.graph_signature.output_specs[i])
    if not kinds:
        raise ExportError(
            "packed: expected an output with one entry a token or a sequence, found none: "
            + "; ".join(d.reason for d in made.report.declined)
        )
    output.args = (tuple(kept),)
    program.graph_signature.output_specs[:] = specs
    call = program.module_call_graph[0].signature
    assert call is not None
    call.out_spec = pytree.tree_structure([0] * len(kept))
    program.graph.eliminate_dead_code()
    program.graph_module.recompile()
    made.outputs = list(kinds)
    return kinds


def verify(path: Path, model: nn.Module, made: Program, packed: Packed, portable: bool) -> Verified:
    """Compares rows of sequences with the model on each of them. Raises VerificationError."""
    session, worst, compared = Session(path), 0.0, []
    for lengths in ROWS:
        row, alone = _sample(made, packed, lengths)
        found = session.run(row)
        each = [dict(zip(packed.answers, eager(model, one), strict=True)) for one in alone]
        text = f"sequences of {', '.join(map(str, lengths))}"
        for name, kind in packed.outputs.items():
            dim = 1 if kind == TOKEN else 0
            want = torch.cat([one[name] for one in each], dim)
            allowed, error = tolerance(model, [want]), difference(want, found[name])
            if not error <= allowed:
                raise VerificationError(
                    f"expected output {name} of {text} within {allowed:.0e} of the largest value "
                    f"that each has by itself, found {error:.1e}; "
                    f"{_where(made, row, name, want, allowed, portable)}"
                )
            worst = max(worst, error)
        compared.append(text)
    return Verified(worst, tuple(compared), ())


def _where(
    made: Program, row: dict[str, Tensor], name: str, want: Tensor, allowed: float, portable: bool
) -> str:
    """Whether the graph is wrong, or what ONNX Runtime makes of it, and at which node."""
    if len(row[OFFSETS]) < 3:
        return "a row of several sequences agrees"  # ROWS has those first
    flat = made.program._graph_module_flat_inputs((), dict(row))
    with torch.no_grad():
        found = made.program.graph_module(*flat)[made.outputs.index(name)]
    if difference(want, found) <= allowed:
        return first_difference(made, row, allowed, portable)
    return (
        "so does the row in torch. Where the model counts positions from another number than 0, "
        "give position_ids with the example"
    )


def _sample(
    made: Program, packed: Packed, lengths: Sequence[int]
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """What the example holds, over again: as inputs of the file, and of the model for each."""
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    row, others = {}, {n: v for n, v in made.kwargs.items() if not isinstance(v, Tensor)}
    for name in packed.inputs:
        value = made.kwargs[name]
        row[name] = value[:, torch.arange(int(offsets[-1])) % value.shape[1]]
    alone = []
    for first, last in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
        one: dict[str, Any] = others | {n: v[:, first:last] for n, v in row.items()}
        if packed.counted:
            one["position_ids"] = packed.start + torch.arange(last - first)[None]
        alone.append(one)
    return row | {OFFSETS: offsets.int()}, alone
