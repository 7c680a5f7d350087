"""Every test model, with all idioms and proof: the ops expected, and eager's numbers.

Spellings are raised to their op, so many times, and nothing less specific is left; near misses are
not raised, for the reasons in the golden table. Outputs and gradients are eager's, always.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from effpass.ops import OPS
from tests.patterns import misses
from tests.patterns.cases import (
    EITHER,
    LATER,
    NEAR_MISSES,
    SOFTCAP,
    SPELLINGS,
    inputs,
    named,
)
from tests.patterns.raising import Raiser, leaf, tensors, total
from tests.patterns.spellings.spelling import NearMiss, Spelling
from tests.tolerances import close

# torch's own: Dynamo instantiates a model's autograd.Function, which torch deprecates
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

SCANS = ("selective_scan", "ssd_scan", "linear_recurrence")
# what is raised to another op than the most specific one, and why
OTHERWISE = {
    "retention": ("linear_recurrence", "its decay is a buffer: whether it has a logarithm is open"),
    "last_token_only": ("linear_recurrence", "only the last state is read, by no contraction"),
}
FROM_TWO = {"NegativePad"}  # it cuts off more tokens than one
# loops over chunks whose last one is shorter, at some lengths: not raised, for this reason
UNCLEAR = "it is unclear which tensor reads the state"
SHORT_CHUNKS = {("chunk_loop", 16), ("nothing_wrong_in_a_loop", 5)}
ROWS = {
    torch.float64: ("raised_fp64", "raised_fp64"),
    torch.float32: ("model_fp32", "raised_gradient_fp32"),
    torch.bfloat16: ("model_bf16", "model_bf16"),
}
SLOW = pytest.mark.slow
Model = Spelling | NearMiss


def params(models: list[Any]) -> list[Any]:
    """The models as parameters; those that take long are marked."""
    return [pytest.param(m, marks=SLOW if m.name in LATER else (), id=named(m)) for m in models]


def compared(model: Model, length: int, dtype: torch.dtype = torch.float32) -> Raiser:
    """Outputs and gradients of the raised model are eager's; answers what was raised."""
    mine = model.make().to(dtype)
    theirs = copy.deepcopy(mine)
    given, wanted = ([converted(x, dtype) for x in inputs(model, length)] for _ in range(2))
    raiser = Raiser(mine)
    torch.manual_seed(1)
    actual = tensors(raiser(*given))
    torch.manual_seed(1)
    expected = tensors(theirs(*wanted))
    value_row, gradient_row = ROWS[dtype]
    for a, e in zip(actual, expected, strict=True):
        close(a, e, value_row)
    total(actual).backward()
    total(expected).backward()
    pairs = zip([*given, *mine.parameters()], [*wanted, *theirs.parameters()], strict=True)
    for a, e in ((a.grad, e.grad) for a, e in pairs):
        assert (a is None) == (e is None)
        if a is not None and e is not None:
            close(a, e, gradient_row)
    return raiser


def converted(x: Tensor, dtype: torch.dtype) -> Tensor:
    return leaf(x.to(dtype) if x.is_floating_point() else x)


def found(raiser: Raiser, op: str) -> int:
    return raiser.nodes(op) if op in OPS else raiser.count(op)


def check_ops(raiser: Raiser, spelling: Spelling, graphs: int = 1) -> None:
    """Its op, as often as it says, in every graph; and no scan of another kind."""
    op = OTHERWISE[spelling.name][0] if spelling.name in OTHERWISE else spelling.op
    assert len(raiser.graphs) == graphs
    assert found(raiser, op) == spelling.count * graphs, raiser.reasons
    others = {scan: found(raiser, scan) for scan in SCANS if scan != op and op in SCANS}
    assert not any(others.values()), others


def check_raised(spelling: Spelling, length: int) -> None:
    raiser = compared(spelling, length)
    if (spelling.name, length) in SHORT_CHUNKS:
        assert raiser.reasons == [UNCLEAR]
    else:
        check_ops(raiser, spelling)


@pytest.mark.parametrize("spelling", params(SPELLINGS))
def test_a_spelling_is_raised(spelling: Spelling) -> None:
    check_raised(spelling, 5)


@SLOW
@pytest.mark.parametrize("spelling", params(SPELLINGS))
def test_a_longer_one_too(spelling: Spelling) -> None:
    check_raised(spelling, 16)


