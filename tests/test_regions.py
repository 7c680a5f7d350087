"""Regions and aliases: what a rewrite may not carry across, each from a program that once broke."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import effpass
from tests.tolerances import close

EAGER = {"compiler": "eager"}


def inside(x: Tensor, w: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        y = x @ w
    return y.float()


def after(x: Tensor, w: Tensor) -> Tensor:
    return inside(x, w) @ w


def disabled_again(x: Tensor, w: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        y = x @ w
        with torch.autocast("cpu", enabled=False):
            z = y.float() @ w
        return (z @ w).float()


def in_a_checkpoint(x: Tensor, w: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        y = checkpoint(lambda v: (v @ w).float() * 2, x, use_reentrant=False)
    return y.float()  # type: ignore[union-attr]


@pytest.mark.parametrize("compiler", ["eager", "inductor"])
@pytest.mark.parametrize("run", [inside, after, disabled_again, in_a_checkpoint])
def test_autocast_regions_keep_their_dtypes(run: Callable[..., Tensor], compiler: str) -> None:
    x, w = torch.randn(4, 4), torch.randn(4, 4)
    compiled = torch.compile(run, backend="effpass", options={"compiler": compiler})
    mine, theirs = w.clone().requires_grad_(), w.clone().requires_grad_()
    actual, expected = compiled(x, mine), run(x, theirs)
    close(actual, expected, "model_bf16")
    actual.sum().backward()
    expected.sum().backward()
    assert mine.grad is not None and theirs.grad is not None
    close(mine.grad, theirs.grad, "model_bf16")
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("rows", [4, 5])
def test_products_of_four_dimensions_stay(rows: int) -> None:
    run = lambda w, x: (w @ x.transpose(1, 2)).transpose(1, 2) * 1  # noqa: E731
    w, x = torch.randn(rows, 4), torch.randn(2, 4, 3, 4)
    compiled = torch.compile(run, backend="effpass", options=EAGER)
    close(compiled(w, x), run(w, x), "model_fp32")


def test_strides_of_outputs_and_views_stay() -> None:
    def run(w: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        y = (w @ x.transpose(1, 2)).transpose(1, 2)
        return y, y.transpose(1, 2).view(x.shape[0], -1)

    w, x = torch.randn(5, 4), torch.randn(2, 3, 4)
    compiled = torch.compile(run, backend="effpass", options=EAGER)
    for mine, theirs in zip(compiled(w, x), run(w, x), strict=True):
        close(mine, theirs, "model_fp32")
        assert mine.stride() == theirs.stride()


def test_no_gradient_leaves_a_no_grad_region() -> None:
    def run(x: Tensor, w: Tensor) -> Tensor:
        with torch.no_grad():
            t = x.transpose(0, 1).transpose(0, 1)
        return t * w

    compiled = torch.compile(run, backend="effpass", options=EAGER)
    x, w = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    compiled(x, w).sum().backward()
    assert x.grad is None and w.grad is not None


def test_an_output_is_a_tensor_of_its_own() -> None:
    compiled = torch.compile(
        lambda x: x.transpose(0, 1).transpose(0, 1), backend="effpass", options=EAGER
    )
    x = torch.randn(3, 4)
    compiled(x).unsqueeze_(0)
    assert x.shape == (3, 4)


@pytest.mark.parametrize("compiler", ["eager", "inductor"])
def test_data_of_a_tensor(compiler: str) -> None:
    linear, x = nn.Linear(4, 4), torch.randn(2, 4)
    run = lambda x: nn.functional.linear(x, linear.weight.data) + x.data * 2  # noqa: E731
    compiled = torch.compile(run, backend="effpass", options={"compiler": compiler})
    close(compiled(x), run(x), "model_fp32")


def test_inference_mode_inside() -> None:
    def run(x: Tensor, w: Tensor) -> Tensor:
        with torch.inference_mode():
            t = x * w
        return t.clone() * 2 + w

    compiled = torch.compile(run, backend="effpass", options=EAGER)
    x, w = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
    compiled(x, w).sum().backward()
    assert x.grad is None
    assert w.grad is not None and w.grad.tolist() == [1.0, 1.0, 1.0]


def test_verification_steps_an_optimizer_once() -> None:
    class Bump(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p = nn.Parameter(torch.zeros(2), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            torch._foreach_add_([self.p], [x])
            return self.p * 1

    model = Bump()
    report = effpass.explain(model, torch.ones(2))
    assert model.p.tolist() == [1.0, 1.0]
    assert report.graphs[0].verified.startswith("not run")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["selective_scan", "ssd_scan", "linear_recurrence"])
def test_default_dtype_does_not_reach_the_kernels(name: str, dtype: torch.dtype) -> None:
    op = effpass.ops.OPS[name]
    shapes = {"b": 2, "t": 5, "s": 2, "d": 3, "n": 4, "h": 2, "p": 3, "g": 1}
    given = {
        n: torch.rand([shapes[a] for a in dims], dtype=torch.float32).neg_().requires_grad_()
        for n, dims in op.axes.inputs.items()
    }
    plain = [o.sum() for o in op(**given)]
    expected = torch.autograd.grad(sum(plain), list(given.values()))
    torch.set_default_dtype(dtype)
    try:
        found = [o.sum() for o in op(**given)]
        actual = torch.autograd.grad(sum(found), list(given.values()))
    finally:
        torch.set_default_dtype(torch.float32)
    for mine, theirs in zip(actual, expected, strict=True):
        assert torch.equal(mine, theirs)


def test_forward_mode_is_refused() -> None:
    a, b = torch.rand(1, 4, 3), torch.rand(1, 4, 3)
    with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
        torch.func.jvp(lambda v: effpass.ops.linear_recurrence(a, v)[0], (b,), (b,))


def test_offsets_are_checked_by_every_implementation() -> None:
    a = torch.rand(1, 9, 3)
    broken = torch.tensor([0, 3, 7], dtype=torch.int32)
    with pytest.raises(ValueError, match="to end at the token count 9, found 7"):
        effpass.ops.linear_recurrence.reference(a, a, None, broken)
