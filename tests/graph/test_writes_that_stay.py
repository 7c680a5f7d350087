"""Writes that dataflow cannot say stay, with the reason; the program stays what it was."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from effpass.capture.dynamo import capture
from effpass.graph.functional import functional
from effpass.graph.storages import Storages
from effpass.graph.writes import writes
from tests.graph.rewritten import Rewritten, equal

Program = Callable[..., Any]
OUTSIDE = torch.zeros(4)
STAYS: dict[str, tuple[Program, str]] = {}


def stays(reason: str) -> Callable[[Program], Program]:
    """Adds a function of x (3, 4) and y (2, 3, 4), with its one reason, to the table."""

    def add(run: Program) -> Program:
        STAYS[run.__name__] = run, reason
        return run

    return add


@torch.library.custom_op("effpass_test::doubled", mutates_args=())
def doubled(x: Tensor) -> Tensor:
    """An op of somebody else's."""
    return x * 2


@doubled.register_fake
def _(x: Tensor) -> Tensor:
    return torch.empty_like(x)


@stays("is not made in the graph")
def an_attribute(x: Tensor, y: Tensor) -> Tensor:
    OUTSIDE.add_(1)
    return x * (OUTSIDE * 1)


@stays("is not made in the graph")
def an_alias_of_an_input(x: Tensor, y: Tensor) -> Tensor:
    z = y.detach().reshape(2, 12)[0]
    z.mul_(1)
    return z * x[0].sum()


@stays("is not made by an ATen op")
def made_by_somebody_elses_op(x: Tensor, y: Tensor) -> Tensor:
    z = doubled(x.detach())
    z += 1
    return z * x


@stays("is an op of effpass_test")
def read_by_somebody_elses_op(x: Tensor, y: Tensor) -> Tensor:
    z = x.detach() * 2
    z += 1
    return doubled(z) * x


@stays("is not an ATen op")
def read_by_a_higher_order_op(x: Tensor, y: Tensor) -> Any:
    z = x * 2
    z += 1
    return checkpoint(lambda v: v.sin() * 2, z, use_reentrant=False)


@stays("is not made by an ATen op")
def made_by_a_higher_order_op(x: Tensor, y: Tensor) -> Any:
    z: Any = checkpoint(lambda v: v.sin() * 2, x, use_reentrant=False)
    z += 1
    return z * 2


@stays("in another grad mode or autocast region")
def written_without_gradients(x: Tensor, y: Tensor) -> Tensor:
    z = x * 2
    with torch.no_grad():
        z[0] = 0
    return z * y[0]


@stays("in another grad mode or autocast region")
def made_without_gradients(x: Tensor, y: Tensor) -> Tensor:
    with torch.no_grad():
        z = x * 2
    z.mul_(y[0])
    return z * 1


@stays("in another grad mode or autocast region")
def a_view_without_gradients(x: Tensor, y: Tensor) -> Tensor:
    z = x.detach() * 2
    with torch.no_grad():
        row = z[0]
    z.mul_(3)
    return x * z * row


@stays("in another grad mode or autocast region")
def written_under_autocast(x: Tensor, y: Tensor) -> Tensor:
    z = x * 2
    with torch.autocast("cpu", torch.bfloat16):
        z.mul_(y[0])
        return z * 1


