"""The life of one graph, top to bottom: what ``torch.compile(model, backend="effpass")`` runs.

Dynamo graph -> captured (pre-dispatch ATen) -> cleaned -> mathematics in plain nodes raised to ops
-> an implementation for every op -> compiled by Inductor. A graph that cannot be captured keeps
Dynamo's form; its ops are lowered all the same.
"""

from __future__ import annotations

import functools
import itertools
import logging
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.fx import GraphModule

import effpass.lowering  # noqa: F401  registers the implementations
from effpass import ledger
from effpass.axes.origins import origins
from effpass.capture import known
from effpass.capture.dynamo import CaptureError, capture
from effpass.chains import Axes
from effpass.config import Config
from effpass.debug import Stages
from effpass.graph.clean import clean, graphs
from effpass.graph.sizes import join_sizes
from effpass.graph.source import layer, line, modules
from effpass.graph.verify import VerificationError, verify
from effpass.lower import in_place, lower, reference_form
from effpass.onnx_compiler import Unsuitable, in_runtime
from effpass.ops import OPS
from effpass.passes import packed_rows
from effpass.passes.boundaries import callers
from effpass.passes.reduce_tokens import Forms as ReducedForms
from effpass.passes.reduce_tokens import ReduceTokens
from effpass.patterns.raising import raise_ops
from effpass.report import Applied, Called, Chosen, Declined, GraphReport, Miss

log = logging.getLogger("effpass")
_NUMBERS = itertools.count()


def backend(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    options: Mapping[str, Any] | None = None,
    mode: str | None = None,
) -> Callable[..., Any]:
    """The entry point ``torch_dynamo_backends: effpass``; ``options`` and ``mode`` as in Config."""
    return compile_graph(gm, example_inputs, Config.from_options(options, mode))


def compile_graph(
    gm: GraphModule,
    inputs: Sequence[Any],
    config: Config,
    keep: Callable[[GraphReport], None] | None = None,
) -> Callable[..., Any]:
    """Rewrites one Dynamo graph and compiles it; ``keep`` receives the report of it."""
    started = time.perf_counter()
    known.install()  # torch._dynamo.reset() forgets its callback
    report = GraphReport(f"graph_{next(_NUMBERS)}", config.compiler)
    stages = Stages(report.name)
    stages.graph("dynamo", gm)
    graph = _captured(gm, inputs, report)
    marks = packed_rows.take(graph, [str(n.target) for n in gm.graph.find_nodes(op="placeholder")])
    stages.graph("captured", graph)
    report.nodes_before = len(graph.graph.nodes)
    before = reference_form(graph) if config.verify else None

    report.applied += clean(graph)
    stages.graph("cleaned", graph)
    report.called += _called(graph)
    if graph is not gm:
        raising = raise_ops(graph, config.verify, strict=config.strict)
        report.raised, report.misses = raising.raised, raising.misses
        report.applied += clean(graph)
        stages.graph("raised", graph)
    report.misses += _unraised(graph, report)
    if keep is not None:
        report.axes = _axes(graph)
    report.declined += _declined_functions(graph)

    if config.passes:
        join_sizes(graph)

    def finish() -> Callable[..., Any]:
        run = _packed(graph, inputs, config, report) or _in_runtime(graph, inputs, config, report)
        return run or _lowered(graph, before, inputs, config, report, stages)

    forms = _forms(config, report, whole=True, padded=marks.padded or not marks.names)
    rows = packed_rows.find_rows(graph, marks, forms, finish)
    if rows is not None and rows.what is not None:
        _tell_rows(rows.what, rows.counts, config, report)
        report.nodes_after = len(graph.graph.nodes)
    report.declined += packed_rows.broken(gm, marks)
    run = rows or (finish() if marks.tells else callers.watched(graph, finish))
    report.seconds = time.perf_counter() - started
    stages.report(report)
    (keep or _publish(gm, inputs))(report)
    return run


