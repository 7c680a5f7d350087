"""Gradients off and autocast inside a graph: every packed node keeps the mode of its original.

Packed nodes are made when they are first asked for, in another order than their originals. So each
is stamped with the mode of the node that it stands for, and the switches are put between the nodes
when all are there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.fx import Graph, GraphModule, Node

KEY = "effpass_packed_mode"
set_grad_enabled = torch._C._set_grad_enabled
ENTER = re.compile(r"(\w+)(?:\s*:.*?)? = \w*_enter_autocast\((.*?)\)(;.*)?$")
EXIT = re.compile(r"\w+(?:\s*:.*?)? = \w*_exit_autocast\(")


@dataclass(frozen=True)
class Mode:
    """``grad``: as ``torch._C._set_grad_enabled`` was called last, None where it was not.

    ``autocast``: arguments of the autocast contexts around, the outermost first.
    """

    grad: bool | None = None
    autocast: tuple[tuple[Any, ...], ...] = ()


OUTSIDE = Mode()


def modes(gm: GraphModule) -> dict[Node, Mode]:
    """The mode of every node of a captured graph."""
    found: dict[Node, Mode] = {}
    now, entered = OUTSIDE, dict[Node, Mode]()
    for node in gm.graph.nodes:
        if node.target is _enter_autocast:
            entered[node] = now
            now = replace(now, autocast=(*now.autocast, tuple(node.args)))
        elif node.target is _exit_autocast:
            now = replace(now, autocast=entered[node.args[0]].autocast)
        elif node.target is set_grad_enabled:
            now = replace(now, grad=bool(node.args[0]))
        found[node] = now
    return found


class ModedGraph(Graph):
    """A graph whose new nodes are stamped with the mode that is current."""

    def __init__(self) -> None:
        super().__init__()
        self.mode = OUTSIDE

    @contextmanager
    def within(self, mode: Mode) -> Iterator[None]:
        """Nodes that are made inside have this mode."""
        before, self.mode = self.mode, mode
        try:
            yield
        finally:
            self.mode = before

    def create_node(self, *args: Any, **kwargs: Any) -> Node:
        """One more node."""
        node = super().create_node(*args, **kwargs)
        node.meta[KEY] = self.mode
        return node


def switch_modes(graph: Graph) -> None:
    """Puts the calls that switch modes between stamped nodes. The graph ends as it begins."""
    if all(node.meta.get(KEY, OUTSIDE) == OUTSIDE for node in graph.nodes):
        return
    now, handles = OUTSIDE, list[Node]()
    usual = torch.is_grad_enabled()
    for node in list(graph.nodes):
        if node.op in ("placeholder", "get_attr"):
            continue
        wanted = OUTSIDE if node.op == "output" else node.meta.get(KEY, OUTSIDE)
        with graph.inserting_before(node):
            common = 0
            for a, b in zip(now.autocast, wanted.autocast, strict=False):
                if a != b:
                    break
                common += 1
            while len(handles) > common:
                graph.call_function(_exit_autocast, (handles.pop(),))
            for each in wanted.autocast[common:]:
                handles.append(graph.call_function(_enter_autocast, each))
            before, after = (usual if m.grad is None else m.grad for m in (now, wanted))
            if before != after:
                graph.call_function(set_grad_enabled, (after,))
        now = wanted


def write_contexts(gm: GraphModule) -> None:
    """Makes the module's code say ``with torch.autocast(...)``, which Dynamo keeps as a context.

    It would trace the bare calls as what they do to the process, and lose them in later stages.
    """
    if not gm.graph.find_nodes(op="call_function", target=_enter_autocast):
        return
    gm.graph.on_generate_code(lambda _: _with_contexts)
    gm.recompile()


def _with_contexts(body: list[str]) -> list[str]:
    lines, depth = list[str](), 0
    for line in "".join(body).splitlines():
        pad = "    " * depth
        entered = ENTER.match(line.strip())
        if entered is not None:
            device, dtype, enabled, cache = entered[2].split(", ")
            given = f"{device}, dtype={dtype}, enabled={enabled}, cache_enabled={cache}"
            lines += [f"{pad}with torch.autocast({given}):", f"{pad}    pass"]
            depth += 1
        elif EXIT.match(line.strip()):
            depth -= 1
        else:
            lines.append(pad + line)
    return [line + "\n" for line in lines]
