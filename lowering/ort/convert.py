"""From an exported program that holds ops of effpass to an ONNX model."""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import optimizer
from onnxscript.rewriter.rules.fusion._rms_normalization import fuse_rms_normalization
from torch.export import ExportedProgram
from torch.onnx import OnnxExporterError

from effpass.lowering.ort.forms import fuse_all
from effpass.lowering.ort.table import table

OPSET = 23
_SYMBOL = re.compile(r"[A-Za-z_]\w*")


class Untranslatable(Exception):
    """A program that has no ONNX form; the text names the operator, or the node."""


@dataclass(frozen=True)
class Converted:
    """An ONNX model, the program it was made of (decomposed: names of nodes are names of values),
    and what the runtime lacks."""

    model: ir.Model
    program: ExportedProgram
    lacks: tuple[str, ...]


def convert(program: ExportedProgram, portable: bool = False, optimize: bool = True) -> Converted:
    """The ONNX model of ``program``. Raises Untranslatable."""
    translations, lacks = table(portable)
    try:
        with _quiet():
            made = torch.onnx.export(
                program,
                dynamo=True,
                custom_translation_table=translations,
                opset_version=OPSET,
                optimize=False,
                verbose=False,
            )
            assert made is not None and made.exported_program is not None
            if optimize:
                lacks += _optimize(made.model, portable)
    except OnnxExporterError as error:
        raise Untranslatable(_reason(error)) from error
    return Converted(made.model, made.exported_program, tuple(lacks))


def _optimize(model: ir.Model, portable: bool) -> list[str]:
    """Folds constants, fuses norms, writes the chosen forms; answers what the runtime lacks."""
    optimizer.optimize_ir(model)
    fuse_rms_normalization(model)
    return fuse_all(model, portable)


def _reason(error: BaseException) -> str:
    """The operator that has no translation, or the first line of the innermost error."""
    chain = [error]
    while chain[-1].__cause__ is not None:
        chain.append(chain[-1].__cause__)
    text = str(chain[-1])
    found = re.search(
        r"No ONNX function found for <OpOverload\(op='([^']+)', overload='(\w+)'", text
    )
    if found:
        return f"no ONNX translation of the operator {found[1]}.{found[2]}"
    nodes = [re.search(r"Error when translating node (%\w+)", str(each)) for each in chain]
    where = next((f"at node {match[1]}: " for match in nodes if match), "")
    return f"{where}{type(chain[-1]).__name__}: {text.strip().splitlines()[0] if text else ''}"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's own talk: what matters is raised, or measured afterwards."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def rename(
    model: ir.Model, inputs: dict[str, str], outputs: list[str], dims: dict[str, str]
) -> None:
    """Names inputs (by their old names), outputs (in order) and symbolic dims, in place."""
    graph = model.graph
    wanted = {*inputs.values(), *outputs}
    ends = {id(v) for v in (*graph.inputs, *graph.outputs)}
    for value in [v for v in _values(model) if id(v) not in ends and v.name in wanted]:
        value.name = f"{value.name}_inner"
    for value in graph.inputs:
        value.name = inputs.get(str(value.name), value.name)
    for value, name in zip(graph.outputs, outputs, strict=True):
        value.name = name
    for value in _values(model):
        if value.shape is not None:
            value.shape = ir.Shape([_dim(size, dims) for size in value.shape])


def _values(model: ir.Model) -> Iterator[Any]:
    yield from model.graph.inputs
    yield from model.graph.initializers.values()
    for node in model.graph:
        yield from node.outputs


def _dim(size: Any, dims: dict[str, str]) -> Any:
    text = getattr(size, "value", size)
    if not isinstance(text, str):
        return size
    if text.isdigit():  # fixed by the model's own code, as the exporter writes it
        return int(text)
    return _SYMBOL.sub(lambda match: dims.get(match[0], match[0]), text)
