"""Explain: compile a model with effpass, run it once, and tell what became of it."""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from effpass.backend import compile_graph
from effpass.config import Config
from effpass.report import Report


def explain(
    model: Callable[..., Any], *args: Any, options: Mapping[str, Any] | None = None, **kwargs: Any
) -> Report:
    """What effpass does with ``model(*args, **kwargs)``, and what it declines, and why.

    The report begins with its ``coverage``: layer by layer, what was found and the nearest miss.
    The model runs once on these inputs, in whatever mode (training, evaluation, no_grad) it is in;
    the random state is put back, a cache among the inputs is written to as by any call. Graphs are
    verified and run eagerly, whatever ``options`` says of the compiler. Raises ValueError or
    TypeError for options that ``torch.compile(..., backend="effpass")`` would refuse.
    """
    config = dataclasses.replace(Config.from_options(options), compiler="eager", verify=True)
    found = Report()

    def backend(gm: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        return compile_graph(gm, inputs, config, keep=found.graphs.append)

    def call() -> Any:
        return model(*args, **kwargs)

    # a code object of its own: explaining twice must not count as recompiling the same code
    fresh = types.FunctionType(
        call.__code__.replace(co_name="explained"),
        call.__globals__,
        "explained",
        None,
        call.__closure__,
    )
    with torch.random.fork_rng(devices=[]):
        torch.compile(fresh, backend=backend)()
    return found
