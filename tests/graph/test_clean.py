"""Each clean-up rule: it fires, keeps the numbers, and leaves alone what only looks alike."""

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

import effpass.ops  # noqa: F401  registers the ops
from effpass.graph.clean import clean


def cleaned(run, *args: Tensor) -> dict[str, int]:
    gm = make_fx(run, pre_dispatch=True, tracing_mode="fake")(*args)
    applied = clean(gm)
    gm.graph.lint()
    expected, actual = run(*args), gm(*args)
    torch.testing.assert_close(actual, expected)
    return {a.what: a.count for a in applied}


def test_casting_to_the_same_dtype() -> None:
    x = torch.randn(3)
    assert cleaned(lambda x: x.to(torch.float32) + 1, x) == {"same_dtype_cast": 1}
    assert cleaned(lambda x: x.to(torch.float64) + 1, x) == {}


def test_copying_cast_stays() -> None:
    x = torch.randn(3)
    assert cleaned(lambda x: x.to(torch.float32, copy=True).add_(1), x) == {}


def test_tensors_made_by_size() -> None:
    x = torch.randn(2, 3, dtype=torch.float64)

    def run(x: Tensor) -> tuple[Tensor, ...]:
        y = x * 2
        made = (y.new_zeros(2), y.new_ones(1, 4), y.new_full((3,), 7, dtype=torch.int64))
        return (*made, torch.zeros_like(y), torch.full_like(y, -1.5), torch.ones_like(y.t()))

    assert cleaned(run, x) == {"made_by_size": 5}  # the last one has strides of its own
    assert cleaned(lambda x: torch.zeros_like(x).add_(x), x) == {"made_by_size": 1}


def test_constants_are_not_detached() -> None:
    x = torch.randn(3)
    assert cleaned(lambda x: x + torch.tensor(1.5), x) == {"detached_constant": 1}
    assert cleaned(lambda x: (x * 2).detach_() + 1, x) == {}


def test_double_transpose() -> None:
    x = torch.randn(2, 3, 4)
    assert cleaned(lambda x: x.transpose(1, 2).transpose(-1, 1) + 1, x) == {"double_transpose": 1}
    assert cleaned(lambda x: x.transpose(1, 2).transpose(0, 1) + 1, x) == {}


def test_matmul_of_transpose() -> None:
    w, x = torch.randn(5, 4), torch.randn(2, 3, 4)

    def run(w: Tensor, x: Tensor) -> Tensor:
        b = (w @ x.transpose(1, 2)).transpose(1, 2)
        return torch.ops.effpass.linear_recurrence(b, b)[0]

    assert cleaned(run, w, x) == {"matmul_of_transpose": 1}


def test_matmul_read_by_what_sees_strides_stays() -> None:
    w, x = torch.randn(5, 4), torch.randn(2, 3, 4)
    assert cleaned(lambda w, x: (w @ x.transpose(1, 2)).transpose(1, 2) * 2, w, x) == {}


def test_matmul_read_in_two_ways_stays() -> None:
    w, x = torch.randn(5, 4), torch.randn(2, 3, 4)

    def run(w: Tensor, x: Tensor) -> Tensor:
        product = w @ x.transpose(1, 2)
        return product.transpose(1, 2).sum() + product.view(-1).sum()

    assert cleaned(run, w, x) == {}


def test_batched_left_side_stays() -> None:
    w, x = torch.randn(2, 5, 4), torch.randn(2, 3, 4)
    assert cleaned(lambda w, x: (w @ x.transpose(1, 2)).transpose(1, 2) * 2, w, x) == {}