def _lowered(
    graph: GraphModule,
    before: GraphModule | None,
    inputs: Sequence[Any],
    config: Config,
    report: GraphReport,
    stages: Stages,
) -> Callable[..., Any]:
    """The one graph of most models: an implementation for every op, verified and compiled."""
    report.chosen += lower(graph, config.targets)
    stages.graph("lowered", graph)
    if before is not None:
        compare = functools.partial(verify, before, graph, inputs)
        if not _agree("clean and lower", compare, "the captured graph", config, report):
            graph = before
    report.nodes_after = len(graph.graph.nodes)
    return _compile(graph, inputs, config)


def _captured(gm: GraphModule, inputs: Sequence[Any], report: GraphReport) -> GraphModule:
    try:
        return capture(gm, inputs)
    except CaptureError as reason:
        report.declined.append(Declined("capture", "", str(reason), "the graph runs uncleaned"))
    except Exception as error:  # declined, never an exception: Dynamo's own graph is still good
        reason = f"it cannot be traced again: {type(error).__name__}: {error}"
        report.declined.append(Declined("capture", "", reason, "the graph runs uncleaned"))
    return gm


def _axes(graph: GraphModule) -> list[Axes]:
    """Batch and token dims of every value, and from where each has their names."""
    return [
        Axes(
            *(each.node.name, each.text, layer(each.node), line(each.node)),
            {name: node.name for name, node in each.via.items()},
            each.given,
        )
        for each in origins(graph)
    ]


def _called(graph: GraphModule) -> list[Called]:
    """Attention that the model calls as torch's own op."""
    target = torch.ops.aten.scaled_dot_product_attention.default
    nodes = (
        n
        for body in graphs(graph)
        for n in body.graph.find_nodes(op="call_function", target=target)
    )
    return [Called("sdpa", layer(node), line(node)) for node in nodes]


def _declined_functions(graph: GraphModule) -> list[Declined]:
    """Known functions of the model's own modules that keep their own code, and why."""
    used = modules(graph)
    hint = "the function is compiled as it is written"
    return [
        Declined("front_door", f"{d.module}.{d.function}", d.reason, hint)
        for d in known.declined()
        if d.module in used
    ]


def _unraised(graph: GraphModule, report: GraphReport) -> list[Miss]:
    """Library functions that were traced, in layers where no pattern found their recurrence."""
    found = {r.where for r in report.raised if r.op in OPS and r.op != "causal_conv1d"}
    return [
        Miss(function, layer(node), reason, line(node))
        for node, function, reason in known.find_unraised(graph.graph)
        if layer(node) not in found
    ]


def _agree(
    what: str,
    compare: Callable[[], str],
    otherwise: str,
    config: Config,
    report: GraphReport,
) -> bool:
    """Whether a rewritten graph computes what it did, by ``compare``; else ``otherwise`` runs."""
    try:
        report.verified = compare()
    except VerificationError as error:
        if config.strict:
            raise
        report.verified = f"failed: {error}; {otherwise} runs"
        warnings.warn(f"effpass: verification failed in {what}: {error}", stacklevel=2)
        return False
    return True


def _forms(
    config: Config, report: GraphReport, whole: bool = False, padded: bool = True
) -> Callable[[str], Callable[..., Any]]:
    """Compiles forms of one graph when they first run; the report tells ops of the packed one.

    ``whole``: they hold all tokens, so that ReduceTokens may still take some. ``padded``: a padding
    mask may be among the inputs.
    """
    chosen: dict[str, list[Chosen]] = {}

    def compile(form: str) -> Callable[..., Any]:
        def finish(gm: GraphModule, given: Sequence[Any]) -> Callable[..., Any]:
            made = capture(gm, given)
            clean(made)
            fewer = _reduced(made, given, form, config, report, padded) if whole else None
            if fewer is not None:
                return fewer
            chosen[form] = lower(made, config.targets)
            packed = [each for name, each in chosen.items() if name != "plain"]
            report.chosen = packed[0] if packed else chosen[form]
            return _compile(made, given, config)

        return finish

    return compile


