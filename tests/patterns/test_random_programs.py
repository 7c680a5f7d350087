"""Random programs, raised by structure alone, compute what eager does: outputs and gradients.

More of them: ``python -m tests.patterns.fuzz``.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import Graph, Node

from effpass.patterns import raising
from effpass.patterns.proposal import Idiom, Proposal
from tests.patterns.differences import Differs, check, check_compiled, check_symbolic
from tests.patterns.fuzz import Tally, one
from tests.patterns.mutants import mutant
from tests.patterns.pieces.everything import RECIPE
from tests.patterns.programs import Input, Program, write
from tests.patterns.reduce import reduced

SEEDS = st.binary(min_size=8, max_size=8).map(bytes.hex)
COMMON = ("unrolled loop", "causal convolution", "attention")
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
    inputs = (Input((2, 8, 8), batched=True), Input((2, 8, 8), layout="strided", batched=True))
    for way in (check, check_symbolic, check_compiled):
        way(Program(FOUND[name], inputs, dtype))


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
