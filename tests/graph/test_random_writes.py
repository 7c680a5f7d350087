"""Random programs in functional form have the outputs and the gradients of eager."""

import pytest
import torch
from hypothesis import HealthCheck, Phase, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from effpass.graph.functional import functional
from effpass.graph.storages import Storages
from effpass.graph.writes import writes
from tests.graph.random_writes import Rejected, run
from tests.graph.rewritten import Checked, gradients, leaf, same

X, Y = torch.linspace(-1, 1, 12).view(4, 3).sin(), torch.linspace(-2, 2, 24).view(2, 3, 4).cos()
programs = st.lists(st.integers(0, 10**6), min_size=10, max_size=80)
HEALTH = [HealthCheck.filter_too_much, HealthCheck.too_slow, HealthCheck.data_too_large]


def check(choices: list[int]) -> None:
    """Traces one program, rewrites it, and compares; rejects those that eager rejects."""
    mine, theirs = [leaf(X), leaf(Y)], [leaf(X), leaf(Y)]
    try:
        expected = run(choices, *theirs)
        gradients(expected, theirs)
    except (Rejected, RuntimeError):  # eager will not run or differentiate it
        assume(False)
        raise
    traced = make_fx(lambda x, y: run(choices, x, y), pre_dispatch=True, tracing_mode="fake")
    try:
        gm = traced(*mine)
    except Rejected as error:
        # fake tensors refuse every write to overlapping memory, eager only some of them
        assert "refers to a single memory location" in str(error.__cause__)
        assume(False)
        raise
    live = sum(len(s.writes) for s in Storages(gm) if s.live)
    before = sum(bool(writes(node)) for node in gm.graph.nodes)
    assert functional(gm) == live
    gm.graph.lint()
    gm.recompile()
    assert sum(bool(writes(node)) for node in gm.graph.nodes) == before - live
    theirs = [leaf(X), leaf(Y)]
    same(gm(*mine), mine, run(choices, *theirs), theirs)
    with torch.no_grad():
        Checked(gm).run(X.clone(), Y.clone())


@settings(max_examples=150, deadline=None, suppress_health_check=HEALTH)
@given(programs)
def test_random_programs(choices: list[int]) -> None:
    check(choices)


@pytest.mark.slow
@settings(max_examples=3000, deadline=None, suppress_health_check=HEALTH, phases=(Phase.generate,))
@given(programs)
def test_many_random_programs(choices: list[int]) -> None:
    check(choices)


@settings(max_examples=60, deadline=None)
@given(
    st.permutations(range(5)),
    st.integers(0, 4),
    st.lists(st.integers(0, 4), min_size=5, max_size=8),
    st.sampled_from([0, 1, 2]),
    st.booleans(),
)
def test_buffers_filled_in_any_order(
    order: list[int], left_out: int, reads: list[int], dim: int, wide: bool
) -> None:
    def fill(x: Tensor, y: Tensor) -> list[Tensor]:
        buffer = torch.zeros(5, 5, 5)[: x.shape[0]] if left_out else x * 2
        for time, index in enumerate(order[left_out // 2 :]):
            value = x.select(dim, index) * buffer.select(dim, reads[time]).clone()
            if wide:
                buffer.narrow(dim, index, 1).copy_(value.unsqueeze(dim))
            else:
                buffer.select(dim, index).copy_(value + y.sum())
        again = buffer.select(dim, reads[-1]).clone()
        buffer.select(dim, reads[-1]).add_(again)
        return [buffer * 1, again]

    x = torch.linspace(-1, 1, 125).view(5, 5, 5).cos()
    mine, theirs = [leaf(x), leaf(Y)], [leaf(x), leaf(Y)]
    gm = make_fx(fill, pre_dispatch=True, tracing_mode="fake")(*mine)
    assert functional(gm) == 1 + len(order[left_out // 2 :])
    gm.graph.lint()
    gm.recompile()
    same(gm(*mine), mine, fill(*theirs), theirs)
    with torch.no_grad():
        Checked(gm).run(x.clone(), Y.clone())
