"""The capture door for export: a strict ``torch.export`` that sees the same ops as torch.compile.

Known library functions become ops while Dynamo traces (``effpass.capture.known``), whatever else
is raised from plain nodes; then the program's signature is put right again.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import SymInt, Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind
from torch.fx import Node
from torch.utils import _pytree as pytree

from effpass.capture import known
from effpass.graph.clean import clean
from effpass.passes.boundaries.marks import Marks, RowError, take
from effpass.patterns.raising import raise_ops
from effpass.report import Declined, GraphReport

Dims = Mapping[str, Mapping[int, str]]


class ExportError(Exception):
    """A model that cannot be exported as asked; the text says what was expected, and what to do."""


@dataclass
class Program:
    """An exported, rewritten program; ``inputs`` and ``outputs`` are names of its tensors.

    ``dims`` gives the name of every symbol of a size; ``open`` the dims of each input that may
    change, by name.
    """

    program: ExportedProgram
    kwargs: dict[str, Any]
    inputs: list[str]
    outputs: list[str]
    report: GraphReport
    dims: dict[str, str] = field(default_factory=dict)
    open: dict[str, dict[int, str]] = field(default_factory=dict)


def capture(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], dynamic: Dims | None
) -> Program:
    """Exports ``model`` and raises what is in it.

    ``dynamic``: ``{input: {dim: name}}``; None leaves batch and length open wherever the model
    does. Raises ExportError.
    """
    given = named(model, args, kwargs)
    asked = dynamic
    names = _default_dims(given) if asked is None else {n: dict(d) for n, d in asked.items()}
    _check_dims(names, given)
    program = exported(model, _grown(given, names), names)
    report = GraphReport("export", "onnx")
    marks = rewrite(program, report)
    if marks.explicit:
        raise ExportError(
            "expected inputs of whole rows, found boundaries of a packed row "
            f"({', '.join(marks.names)}): leave seq_idx and cu_seq_lens out, and pass packed=True"
        )
    made = Program(program, given, inputs_of(program), outputs_of(program), report)
    name_dims(made, names, asked is not None)
    return made


def exported(model: nn.Module, example: dict[str, Any], names: Dims) -> ExportedProgram:
    """The model as torch.export sees it, strictly, with these dims open. Raises ExportError."""
    shapes = {name: _spec(value, names.get(name, {})) for name, value in example.items()}
    known.install()
    return traced(model, example, shapes, True, "torch.export cannot capture this model")


def traced(
    model: nn.Module, example: dict[str, Any], shapes: dict[str, Any], strict: bool, failed: str
) -> ExportedProgram:
    """What torch.export makes of a module; ExportError that begins with ``failed`` otherwise."""
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # attributes that libraries write to while they run
            return torch.export.export(model, (), example, dynamic_shapes=shapes, strict=strict)
    except Exception as error:  # torch's own classes, many
        text = str(error).strip().split("\n\n")[0]
        raise ExportError(f"{failed}: {type(error).__name__}: {text}") from error


def named(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments by name, library caches turned off. Raises ExportError."""
    signature = inspect.signature(model.forward)
    try:
        given = dict(signature.bind_partial(*args).arguments) | dict(kwargs)
    except TypeError as error:
        raise ExportError(f"the example inputs do not fit the model: {error}") from error
    for name, value in given.items():
        if "cache" in type(value).__name__.lower():
            raise ExportError(
                f"expected no cache among the inputs, found {name}, a {type(value).__name__}; "
                "pass stateful=True for a model with states"
            )
    if getattr(getattr(model, "config", None), "use_cache", None) is not None:
        if given.get("use_cache"):
            raise ExportError(
                "expected use_cache=False, found True: cache objects are never traced; pass "
                "stateful=True for a model with states"
            )
        if "use_cache" in signature.parameters or _takes_any(signature):
            given["use_cache"] = False
    if not any(isinstance(value, Tensor) for value in given.values()):
        raise ExportError("expected at least one tensor among the example inputs, found none")
    return given


def _takes_any(signature: inspect.Signature) -> bool:
    return any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())


def _default_dims(given: Mapping[str, Any]) -> dict[str, dict[int, str]]:
    """Batch is dim 0; length dim 1 of integers and of (batch, length, channels)."""
    names: dict[str, dict[int, str]] = {}
    for name, value in given.items():
        if not isinstance(value, Tensor) or value.dim() == 0:
            continue
        names[name] = {0: "batch"}
        if value.dim() > 1 and (not value.is_floating_point() or value.dim() == 3):
            names[name][1] = "length"
    return names


def _check_dims(names: Dims, given: Mapping[str, Any]) -> None:
    for name, dims in names.items():
        if not isinstance(given.get(name), Tensor):
            tensors = ", ".join(n for n, v in given.items() if isinstance(v, Tensor))
            raise ExportError(f"dynamic: expected names of tensors ({tensors}), found {name!r}")
        for dim in dims:
            if not 0 <= dim < given[name].dim():
                raise ExportError(
                    f"dynamic: expected dims of {name} from 0 to {given[name].dim() - 1}, "
                    f"found {dim}"
                )


