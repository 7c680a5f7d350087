"""What a read sees once writes are dataflow: right values, gradients and memory, no more."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.graph.rewritten import Rewritten, equal

Program = Callable[..., Any]
X = torch.linspace(-1, 1, 12).view(3, 4).sin()
Y = torch.linspace(-2, 2, 12).view(3, 4).cos()
LONG = torch.linspace(-1, 1, 30).view(2, 5, 3).sin()
GATES = torch.linspace(-2, 2, 30).view(2, 5, 3).sigmoid()


def only_what_was_written_is_read(x: Tensor, y: Tensor) -> Tensor:
    z = x * 2
    row = z[0]
    row.fill_(3)
    return row * y[0]  # and x has a gradient of zero


def a_whole_view_without_gradients(x: Tensor, y: Tensor) -> Tensor:
    z = x * 2
    z.mul_(y)
    with torch.no_grad():
        whole = z.view(3, 4)
    return x * whole


def a_copy_and_its_source_are_returned(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    z, source = x * 1, x * 2
    z.copy_(source)
    return z, source


def a_copied_row_and_its_source_are_returned(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    z, source = x * 1, x[1] * 2
    row = z[0]
    row.copy_(source)
    return row, source


RETURNED = (a_copy_and_its_source_are_returned, a_copied_row_and_its_source_are_returned)


@pytest.mark.parametrize(
    "run", [only_what_was_written_is_read, a_whole_view_without_gradients, *RETURNED]
)
def test_views_of_what_was_written(run: Program) -> None:
    compiled = equal(run, X, Y)
    assert compiled.count == 1 and compiled.left == 0


@pytest.mark.parametrize("run", RETURNED)
def test_outputs_do_not_share_memory_that_eager_does_not(run: Program) -> None:
    mine, source = Rewritten(run)(X, Y)
    assert mine.untyped_storage().data_ptr() != source.untyped_storage().data_ptr()


def test_another_dtype_is_cast_back_not_written_over() -> None:
    def run(x: Tensor, y: Tensor) -> Tensor:
        z = x * 2
        z += y.double()
        return z * 1

    compiled = equal(run, X, Y)
    assert compiled.left == 0 and compiled.nodes("to", "_to_copy") == 2
    assert compiled.nodes("slice_scatter", "clone") == 0


def a_value_that_changes(x: Tensor, a: Tensor) -> Tensor:
    ys = torch.zeros(2, 5, 3)
    for t in range(5):
        ys = torch.select_scatter(ys, a[:, 0], 1, t)
        a.add_(1)
    return ys * x


def a_base_that_changes(x: Tensor, a: Tensor) -> Tensor:
    ys = torch.select_scatter(a, x[:, 0], 1, 0)
    for t in range(1, 4):
        ys = torch.select_scatter(ys, x[:, t], 1, t)
        a.add_(1)
    return ys * x


@pytest.mark.parametrize("run", [a_value_that_changes, a_base_that_changes])
def test_what_changes_is_not_joined(run: Program) -> None:
    compiled = equal(run, LONG, GATES, training=False)
    assert compiled.left >= 3 and compiled.nodes("stack") == 0


def partly_without_gradients(x: Tensor, a: Tensor) -> Tensor:
    ys, rows = torch.zeros(2, 5, 3), x.unbind(1)
    with torch.no_grad():
        for t in range(2):
            ys = torch.select_scatter(ys, rows[t], 1, t)
    for t in range(2, 5):
        ys = torch.select_scatter(ys, rows[t], 1, t)
    return ys * a


def test_pieces_of_two_grad_modes_are_not_joined() -> None:
    assert equal(partly_without_gradients, LONG, GATES).nodes("stack") == 0


def an_argument_that_changes(x: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    ys = torch.select_scatter(torch.zeros(2, 5, 3), x[:, 1], 1, 0)
    x.add_(1)
    return ys[:, 0] * 1, ys * 2


def a_copy_that_is_written_to(x: Tensor, a: Tensor) -> tuple[Tensor, ...]:
    ys, value = torch.zeros(2, 5, 3), x[:, 0] * 2
    ys[:, 0] = value
    copy = ys[:, 0].reshape(-1)
    with torch.no_grad():
        copy.add_(1)
    return value * 2, copy * 1, ys * 2


@pytest.mark.parametrize("run", [an_argument_that_changes, a_copy_that_is_written_to])
def test_reads_do_not_see_later_writes(run: Program) -> None:
    assert equal(run, LONG, GATES, training=False).left == 1