def _reduced(
    gm: GraphModule,
    given: Sequence[Any],
    form: str,
    config: Config,
    report: GraphReport,
    padded: bool,
) -> Callable[..., Any] | None:
    """A form of a graph with fewer tokens, where that was asked for and can be."""
    for each in config.passes:
        if not isinstance(each, ReduceTokens):
            continue
        found = each.apply(gm, _forms(config, report), given, form, report.forms, padded)
        if isinstance(found, Declined):
            report.declined.append(replace(found, reason=f"its {form} form: {found.reason}"))
        elif found is not None:
            before = report.verified
            if config.verify:
                compare = functools.partial(found.verify, given)
                if not _agree(each.name, compare, f"the {form} form as it was", config, report):
                    continue
                report.verified = f"{before}; {form} with fewer tokens: {report.verified}"
            report.applied += found.what
            report.reductions.append(found.reduction)
            return found.run
    return None


def _packed(
    graph: GraphModule, inputs: Sequence[Any], config: Config, report: GraphReport
) -> Callable[..., Any] | None:
    """The graph with and without padding as one callable, where that was asked for and can be."""
    for each in config.passes:
        packs = not isinstance(each, ReduceTokens)
        found = each.apply(graph, _forms(config, report, whole=packs))
        if found is None:
            continue
        if isinstance(found, Declined):
            report.declined.append(found)
            continue
        if config.verify:
            compare = functools.partial(found.verify, inputs)
            if not _agree(each.name, compare, "the graph as it was", config, report):
                continue
        report.applied += found.what
        report.forms = found.run.counts
        report.nodes_after = len(found.packed.graph.nodes)
        _without_runtime(config, report)
        if isinstance(found, ReducedForms):
            report.reductions.append(found.reduction)
        return found.run
    return None


def _tell_rows(what: Applied, counts: dict[str, int], config: Config, report: GraphReport) -> None:
    """Records that a graph runs packed rows as their boundaries tell."""
    report.applied.append(what)
    report.declined += _unpacked(config)
    report.forms = counts
    _without_runtime(config, report)
    if config.verify:
        report.verified = "not run: a row runs as its boundaries tell"


def _unpacked(config: Config) -> list[Declined]:
    """What has nothing to do where sequences lie end to end already."""
    reason = "its row is packed already: the inputs tell where sequences begin"
    names = [p.name for p in config.passes if not isinstance(p, ReduceTokens)]
    return [Declined(f"{name}:packed_rows", "", reason) for name in names]


def _without_runtime(config: Config, report: GraphReport) -> None:
    """Declines ONNX Runtime for a graph of several forms."""
    if config.compiler == "onnxruntime":
        report.compiler = "inductor"
        reason = "both forms of a packed graph are compiled when they are first run"
        hint = "Inductor compiles them"
        report.declined.append(Declined("onnxruntime", "", reason, hint))


def _in_runtime(
    graph: GraphModule, inputs: Sequence[Any], config: Config, report: GraphReport
) -> Callable[..., Any] | None:
    """The graph in ONNX Runtime, where that was asked for and can be."""
    if config.compiler != "onnxruntime":
        return None
    try:
        run, report.verified = in_runtime(graph, inputs)
    except Unsuitable as reason:
        report.compiler = "inductor"
        hint = "Inductor compiles this graph"
        report.declined.append(Declined("onnxruntime", "", str(reason), hint))
        return None
    report.chosen += in_place(graph, "onnxruntime")
    report.nodes_after = len(graph.graph.nodes)
    return run


def _publish(gm: GraphModule, inputs: Sequence[Any]) -> Callable[[GraphReport], None]:
    def publish(report: GraphReport) -> None:
        ledger.remember(report, gm, inputs)
        log.info(report.summary())

    return publish


def _compile(graph: GraphModule, inputs: Sequence[Any], config: Config) -> Callable[..., Any]:
    if config.compiler == "eager":
        return graph.forward
    from torch._inductor.compile_fx import compile_fx

    return compile_fx(graph, list(inputs), config_patches=config.inductor_patches())  # type: ignore[return-value]


known.install()