@stays("autocast changes the form of aten.baddbmm_.default")
def a_form_that_autocast_changes(x: Tensor, y: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        z = y * 2
        z.baddbmm_(y[..., :3], y * 3)
        return z * 1


@stays("is random")
def random(x: Tensor, y: Tensor) -> Tensor:
    z = torch.zeros(3, 4)
    z.uniform_(2, 2)
    return z * x


@stays("is random")
def random_in_training(x: Tensor, y: Tensor) -> Tensor:
    z = x * 0
    return F.dropout(z, 0.5, training=True, inplace=True) * 1


@stays("two outputs of the graph share it")
def two_outputs(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    z = y * 1
    z[0] = x
    return z, z[:, -1]


@stays("it is written through detach")
def through_detach(x: Tensor, y: Tensor) -> Tensor:
    z = x * 2
    z.detach().mul_(3)
    return z * y[0]


@stays("it is written through expand")
def through_expand(x: Tensor, y: Tensor) -> Tensor:
    z = x * 2
    z.expand(1, 3, 4)[0].mul_(3)
    return z * 1


@stays("it is written through unfold")
def through_windows(x: Tensor, y: Tensor) -> Tensor:
    z = y * 2
    z.unfold(2, 2, 2)[..., 0].mul_(3)
    return z * 1


@stays("takes its memory as it lies")
def as_it_lies(x: Tensor, y: Tensor) -> Tensor:
    z = x * 2
    z.add_(1)
    return z.as_strided((4, 3), (1, 4)) * 1


@stays("it is written through real")
def through_a_part_of_a_number(x: Tensor, y: Tensor) -> Tensor:
    z = torch.complex(x, y[0])
    z.real.mul_(2)
    return torch.view_as_real(z) * 1


@stays("writes to it without saying so")
def by_a_norm_that_does_not_say_so(x: Tensor, y: Tensor) -> Tensor:
    mean, var = torch.zeros(4), torch.ones(4)
    z = F.batch_norm(x.detach(), mean, var, training=True)
    mean.mul_(2)
    return z * mean * x


@stays("has no form out of place")
def no_form_out_of_place(x: Tensor, y: Tensor) -> Tensor:
    z = x * 2
    z.fill_diagonal_(1)
    return z * 1


@stays("has gaps in memory")
def gaps(x: Tensor, y: Tensor) -> Tensor:
    z = torch.empty_strided((3, 4), (8, 2))
    z.copy_(x)
    return z.mul_(2) * 1


INPUTS = torch.linspace(-1, 1, 12).view(3, 4).sin(), torch.linspace(-2, 2, 24).view(2, 3, 4).cos()


@pytest.mark.parametrize("name", STAYS)
def test_writes_stay_and_say_why(name: str) -> None:
    run, reason = STAYS[name]
    OUTSIDE.zero_()
    compiled = Rewritten(run)
    compiled(*INPUTS)
    assert compiled.count == 0 and compiled.left > 0
    assert len(compiled.problems) == 1 + (name == "by_a_norm_that_does_not_say_so")
    assert any(reason in problem for problem in compiled.problems), compiled.problems


@pytest.mark.parametrize("name", STAYS)
def test_the_program_is_what_it_was(name: str) -> None:
    """Others in the same graph become dataflow, and do not disturb it."""
    run = STAYS[name][0]

    def more(x: Tensor, y: Tensor) -> Any:
        z = x * 1
        row = z[0]
        z[1] = y[0, 0]
        z[0].mul_(2)
        return run(z * 1, y), row * z

    first = OUTSIDE.zero_().clone()
    compiled = equal(lambda x, y: (OUTSIDE.copy_(first), more(x, y))[1], *INPUTS)
    assert compiled.count == 2


def test_an_input_is_written() -> None:
    def run(x: Tensor) -> Tensor:
        x.mul_(2)
        z = x[0]
        z.add_(1)
        return x * 1

    mine, theirs = INPUTS[0].clone(), INPUTS[0].clone()
    compiled = Rewritten(run)
    assert torch.equal(compiled(mine), run(theirs))
    assert torch.equal(mine, theirs)
    assert compiled.count == 0 and compiled.left == 2
    assert "is not made in the graph" in compiled.problems[0]


def test_no_value() -> None:
    def run(x: Tensor) -> Tensor:
        z = x * 1
        z.add_(1)
        return z.exp() * 2

    counts: list[int] = []

    def backend(gm: Any, inputs: Any) -> Any:
        graph = capture(gm, inputs)
        exp = next(n for n in graph.graph.nodes if n.target is torch.ops.aten.exp.default)
        del exp.meta["val"]
        assert [s.problem for s in Storages(graph) if s.writes] == ["exp has no value"]
        counts.append(functional(graph))
        for node in graph.graph.nodes:
            node.meta.pop("val", None)
        counts.append(functional(graph))
        assert any(writes(node) for node in graph.graph.nodes)
        graph.recompile()
        return graph.forward

    compiled = torch.compile(run, backend=backend, fullgraph=True)
    assert torch.equal(compiled(INPUTS[0]), run(INPUTS[0]))
    assert counts == [0, 0]


@pytest.mark.parametrize("name", ["made_without_gradients", "a_form_that_autocast_changes"])
def test_the_same_program_in_one_mode_becomes_dataflow(name: str) -> None:
    """It is the change of modes that stops it, nothing else."""
    run = {
        "made_without_gradients": lambda x, y: (x * 2).mul_(y[0]) * 1,
        "a_form_that_autocast_changes": lambda x, y: (y * 2).baddbmm_(y[..., :3], y * 3) * 1,
    }[name]
    compiled = equal(run, *INPUTS)
    assert compiled.count == 1 and compiled.left == 0


def test_autocast_around_it_all() -> None:
    """What is put in is not touched by autocast; bfloat16 and float32 buffers are stacked."""

    def run(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        with torch.autocast("cpu", torch.bfloat16):
            rows, wide = torch.zeros(3, 4, dtype=torch.bfloat16), torch.zeros(3, 4)
            half = torch.zeros(3, 4, dtype=torch.float16)
            for t in range(3):
                rows[t] = x[t] @ y[0].t() @ y[0]
                wide[t] = x[t]
                half[t] = x[t].half()
            return rows.mul_(2) * 1, wide.add_(rows) * 1, half * 1

    compiled = Rewritten(run)
    for mine, theirs in zip(compiled(*INPUTS), run(*INPUTS), strict=True):
        assert torch.equal(mine, theirs) and mine.dtype == theirs.dtype
    assert compiled.left == 0 and compiled.count == 11
    assert compiled.nodes("stack") == 2
    assert compiled.nodes("select_scatter") == 3  # autocast refuses to stack float16


def test_what_is_put_in_is_not_for_autocast() -> None:
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    for name in ("select_scatter", "slice_scatter", "diagonal_scatter", "full", "clone", "expand"):
        assert not any(has(f"aten::{name}", f"Autocast{d}") for d in ("CPU", "CUDA"))
    assert has("aten::baddbmm", "AutocastCPU")