def resized(value: Tensor, dim: int, size: int) -> Tensor:
    """``value`` with ``size`` entries along ``dim``, those it has over again."""
    return value.index_select(dim, torch.arange(size) % value.shape[dim])


def _grown(given: Mapping[str, Any], names: Dims) -> dict[str, Any]:
    """Examples in which every open dim has at least 2 entries: torch.export fixes 0 and 1."""
    grown = dict(given)
    for name, dims in names.items():
        for dim in dims:
            if grown[name].shape[dim] == 0:
                raise ExportError(f"expected example inputs that are not empty, found {name}")
            if grown[name].shape[dim] == 1:
                grown[name] = resized(grown[name], dim, 2)
    return grown


def _spec(value: Any, dims: Mapping[int, str]) -> Any:
    if not isinstance(value, Tensor):
        return pytree.tree_map(lambda _: None, value)
    return dict.fromkeys(dims, Dim.AUTO)


def rewrite(program: ExportedProgram, report: GraphReport) -> Marks:
    """The passes of torch.compile up to raising, in place; answers what tells boundaries.

    Raises ExportError.
    """
    graph = program.graph_module
    report.nodes_before = len(graph.graph.nodes)
    for node, spec in zip(
        graph.graph.find_nodes(op="placeholder"), program.graph_signature.input_specs, strict=True
    ):
        node.meta["effpass_parameter"] = spec.kind is InputKind.PARAMETER
    marks = _marks(program)
    report.applied += clean(graph)
    raising = raise_ops(graph, proving=False)
    report.raised, report.misses = raising.raised, raising.misses
    report.applied += clean(graph)
    resign(program)
    report.nodes_after = len(graph.graph.nodes)
    return marks


def _marks(program: ExportedProgram) -> Marks:
    """Which inputs of the user tell boundaries; buffers of that name do not."""
    graph, specs = program.graph_module, program.graph_signature.input_specs
    names = [
        str(node.target) if spec.kind is InputKind.USER_INPUT else ""
        for node, spec in zip(graph.graph.find_nodes(op="placeholder"), specs, strict=True)
    ]
    try:
        return take(graph, names)
    except RowError as error:
        raise ExportError(str(error)) from error


def resign(program: ExportedProgram) -> None:
    """Puts the names of outputs in the signature right after nodes were replaced."""
    outputs: Any = program.graph_module.graph.output_node().args[0]
    for node, spec in zip(outputs, program.graph_signature.output_specs, strict=True):
        if isinstance(node, Node):
            spec.arg.name = node.name


def inputs_of(program: ExportedProgram) -> list[str]:
    """Names of the inputs that are tensors."""
    specs = program.graph_signature.input_specs
    return [
        s.arg.name
        for s in specs
        if s.kind is InputKind.USER_INPUT and not isinstance(s.arg, ConstantArgument)
    ]


def outputs_of(program: ExportedProgram) -> list[str]:
    """Names of the outputs that are tensors, as the model's own output calls them."""
    leaves: Any = program.graph_module.graph.output_node().args[0]
    spec: Any = program.call_spec.out_spec
    paths, _ = pytree.tree_flatten_with_path(pytree.tree_unflatten(list(range(len(leaves))), spec))
    names = {leaf: _path(path) or f"output_{leaf}" for path, leaf in paths}
    return [names[i] for i, leaf in enumerate(leaves) if isinstance(leaf, Node)]


def _path(path: tuple[Any, ...]) -> str:
    keys = [getattr(k, "key", getattr(k, "name", getattr(k, "idx", ""))) for k in path]
    name = "_".join(map(str, keys))
    return name if name.isidentifier() else f"output_{name}" if name else ""


def name_dims(made: Program, names: Dims, strict: bool) -> None:
    """Names symbols of sizes; a size that is fixed is an error if asked for, else a record."""
    placeholders = {n.name: n for n in made.program.graph.find_nodes(op="placeholder")}
    for name, dims in names.items():
        if name not in placeholders:
            continue
        value = placeholders[name].meta["val"]
        for dim, called in dims.items():
            size = value.shape[dim]
            if isinstance(size, SymInt) and str(size).isidentifier():
                made.dims.setdefault(str(size), called)
                made.open.setdefault(name, {})[dim] = made.dims[str(size)]
                continue
            reason = f"dim {dim} ({called}) of {name} is fixed at {size} by the model's own code"
            if strict:
                raise ExportError(f"dynamic: expected it to be open, but {reason}")
            hint = "a loop over it, or a size that was read, makes it a constant"
            made.report.declined.append(Declined("dynamic", name, reason, hint))
