"""Judges values beyond tolerance: how exact can they be, computed in these dtypes?

A difference counts where eager itself would be exact. How exact that is, is seen by Monte Carlo
arithmetic: eager runs again, forward and back, while the result of every operation is moved by one
unit in the last place, up or down at random. Where there is one, the same program in float64 is the
truth that distances are taken from. A fused attention, say, takes the rounded ``dO . O`` from
``dO . v``, which eager's softmax does without rounding where a weight is exactly 1.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx import Node
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from effpass.axes.labels import argument, opname
from effpass.graph.duplicates import merge_duplicates
from effpass.patterns.softmax.softmax import softmax
from tests.patterns.programs import Program
from tests.patterns.runs import Invalid, Result, capture, run_on
from tests.tolerances import FARTHER

Part = Literal["outputs", "gradients", "arguments"]
NARROW = re.compile(r"torch\.(bfloat16|float16)|\.(half|bfloat16)\(")
ROUNDED = {torch.float32: "program_rounded_fp32", torch.bfloat16: "program_rounded_bf16"}
MOVES = 8
EXACT = {  # what takes values as they are: two that are equal stay so
    *("where", "masked_fill", "clone", "_to_copy", "copy", "cat", "stack", "index", "gather"),
    *("index_select", "select_scatter", "slice_scatter", "select_backward", "slice_backward"),
    *("full", "full_like", "new_full", "scalar_tensor", "arange", "ones", "ones_like", "fill"),
    *("tril", "triu", "flip", "roll", "constant_pad_nd", "repeat", "index_put", "new_ones"),
    *("amax", "amin", "max", "min", "maximum", "minimum", "relu", "clamp", "clamp_min"),
    *("abs", "neg", "threshold_backward", "unfold_backward", "empty_like", "new_empty"),
}


@dataclass
class Conditioning:
    """How exactly eager computes the values of one program (with ``batch`` rows)."""

    program: Program
    batch: int | None = None

    def accepts(self, part: Part, i: int, actual: Tensor, expected: Tensor) -> bool:
        """Whether a value is about as near to the truth as eager's, or as eager's is to itself."""
        a, e = actual.detach().double(), expected.detach().double()
        if not torch.equal(a.isfinite(), e.isfinite()):
            return False
        finite = e.isfinite()
        held = [_value(result, part, i, finite) for result in self.moved]
        center = None if self.truth is None else _value(self.truth, part, i, finite)
        center = e[finite] if center is None else center
        own = max(_distance(v, center) for v in (e[finite], *held) if v is not None)
        ulp = torch.finfo(expected.dtype).eps * e[finite].abs().max().item()
        return _distance(a[finite], center) <= FARTHER * own + ulp

    @cached_property
    def truth(self) -> Result | None:
        """The program in float64, on the same numbers; None where it names narrower dtypes."""
        if self.program.dtype is torch.float64 or NARROW.search(self.program.text):
            return None
        given = [_detached(x, x.double()) for x in self.program.arguments(self.batch)]
        text = self.program.text.replace("torch.float32", "torch.float64")
        return _attempt(replace(self.program, text=text), given)

    @cached_property
    def moved(self) -> list[Result]:
        """Eager, each operation rounded at random."""
        found = []
        for seed in range(MOVES):
            with _Rounding(seed):
                found.append(_attempt(self.program, self.program.arguments(self.batch)))
        return [result for result in found if result is not None]


class _Rounding(TorchDispatchMode):
    """Moves what is computed by one unit in the last place; 0 and infinity stay."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        views = any(returned.alias_info is not None for returned in func._schema.returns)
        if views or func._opname in EXACT:
            return made
        return pytree.tree_map_only(Tensor, self._moved, made)

    def _moved(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        up = torch.rand(x.shape, generator=self.generator) < 0.5
        moved = torch.nextafter(x, torch.where(up, torch.inf, -torch.inf).to(x.dtype))
        return moved.where((x != 0) & moved.isfinite(), x)


@cache
def rounded(program: Program) -> str | None:
    """The row for a program that casts to a narrower dtype than its own; None for others."""
    try:
        graph, _ = capture(program)
    except Invalid:
        return None
    values = [node.meta.get("val") for node in graph.graph.nodes]
    found = {v.dtype for v in values if isinstance(v, Tensor) and v.is_floating_point()}
    narrowest = max(found, key=lambda dtype: torch.finfo(dtype).eps, default=program.dtype)
    return None if narrowest is program.dtype else ROUNDED.get(narrowest)


@cache
def unguarded(program: Program) -> bool:
    """Whether it divides exponentials by their sum without taking away the largest score."""
    try:
        graph, _ = capture(program)
    except Invalid:
        return False
    merge_duplicates(graph.graph)
    return any(
        opname(node) == "div" and softmax(node) is not None and not _guarded(node)
        for node in graph.graph.nodes
    )


def _guarded(division: Node) -> bool:
    exponent = argument(argument(division, 0), 0)
    taken = argument(exponent, 1) if opname(exponent) == "sub" else None
    pending = [taken] if isinstance(taken, Node) else []
    for _ in range(4):
        if any(opname(node) in ("amax", "max") for node in pending):
            return True
        pending = [source for node in pending for source in node.all_input_nodes]
    return False


def _attempt(program: Program, given: list[Tensor]) -> Result | None:
    try:
        return run_on(program.function(), given)
    except Invalid:
        return None


def _value(result: Result, part: Part, i: int, finite: Tensor) -> Tensor | None:
    """One value, where eager's is finite; None where this one is not, or there is none."""
    values = getattr(result, part)
    found = None if values is None else values[i]
    if found is None or found.shape != finite.shape:
        return None
    found = found.detach().double()[finite]
    return found if bool(found.isfinite().all()) else None


def _distance(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


def _detached(x: Tensor, value: Tensor) -> Tensor:
    """``value`` as an argument in place of ``x``."""
    if not x.is_floating_point():
        return x
    return value.detach().requires_grad_(x.requires_grad)
