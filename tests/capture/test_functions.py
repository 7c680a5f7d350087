"""``autograd.Function`` in a captured graph: one node, whose bodies are captured like the graph."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule

import effpass
from effpass.capture.dynamo import FUNCTION, capture
from tests.tolerances import close

EAGER = {"compiler": "eager"}


class Cubed(torch.autograd.Function):
    """x^3 with twice its gradient, in-place writes inside."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        square = x.clone().mul_(x)
        ctx.save_for_backward(square)
        return square * x

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (square,) = ctx.saved_tensors
        return 6 * square * grads[0]


class Product(torch.autograd.Function):
    """x W with the gradient of W W^T: what autocast does to one it does not do to the other."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(weight)
        return x @ weight

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (weight,) = ctx.saved_tensors
        return grads[0].float() @ weight.t(), None


def bodies(run: Any, *args: Any) -> list[GraphModule]:
    """The bodies of the functions in the captured graph of a program."""
    found: list[GraphModule] = []

    def keep(gm: GraphModule, inputs: Any) -> Any:
        graph = capture(gm, inputs)
        for node in graph.graph.find_nodes(op="call_function", target=FUNCTION):
            found.extend(getattr(graph, body.target) for body in node.args[:2])
        return gm.forward

    torch.compile(run, backend=keep, fullgraph=True)(*args)
    return found


def written_in_aten(body: GraphModule) -> bool:
    calls = [node for node in body.graph.nodes if node.op.startswith("call")]
    return all("aten" in str(n.target) or "grad_enabled" in str(n.target) for n in calls)


def test_bodies_are_captured() -> None:
    forward, *_ = bodies(lambda x: Cubed.apply(x) + 1, torch.rand(3, requires_grad=True))
    assert written_in_aten(forward)


@pytest.mark.parametrize("compiler", ["eager", "inductor"])
def test_the_gradient_stays_the_users_own(compiler: str) -> None:
    def run(x: Tensor) -> Tensor:
        return Cubed.apply(x.sin()) * x  # type: ignore[no-untyped-call]

    x = torch.rand(2, 5)
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    compiled = torch.compile(run, backend="effpass", options={"compiler": compiler})
    actual, expected = compiled(mine), run(theirs)
    close(actual, expected, "model_fp32")
    actual.sum().backward()
    expected.sum().backward()
    assert mine.grad is not None and theirs.grad is not None
    close(mine.grad, theirs.grad, "model_gradient_fp32")
    assert torch.is_grad_enabled()
    with torch.no_grad():
        torch._dynamo.reset()
        close(compiled(x), run(x), "model_fp32")
        assert not torch.is_grad_enabled()


@pytest.mark.parametrize("where", ["outside", "inside"])
def test_autocast_is_left_at_the_backward(where: str) -> None:
    weight = torch.rand(4, 4)

    def run(x: Tensor) -> Tensor:
        if where == "outside":
            return Product.apply(x, weight)  # type: ignore[no-untyped-call, no-any-return]
        with torch.autocast("cpu", torch.bfloat16):
            return Product.apply(x, weight)  # type: ignore[no-untyped-call, no-any-return]

    x = torch.rand(3, 4)
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    compiled = torch.compile(run, backend="effpass", options=EAGER)
    with torch.autocast("cpu", torch.bfloat16, enabled=where == "outside"):
        actual, expected = compiled(mine), run(theirs)
    close(actual, expected, "model_bf16")
    assert not effpass.report(compiled).declined
    actual.float().sum().backward()
    expected.float().sum().backward()
    assert mine.grad is not None and theirs.grad is not None
    close(mine.grad, theirs.grad, "model_bf16")
