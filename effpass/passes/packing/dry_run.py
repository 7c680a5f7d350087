"""Runs a packed graph on tensors without data: what cannot run is declined, not met by a user."""

from __future__ import annotations

from typing import Any

import torch
from torch import SymInt, Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.fx import GraphModule, Node

from effpass.axes.relation import values
from effpass.passes.packing.places import Unpackable
from effpass.passes.packing.samples import size_of


def check_shapes(packed: GraphModule, mask: Node) -> None:
    """Raises Unpackable where the packed graph fails on a batch of the captured size."""
    inputs = packed.graph.find_nodes(op="placeholder")
    rows, tokens = (size_of(size, {}) for size in values(mask)[0].shape)
    count = max(2, rows * tokens - 1)
    device = values(mask)[0].device
    with FakeTensorMode() as mode, torch.random.fork_rng(devices=[]):
        given = [_empty(node.meta["val"]) for node in inputs[:-4]]
        given += [torch.zeros(count, dtype=torch.long, device=device) for _ in range(3)]
        given.append(torch.zeros(rows + 1, dtype=torch.int32, device=device))
        run = _Run(packed, mode)
        try:
            with torch.set_grad_enabled(torch.is_grad_enabled()):
                run.run(*given)
        except Exception as error:  # whatever it is, the graph with padding still runs
            run.leave()
            first = str(error).strip().partition("\n")[0]
            raise Unpackable(
                "shapes", run.node, f"its packed form fails: {type(error).__name__}: {first}"
            ) from error


class _Run(torch.fx.Interpreter):
    """Remembers the node that runs; modes of the graph must not outlive a failure."""

    def __init__(self, gm: GraphModule, mode: FakeTensorMode) -> None:
        super().__init__(gm)
        self.mode = mode
        self.node: Node | None = None
        self.entered: list[Any] = []

    def run_node(self, n: Node) -> Any:
        """One node."""
        self.node = n
        made = super().run_node(n)
        if n.target is _enter_autocast:
            self.entered.append(made)
        elif n.target is _exit_autocast:
            self.entered.pop()
        return made

    def leave(self) -> None:
        """Out of the autocast contexts that a failure has left open."""
        while self.entered:
            _exit_autocast(self.entered.pop())

    def fetch_attr(self, target: str) -> Any:
        """A constant of the module, as a tensor without data."""
        found = super().fetch_attr(target)
        return self.mode.from_tensor(found) if isinstance(found, Tensor) else found


def _empty(value: Any) -> Any:
    if isinstance(value, Tensor):
        shape = [size_of(size, {}) for size in value.shape]
        return torch.empty(
            shape, dtype=value.dtype, device=value.device, requires_grad=value.requires_grad
        )
    return size_of(value, {}) if isinstance(value, SymInt) else value
