"""The life of one graph, top to bottom: what ``torch.compile(model, backend="effpass")`` runs.

Dynamo graph -> captured (pre-dispatch ATen) -> cleaned -> mathematics in plain nodes raised to ops
-> an implementation for every op -> compiled by Inductor. A graph that cannot be captured keeps
Dynamo's form; its ops are lowered all the same.
"""

from __future__ import annotations

import itertools
import logging
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

import effpass.lowering  # noqa: F401  registers the implementations
from effpass import ledger
from effpass.capture import known
from effpass.capture.dynamo import CaptureError, capture
from effpass.config import Config
from effpass.debug import Stages
from effpass.graph.clean import clean, graphs
from effpass.graph.source import layer, line, modules
from effpass.graph.verify import VerificationError, verify
from effpass.lower import lower, reference_form
from effpass.ops import OPS
from effpass.passes.pack_varlen import Forms
from effpass.passes.reduce_tokens import Forms as ReducedForms
from effpass.patterns.raising import raise_ops
from effpass.report import Called, Chosen, Declined, GraphReport, Miss

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
    packed = _packed(graph, inputs, config, report)
    if packed is not None:
        report.declined += _declined_functions(graph)
        report.seconds = time.perf_counter() - started
        (keep or _publish(gm, inputs))(report)
        return packed
    report.chosen += lower(graph, config.targets)
    stages.graph("lowered", graph)
    report.declined += _declined_functions(graph)

    if before is not None:
        graph = _verified(before, graph, inputs, config, report)
    report.nodes_after = len(graph.graph.nodes)
    report.seconds = time.perf_counter() - started
    stages.report(report)
    (keep or _publish(gm, inputs))(report)
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


def _verified(
    before: GraphModule,
    after: GraphModule,
    inputs: Sequence[Any],
    config: Config,
    report: GraphReport,
) -> GraphModule:
    try:
        report.verified = verify(before, after, inputs)
        return after
    except VerificationError as error:
        if config.strict:
            raise
        report.verified = f"failed: {error}; the captured graph runs"
        warnings.warn(f"effpass: verification failed in clean and lower: {error}", stacklevel=2)
    return before


def _packed(
    graph: GraphModule, inputs: Sequence[Any], config: Config, report: GraphReport
) -> Callable[..., Any] | None:
    """The graph with and without padding as one callable, where that was asked for and can be."""
    chosen: dict[str, list[Chosen]] = {}

    def compile(form: str) -> Callable[..., Any]:
        def finish(gm: GraphModule, given: Sequence[Any]) -> Callable[..., Any]:
            made = capture(gm, given)
            clean(made)
            chosen[form] = lower(made, config.targets)
            fast = chosen.get("packed") or chosen.get("reduced")
            report.chosen = fast or chosen[form]
            return _compile(made, given, config)

        return finish

    for i, each in enumerate(config.passes):
        found = each.apply(graph, compile)
        if found is None:
            continue
        if isinstance(found, Declined):
            report.declined.append(found)
            continue
        if config.verify and not _agree(found, inputs, config, report):
            continue
        report.applied.append(found.what)
        report.forms = found.run.counts
        report.nodes_after = len(found.packed.graph.nodes)
        reason = f"{each.name} already runs this graph, and the two are not combined yet"
        report.declined += [Declined(p.name, "", reason) for p in config.passes[i + 1 :]]
        if isinstance(found, ReducedForms):
            report.reductions.append(found.reduction)
        return found.run
    return None


def _agree(
    forms: Forms | ReducedForms, inputs: Sequence[Any], config: Config, report: GraphReport
) -> bool:
    try:
        report.verified = forms.verify(inputs)
    except VerificationError as error:
        if config.strict:
            raise
        report.verified = f"failed: {error}; the graph runs as it was"
        warnings.warn(
            f"effpass: verification failed in {forms.what.rewrite}: {error}", stacklevel=2
        )
        return False
    return True


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
