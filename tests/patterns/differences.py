"""Runs a program as it is and raised, without proof, and says where the two differ."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
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

import effpass
from effpass.graph.clean import clean
from effpass.patterns.raising import raise_ops
from tests.patterns.programs import Input, Program
from tests.tolerances import close

RECORDED = {"ffn": 1 << 20, "attention_softcap": 1 << 20}  # ops that leave their regions alone
ROWS = {torch.float64: "program_fp64", torch.float32: "program_fp32"}


@dataclass
class Outcome:
    """What was raised in one program, by idiom, and the nearest misses."""

    raised: Counter[str] = field(default_factory=Counter)
    ops: Counter[str] = field(default_factory=Counter)
    reasons: tuple[str, ...] = ()
    compared: int = 0  # gradients
    batches: int = 1  # batch sizes that were run


class Invalid(Exception):
    """The program itself does not run."""


class Differs(AssertionError):
    """The raised program computes something else; the text says what."""


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


def check(program: Program, symbolic: bool = False) -> Outcome:
    """Raises Differs where the raised program is not the program, Invalid where that cannot run."""
    expected = run(program.function(), program)
    graph, mode = capture(program, symbolic)
    clean(graph)
    outcome = _raised(graph)
    if not outcome.ops - Counter(RECORDED):
        return outcome  # the graph is the one that was captured
    _same(graph, expected, program, outcome)
    for other in other_batches(graph, program, mode):
        try:
            expected = run(program.function(), program, other)
        except Invalid:  # it names a batch size
            continue
        outcome.batches += 1
        _same(graph, expected, program, outcome, other)
    return outcome


def check_symbolic(program: Program) -> Outcome:
    """The same with a batch size that is not fixed; run with two."""
    return check(program, symbolic=True)


def check_compiled(program: Program) -> Outcome:
    """The same through ``torch.compile``, all of it; that runs the graph as it is in the end."""
    torch._dynamo.reset()
    compiled = torch.compile(program.function(), backend="effpass", options={"compiler": "eager"})
    outcome = Outcome()
    _same(compiled, run(program.function(), program), program, outcome)
    other = program.inputs[0].shape[0] + 1  # Dynamo makes the batch a symbol
    try:
        expected = run(program.function(), program, other)
    except Invalid:  # it names a batch size
        pass
    else:
        outcome.batches += 1
        _same(compiled, expected, program, outcome, other)
    for graph in effpass.report(compiled).graphs:
        outcome.raised.update(r.idiom for r in graph.raised)
        outcome.ops.update(r.op for r in graph.raised)
        outcome.reasons += tuple(m.reason for m in graph.misses)
    broken = [reason for reason in outcome.reasons if reason.startswith("it failed")]
    if broken:
        raise Differs(broken[0])
    return outcome


def _same(
    graph: Callable[..., Any],
    expected: Result,
    program: Program,
    outcome: Outcome,
    batch: int | None = None,
) -> None:
    try:
        actual = run(graph, program, batch)
    except Invalid as error:
        raise Differs(f"it does not run: {error}") from error
    compare(actual, expected, program, outcome)


def _raised(graph: GraphModule) -> Outcome:
    """Raises ops by structure alone; an idiom that breaks is a difference too."""
    try:
        raising = raise_ops(graph, proving=False, strict=True)
        graph.graph.lint()
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{where.filename.rpartition('/')[2]}:{where.lineno}"
        raise Differs(f"raising fails: {type(error).__name__}: {error} at {place}") from error
    return Outcome(
        Counter(r.idiom for r in raising.raised),
        Counter(r.op for r in raising.raised),
        tuple(m.reason for m in raising.misses),
    )


def other_batches(graph: GraphModule, program: Program, mode: FakeTensorMode) -> list[int]:
    """Another batch size that the captured graph must serve; none where it was fixed."""
    inputs = zip(graph.graph.find_nodes(op="placeholder"), program.inputs, strict=True)
    firsts = [node.meta["val"].shape[0] for node, given in inputs if given.batched]
    symbols = {n.node.expr for n in firsts if isinstance(n, torch.SymInt)}
    if len(symbols) != 1 or not all(isinstance(n, torch.SymInt) for n in firsts):
        return []
    (symbol,) = symbols
    other = program.inputs[0].shape[0] + 1
    guards = [guard.expr for guard in mode.shape_env.guards]  # type: ignore[union-attr]
    return [other] if symbol.is_Symbol and _hold(guards, symbol, other) else []


def _hold(guards: list[Any], symbol: Any, size: int) -> bool:
    return all(bool(guard.subs({symbol: size})) for guard in guards)


@dataclass
class Result:
    """Outputs, gradients of inputs (None: none, or backward fails) and written inputs."""

    outputs: list[Tensor]
    gradients: list[Tensor | None] | None
    arguments: list[Tensor]


def run(function: Callable[..., Any], program: Program, batch: int | None = None) -> Result:
    """One forward and backward pass; each element of each output counts differently."""
    given = program.arguments(batch)
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


def compare(actual: Result, expected: Result, program: Program, outcome: Outcome) -> None:
    """Outputs, gradients, and inputs that are written to. Raises Differs."""
    row = ROWS[program.dtype]
    if len(actual.outputs) != len(expected.outputs):
        raise Differs(f"{len(actual.outputs)} outputs, not {len(expected.outputs)}")
    for i, (a, e) in enumerate(zip(actual.outputs, expected.outputs, strict=True)):
        _close(a, e, row, f"output {i}")
        if a.requires_grad != e.requires_grad:
            raise Differs(f"output {i} requires_grad is {a.requires_grad}")
        if layout(a) != layout(e):
            raise Differs(f"output {i} has strides {a.stride()}, not {e.stride()}")
    if _shared(actual) != _shared(expected):
        raise Differs(f"of outputs and arguments share memory {_shared(actual)}")
    for i, (a, e) in enumerate(zip(actual.arguments, expected.arguments, strict=True)):
        _close(a, e, row, f"x{i} after the call")
    if expected.gradients is None:
        return
    if actual.gradients is None:
        raise Differs("backward fails")
    for i, (a, e) in enumerate(zip(actual.gradients, expected.gradients, strict=True)):
        _gradient(a, e, row, f"gradient of leaf {i}")
        outcome.compared += e is not None


def layout(value: Tensor) -> list[int]:
    """The dims that have more than one element, widest stride first."""
    dims = [i for i, n in enumerate(value.shape) if n > 1]
    return sorted(dims, key=lambda i: -value.stride(i))


def _shared(result: Result) -> list[tuple[int, int]]:
    """Which outputs share memory with which others, or with arguments."""
    held = [v.untyped_storage().data_ptr() for v in (*result.outputs, *result.arguments)]
    return [(i, j) for i in range(len(result.outputs)) for j in range(i) if held[i] == held[j]] + [
        (i, j)
        for i in range(len(result.outputs))
        for j in range(len(result.outputs), len(held))
        if held[i] == held[j]
    ]


def _gradient(a: Tensor | None, e: Tensor | None, row: str, name: str) -> None:
    if e is None or a is None:
        if (e is None) != (a is None):
            raise Differs(f"{name} is {'missing' if a is None else 'not None'}")
    elif e.isfinite().all():  # where eager divides by zero, so may others elsewhere
        _close(a, e, row, name)


def _close(a: Tensor, e: Tensor, row: str, name: str) -> None:
    if not e.is_floating_point():
        if a.shape != e.shape or not torch.equal(a, e):
            raise Differs(f"{name} is another")
        return
    try:
        close(a, e, row)
    except AssertionError as error:
        raise Differs(f"{name}: {error}") from error
