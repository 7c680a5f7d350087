"""Intervals of time, against the numbers they stand for: every rule, on random programs too."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import Interpreter
from torch.fx.experimental.proxy_tensor import make_fx

from effpass.patterns.scans.interval_rules import Sight
from effpass.patterns.scans.intervals import (
    FREE,
    PRODUCT,
    SUM,
    TIME,
    ZERO,
    Atom,
    Value,
    fields,
    products,
    reshaped,
    sums,
)
from tests.tolerances import close

BATCH, TIMES, WIDTH = 3, 8, 5


def leaf(codes: Callable[[Tensor], Tensor]) -> Value:
    """A tensor (batch, time, width)."""
    dims = ((Atom("batch", 1, BATCH),), (Atom(TIME, 0, TIMES),), (Atom("width", 1, WIDTH),))
    return Value(dims, codes(torch.arange(TIMES)))


def number(code: int, a: Tensor, b: Tensor) -> Tensor:
    """What a code stands for, (batch, width); a and b are (batch, time, width)."""
    kind, first, last, upto = (int(field) for field in fields(torch.tensor(code)))
    one = torch.ones(BATCH, WIDTH, dtype=a.dtype)
    if kind == PRODUCT:
        return a[:, first : upto + 1].prod(1)
    if kind == SUM:
        terms = [a[:, k + 1 : upto + 1].prod(1) * b[:, k] for k in range(first, last + 1)]
        return torch.stack(terms).sum(0)
    return 0 * one if code == ZERO else one


def expected(value: Value, a: Tensor, b: Tensor) -> Tensor:
    """The tensor that a value says, NaN where it says nothing."""
    codes = value.codes.flatten().tolist()
    rows = [number(c, a, b) if c >= 0 else torch.full((BATCH, WIDTH), torch.nan) for c in codes]
    table = torch.stack(rows) if rows else torch.empty(0, BATCH, WIDTH)
    table = table.view(*value.codes.shape, BATCH, WIDTH)
    shape, times = value.shape, []
    named = dict.fromkeys(("batch", "width"), torch.zeros([1] * len(shape), dtype=torch.long))
    for place, dim in enumerate(value.dims):
        line = [-1 if other == place else 1 for other in range(len(shape))]
        inner, where = shape[place], torch.arange(shape[place]).view(line)
        for atom in dim:
            inner //= max(atom.size, 1)
            part = where // max(inner, 1) % max(atom.size, 1)
            if atom.name == TIME:
                times.append(part)
            elif atom.name != FREE:
                named[atom.name] = named[atom.name] + part * atom.stride
    if 0 in shape:
        return torch.empty(shape)
    return table[(*times, named["batch"], named["width"])].expand(shape)


class Program:
    """Random operations on a and b, the same for the same choices; a first run finds what fits."""

    def __init__(self, choices: list[int], a: Tensor, b: Tensor) -> None:
        self.choices, self.misfits, self.trying = choices, set[int](), True
        self(a, b)
        self.trying = False

    def __call__(self, a: Tensor, b: Tensor) -> list[Tensor]:
        made, self.left = [a, b], list(self.choices)
        while len(self.left) > 12:
            step = len(self.left)
            chosen = OPERATIONS[self.draw(len(OPERATIONS))]
            if step in self.misfits:
                continue
            try:
                result = chosen(self, made)
            except (RuntimeError, IndexError, ValueError):
                assert self.trying
                self.left = list(self.choices[: step - 1])
                self.misfits.add(step)
                continue
            made += [t for t in result if 0 < t.numel() < 3000 and t.dim() < 6]
        return made

    def draw(self, below: int) -> int:
        """A number from 0 to ``below - 1``."""
        return self.left.pop() % max(below, 1)

    def one(self, made: list[Tensor]) -> Tensor:
        """A tensor; later ones more often."""
        return made[max(self.draw(len(made)), self.draw(len(made)))]

    def dim(self, x: Tensor) -> int:
        """One of its dims."""
        return self.draw(x.dim()) - x.dim() * self.draw(2)

    def alike(self, made: list[Tensor], x: Tensor) -> Tensor:
        """A tensor of the same shape as ``x``."""
        same = [t for t in made if t.shape == x.shape]
        return same[self.draw(len(same))]


Operation = Callable[[Program, list[Tensor]], Sequence[Tensor]]
OPERATIONS: list[Operation] = []


def operation(function: Operation) -> Operation:
    """One of the operations, as often as it is listed."""
    OPERATIONS.extend(
        [function] * (3 if function.__name__ in ("multiply", "sum_up", "combine") else 1)
    )
    return function


@operation
def multiply(p: Program, made: list[Tensor]) -> Sequence[Tensor]:
    x = p.one(made)
    return [x * (p.alike(made, x) if p.draw(3) else p.one(made))]


@operation
def sum_up(p: Program, made: list[Tensor]) -> Sequence[Tensor]:
    x = p.one(made)
    if p.draw(4) == 0:
        return [torch.addcmul(x, p.alike(made, x), p.alike(made, x))]
    return [x + (p.alike(made, x) if p.draw(3) else p.one(made))]


@operation
def cut(p: Program, made: list[Tensor]) -> Sequence[Tensor]:
    x = p.one(made)
    where = [slice(None)] * x.dim()
    where[p.dim(x)] = slice(p.draw(4), [None, -1, 3, 8][p.draw(4)], 1 + p.draw(2))
    return [x[tuple(where)]]


@operation
def pick(p: Program, made: list[Tensor]) -> Sequence[Tensor]:
    x = p.one(made)
    dim = p.dim(x)
    return [x.select(dim, p.draw(x.shape[dim])), *x.unbind(dim)[:2]]


@operation
def reorder(p: Program, made: list[Tensor]) -> Sequence[Tensor]:
    x = p.one(made)
    return [x.transpose(p.dim(x), p.dim(x)), x.movedim(p.dim(x), p.dim(x)), x.flip([p.dim(x)])]


@operation
def regroup(p: Program, made: list[Tensor]) -> Sequence[Tensor]:
    x = p.one(made)
    dim = p.draw(x.dim())
    if p.draw(2) and dim + 1 < x.dim():
        return [x.flatten(dim, dim + 1)]
    return [x.unflatten(dim, (-1, 2)), x.reshape(*x.shape[:dim], 2, -1, *x.shape[dim + 1 :])]


@operation
def lengthen(p: Program, made: list[Tensor]) -> Sequence[Tensor]:
    x = p.one(made)
    pads = [0] * (2 * p.draw(x.dim() + 1))
    if pads:
        pads[p.draw(len(pads))] = 1 + p.draw(2)
    y, dim = torch.nn.functional.pad(x, pads, value=float(p.draw(2))), p.dim(x)
    return [y, torch.cat([torch.zeros_like(x.narrow(dim, 0, 1)), x], dim), x.roll(1, dim)]


@operation
def join(p: Program, made: list[Tensor]) -> Sequence[Tensor]:
    x = p.one(made)
    y, dim = p.alike(made, x), p.dim(x)
    return [torch.cat([x, y], dim), torch.stack([x, y], p.draw(x.dim() + 1))]


@operation
def write(p: Program, made: list[Tensor]) -> Sequence[Tensor]:
    x = p.one(made)
    dim = p.draw(x.dim())
    part = x.narrow(dim, 0, 1) if p.draw(2) else torch.ones_like(x.narrow(dim, 0, 1))
    whole = torch.zeros_like(x) if p.draw(2) else x
    at = p.draw(x.shape[dim])
    return [
        torch.slice_scatter(whole, part, dim, at, at + 1),
        torch.select_scatter(whole, part.squeeze(dim), dim, at),
    ]


@operation
def spread(p: Program, made: list[Tensor]) -> Sequence[Tensor]:
    x = p.one(made)
    dim = p.draw(x.dim() + 1)
    wide = x.unsqueeze(dim).expand(*x.shape[:dim], 2, *x.shape[dim:])
    return [x.unsqueeze(dim), wide, x.unsqueeze(dim).squeeze(dim), *x.chunk(2, p.dim(x))]


@operation
def mask(p: Program, made: list[Tensor]) -> Sequence[Tensor]:
    x = p.one(made)
    kept = torch.arange(x.shape[-1]) >= p.draw(3)
    return [torch.where(kept, x, 0.0), x.masked_fill(kept, 1.0), x * kept.to(x.dtype)]


@operation
def combine(p: Program, made: list[Tensor]) -> Sequence[Tensor]:
    """A step of a scan of some pair, now and then with a mistake."""
    pairs = [(x, y) for x, y in pairwise(made) if x.shape == y.shape and x.dim() > 1]
    a, b = pairs[max(p.draw(len(pairs)), p.draw(len(pairs)))]
    dim = 1 if p.draw(4) else p.draw(a.dim())
    if p.draw(2):
        early, late = slice(0, a.shape[dim] // 2 * 2, 2), slice(1, None, 2)
    else:
        shift = (1, 1, 2, 4, 3)[p.draw(5)]
        early, late = slice(0, -shift), slice(shift, None)
    mistakes = p.draw(8)
    (a1, b1), (a2, b2) = ([v[(slice(None),) * dim + (s,)] for v in (a, b)] for s in (early, late))
    a1, a2 = (a2, a1) if mistakes == 0 else (a1, a2)
    products, totals = a1 * a2, (a1 if mistakes == 1 else a2) * b1 + b2
    if early.step == 2 or p.draw(4) == 0:
        return [products, totals]
    heads = [v.narrow(dim, 0, shift) for v in (a, b)]
    return [torch.cat([h, v], dim) for h, v in zip(heads, (products, totals), strict=True)]


@given(st.lists(st.integers(0, 2**30), min_size=60, max_size=250))
@settings(max_examples=60, deadline=None)
def test_what_is_known_is_true(choices: list[int]) -> None:
    """Every element that the rules claim to know has that value, in random programs."""
    generator = torch.Generator().manual_seed(0)
    shape = (BATCH, TIMES, WIDTH)
    a, b = (torch.rand(shape, generator=generator, dtype=torch.float64) + 0.5 for _ in "ab")
    traced = make_fx(Program(choices, a, b), pre_dispatch=True, tracing_mode="fake")(a, b)
    first, second = traced.graph.find_nodes(op="placeholder")
    run = Interpreter(traced, garbage_collect_values=False)
    run.run(a, b)
    sight = Sight({first: leaf(products), second: leaf(lambda t: sums(t, t, t))})
    for node in traced.graph.nodes:
        if not any(sight.values.get(source) for source in node.all_input_nodes):
            continue
        value = sight.follow(node)
        if isinstance(value, Value):
            wanted, found = expected(value, a, b), run.env[node]
            assert wanted.shape == found.shape, node
            known = ~wanted.isnan()
            close(found[known], wanted[known].to(found.dtype), "interval_fp64")


def test_programs_reach_sums_over_several_tokens() -> None:
    """The test above would hold of everything if nothing were known."""
    a, b = torch.rand(2, BATCH, TIMES, WIDTH, dtype=torch.float64)

    def scan(a: Tensor, b: Tensor) -> Tensor:
        h = b[:, 0]
        for t in range(1, TIMES):
            h = a[:, t] * h + b[:, t]
        return h

    traced = make_fx(scan, pre_dispatch=True, tracing_mode="fake")(a, b)
    first, second = traced.graph.find_nodes(op="placeholder")
    sight = Sight({first: leaf(products), second: leaf(lambda t: sums(t, t, t))})
    values = [sight.follow(n) for n in traced.graph.nodes if n.op == "call_function"]
    last = values[-1]
    assert isinstance(last, Value)
    close(scan(a, b), expected(last, a, b), "interval_fp64")
    assert not expected(last, a, b).isnan().any()


@pytest.mark.parametrize(
    "cut",
    [
        lambda x: x[..., 1:],
        lambda x: x.flip(-1),
        lambda x: x.roll(1, -1),
        lambda x: torch.cat([x[..., 2:], x[..., :2]], -1),
        lambda x: x.select(0, 1),
        lambda x: torch.nn.functional.pad(x, (1, 0))[..., :-1],
    ],
)
def test_channels_and_batch_are_never_cut(cut: Callable[[Tensor], Tensor]) -> None:
    x = torch.rand(BATCH, TIMES, WIDTH)
    traced = make_fx(cut, pre_dispatch=True, tracing_mode="fake")(x)
    (first,) = traced.graph.find_nodes(op="placeholder")
    sight = Sight({first: leaf(products)})
    values = [sight.follow(n) for n in traced.graph.nodes if n.op == "call_function"]
    assert values[-1] is None


def test_dims_are_merged_and_cut_apart_again() -> None:
    value = leaf(products)
    flat = reshaped(value, [BATCH * TIMES, WIDTH])
    assert flat is not None and flat.shape == [BATCH * TIMES, WIDTH]
    again = reshaped(flat, [BATCH, TIMES // 2, 2, WIDTH])
    assert again is not None and again.codes.shape == (TIMES // 2, 2)
    back = reshaped(again, [BATCH, TIMES, WIDTH])
    assert back is not None and back.dims == value.dims and torch.equal(back.codes, value.codes)
    assert reshaped(value, [TIMES, BATCH, WIDTH]) is None
