"""Runs programs: captured as the backend does, or forward and backward on their arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    ShapeEnv,
    StatelessSymbolicContext,
)

from tests.patterns.programs import Input, Program


class Invalid(Exception):
    """The program itself does not run."""


def capture(program: Program, symbolic: bool = False) -> tuple[GraphModule, FakeTensorMode]:
    """The graph of a program, as the backend captures it but without Dynamo."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    pairs = zip(program.inputs, program.arguments(), strict=True)
    fakes = [_fake(mode, i, x, value, symbolic) for i, (x, value) in enumerate(pairs)]
    try:
        with mode, grad_mode_kept():
            return make_fx(program.function(), pre_dispatch=True)(*fakes), mode
    except (RuntimeError, IndexError, ValueError, TypeError) as error:
        raise Invalid(str(error)) from error


def _fake(mode: FakeTensorMode, i: int, given: Input, value: Tensor, symbolic: bool) -> Tensor:
    if not symbolic or not given.batched:
        return mode.from_tensor(value, static_shapes=True)
    dims = [DimDynamic.DUCK] + [DimDynamic.STATIC] * (value.dim() - 1)
    context = StatelessSymbolicContext(dynamic_sizes=dims)
    return mode.from_tensor(value, symbolic_context=context, source=ConstantSource(f"x{i}"))


@dataclass
class Result:
    """Outputs, gradients of inputs (None: none, or backward fails) and written inputs."""

    outputs: list[Tensor]
    gradients: list[Tensor | None] | None
    arguments: list[Tensor]


def run(function: Callable[..., Any], program: Program, batch: int | None = None) -> Result:
    """One forward and backward pass; each element of each output counts differently."""
    return run_on(function, program.arguments(batch))


def run_on(function: Callable[..., Any], given: list[Tensor]) -> Result:
    """The same on other arguments."""
    try:
        with grad_mode_kept(), memory_filled():
            outputs = list(function(*given))
    except (RuntimeError, IndexError, ValueError, TypeError) as error:
        raise Invalid(str(error)) from error
    leaves = [x for x in given if x.requires_grad]
    wanted = [o for o in outputs if o.requires_grad]
    if not wanted or not leaves:
        return Result(outputs, [None] * len(leaves), given)
    try:
        gradients = torch.autograd.grad(
            [_weighted(o) for o in wanted], leaves, allow_unused=True, retain_graph=False
        )
    except RuntimeError:  # e.g. what backward needs was written to
        return Result(outputs, None, given)
    return Result(outputs, list(gradients), given)


@contextmanager
def grad_mode_kept() -> Iterator[None]:
    """What a program that breaks off in the middle has switched off, is on again."""
    before = torch.is_grad_enabled()
    try:
        yield
    finally:
        torch.set_grad_enabled(before)


@contextmanager
def memory_filled() -> Iterator[None]:
    """New memory holds NaN: what reads it is seen to do so."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def _weighted(output: Tensor) -> Tensor:
    weights = torch.linspace(0.5, 1.5, output.numel(), dtype=torch.float64)
    return (output.double() * weights.view(output.shape)).sum()
