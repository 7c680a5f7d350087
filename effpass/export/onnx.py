"""``effpass.export_onnx``: an unmodified model as one ONNX file, verified before it is there."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir
from torch import nn

from effpass.config import Config
from effpass.export import check, files, reduced, states
from effpass.export import packed as packed_rows
from effpass.export.program import Dims, ExportError, Program, capture
from effpass.export.runner import LONGEST, PACKED, STATES
from effpass.lower import in_place
from effpass.lowering.ort.convert import Untranslatable, convert, rename
from effpass.lowering.ort.session import SessionError
from effpass.passes.reduce_tokens import ReduceTokens
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
    packed: bool = False,
    portable: bool = False,
    verify: bool = True,
) -> OnnxExport:
    """Writes ``model`` (in evaluation mode) to ``path`` as ONNX, and answers what was written.

    ``args``, ``kwargs``: example inputs. ``dynamic``: open dims, ``{input: {dim: name}}``; by
    default batch and length, wherever the model leaves them open. ``stateful``: the states of
    convolutions, scans and attention become inputs and outputs, so that one file does prefill and
    decoding. ``packed``: the file takes sequences end to end, (1, T, ...), and ``cu_seqlens``,
    int32 (S + 1,), where each begins. ``portable``: only operators of ``ai.onnx``. ``verify``:
    compare with eager at several batches and lengths before the file is put in its place.
    ``options``: as for torch.compile; ``reduce_tokens`` makes a file whose later blocks see fewer
    tokens, compared with torch's own reduced form.

    Raises ExportError, with what was expected and found, for a model that cannot be captured or
    translated, that disagrees with eager (naming the first node that differs), or a path that
    cannot be written; nothing is then left at ``path`` that was not there before.
    """
    settings = _check(model, options, dynamic, stateful, packed)
    given = (model, tuple(args), dict(kwargs or {}))
    try:
        form = _packed(given, portable) if packed else _whole(given, dynamic, stateful, portable)
        if settings is not None:
            form = _reduced(form.made, model, settings, portable)
        about = _metadata(model, options, form.made.report, portable)
        return _write(form, Path(path), about, portable, verify)
    except (Untranslatable, files.FileError, check.VerificationError, SessionError) as error:
        raise ExportError(f"{type(model).__name__} was not exported: {error}") from error


def _write(
    form: _Form, path: Path, about: dict[str, str], portable: bool, verify: bool
) -> OnnxExport:
    """Translates, writes and verifies; the file is at ``path`` when all of it went well."""
    made = form.made
    converted = convert(made.program, portable)
    rename(converted.model, {}, made.outputs, made.dims)
    form.finish(converted.model)
    converted.model.metadata_props.update(about | form.metadata)
    made.report.chosen = in_place(made.program.graph_module, "onnxruntime")
    operators = Counter(_operator(node) for node in converted.model.graph)
    with files.written(converted.model, path) as draft:
        found = form.verify(draft) if verify else None
    notes = [f"{d.where}: {d.reason}" for d in made.report.declined]
    notes += [*form.notes, *converted.lacks, *(() if found is None else found.skipped)]
    return OnnxExport(
        path,
        tuple(made.inputs),
        tuple(made.outputs),
        dict(operators.most_common()),
        None if found is None else found.error,
        () if found is None else found.sizes,
        tuple(notes),
        made.report,
    )


@dataclass(frozen=True)
class _Form:
    """What is exported, how a file of it is verified, and what is still to be done to its graph."""

    made: Program
    verify: Callable[[Path], check.Verified]
    metadata: dict[str, str] = field(default_factory=dict)
    finish: Callable[[ir.Model], None] = lambda model: None
    notes: tuple[str, ...] = ()


_Given = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]


def _whole(given: _Given, dynamic: Dims | None, stateful: bool, portable: bool) -> _Form:
    made = capture(*given, dynamic)
    if not stateful:
        return _Form(made, lambda path: check.verify(path, given[0], made, portable))
    carried = states.lift(made)
    record = {STATES: json.dumps(carried)}
    return _Form(made, lambda path: states.verify(path, given[0], made, carried), record)


def _packed(given: _Given, portable: bool) -> _Form:
    made, row = packed_rows.capture_packed(*given)

    def verify(path: Path) -> check.Verified:
        return packed_rows.verify(path, given[0], made, row, portable)

    return _Form(made, verify, {PACKED: json.dumps(row.record())})


def _reduced(plain: Program, model: nn.Module, settings: ReduceTokens, portable: bool) -> _Form:
    made, shorter = reduced.reduce(plain, settings)
    if shorter is None:
        return _Form(plain, lambda path: check.verify(path, model, plain, portable))
    notes = [f"reduce_tokens: {shorter.forms.reduction.valid}"]
    if shorter.longest:
        most = shorter.longest["tokens"]
        notes.append(f"reduce_tokens: inputs of up to {most} tokens, for which a ratio is solved")
    if not shorter.sizes:
        notes.append("reduce_tokens: the number of tokens is fixed by the example")

    def verify(path: Path) -> check.Verified:
        return reduced.verify(path, model, made, shorter, portable)

    record = {LONGEST: json.dumps(shorter.longest)} if shorter.longest else {}
    return _Form(made, verify, record, shorter.finish, tuple(notes))


def _check(
    model: nn.Module,
    options: Mapping[str, Any] | None,
    dynamic: Dims | None,
    stateful: bool,
    packed: bool,
) -> ReduceTokens | None:
    """Refuses what cannot be exported; answers how tokens are to be reduced, if they are."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected an nn.Module, found {type(model).__name__}")
    if model.training:
        raise ExportError("expected a model in evaluation mode, found training; call model.eval()")
    devices = {p.device.type for p in model.parameters()} - {"cpu"}
    if devices:
        raise ExportError(f"expected a model on the CPU, found {', '.join(devices)}; call .cpu()")
    passes = Config.from_options(options).passes
    for each in passes:
        if not isinstance(each, ReduceTokens):
            raise ExportError(
                f"expected no {each.name} in options: its host part makes packed rows of padded "
                "ones; packed=True exports a file that takes packed rows"
            )
    if packed and (stateful or dynamic is not None or passes):
        other = "stateful=True" if stateful else "reduce_tokens" if passes else "dynamic"
        raise ExportError(f"expected packed=True by itself, found {other}: they do not combine")
    if stateful and passes:
        raise ExportError(
            "expected stateful=True or reduce_tokens, found both: tokens that left "
            "have no place in a state"
        )
    return passes[0] if passes else None


def _operator(node: ir.Node) -> str:
    return f"{node.domain}.{node.op_type}" if node.domain else node.op_type


def _metadata(
    model: nn.Module,
    options: Mapping[str, Any] | None,
    report: GraphReport,
    portable: bool,
) -> dict[str, str]:
    """What the file says of itself."""
    name = getattr(getattr(model, "config", None), "_name_or_path", "") or ""
    rewrites = sorted({a.rewrite for a in report.applied} | {r.idiom for r in report.raised})
    return {
        "effpass.version": getattr(sys.modules["effpass"], "__version__", "unknown"),
        "effpass.options": json.dumps({**(options or {}), "portable": portable}, default=str),
        "effpass.model": f"{type(model).__module__}.{type(model).__qualname__} {name}".strip(),
        "effpass.passes": json.dumps(rewrites),
    }
