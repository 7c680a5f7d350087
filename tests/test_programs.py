"""Programs beyond a plain forward: what else a graph may hold, and how it may be called."""

import copy
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import effpass
from tests.tiny import Stack
from tests.tolerances import close

EAGER = {"compiler": "eager"}


class Doubled(torch.autograd.Function):
    """exp, with twice its gradient: a rewrite that saw only the forward would lose the 2."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        ctx.save_for_backward(a)
        return a.exp()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (a,) = ctx.saved_tensors
        return 2 * grad * a.exp()


OUTSIDE = torch.arange(8.0)
PROGRAMS: dict[str, Callable[[Tensor], Tensor]] = {
    "vmap": lambda x: torch.vmap(lambda row: row * 2 + row.sum())(x),
    "func.grad": lambda x: torch.func.grad(lambda v: (v**3).sum())(x),
    "autograd.Function": lambda x: Doubled.apply(x),  # type: ignore[no-untyped-call]
    "cond": lambda x: torch.cond(x.sum() > 0, lambda v: v + 1, lambda v: v - 1, (x,)),
    "constants": lambda x: x * OUTSIDE + torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8]),
    "views": lambda x: x.transpose(0, 1).flatten(1).unfold(1, 2, 1).contiguous(),
    "item": lambda x: x[: int((x > 0).sum().item() % 2) + 1],
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_equal_to_eager_forward_and_backward(name: str) -> None:
    run = PROGRAMS[name]
    compiled = torch.compile(run, backend="effpass", options=EAGER)
    for sign in (1.0, -1.0):
        x = sign * torch.rand(2, 3, 8)
        mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        actual, expected = compiled(mine), run(theirs)
        close(actual, expected, "model_fp32")
        actual.sum().backward()
        expected.sum().backward()
        assert mine.grad is not None and theirs.grad is not None
        close(mine.grad, theirs.grad, "model_gradient_fp32")


def test_transforms_decline_the_capture_and_say_so() -> None:
    report = effpass.explain(PROGRAMS["func.grad"], torch.rand(2, 8))
    assert "part of a grad transform" in report.declined[0].reason


@pytest.mark.parametrize("compiler", ["eager", "inductor"])
def test_inference_mode(compiler: str) -> None:
    model, x = Stack(), torch.randn(2, 7, 8)
    compiled = torch.compile(model, backend="effpass", options={"compiler": compiler})
    with torch.inference_mode():
        close(compiled(x), model(x), "model_fp32")


def test_inputs_with_other_strides() -> None:
    model = Stack()
    compiled = torch.compile(model, backend="effpass", options=EAGER)
    for x in (torch.randn(7, 2, 8).transpose(0, 1), torch.randn(2, 7, 16)[:, :, ::2]):
        close(compiled(x), model(x), "model_fp32")


@pytest.mark.parametrize("shape", [(0, 7, 8), (2, 0, 8), (1, 1, 8)])
def test_empty_and_single(shape: tuple[int, ...]) -> None:
    model, x = Stack(), torch.randn(shape)
    compiled = torch.compile(model, backend="effpass", options=EAGER)
    close(compiled(x), model(x), "model_fp32")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model, x = Stack().to(dtype), torch.randn(2, 7, 8, dtype=dtype)
    compiled = torch.compile(model, backend="effpass", options=EAGER)
    close(compiled(x), model(x), "model_fp32" if dtype == torch.float64 else "model_bf16")


def test_buffers_written_in_training_are_written_once() -> None:
    mine = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)).train()
    theirs = copy.deepcopy(mine)
    compiled = torch.compile(mine, backend="effpass", options={**EAGER, "verify": True})
    x = torch.randn(16, 8)
    for _ in range(2):
        close(compiled(x), theirs(x), "model_fp32")
    close(mine[1].running_mean, theirs[1].running_mean, "model_fp32")
    assert mine[1].num_batches_tracked == 2


def test_training_steps_stay_together() -> None:
    mine = Stack()
    theirs = copy.deepcopy(mine)
    compiled = torch.compile(mine, backend="effpass", options=EAGER)
    x = torch.randn(2, 7, 8)
    for model, call in ((mine, compiled), (theirs, theirs)):
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for _ in range(5):
            optimizer.zero_grad()
            call(x).square().mean().backward()
            optimizer.step()
    for a, b in zip(mine.parameters(), theirs.parameters(), strict=True):
        close(a, b, "model_gradient_fp32")


@pytest.mark.parametrize("outer", ["compile(ddp)", "ddp(compile)"])
def test_distributed_data_parallel(outer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "MASTER_ADDR", "127.0.0.1")
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        model, x = Stack(), torch.randn(2, 7, 8)
        ddp = nn.parallel.DistributedDataParallel
        if outer == "compile(ddp)":
            compiled: Any = torch.compile(ddp(copy.deepcopy(model)), backend="effpass")
        else:
            compiled = ddp(torch.compile(copy.deepcopy(model), backend="effpass"))
        expected, actual = model(x), compiled(x)
        close(actual, expected, "model_fp32")
        actual.square().mean().backward()
        expected.square().mean().backward()
        for a, b in zip(compiled.parameters(), model.parameters(), strict=True):
            close(a.grad, b.grad, "model_gradient_fp32")
    finally:
        dist.destroy_process_group()
