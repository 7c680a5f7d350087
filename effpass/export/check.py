"""Verification: the exported model against eager, at several batches and lengths.

A model that disagrees is an error that names the first node whose value differs.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.fx import Interpreter, Node
from torch.utils import _pytree as pytree

from effpass.export.program import Program, resized
from effpass.graph.source import layer, line
from effpass.lowering.ort.convert import Converted, convert
from effpass.lowering.ort.session import Session, SessionError

# of the largest value of an output: a few hundred roundings, in the narrowest dtype of the model
ALLOWED = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
OUTPUTS_AT_ONCE = 32


class VerificationError(Exception):
    """The exported model and eager disagree; the text says how far, where first, and on what."""


@dataclass(frozen=True)
class Verified:
    """``error``: the largest difference, over the largest value of its output. ``sizes``: those
    compared, each as text; ``skipped``: those that eager itself refused, and why."""

    error: float
    sizes: tuple[str, ...]
    skipped: tuple[str, ...]


def verify(path: Path, model: nn.Module, made: Program, portable: bool) -> Verified:
    """Compares the file at ``path`` with ``model`` at several sizes. Raises VerificationError."""
    session = Session(path)
    worst, compared, skipped = 0.0, [], []
    for name, kwargs in samples(made):
        try:
            expected = eager(model, kwargs)
        except Exception as error:
            skipped.append(f"{name}: eager refuses it: {type(error).__name__}: {error}")
            continue
        given = {n: v for n, v in kwargs.items() if n in session.inputs}
        try:
            found = list(session.run(given).values())
        except SessionError as error:
            raise VerificationError(f"ONNX Runtime fails at {name}: {error}") from error
        allowed = tolerance(model, expected)
        for output, want, have in zip(made.outputs, expected, found, strict=True):
            error = difference(want, have)
            if not error <= allowed:
                where = first_difference(made, kwargs, allowed, portable)
                raise VerificationError(
                    f"expected output {output} at {name} within {allowed:.0e} of its largest "
                    f"value, found {error:.1e}; {where}"
                )
            worst = max(worst, error)
        compared.append(name)
    if not compared:
        raise VerificationError(f"there is nothing to compare: {'; '.join(skipped)}")
    return Verified(worst, tuple(compared), tuple(skipped))


def samples(made: Program) -> Iterator[tuple[str, dict[str, Any]]]:
    """The example inputs, then others with open dims at 1, and at odd sizes beyond the example."""
    sizes: dict[str, int] = {}
    rows, tokens = set(), set()
    for name, dims in made.open.items():
        for dim, called in dims.items():
            sizes.setdefault(called, made.kwargs[name].shape[dim])
            if dim == 0:
                rows.add(called)
            elif dim == 1 and made.kwargs[name].dim() <= 3:
                tokens.add(called)
    for each in (
        sizes,
        sizes | dict.fromkeys(rows, 1),
        {n: s + (n in rows) + (s + 1) * (n in tokens) for n, s in sizes.items()},
        sizes | dict.fromkeys(rows, 2) | dict.fromkeys(tokens, 1),
    ):
        kwargs = dict(made.kwargs)
        for name, dims in made.open.items():
            for dim, called in dims.items():
                kwargs[name] = resized(kwargs[name], dim, each[called])
        text = ", ".join(f"{called} {size}" for called, size in each.items())
        yield text or "the example's sizes", kwargs


def eager(model: nn.Module, kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors that the model answers, in order."""
    with torch.no_grad():
        leaves = pytree.tree_leaves(model(**kwargs))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor)]


def tolerance(model: nn.Module, outputs: list[Tensor]) -> float:
    """What is allowed for the narrowest floating-point dtype of weights and outputs."""
    dtypes = {p.dtype for p in model.parameters()} | {v.dtype for v in outputs}
    return max((ALLOWED[d] for d in dtypes if d in ALLOWED), default=0.0)


def difference(expected: Tensor, found: Tensor) -> float:
    """The largest difference over the largest finite value; infinite where kinds disagree."""
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return float("inf")
    if expected.numel() == 0:
        return 0.0
    want, have = expected.double(), found.to(expected.device).double()
    finite = want.isfinite()
    if not torch.equal(finite, have.isfinite()) or not torch.equal(want.isnan(), have.isnan()):
        return float("inf")
    if not bool(finite.any()):
        return 0.0
    worst = (want - have)[finite].abs().max().item()
    return worst / max(want[finite].abs().max().item(), 1e-30) if worst else 0.0


def first_difference(
    made: Program, kwargs: Mapping[str, Any], allowed: float, portable: bool
) -> str:
    """Which node of the graph is the first to differ, found by its intermediate values."""
    converted = convert(made.program, portable, optimize=False)
    values = _Values(converted, made, kwargs).values
    names = [name for name in _names(converted.model) if name in values]
    for start in range(0, len(names), OUTPUTS_AT_ONCE):
        part = names[start : start + OUTPUTS_AT_ONCE]
        found = _intermediate(converted.model, part, made, kwargs)
        for name in part:
            node, want = values[name]
            if name in found and not difference(want, found[name]) <= allowed:
                if node.target is operator.getitem:
                    node = node.all_input_nodes[0]
                place = ", ".join(filter(None, (str(node.target), layer(node), line(node))))
                return f"the first node that differs is {node.name} ({place})"
    return "every node of the plain graph agrees: the optimiser changed it"


class _Values(Interpreter):
    """Every tensor of a program on some inputs, by the name that its ONNX value has."""

    def __init__(self, converted: Converted, made: Program, kwargs: Mapping[str, Any]) -> None:
        program = converted.program
        super().__init__(program.graph_module)
        self.values: dict[str, tuple[Node, Tensor]] = {}
        with torch.no_grad():
            self.run(*program._graph_module_flat_inputs((), dict(kwargs)))

    def run_node(self, n: Node) -> Any:
        made = super().run_node(n)
        if n.op == "call_function":
            several = isinstance(made, tuple | list)
            for i, value in enumerate(made if several else (made,)):
                if isinstance(value, Tensor):
                    self.values[f"{n.name}__{i}" if several else n.name] = (n, value)
        return made


def _names(model: ir.Model) -> list[str]:
    return [str(value.name) for node in model.graph for value in node.outputs]


def _intermediate(
    model: ir.Model, names: list[str], made: Program, kwargs: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Values inside the model, by name."""
    by_name = {str(v.name): v for node in model.graph for v in node.outputs}
    outputs = list(model.graph.outputs)
    model.graph.outputs[:] = [by_name[name] for name in names if by_name[name].type is not None]
    try:
        session = Session(ir.to_proto(model).SerializeToString())
    finally:
        model.graph.outputs[:] = outputs
    return session.run({n: v for n, v in kwargs.items() if n in session.inputs})
