"""Loops beyond the tables: where they begin and end, what is around them, how they are called."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from effpass.patterns import discretised, unrolled
from tests.patterns.raising import Raiser, equal
from tests.tolerances import close

IDIOMS = (unrolled.IDIOM, discretised.IDIOM)


class Run(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> Any:
        return self.function(*args)


def scan(a: Tensor, x: Tensor) -> Tensor:
    h, hs = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        h = a[:, t] * h + x[:, t]
        hs.append(h)
    return torch.stack(hs, 1)


def pair(length: int = 6, batch: int = 2, width: int = 3) -> tuple[Tensor, Tensor]:
    return torch.rand(batch, length, width), torch.randn(batch, length, width)


def recurrences(function: Callable[..., Any], *args: Tensor) -> tuple[int, list[str]]:
    raiser = equal(Run(function), args, IDIOMS)
    return raiser.nodes("linear_recurrence"), raiser.reasons


def test_layers_without_anything_between() -> None:
    assert recurrences(lambda a, x: scan(a, scan(a, scan(a, x))), *pair()) == (3, [])


def test_the_same_tensors_stepped_through_twice() -> None:
    def run(a: Tensor, x: Tensor) -> Tensor:
        h = torch.zeros_like(x[:, 0])
        for t in range(x.shape[1]):
            h = a[:, t] * h + x[:, t]
        hs = []
        for t in range(x.shape[1]):
            h = a[:, t].sigmoid() * h + x[:, t]
            hs.append(h)
        return torch.stack(hs, 1)

    assert recurrences(run, *pair()) == (2, [])


def test_two_recurrences_in_one_loop() -> None:
    def run(a: Tensor, x: Tensor) -> Tensor:
        g = h = torch.zeros_like(x[:, 0])
        hs = []
        for t in range(x.shape[1]):
            g = a[:, t] * g + x[:, t]
            h = 0.5 * h + g
            hs.append(h)
        return torch.stack(hs, 1)

    assert recurrences(run, *pair())[0] == 2


def test_the_token_before() -> None:
    def run(a: Tensor, x: Tensor) -> Tensor:
        h, hs = x[:, 0], []
        for t in range(1, x.shape[1]):
            h = a[:, t] * h + (x[:, t] - x[:, t - 1])
            hs.append(h)
        return torch.stack(hs, 1)

    assert recurrences(run, *pair())[0] == 1


def test_a_loop_over_a_part() -> None:
    def run(a: Tensor, x: Tensor) -> Tensor:
        h, hs = torch.ones_like(x[:, 0]), []
        for t in range(2, 7):
            h = a[:, t] * h + x[:, t]
            hs.append(h)
        return torch.stack(hs, 1)

    count, reasons = recurrences(run, *pair(9))
    assert count == 1 or reasons == ["its steps are not alike: those before step 2 differ"]


def test_some_steps_are_not_the_loop() -> None:
    def run(a: Tensor, x: Tensor) -> Tensor:
        h, hs = torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            h = a[:, t] * h + (x[:, t] if t != 4 else x[:, t].tanh())
            hs.append(h)
        return torch.stack(hs, 1)

    count, (reason,) = recurrences(run, *pair(9))
    assert count == 0 and reason.startswith("its steps are not alike: step")


def test_dead_code_is_no_loop() -> None:
    def run(a: Tensor, x: Tensor) -> Tensor:
        scan(a, x)
        return x * 2

    assert recurrences(run, *pair()) == (0, [])


def test_every_step_returned_alone() -> None:
    def run(a: Tensor, x: Tensor) -> list[Tensor]:
        return list(scan(a, x).unbind(1))

    assert recurrences(run, *pair()) == (1, [])


def test_a_state_that_is_one_number() -> None:
    def run(a: Tensor, x: Tensor) -> Tensor:
        h, hs = torch.zeros(()), []
        for t in range(x.shape[0]):
            h = a[t] * h + x[t]
            hs.append(h)
        return torch.stack(hs)

    assert recurrences(run, torch.rand(6), torch.randn(6)) == (1, [])


def test_a_convolution_window_carried_by_hand_stays() -> None:
    def run(w: Tensor, x: Tensor) -> Tensor:
        window, ys = torch.zeros(x.shape[0], x.shape[2], 3), []
        for t in range(x.shape[1]):
            window = torch.cat([window[:, :, 1:], x[:, t].unsqueeze(-1)], -1)
            ys.append((window * w).sum(-1))
        return torch.stack(ys, 1)

    count, (reason,) = recurrences(run, torch.randn(3, 3), torch.randn(2, 6, 3))
    assert count == 0 and "is applied to the state inside the recurrence" in reason


@pytest.mark.parametrize("other", [1, 3, 7])
def test_other_batches_without_compiling_again(other: int) -> None:
    raiser = Raiser(Run(scan), IDIOMS)
    first = pair(batch=5)
    for x in first:
        torch._dynamo.mark_dynamic(x, 0)
    close(raiser(*first), scan(*first), "model_fp32")
    second = pair(batch=other)
    close(raiser(*second), scan(*second), "model_fp32")
    assert raiser.nodes("linear_recurrence") == len(raiser.graphs)
    assert len(raiser.graphs) == (2 if other == 1 else 1)


def test_autocast_keeps_its_dtypes() -> None:
    linear = nn.Linear(3, 3)

    def run(a: Tensor, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return scan(a, linear(x))

    raiser = Raiser(run, IDIOMS)
    args = pair()
    close(raiser(*args), run(*args), "model_bf16")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    args = [v.to(dtype) for v in pair()]
    raiser = Raiser(Run(scan), IDIOMS)
    expected = scan(*(v.double() for v in args)).to(dtype)
    close(raiser(*args), expected, "model_fp32" if dtype is torch.float64 else "model_bf16")
    assert raiser.nodes("linear_recurrence") == 1


def test_inputs_that_are_not_contiguous() -> None:
    a, x = torch.rand(6, 2, 3).transpose(0, 1), torch.randn(2, 3, 6).transpose(1, 2)
    assert recurrences(scan, a, x) == (1, [])
