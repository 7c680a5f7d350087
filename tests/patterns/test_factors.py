"""Dims as products of factors: reshapes split and merge, operands are laid over each other."""

from __future__ import annotations

import pytest

from effpass.patterns.chunks.factors import (
    Classes,
    Factor,
    Key,
    Unreadable,
    broadcast,
    count,
    of_shape,
    of_tensor,
    recut,
    regroup,
    sources,
    split,
)


def test_a_reshape_splits_and_merges() -> None:
    dims = of_tensor(0, (2, 12, 6))
    made = regroup(dims, (2, 3, 4, 6))
    assert [count(dim) for dim in made] == [2, 3, 4, 6]
    assert sources(made[1]) == {Key(0, 1, 0, 4, 3)} and sources(made[2]) == {Key(0, 1, 0, 1, 4)}
    assert regroup(made, (6, 24))[0] == (*made[0], *made[1])
    assert regroup(of_tensor(0, (1, 5)), (5, 1, 1)) == (of_tensor(0, (1, 5))[1], (), ())


@pytest.mark.parametrize("shape", [(5, 2), (3, 3), (12, 1, 2), (4, 3, 0)])
def test_a_reshape_that_does_not_fit(shape: tuple[int, ...]) -> None:
    with pytest.raises(Unreadable):
        regroup(of_tensor(0, (6, 2)), shape)


def test_what_is_laid_over_each_other_is_one_class() -> None:
    classes = Classes()
    heads, grouped = of_tensor(0, (6,)), of_tensor(1, (3,))
    copies = ((*grouped[0], Factor(2)),)
    (dim,) = broadcast([heads, copies], classes)
    assert [factor.size for factor in dim] == [3, 2]
    outer, inner = Key(0, 0, 0, 2, 3), Key(0, 0, 0, 1, 2)
    assert classes.of(outer) == classes.of(Key(1, 0, 0, 1, 3)) != classes.of(inner)
    assert set(classes) >= {outer, inner}


def test_dims_of_one_are_broadcast() -> None:
    made = broadcast([of_tensor(0, (4, 1)), of_shape((3,))], Classes())
    assert made == (*of_tensor(0, (4,)), (Factor(3),))


@pytest.mark.parametrize(("left", "right"), [((4,), (6,)), ((2,), (3,))])
def test_sizes_that_do_not_run_along_each_other(left: tuple[int], right: tuple[int]) -> None:
    with pytest.raises(Unreadable):
        broadcast([of_tensor(0, left), of_tensor(1, right)], Classes())


def test_a_padded_dim_is_another_key_of_the_same_tensor() -> None:
    (dim,) = of_tensor(3, (10,))
    padded = recut(dim, 12, cut=1)
    assert sources(padded) == {Key(3, 0, 1, 1, 12)}
    outer, inner = split(padded[0], 4)
    assert outer.sources == {Key(3, 0, 1, 4, 3)} and inner.sources == {Key(3, 0, 1, 1, 4)}
    assert recut(dim, 1, cut=2) == ()
