"""Buffers filled piece by piece become a stack or a cat; what only looks like one stays."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.graph.rewritten import Rewritten, equal, leaf, same

Program = Callable[..., Any]
X = torch.linspace(-1, 1, 30).view(2, 5, 3).sin()
A = torch.linspace(-2, 2, 30).view(2, 5, 3).sigmoid()
SCATTERS = ("select_scatter", "slice_scatter")


def filled_in_order(x: Tensor, a: Tensor) -> Tensor:
    ys, h = torch.empty_like(x), torch.zeros(2, 3)
    for t in range(5):
        h = a[:, t] * h + x[:, t]
        ys[:, t] = h
    return ys * 2


def filled_from_the_end(x: Tensor, a: Tensor) -> Tensor:
    ys, h = torch.zeros(2, 5, 3), torch.zeros(2, 3)
    for t in reversed(range(5)):
        h = a[:, t] * h + x[:, t]
        ys[:, t - 5] = h
    return ys


def filled_channels_first(x: Tensor, a: Tensor) -> Tensor:
    ys, h = x.new_zeros(2, 3, 5), torch.zeros(2, 3)
    for t in range(5):
        h.mul_(a[:, t]).add_(x[:, t])
        ys[..., t].copy_(h)
    return ys.transpose(1, 2) * a


def fed_back(x: Tensor, a: Tensor) -> Tensor:
    h = torch.zeros_like(x)
    h[:, 0] = x[:, 0]
    for t in range(1, 5):
        h[:, t] = a[:, t] * h[:, t - 1].clone() + x[:, t]
    return h * 2


def added_in_place(x: Tensor, a: Tensor) -> Tensor:
    h = x.clone()
    for t in range(1, 5):
        h[:, t] += a[:, t] * h[:, t - 1].clone()
    return h * 2


def one_index_more(x: Tensor, a: Tensor) -> Tensor:
    h = torch.zeros(2, 6, 3)
    for t in range(5):
        h[:, t + 1] = a[:, t] * h[:, t].clone() + x[:, t]
    return h[:, 1:] * 2


def filled_twice(x: Tensor, a: Tensor) -> Tensor:
    ys = torch.zeros(2, 5, 3)
    for t in range(5):
        ys[:, t] = x[:, t] * 2
    for t in range(5):
        ys[:, t] *= a[:, t]
    return ys * 2


def started_twice(x: Tensor, a: Tensor) -> Tensor:
    ys = torch.zeros(2, 5, 3)
    ys[:, 0] = a[:, 0]
    for t in range(5):
        ys[:, t] = x[:, t] * a[:, 0]
    return ys * 2


def read_when_full(x: Tensor, a: Tensor) -> tuple[Tensor, ...]:
    ys = torch.zeros(2, 5, 3)
    for t in range(5):
        ys[:, t] = x[:, t] * a[:, 0]
    return ys[:, 1:3].sum() + ys[:, 4], ys.reshape(-1) * 2


def kept_wide(x: Tensor, a: Tensor) -> Tensor:
    ys = torch.zeros(2, 5, 3)
    for t in range(5):
        ys[:, t : t + 1] = x[:, t : t + 1] * a[:, :1]
    return ys * 2


def halves(x: Tensor, a: Tensor) -> Tensor:
    ys = torch.empty(2, 5, 3)
    ys[:, 2:] = x[:, 2:] * 2
    ys[:, :2] = a[:, :2]
    return ys * 2


def one_and_the_rest(x: Tensor, a: Tensor) -> Tensor:
    ys = torch.empty(2, 5, 3)
    ys[:, 0] = x[:, 0] * 2
    ys[:, 1:] = a[:, 1:]
    return ys * 2


def in_double(x: Tensor, a: Tensor) -> Tensor:
    ys = torch.empty(2, 5, 3, dtype=torch.float64)
    for t in range(5):
        ys[:, t] = x[:, t]
    return ys * 2


# program: (joined by, how many, nodes that still scatter)
JOINED: dict[Program, tuple[str, int, int]] = {
    filled_in_order: ("stack", 1, 0),
    filled_from_the_end: ("stack", 1, 0),
    filled_channels_first: ("stack", 1, 0),
    fed_back: ("stack", 1, 0),
    added_in_place: ("stack", 1, 0),
    one_index_more: ("stack", 1, 0),
    filled_twice: ("stack", 1, 0),
    started_twice: ("stack", 1, 0),
    read_when_full: ("stack", 1, 0),
    kept_wide: ("cat", 1, 0),
    halves: ("cat", 1, 0),
    one_and_the_rest: ("cat", 1, 0),
    in_double: ("stack", 1, 0),
}


@pytest.mark.parametrize("run", JOINED, ids=lambda run: run.__name__)
def test_joined(run: Program) -> None:
    compiled = equal(run, X, A)
    op, count, scatters = JOINED[run]
    assert compiled.left == 0
    assert compiled.nodes("stack", "cat") == compiled.nodes(op) == count
    assert compiled.nodes(*SCATTERS) == scatters


def fed_back_for_inference(x: Tensor, a: Tensor) -> Tensor:
    h = torch.zeros_like(x)
    h[:, 0] = x[:, 0]
    for t in range(1, 5):
        h[:, t] = a[:, t] * h[:, t - 1] + x[:, t]
    return h * 2


def test_steps_read_values_and_not_the_buffer() -> None:
    """``h[:, t - 1]`` is what was written there: the graph of a loop that carries a variable.

    Eager cannot differentiate it: the product needs memory that the next step has changed.
    """
    compiled = equal(fed_back_for_inference, X, A, training=False)
    assert compiled.nodes("stack") == 1 and compiled.nodes(*SCATTERS) == 0
    selected = [
        n.args[0].op  # type: ignore[union-attr]
        for n in compiled.graph.graph.nodes
        if getattr(n.target, "_opname", "") == "select"
    ]
    assert set(selected) == {"placeholder"}


def read_before_it_is_full(x: Tensor, a: Tensor) -> Tensor:
    ys, total = torch.zeros(2, 5, 3), torch.zeros(())
    for t in range(5):
        ys[:, t] = x[:, t]
        total = total + ys.sum()
    return ys * total


def two_left_out(x: Tensor, a: Tensor) -> Tensor:
    ys = torch.zeros(2, 5, 3)
    for t in range(3):
        ys[:, t] = x[:, t]
    return ys * 2


def over_each_other(x: Tensor, a: Tensor) -> Tensor:
    ys = torch.zeros(2, 5, 3)
    ys[:, :3] = x[:, :3]
    ys[:, 2:4] = a[:, 2:4]
    return ys * 2


def over_each_other_up_to_the_end(x: Tensor, a: Tensor) -> Tensor:
    ys = torch.zeros(2, 5, 3)
    ys[:, 1:3] = x[:, 1:3]
    ys[:, 2:5] = a[:, 2:5]
    return ys * 2


def along_two_dims(x: Tensor, a: Tensor) -> Tensor:
    ys = torch.zeros(2, 5, 3)
    ys[0] = x[0]
    ys[:, 1] = a[:, 1]
    ys[1] = x[1]
    return ys * 2


def every_other(x: Tensor, a: Tensor) -> Tensor:
    ys = torch.zeros(2, 5, 3)
    ys[:, ::2] = x[:, ::2]
    ys[:, 1::2] = a[:, 1::2]
    return ys * 2


def laid_out_otherwise(x: Tensor, a: Tensor) -> Tensor:
    ys = torch.zeros(3, 5, 2).permute(2, 1, 0)
    for t in range(5):
        ys[:, t] = x[:, t]
    return ys


def gradients_of_zero(x: Tensor, a: Tensor) -> Tensor:
    ys = a * 2
    for t in range(5):
        ys[:, t] = x[:, t]
    return ys * 2


def a_row_without_gradients(x: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    ys = torch.zeros(2, 5, 3)
    for t in range(5):
        ys[:, t] = x[:, t]
    with torch.no_grad():
        row = ys[:, 2]
    return row * a[:, 0], ys * 2


def a_buffer_of_the_model(x: Tensor, a: Tensor) -> Tensor:
    kept = torch.zeros(2, 3)
    ys = torch.zeros(2, 5, 3)
    for t in range(5):
        with torch.no_grad():
            kept.add_(a[:, t])
        ys[:, t].copy_(kept)
        ys[:, t] += x[:, t]
    return ys * 2


STAY: tuple[Program, ...] = (
    read_before_it_is_full,
    two_left_out,
    over_each_other,
    over_each_other_up_to_the_end,
    along_two_dims,
    every_other,
    laid_out_otherwise,
    gradients_of_zero,
)


@pytest.mark.parametrize("run", STAY, ids=lambda run: run.__name__)
def test_not_joined(run: Program) -> None:
    compiled = equal(run, X, A)
    assert compiled.left == 0
    assert compiled.nodes("stack", "cat") == 0
    assert compiled.nodes(*SCATTERS) >= 2


def a_row_without_gradients_beside_one_with(x: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    row, ys = a_row_without_gradients(x, a)
    return row * x[:, 2], ys


@pytest.mark.parametrize("run", [a_row_without_gradients, a_row_without_gradients_beside_one_with])
def test_rows_without_gradients_stay_without(run: Program) -> None:
    compiled = equal(run, X, A)
    assert compiled.nodes("stack") == 1


def test_values_that_change_after_they_were_written() -> None:
    compiled = equal(a_buffer_of_the_model, X, A)
    assert any("in another grad mode" in problem for problem in compiled.problems)


def cell_is_returned(x: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    ys, last = torch.zeros(2, 5, 3), x[:, 0]
    for t in range(5):
        last = x[:, t] * a[:, t]
        ys[:, t] = last
    return last, ys[:, 4].contiguous()


def input_is_returned(x: Tensor, a: Tensor) -> Tensor:
    ys = torch.zeros(2, 5, 3)
    for t in range(5):
        ys[:, t] = x[:, 0]
    return ys[:, 1].reshape(-1)


@pytest.mark.parametrize("run", [cell_is_returned, input_is_returned], ids=lambda r: r.__name__)
def test_outputs_keep_memory_of_their_own(run: Program) -> None:
    equal(run, X, A)
    x, a = X.clone(), A.clone()
    out = Rewritten(run)(x, a)
    outputs = out if isinstance(out, tuple) else (out,)
    places = [t.untyped_storage().data_ptr() for t in (x, a, *outputs)]
    assert len(set(places)) == len(places)


def test_rows_of_a_single_token() -> None:
    compiled = equal(lambda x: _fill(x, 1), X)
    assert compiled.nodes("stack") == 1


def test_symbolic_batch() -> None:
    compiled = Rewritten(lambda x: _fill(x, 5))
    for batch in (4, 6):
        x = torch.randn(batch, 5, 3)
        mine, theirs = leaf(x), leaf(x)
        torch._dynamo.mark_dynamic(mine, 0)
        same([compiled(mine)], [mine], [_fill(theirs, 5)], [theirs])
    assert compiled.nodes("stack") == 1 and compiled.nodes(*SCATTERS) == 0


def _fill(x: Tensor, steps: int) -> Tensor:
    ys = torch.zeros(x.shape[0], steps, 3)
    for t in range(steps):
        ys[:, t] = x[:, t] * 2
    return ys + 1
