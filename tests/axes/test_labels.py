"""Labels of dims through views and products, and tensors brought into the dims of an op."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx

from effpass.axes.contraction import Contraction, contraction
from effpass.axes.labels import Dims, Labels
from effpass.patterns.blocks.layout import arrange, sizes
from effpass.patterns.softmax.bounds import values


def last(function: Callable[..., Tensor], *args: Tensor) -> Node:
    """The node of what a function returns, captured on fakes."""
    graph = make_fx(function, pre_dispatch=True, tracing_mode="fake")(*args).graph
    (node,) = graph.output_node().all_input_nodes
    return node


def product(function: Callable[..., Tensor], *args: Tensor) -> Contraction:
    found = contraction(last(function, *args))
    assert found is not None
    return found


def test_a_view_cuts_labels_and_joins_them() -> None:
    labels = Labels()
    dims = (labels.fresh(6), labels.fresh(4))
    cut = labels.regroup(dims, (2, 3, 4))
    assert cut is not None and [len(dim) for dim in cut] == [1, 1, 1]
    assert labels.resolved(dims) == (cut[0] + cut[1], cut[2])
    assert labels.regroup(cut, (6, 1, 4)) == (cut[0] + cut[1], (), cut[2])
    assert labels.regroup(dims, (4, 6)) is None  # 6 = 4 * 1.5


@pytest.mark.parametrize(
    "view",
    [
        lambda x: x.transpose(1, -1),
        lambda x: x.permute(2, 0, 1),
        lambda x: x.unsqueeze(1).movedim(2, 0),
        lambda x: x.flatten(1),
        lambda x: x.unflatten(1, (2, 2)).swapaxes(0, 2),
        lambda x: x[:, :, None].expand(2, 4, 3, 6).reshape(2, 12, 6),
        lambda x: x.repeat_interleave(3, dim=1),
    ],
)
def test_a_view_is_undone(view: Callable[[Tensor], Tensor]) -> None:
    """What lies behind views, arranged in their dims, is what they show."""
    x = torch.randn(2, 4, 6)
    node, labels = last(view, x), Labels()
    shown = dims = labels.of(node)
    while node.op == "call_function":
        behind = labels.behind(node, dims)
        assert behind is not None
        node, dims = node.args[0], behind  # type: ignore[assignment]
    held, groups = labels.resolved(dims), labels.resolved(shown)
    made = arrange(x, held, groups, sizes(labels, [(x, held)]), "1" * len(groups))
    assert torch.equal(made, view(x))


@pytest.mark.parametrize(
    "function",
    [
        lambda a, b: a @ b,
        lambda a, b: torch.einsum("bik,bkj->bij", a, b),
        lambda a, b: torch.einsum("...ik, ...kj", a, b),
        lambda a, b: torch.bmm(a, b),
        lambda a, b: (a[..., None] * b[:, None]).sum(2),
    ],
)
def test_a_product_in_any_spelling(function: Callable[..., Tensor]) -> None:
    a, b = torch.randn(2, 3, 5), torch.randn(2, 5, 7)
    found, labels = product(function, a, b), Labels()
    rows, columns, out = found.labelled(labels)
    shared = {x for dim in rows for x in dim} & {x for dim in columns for x in dim}
    shown = [x for dim in out for x in dim]
    assert len(shown) == 3 and len(shared) == 2 and len(shared - set(shown)) == 1


@pytest.mark.parametrize(
    "function",
    [
        lambda a, b: torch.einsum("bik,bkj->ij", a, b.relu()) + 1,
        lambda a, b: torch.einsum("bik,ckj->bcij", a, b).sum(1),
        lambda a, b: torch.einsum("bik,ckj->bij", a, b),
        lambda a, b: torch.einsum("bii,bkj->bkj", a[:, :, :3], b),
        lambda a, b: (a * a).sum(1),
    ],
)
def test_what_is_no_product_of_two(function: Callable[..., Tensor]) -> None:
    """A sum over an axis of one operand alone, a diagonal, a square."""
    assert contraction(last(function, torch.randn(2, 3, 5), torch.randn(2, 5, 7))) is None


def test_a_group_of_which_a_part_is_there_is_broadcast() -> None:
    labels = Labels()
    (a, b, c) = (labels.fresh(n)[0] for n in (2, 3, 4))
    known = {a: 2, b: 3, c: 4}
    x = torch.randn(3, 4)
    dims: Dims = ((b,), (c,))
    assert arrange(x, dims, ((), (a, b), (c,)), known).shape == (1, 6, 4)
    assert arrange(x, dims, ((a,), (b,), (c,)), known).shape == (1, 3, 4)
    assert arrange(x, dims, ((a,), (b,), (c,)), known, "111").shape == (2, 3, 4)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda m: torch.where(m, 0.0, -1e9), {0.0, -1e9}),
        (lambda m: (1.0 - m.float()) * -1e4, {0.0, -1e4}),
        (lambda m: torch.zeros(2, 2).masked_fill(m, float("-inf")), {0.0, float("-inf")}),
        (lambda m: torch.where(m, 0.0, -3.4028235e38).bfloat16(), {0.0, float("-inf")}),
        (lambda m: m.float()[:, None].expand(2, 5, 2) - 1, {0.0, -1.0}),
        (lambda m: m.float().exp(), None),
    ],
)
def test_the_numbers_of_a_mask(
    function: Callable[[Tensor], Tensor], expected: set[float] | None
) -> None:
    found = values(last(function, torch.ones(2, 2, dtype=torch.bool)))
    wanted = None if expected is None else {float(torch.tensor(v)) for v in expected}
    assert (None if found is None else {float(torch.tensor(v)) for v in found}) == wanted
