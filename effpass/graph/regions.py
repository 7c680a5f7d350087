"""The regions of a graph: in each, whether gradients are recorded and what autocast does."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.fx import GraphModule, Node

from effpass.graph.clean import number_regions

DEVICES = ("cpu", "cuda")


@dataclass(frozen=True)
class Modes:
    """Gradients on or off (at the start of a graph: taken to be on); autocast dtypes by device."""

    grad: bool = True
    autocast: dict[str, torch.dtype] = field(default_factory=dict)


def region(node: Node) -> int:
    """The number of a node's region."""
    return node.meta["effpass_region"]


def region_modes(gm: GraphModule) -> list[Modes]:
    """Numbers the regions of a graph, and answers the modes of each."""
    number_regions(gm)
    found, outside = [_ambient()], {}
    for node in gm.graph.nodes:
        if region(node) < len(found):
            continue
        before = found[-1]
        if node.target is _enter_autocast:
            outside[node] = before.autocast
            found.append(Modes(before.grad, before.autocast | _entered(node)))
            if not node.args[2]:
                del found[-1].autocast[str(node.args[0])]
        elif node.target is _exit_autocast:
            found.append(Modes(before.grad, outside[node.args[0]]))  # type: ignore[index]
        else:
            found.append(Modes(bool(node.args[0]), before.autocast))
    return found


def _ambient() -> Modes:
    on = {d: torch.get_autocast_dtype(d) for d in DEVICES if torch.is_autocast_enabled(d)}
    return Modes(True, on)


def _entered(node: Node) -> dict[str, torch.dtype]:
    device, dtype, *_ = node.args
    given = dtype if isinstance(dtype, torch.dtype) else torch.get_autocast_dtype(str(device))
    return {str(device): given}
