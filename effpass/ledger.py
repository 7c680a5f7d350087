"""Remembers what each compiled graph became, so that ``effpass.report(compiled)`` can tell."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import GraphModule

from effpass.graph.source import FRAME
from effpass.report import GraphReport, Report


@dataclass(frozen=True)
class _Entry:
    report: GraphReport
    tensors: frozenset[weakref.ref[torch.nn.Parameter]]
    frames: frozenset[tuple[str, int]]  # file and line of the outermost user frames


_ENTRIES: list[_Entry] = []


def remember(report: GraphReport, gm: GraphModule, inputs: Sequence[Any]) -> None:
    """Files the report of a graph under its parameters and its source lines."""
    tensors = frozenset(weakref.ref(v) for v in inputs if isinstance(v, torch.nn.Parameter))
    frames = set()
    for node in gm.graph.nodes:
        match = FRAME.search(node.meta.get("stack_trace") or "")
        if match:
            frames.add((match["file"], int(match["line"])))
    _ENTRIES.append(_Entry(report, tensors, frozenset(frames)))


def report(compiled: Any) -> Report:
    """What a compiled model or function that has run became: one entry a graph.

    ``compiled`` is the result of ``torch.compile(..., backend="effpass")``, or the module itself.
    Graphs are found by the parameters they use, or, without parameters, by their source lines.
    Raises TypeError for what is neither a module nor a function.
    """
    module = getattr(compiled, "_orig_mod", compiled)
    if isinstance(module, torch.nn.Module):
        own = {id(p) for p in module.parameters()}
        if own:
            return Report([e.report for e in _ENTRIES if own & {id(ref()) for ref in e.tensors}])
        return _by_source(type(module).forward)
    if not callable(compiled):
        raise TypeError(
            "expected the result of torch.compile(model, backend='effpass') that has run, "
            f"found {type(compiled).__name__}"
        )
    return _by_source(compiled)


def _by_source(function: Any) -> Report:
    code = getattr(inspect.unwrap(function), "__code__", None)
    if code is None:
        raise TypeError(f"expected a Python function, found {type(function).__name__}")
    lines = range(code.co_firstlineno, max(_lines(code), default=code.co_firstlineno) + 1)
    return Report(
        [
            e.report
            for e in _ENTRIES
            if any(f == code.co_filename and n in lines for f, n in e.frames)
        ]
    )


def _lines(code: Any) -> list[int]:
    return [line for _, _, line in code.co_lines() if line is not None]
