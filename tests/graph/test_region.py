"""Regions: what may be taken out of a graph, what a constant is, and how it is put back."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from effpass.graph.clean import clean
from effpass.graph.region import CarveError, carve, constant, early_users
from effpass.graph.splice import SpliceError, insert, replace


def traced(run: Callable[..., Any], *args: Tensor) -> GraphModule:
    gm = make_fx(run, pre_dispatch=True, tracing_mode="fake")(*args)
    clean(gm)
    return gm


def node(gm: GraphModule, op: str, number: int = 0) -> Node:
    return [n for n in gm.graph.nodes if getattr(n.target, "_opname", "") == op][number]


def refusal(gm: GraphModule, inputs: list[Node], outputs: list[Node]) -> str:
    with pytest.raises(CarveError) as error:
        carve(inputs, outputs)
    return str(error.value)


def test_a_region_runs_alone_in_float64() -> None:
    gm = traced(lambda x: (x.exp() + torch.ones(3, dtype=torch.float32)).sin() * 2, torch.randn(3))
    region = carve([node(gm, "exp")], [node(gm, "sin")])
    x = torch.randn(3, dtype=torch.float64)
    (value,) = region.run([x], double=True)
    assert value.dtype is torch.float64
    torch.testing.assert_close(value, (x + 1).sin())


def test_it_reads_nothing_but_its_inputs() -> None:
    gm = traced(lambda x, y: (x.exp() + y).sin(), torch.randn(3), torch.randn(3))
    assert "also reads the graph's input" in refusal(gm, [node(gm, "exp")], [node(gm, "sin")])


def test_random_and_writing_nodes() -> None:
    gm = traced(lambda x: torch.dropout(x.exp(), 0.5, True).sin(), torch.randn(3))
    assert "is random" in refusal(gm, [node(gm, "exp")], [node(gm, "sin")])
    gm = traced(lambda x: torch.dropout(x.exp(), 0.5, False).sin(), torch.randn(3))
    carve([node(gm, "exp")], [node(gm, "sin")])

    def writes(x: Tensor) -> Tensor:
        y = x.exp().add_(1)
        return y.sin()

    gm = traced(writes, torch.randn(3))
    assert "writes in place" in refusal(gm, [node(gm, "exp")], [node(gm, "sin")])


def test_grad_mode_does_not_change_inside() -> None:
    def run(x: Tensor) -> Tensor:
        with torch.no_grad():
            y = x.exp()
        return y.cos().sin()

    gm = traced(run, torch.randn(3))
    found = refusal(gm, gm.graph.find_nodes(op="placeholder"), [node(gm, "sin")])
    assert "grad mode or autocast changes" in found


def test_an_output_written_later() -> None:
    def run(x: Tensor) -> Tensor:
        y = x.exp().sin()
        z = y.cos()
        y.mul_(2)
        return y + z

    gm = traced(run, torch.randn(3))
    assert "mul_ writes in place" in refusal(gm, [node(gm, "exp")], [node(gm, "sin")])


def test_users_in_front_move_behind() -> None:
    def run(x: Tensor) -> Tensor:
        a = x.exp()
        b = a.sin()  # read here ...
        c = x.cos()
        return b + (a * c)

    gm = traced(run, torch.randn(3))
    (x,) = gm.graph.find_nodes(op="placeholder")
    region = carve([x, node(gm, "cos")], [node(gm, "exp"), node(gm, "mul")])
    assert [n.name for n in early_users(region)] == ["sin"]


def test_a_region_that_feeds_itself() -> None:
    gm = traced(lambda x: x.exp().sin().cos(), torch.randn(3))
    found = refusal(gm, [node(gm, "sin")], [node(gm, "exp"), node(gm, "cos")])
    assert "depends on what it computes" in found or "also reads" in found


def test_constants() -> None:
    def run(x: Tensor) -> Tensor:
        mask = torch.ones(3, 3).tril() * 2
        return x + mask

    gm = traced(run, torch.randn(3, 3))
    value = constant(node(gm, "mul"))
    assert value is not None and torch.equal(value, 2 * torch.ones(3, 3).tril())
    assert constant(node(gm, "add")) is None
    assert constant(node(gm, "mul"), limit=4) is None


def test_replacing_keeps_strides_for_views_behind() -> None:
    def run(x: Tensor) -> Tensor:
        return (x.exp() + 1).view(-1)

    gm = traced(run, torch.randn(2, 3))
    (x,), add = gm.graph.find_nodes(op="placeholder"), node(gm, "add")
    region = carve([x], [add])
    made = insert(lambda v: [(v.t().exp() + 1).contiguous().t()], [x], region.place, add)
    replace(region.outputs, made, region.nodes)
    gm.recompile()
    x_ = torch.randn(2, 3)
    torch.testing.assert_close(gm(x_), run(x_))
    assert node(gm, "clone")


def test_another_shape_or_dtype_does_not_fit() -> None:
    gm = traced(lambda x: x.exp() * 2, torch.randn(2, 3))
    (x,), exp = gm.graph.find_nodes(op="placeholder"), node(gm, "exp")
    made = insert(lambda v: [v.double()], [x], exp, exp)
    with pytest.raises(SpliceError, match=r"expected torch\.float32 of shape"):
        replace([exp], made, [exp])
