"""Merging nodes that compute the same: what goes, and what must stay apart."""

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from effpass.graph.clean import clean
from effpass.graph.duplicates import merge_duplicates


def merged(run, *args: Tensor) -> int:
    gm = make_fx(run, pre_dispatch=True, tracing_mode="fake")(*args)
    clean(gm)
    count = merge_duplicates(gm.graph)
    gm.graph.lint()
    gm.recompile()
    expected = run(*(a.clone() for a in args))
    torch.testing.assert_close(gm(*(a.clone() for a in args)), expected)
    return count


def test_the_same_of_the_same() -> None:
    x = torch.randn(3, 4)
    assert merged(lambda x: x.exp() * x.exp(), x) == 1
    assert merged(lambda x: x.exp() * x[:].exp(), x) == 2
    assert merged(lambda x: x.exp() * x.sin(), x) == 0


def test_numbers_of_another_type() -> None:
    x = torch.arange(3)
    assert merged(lambda x: (x + 1) * (x + 1.0) * (x + True), x) == 0


def test_a_part_is_not_the_whole() -> None:
    x = torch.randn(3, 4)
    assert merged(lambda x: x[:2].sum() + x[:3].sum() + x[::1].sum() + x[:-1].sum(), x) > 0
    assert merged(lambda x: x[:2].sum() + x[1:].sum(), x) == 0


def test_what_is_written_to_stays() -> None:
    def run(x: Tensor) -> Tensor:
        a, b = x.exp(), x.exp()
        a.add_(1)
        return a * b

    assert merged(run, torch.randn(3)) == 0


def test_outputs_stay_apart() -> None:
    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        return x.exp(), x.exp()

    assert merged(run, torch.randn(3)) == 0


def test_random_numbers_stay_random() -> None:
    gm = make_fx(lambda x: torch.rand_like(x) - torch.rand_like(x), pre_dispatch=True)(
        torch.ones(3)
    )
    clean(gm)
    assert merge_duplicates(gm.graph) == 0


def test_a_result_that_grows() -> None:
    def run(x: Tensor) -> Tensor:
        y = x[:, :1]
        for t in range(1, 5):
            y = torch.cat([y, x[:, t : t + 1] * 2], dim=1)
        return y + 1

    assert merged(run, torch.randn(2, 5)) == 3


def test_a_part_of_the_growth_that_is_used_stays() -> None:
    def run(x: Tensor) -> Tensor:
        y = torch.cat([x, x], dim=1)
        return torch.cat([y, x], dim=1).sum() + y.sum()

    assert merged(run, torch.randn(2, 5)) == 0


def test_cats_along_other_dims_stay() -> None:
    def run(x: Tensor) -> Tensor:
        return torch.cat([torch.cat([x, x], dim=0), torch.cat([x, x], dim=0)], dim=1) * 2

    assert merged(run, torch.randn(2, 5)) == 1
