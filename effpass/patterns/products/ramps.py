"""Ramps: tensors that count tokens, perhaps scaled and from elsewhere: ``(arange(n) + 1) / 8``."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.fx import Node

from effpass.axes.labels import opname
from effpass.axes.relation import arguments

aten = torch.ops.aten
RAMPS = (aten.arange.default, aten.arange.start, aten.arange.start_step)
COUNTS: Mapping[str, Callable[[tuple[float, float], float], tuple[float, float]]] = {
    "add": lambda line, n: (line[0] + n, line[1]),
    "sub": lambda line, n: (line[0] - n, line[1]),
    "rsub": lambda line, n: (n - line[0], -line[1]),
    "mul": lambda line, n: (line[0] * n, line[1] * n),
    "div": lambda line, n: (line[0] / n, line[1] / n),
}
PASSED = ("to", "_to_copy", "view", "reshape", "unsqueeze", "expand", "neg", "clone")


# a half counts so far without leaving a number out
FARTHEST = {torch.bfloat16: 256, torch.float16: 2048}
EXACT = (torch.int32, torch.int64, torch.float32, torch.float64)


def is_ramp(node: Node) -> bool:
    """Whether a tensor counts 0, 1, 2, ..., perhaps scaled and from elsewhere."""
    rounded = False
    while node.target not in RAMPS:
        source = node.args[0] if len(node.all_input_nodes) == 1 and node.args else None
        if not isinstance(source, Node) or not _steps(node, source):
            return False
        rounded = rounded or _dtype(node) in FARTHEST
        if rounded and opname(node) in COUNTS:
            return False
        node = source
    given = arguments(node)
    numbers = (given.get(name, 0) for name in ("start", "step"))
    return _exact(node) and all(isinstance(number, int | float) for number in numbers)


def _steps(node: Node, source: Node) -> bool:
    """Whether it changes what is counted by numbers alone, and without rounding to few digits."""
    if not _exact(node) or not _exact(source):
        return False
    if opname(node) in COUNTS:
        plain = len(node.args) == 2 and not node.kwargs
        return plain and isinstance(node.args[1], int | float)
    rounds = _dtype(source).is_floating_point and not _dtype(node).is_floating_point
    return opname(node) in PASSED and not rounds


def _dtype(node: Node) -> torch.dtype:
    return node.meta["val"].dtype


def _exact(node: Node) -> bool:
    """Whether the numbers are not rounded."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        return False
    plain = node.target is aten.arange.default or opname(node) in PASSED
    count = value.numel()
    short = isinstance(count, int) and count <= FARTHEST.get(value.dtype, 0)
    return value.dtype in EXACT or (plain and short)


def counted(node: Node) -> tuple[float, float]:
    """First value and step of a ramp."""
    if node.target in RAMPS:
        given = arguments(node)
        return float(given.get("start", 0)), float(given.get("step", 1))
    source, *numbers = node.args
    line = counted(source)  # type: ignore[arg-type]
    if opname(node) in COUNTS:
        return COUNTS[opname(node)](line, float(numbers[0]))  # type: ignore[arg-type]
    return (-line[0], -line[1]) if opname(node) == "neg" else line