@SLOW
@pytest.mark.parametrize("length", [1, 2])
@pytest.mark.parametrize("spelling", params([s for s in SPELLINGS if s.multiple == 1]))
def test_few_tokens_are_right(spelling: Spelling, length: int) -> None:
    """Raised or not."""
    if length == 1 and spelling.name in FROM_TWO:
        pytest.skip("eager itself cannot")
    compared(spelling, length)


@pytest.mark.parametrize("model", params(EITHER))
def test_what_may_be_raised_is_right(model: Model) -> None:
    """In float64, since fills of -10000 round the scores beside them."""
    compared(model, 5, torch.float64)


@pytest.mark.parametrize("near_miss", params(NEAR_MISSES))
def test_a_near_miss_is_not_raised(near_miss: NearMiss) -> None:
    row = misses.row(compared(near_miss, misses.LENGTH))
    assert row == misses.expected()[near_miss.name]
    assert near_miss.around or not row["raised"]


@SLOW
@pytest.mark.parametrize("near_miss", params(NEAR_MISSES))
def test_a_longer_near_miss_is_not_raised(near_miss: NearMiss) -> None:
    row = misses.row(compared(near_miss, 16))
    assert near_miss.around or not row["raised"]


def test_the_golden_table_has_no_other_rows() -> None:
    assert sorted(misses.expected()) == sorted(model.name for model in NEAR_MISSES)


def test_every_list_has_its_models() -> None:
    """Or all of the above would hold of nothing."""
    names = {model.name for model in [*SPELLINGS, *EITHER, *NEAR_MISSES]}
    raised = {*OPS, "sdpa", "ffn"} - {"varlen_attention"}  # that is for packed rows
    assert {s.op for s in SPELLINGS} == raised
    assert names >= LATER | set(OTHERWISE) and SOFTCAP and EITHER


@pytest.mark.parametrize("model", params(SOFTCAP))
def test_a_soft_cap_is_recorded(model: NearMiss) -> None:
    raiser = compared(model, 5)
    assert found(raiser, "attention_softcap") == 1 and found(raiser, "sdpa") == 0
    assert any("soft cap" in reason for reason in raiser.reasons)


# raised for the length they were traced with, not for one that changes from call to call
FIXED_LENGTH = {"paper_listing", "doubling_by_pad_selective"}
VARIED = [
    *("ShiftedSum", "NanoGpt", "Gated", "doubling_by_pad_selective", "LeftPad", "RepeatedKeys"),
    *("discretise_each_step", "min_gru", "paper_listing", "product_and_sum"),
]


def varied() -> list[Any]:
    """A few spellings, each of another idiom; most of them later."""
    models = [next(s for s in SPELLINGS if s.name == name) for name in VARIED]
    return params(models[:4]) + [pytest.param(m, marks=SLOW, id=named(m)) for m in models[4:]]


@pytest.mark.parametrize("spelling", varied())
def test_bfloat16(spelling: Spelling) -> None:
    check_ops(compared(spelling, 5, torch.bfloat16), spelling)


@pytest.mark.parametrize("spelling", varied())
def test_a_batch_of_any_size(spelling: Spelling) -> None:
    """Raised once, right for another batch."""
    module = spelling.make()
    raiser = Raiser(module)
    given = inputs(spelling, 5)
    larger = tuple(torch.cat([x, 2 * x, x.flip(0)]) for x in given)
    for x in given:
        torch._dynamo.mark_dynamic(x, 0)
    for args in (given, larger):
        for a, e in zip(tensors(raiser(*args)), tensors(module(*args)), strict=True):
            close(a, e, "model_fp32")
    check_ops(raiser, spelling)


@pytest.mark.parametrize("spelling", varied())
def test_another_length(spelling: Spelling) -> None:
    """Right, and raised again where the length is fixed in the graph."""
    module = spelling.make()
    raiser = Raiser(module)
    for base in (5, 12):
        args = inputs(spelling, base)
        for a, e in zip(tensors(raiser(*args)), tensors(module(*args)), strict=True):
            close(a, e, "model_fp32")
    if spelling.name in FIXED_LENGTH:
        assert found(raiser, spelling.op) == spelling.count
    else:
        check_ops(raiser, spelling, graphs=2)
