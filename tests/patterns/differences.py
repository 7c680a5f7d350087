"""Runs a program as it is and raised, without proof, and says where the two differ."""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx import GraphModule

import effpass
from effpass.graph.clean import clean
from effpass.patterns.raising import raise_ops
from tests.patterns.conditioning import Conditioning, Part, rounded, unguarded
from tests.patterns.programs import Program
from tests.patterns.runs import Invalid, Result, capture, run
from tests.tolerances import close

RECORDED = {"ffn": 1 << 20, "attention_softcap": 1 << 20}  # ops that leave their regions alone
ROWS = {torch.float64: "program_fp64", torch.float32: "program_fp32"}
# in the tally, what holds a value that is beyond its row
ROUNDED = "judged by the dtype of a cast"
CONDITIONED = "judged by conditioning"
UNGUARDED = "NaN of an unguarded softmax in eager alone"
DOUBLE = "float32 alone: equal in float64"
COARSE = 1e-2  # of the largest value: how far float32 may be where float64 agrees
VANISHED = "NaN of a quotient of running products in eager alone"


@dataclass
class Outcome:
    """What was raised in one program, by idiom, and the nearest misses."""

    raised: Counter[str] = field(default_factory=Counter)
    ops: Counter[str] = field(default_factory=Counter)
    reasons: tuple[str, ...] = ()
    compared: int = 0  # gradients
    batches: int = 1  # batch sizes that were run
    judged: Counter[str] = field(default_factory=Counter)  # values beyond tolerance, by what held


class Differs(AssertionError):
    """The raised program computes something else; the text says what."""


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
    Comparison(program, outcome, Conditioning(program, batch)).check(actual, expected)


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
class Comparison:
    """Outputs, gradients, and inputs that are written to, against eager's."""

    program: Program
    outcome: Outcome
    conditioning: Conditioning

    def check(self, actual: Result, expected: Result) -> None:
        """Raises Differs."""
        if len(actual.outputs) != len(expected.outputs):
            raise Differs(f"{len(actual.outputs)} outputs, not {len(expected.outputs)}")
        for i, (a, e) in enumerate(zip(actual.outputs, expected.outputs, strict=True)):
            self._close(a, e, "outputs", i, f"output {i}")
            if a.requires_grad != e.requires_grad:
                raise Differs(f"output {i} requires_grad is {a.requires_grad}")
            if layout(a) != layout(e):
                raise Differs(f"output {i} has strides {a.stride()}, not {e.stride()}")
        if _shared(actual) != _shared(expected):
            raise Differs(f"of outputs and arguments share memory {_shared(actual)}")
        for i, (a, e) in enumerate(zip(actual.arguments, expected.arguments, strict=True)):
            self._close(a, e, "arguments", i, f"x{i} after the call")
        if expected.gradients is None:
            return
        if actual.gradients is None:
            raise Differs("backward fails")
        for i, (a, e) in enumerate(zip(actual.gradients, expected.gradients, strict=True)):
            self._gradient(a, e, i)
            self.outcome.compared += e is not None

    def _gradient(self, a: Tensor | None, e: Tensor | None, i: int) -> None:
        name = f"gradient of leaf {i}"
        if e is None or a is None:
            if (e is None) != (a is None):
                raise Differs(f"{name} is {'missing' if a is None else 'not None'}")
        elif e.isfinite().all():  # where eager divides by zero, so may others elsewhere
            self._close(a, e, "gradients", i, name)

    def _close(self, a: Tensor, e: Tensor, part: Part, i: int, name: str) -> None:
        if not e.is_floating_point():
            if a.shape != e.shape or not torch.equal(a, e):
                raise Differs(f"{name} is another")
            return
        try:
            close(a, e, ROWS[self.program.dtype])
        except AssertionError as error:
            if a.shape != e.shape or a.dtype != e.dtype:
                raise Differs(f"{name}: {error}") from error
            judged = self._judged(a.detach(), e.detach(), part, i)
            if judged is None:
                raise Differs(f"{name}: {error}") from error
            self.outcome.judged[judged] += 1

    def _judged(self, a: Tensor, e: Tensor, part: Part, i: int) -> str | None:
        """By what a value holds that is beyond tolerance; None for nothing."""
        elsewhere = a.isfinite() != e.isfinite()
        if elsewhere.any():
            excuse = UNGUARDED if unguarded(self.program) else None
            if self.outcome.raised["cumulative recurrence"]:
                excuse = VANISHED
            if not e[elsewhere].isnan().all() or excuse is None:
                return None
            rest = self._judged(a.where(~elsewhere, e), e, part, i)
            return None if rest is None else excuse
        rows = [ROWS[self.program.dtype], rounded(self.program)]
        if any(row is not None and _within(a, e, row) for row in rows):
            return ROUNDED
        if self.conditioning.accepts(part, i, a, e):
            return CONDITIONED
        coarse = bool((a - e).abs().max() <= COARSE * e.abs().max())
        return DOUBLE if coarse and _equal_in_double(self.program) else None


@cache
def _equal_in_double(program: Program) -> bool:
    """Whether the same program of float64 inputs, raised, is eager's: the mathematics is right."""
    if program.dtype is not torch.float32:
        return False
    try:
        check(replace(program, dtype=torch.float64))
    except (Differs, Invalid):
        return False
    return True


def _within(a: Tensor, e: Tensor, row: str) -> bool:
    try:
        close(a, e, row)
    except AssertionError:
        return False
    return True


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
