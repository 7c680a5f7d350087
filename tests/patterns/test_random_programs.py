"""Random programs, raised by structure alone, compute what eager does: outputs and gradients.

More of them: ``python -m tests.patterns.fuzz``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import Graph, Node

from effpass.patterns import raising
from effpass.patterns.proposal import Idiom, Proposal
from tests.patterns import runs
from tests.patterns.conditioning import Conditioning
from tests.patterns.differences import (
    CONDITIONED,
    ROUNDED,
    UNGUARDED,
    VANISHED,
    Comparison,
    Differs,
    Outcome,
    check,
    check_compiled,
    check_symbolic,
)
from tests.patterns.fuzz import Tally, one
from tests.patterns.mutants import mutant
from tests.patterns.pieces.everything import RECIPE
from tests.patterns.programs import Input, Program, write
from tests.patterns.reduce import reduced

SEEDS = st.binary(min_size=8, max_size=8).map(bytes.hex)
COMMON = ("unrolled loop", "causal convolution", "attention")
INPUTS = (Input((2, 8, 8), batched=True), Input((2, 8, 8), layout="strided", batched=True))
FOUND = {  # once wrong, made small
    "a causal mask whose fill is no large number": (
        "def program(x0, x1):\n"
        "    S = x0 @ x1.mT\n"
        "    S = S.masked_fill(torch.ones(8, 8, dtype=torch.bool).triu(1), -3.0)\n"
        "    return (torch.softmax(S, -1) @ x1,)\n"
    ),
    "rows that see nothing, in training": (
        "def program(x0, x1):\n"
        "    S = (x0[:, :, None] * x1[:, None]).sum(-1) * 0.5\n"
        "    S = torch.where(torch.ones(8, 8, dtype=torch.bool).triu(0), -1e9, S)\n"
        "    return ((torch.softmax(S, 2)[..., None] * x1[:, None]).sum(2),)\n"
    ),
    "a write into what an op saves for its gradient": (
        "def program(x0, x1):\n"
        "    y = torch.softmax(x0 @ x1.mT, 2) @ x1\n"
        "    with torch.no_grad():\n"
        "        z = y * 1\n"
        "    y[..., 0] = 0\n"
        "    return (y, z)\n"
    ),
    "weights of attention that are rounded": (
        "def program(x0, x1):\n"
        "    W = torch.softmax(x0 @ x1.mT, -1).to(torch.bfloat16).to(x0.dtype)\n"
        "    return (W @ x1,)\n"
    ),
    "exponentials of scores from which a number is taken": (
        "def program(x0, x1):\n"
        "    S = x0 @ x1.mT\n"
        "    W = (S - 1).exp() / (S - 1).exp().sum(-1, keepdim=True)\n"
        "    return (W @ x1,)\n"
    ),
    "queries that a view behind attention cuts in two": (
        "def program(x0, x1):\n"
        "    S = (x0[:, :, None] * x1[:, None]).sum(-1) * 0.5\n"
        "    y = (torch.softmax(S, 2)[..., None] * x1[:, None]).sum(2)\n"
        "    return (y.transpose(0, 1).reshape(2, 8, 8),)\n"
    ),
    "a fill that changes its sign": (
        "def program(x0, x1):\n"
        "    S = x0 @ x1.mT\n"
        "    later = torch.ones(8, 8, dtype=torch.bool).triu(2)\n"
        "    S = torch.where(later, torch.finfo(S.dtype).min, S) * -0.7\n"
        "    return (torch.softmax(S, -1) @ x1,)\n"
    ),
    "a tap that is a constant": (
        "def program(x0, x1):\n"
        "    w = torch.arange(8, dtype=x0.dtype)\n"
        "    return (x0 * x1[0, 0] + F.pad(x0, (0, 0, 1, -1)) * w,)\n"
    ),
}
# Right, and beyond the rows of tolerances: what they are judged by.
HARD = {
    CONDITIONED: (
        "def program(x0, x1):\n"
        "    W = torch.softmax(x0 @ x1.mT * 8000, -1)\n"
        "    return (W @ (x1 * 1000),)\n"
    ),
    ROUNDED: (
        "def program(x0, x1):\n"
        "    u = x0.to(torch.float32).to(x0.dtype)\n"
        "    dt = F.softplus(u @ x1[0])\n"
        "    h, ys = torch.zeros((), dtype=x0.dtype), []\n"
        "    for t in range(8):\n"
        "        new = (dt[:, t] * u[:, t])[..., None] * x1[:, t, None]\n"
        "        h = h * torch.exp(dt[:, t, :, None] * -x1[0].exp()) + new\n"
        "        ys.append((h * x1[:, t, None]).sum(-1))\n"
        "    return (torch.stack(ys, 1),)\n"
    ),
    UNGUARDED: (
        "def program(x0, x1):\n"
        "    S = x0 @ x1.mT * 100\n"
        "    return ((S.exp() / S.exp().sum(-1, keepdim=True)) @ x1,)\n"
    ),
    VANISHED: (
        "def program(x0, x1):\n"
        "    P = torch.sigmoid(x0 - 300).cumprod(1)\n"
        "    return (P * torch.cumsum(x1 / P, 1),)\n"
    ),
}


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    """torch logs what it also raises, where a program does not run."""
    logging.disable()
    yield
    logging.disable(logging.NOTSET)


def run(examples: int, start: int) -> Tally:
    """Checks so many seeds; the assertion shows every failure as a small program."""
    tally, failures = Tally(), []

    @seeded(start)
    @settings(
        max_examples=examples,
        phases=[Phase.generate],
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(SEEDS)
    def each(seed: str) -> None:
        failure = one(seed, tally)
        if failure:
            failures.append(f"{seed}: {failure[1]}\n{failure[0]}")

    each()
    assert not failures, "\n".join(failures)
    return tally


def test_programs_raised_equal_eager() -> None:
    tally = run(100, start=0)
    counts = tally.counts
    assert counts["programs"] > 120 and counts["invalid"] <= counts["programs"] // 20
    assert counts["raised"] >= counts["programs"] * 0.3
    assert counts["with mistakes"] >= counts["programs"] * 0.3
    assert counts["gradients"] >= counts["raised"]
    assert counts["other batches"] and counts["raised in check_compiled"]
    assert counts["mutant: raised in check"]


@pytest.mark.slow
@pytest.mark.parametrize("start", [1, 2, 3])
def test_many_programs_raised_equal_eager(start: int) -> None:
    tally = run(500, start)
    counts = tally.counts
    assert counts["raised"] >= counts["programs"] * 0.3
    assert not {name for name in COMMON if tally.idioms[name] < 5}


@pytest.mark.parametrize("name", FOUND)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_programs_that_were_once_wrong(name: str, dtype: torch.dtype) -> None:
    for way in (check, check_symbolic, check_compiled):
        way(Program(FOUND[name], INPUTS, dtype))


@pytest.mark.parametrize("name", HARD)
def test_what_holds_beyond_the_rows_is_counted(name: str) -> None:
    outcome = check(Program(HARD[name], INPUTS))
    assert outcome.raised and set(outcome.judged) == {name}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("leaf", [0, 1])
def test_conditioning_excuses_rounding_alone(dtype: torch.dtype, leaf: int) -> None:
    program = Program(HARD[CONDITIONED], INPUTS, dtype)
    gradients = runs.run(program.function(), program).gradients
    assert gradients is not None and gradients[leaf] is not None
    expected = gradients[leaf]
    judge, wrong = Conditioning(program), expected.clone()
    wrong[0, 0, 0] += 1e11 * torch.finfo(dtype).eps
    assert judge.accepts("gradients", leaf, expected, expected)
    assert not judge.accepts("gradients", leaf, wrong, expected)
    wrong[0, 0, 0] = torch.nan
    assert not judge.accepts("gradients", leaf, wrong, expected)


def test_only_eager_may_be_nan_and_only_unguarded() -> None:
    program = Program(HARD[UNGUARDED], INPUTS)
    eager = runs.run(program.function(), program)
    finite = replace(eager, outputs=[o.nan_to_num() for o in eager.outputs], gradients=None)
    assert eager.outputs[0].isnan().any()
    outcome = Outcome()
    compare(program, outcome, finite, replace(eager, gradients=None))
    assert set(outcome.judged) == {UNGUARDED}
    with pytest.raises(Differs, match="different places"):
        compare(program, outcome, replace(eager, gradients=None), finite)
    guarded = HARD[UNGUARDED].replace("100\n", "100\n    S = S - S.amax(-1, keepdim=True)\n")
    with pytest.raises(Differs, match="different places"):
        compare(Program(guarded, INPUTS), outcome, finite, replace(eager, gradients=None))


def compare(program: Program, outcome: Outcome, actual: runs.Result, expected: runs.Result) -> None:
    Comparison(program, outcome, Conditioning(program)).check(actual, expected)


def _sums(graph: Graph) -> Iterable[Node]:
    return graph.find_nodes(op="call_function", target=torch.ops.aten.cumsum.default)


def _mistaken(node: Node) -> Proposal:
    def build(x: Tensor) -> list[Tensor]:
        return [x.sum(1, keepdim=True) - x]

    return Proposal("cumsum", (node.args[0],), (node,), build)  # type: ignore[arg-type]


def test_a_wrong_idiom_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (
        "def program(x0, x1):\n"
        "    a = x1 * 2\n"
        "    b = x0.cumsum(1)\n"
        "    c = torch.tanh(b)\n"
        "    return (c, a)\n"
    )
    inputs = (Input((2, 5, 3), batched=True), Input((4,)))
    program = Program(text, inputs)
    assert not check(program).raised
    monkeypatch.setattr(raising, "IDIOMS", (Idiom("wrong", _sums, _mistaken),))
    for way in (check, check_symbolic, check_compiled):
        with pytest.raises(Differs, match="output 0: off by"):
            way(program)
    small = reduced(program, lambda p: _fails(p), 100)
    assert "x0.cumsum(1)" in small.text
    assert "tanh" not in small.text and "x1" not in small.text


def _fails(program: Program) -> bool:
    try:
        check(program)
    except Differs:
        return True
    return False


def test_a_seed_gives_one_program_and_seeds_give_many() -> None:
    texts = [str(write(RECIPE, str(i))) for i in range(30)]
    assert texts == [str(write(RECIPE, str(i))) for i in range(30)]
    assert len(set(texts)) == 30


def test_mutants_are_other_programs_that_run() -> None:
    programs = [write(RECIPE, str(i)) for i in range(20)]
    mutants = [mutant(p, "0") for p in programs]
    made = [(m, p) for m, p in zip(mutants, programs, strict=True) if m is not None]
    assert len(made) >= 10
    for changed, program in made:
        assert len(changed.function()(*changed.arguments())) == len(
            program.function()(*program.arguments())
        )
