"""``effpass.export_onnx``: an unmodified model as one ONNX file, verified before it is there."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir
from torch import nn

from effpass.config import Config
from effpass.export import check, files, states
from effpass.export.program import Dims, ExportError, Program, capture
from effpass.export.runner import STATES
from effpass.lower import in_place
from effpass.lowering.ort.convert import Untranslatable, convert, rename
from effpass.lowering.ort.session import SessionError
from effpass.report import GraphReport, Report


@dataclass(frozen=True)
class OnnxExport:
    """What was written: ``path``, names of ``inputs`` and ``outputs`` (states among them), how many
    ``operators`` of each kind, the largest ``error`` that verification found (None: not verified),
    of the largest value of its output, at ``sizes``; ``notes``: what to know about it."""

    path: Path
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    operators: dict[str, int]
    error: float | None
    sizes: tuple[str, ...]
    notes: tuple[str, ...]
    graph: GraphReport = field(repr=False)

    @property
    def report(self) -> Report:
        """What was found in each layer, and what was not."""
        return Report([self.graph])

    def __str__(self) -> str:
        error = "not verified" if self.error is None else f"largest error {self.error:.1e}"
        operators = ", ".join(f"{count} {name}" for name, count in self.operators.items())
        lines = [f"{self.path}: {error}", operators, *self.notes]
        return "\n".join(lines)


def export_onnx(
    model: nn.Module,
    args: tuple[Any, ...] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    path: str | Path,
    options: Mapping[str, Any] | None = None,
    dynamic: Dims | None = None,
    stateful: bool = False,
    portable: bool = False,
    verify: bool = True,
) -> OnnxExport:
    """Writes ``model`` (in evaluation mode) to ``path`` as ONNX, and answers what was written.

    ``args``, ``kwargs``: example inputs. ``dynamic``: open dims, ``{input: {dim: name}}``; by
    default batch and length, wherever the model leaves them open. ``stateful``: the states of
    convolutions, scans and attention become inputs and outputs, so that one file does prefill and
    decoding. ``portable``: only operators of ``ai.onnx``. ``verify``: compare with eager at several
    batches and lengths before the file is put in its place. ``options``: as for torch.compile.

    Raises ExportError, with what was expected and found, for a model that cannot be captured or
    translated, that disagrees with eager (naming the first node that differs), or a path that
    cannot be written; nothing is then left at ``path`` that was not there before.
    """
    _check(model, options)
    try:
        made = capture(model, tuple(args), dict(kwargs or {}), dynamic)
        carried = states.lift(made) if stateful else []
        converted = convert(made.program, portable)
        rename(converted.model, {}, made.outputs, made.dims)
        about = _metadata(model, options, made.report, carried, portable)
        converted.model.metadata_props.update(about)
        made.report.chosen = in_place(made.program.graph_module, "onnxruntime")
        operators = Counter(_operator(node) for node in converted.model.graph)
        with files.written(converted.model, Path(path)) as draft:
            found = _verified(draft, model, made, carried, portable) if verify else None
    except (Untranslatable, files.FileError, check.VerificationError, SessionError) as error:
        raise ExportError(f"{type(model).__name__} was not exported: {error}") from error
    notes = [f"{d.where}: {d.reason}" for d in made.report.declined] + list(converted.lacks)
    return OnnxExport(
        Path(path),
        tuple(made.inputs),
        tuple(made.outputs),
        dict(operators.most_common()),
        None if found is None else found.error,
        () if found is None else found.sizes,
        (*notes, *(() if found is None else found.skipped)),
        made.report,
    )


def _verified(
    draft: Path, model: nn.Module, made: Program, carried: list[states.State], portable: bool
) -> check.Verified:
    if carried:
        return states.verify(draft, model, made, carried)
    return check.verify(draft, model, made, portable)


def _check(model: nn.Module, options: Mapping[str, Any] | None) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected an nn.Module, found {type(model).__name__}")
    if model.training:
        raise ExportError("expected a model in evaluation mode, found training; call model.eval()")
    devices = {p.device.type for p in model.parameters()} - {"cpu"}
    if devices:
        raise ExportError(f"expected a model on the CPU, found {', '.join(devices)}; call .cpu()")
    config = Config.from_options(options)
    if config.passes:
        raise ExportError(
            f"expected no passes in options, found {', '.join(p.name for p in config.passes)}: "
            "a rewritten layout has no ONNX form yet; export without it"
        )


def _operator(node: ir.Node) -> str:
    return f"{node.domain}.{node.op_type}" if node.domain else node.op_type


def _metadata(
    model: nn.Module,
    options: Mapping[str, Any] | None,
    report: GraphReport,
    carried: list[dict[str, Any]],
    portable: bool,
) -> dict[str, str]:
    """What the file says of itself."""
    name = getattr(getattr(model, "config", None), "_name_or_path", "") or ""
    rewrites = sorted({a.rewrite for a in report.applied} | {r.idiom for r in report.raised})
    made = {
        "effpass.version": getattr(sys.modules["effpass"], "__version__", "unknown"),
        "effpass.options": json.dumps({**(options or {}), "portable": portable}, default=str),
        "effpass.model": f"{type(model).__module__}.{type(model).__qualname__} {name}".strip(),
        "effpass.passes": json.dumps(rewrites),
    }
    return made | ({STATES: json.dumps(carried)} if carried else {})
