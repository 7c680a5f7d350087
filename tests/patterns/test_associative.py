"""Parallel scans become ``linear_recurrence``: however the tree is written, and nothing else."""

import copy
from collections.abc import Callable
from operator import getitem
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._higher_order_ops.associative_scan import associative_scan, associative_scan_op
from torch.fx import GraphModule

from effpass.capture.dynamo import capture
from effpass.patterns import associative, discretised, scan_op
from effpass.patterns.raising import Raising, raise_ops
from tests.patterns.raising import Raiser, equal
from tests.patterns.spellings import parallel_near_misses, scan_near_misses, trees
from tests.patterns.spellings.spelling import NearMiss, Spelling
from tests.tolerances import close

IDIOMS = [associative.IDIOM]
LENGTHS = (2, 5, 8)
# an autograd.Function keeps its two bodies, each with a scan
BY_FUNCTION = [s for s in trees.SPELLINGS if s.name.startswith("pair_scan")]
PLAIN = [s for s in trees.SPELLINGS if s not in BY_FUNCTION]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("spelling", PLAIN, ids=lambda s: s.name)
def test_spellings_are_raised(spelling: Spelling, length: int) -> None:
    compiled = equal(spelling.make(), spelling.inputs(length), IDIOMS)
    assert compiled.count("linear_recurrence") == compiled.nodes("linear_recurrence") == 1
    assert not compiled.reasons


@pytest.mark.parametrize("spelling", PLAIN[::4], ids=lambda s: s.name)
def test_nothing_of_the_tree_stays(spelling: Spelling) -> None:
    """A tree of 32 tokens leaves no more nodes than one of 8."""
    counts = []
    for length in (8, 32):
        compiled = equal(spelling.make(), spelling.inputs(length), IDIOMS)
        compiled.graphs[0].graph.eliminate_dead_code()
        counts.append(len(compiled.graphs[0].graph.nodes))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("spelling", PLAIN, ids=lambda s: s.name)
def test_the_op_of_the_label_follows(spelling: Spelling) -> None:
    idioms = [*IDIOMS, discretised.IDIOM]
    assert equal(spelling.make(), spelling.inputs(5), idioms).nodes(spelling.op) == 1


def combine(left: Any, right: Any) -> Any:
    """(a1, b1), (a2, b2) -> (a1 a2, a2 b1 + b2)."""
    return left[0] * right[0], right[0] * left[1] + right[1]


def scan(a: Tensor, b: Tensor, dim: int = 1, reverse: bool = False) -> Tensor:
    return associative_scan(combine, (a, b), dim, reverse, "generic")[1]


def doubling(a: Tensor, b: Tensor, dim: int = 1) -> Tensor:
    """Hillis-Steele along any dim, a and b broadcast."""
    shift = 1
    while shift < b.shape[dim]:
        old_a, old_b = (v.narrow(dim, 0, v.shape[dim] - shift) for v in (a, b))
        new_a, new_b = (v.narrow(dim, shift, v.shape[dim] - shift) for v in (a, b))
        tail, gain = new_a * old_b + new_b, new_a * old_a
        b = torch.cat([b.narrow(dim, 0, shift), tail], dim)
        a = torch.cat([a.narrow(dim, 0, shift), gain], dim)
        shift *= 2
    return b


class Calls(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> Any:
        return self.function(*args)


def ab(*shape: int, of_a: tuple[int, ...] | None = None) -> tuple[Tensor, Tensor]:
    """Coefficients and values."""
    return torch.rand(of_a or shape) * 0.5 + 0.5, torch.randn(shape)


SHAPES = [((6, 3), 0), ((3, 6), 1), ((2, 3, 6), 2), ((6, 2, 3), 0), ((2, 6, 3, 4), 1)]
SHAPES += [((2, 3, 4, 6), 3), ((2, 3, 6, 2, 2), 2), ((6,), 0), ((1, 6, 3), 1), ((6, 6, 6), 1)]


@pytest.mark.parametrize(("shape", "dim"), SHAPES)
def test_any_dim_is_time(shape: tuple[int, ...], dim: int) -> None:
    function = scan if shape == (2, 3, 6) else doubling
    compiled = equal(Calls(lambda a, b: function(a, b, dim)), ab(*shape), IDIOMS)
    assert compiled.count("linear_recurrence") == 1


@pytest.mark.parametrize("of_a", [(2, 6, 1), (1, 6, 3), (6, 3), (6, 1), (1, 6, 1)])
def test_coefficients_are_broadcast(of_a: tuple[int, ...]) -> None:
    module = Calls(lambda a, b: doubling(a, b, -2))
    compiled = equal(module, ab(2, 6, 3, of_a=of_a), IDIOMS)
    assert compiled.count("linear_recurrence") == 1


def test_values_are_broadcast() -> None:
    compiled = equal(Calls(trees.doubling_by_pad), ab(2, 6, 1, of_a=(2, 6, 3)), IDIOMS)
    assert compiled.count("linear_recurrence") == 1


def test_what_is_read_twice_or_besides() -> None:
    def reads(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        gains, states = associative_scan(combine, (a, b), 1, combine_mode="generic")
        return states[:, -1], states.sin(), gains, a * 2

    compiled = equal(Calls(reads), ab(2, 6, 3), IDIOMS)
    assert compiled.count("linear_recurrence") == 1


def test_two_directions_of_the_same_tensors() -> None:
    compiled = equal(Calls(lambda a, b: scan(a, b) + scan(a, b, reverse=True)), ab(2, 6, 3), IDIOMS)
    assert compiled.count("linear_recurrence") == 2
    compiled.graphs[0].graph.eliminate_dead_code()
    assert compiled.nodes("flip") == 3  # of a, of b, of the states


def test_two_scans_in_a_row() -> None:
    compiled = equal(Calls(lambda a, b: scan(a, scan(a, b))), ab(2, 6, 3), IDIOMS)
    assert compiled.count("linear_recurrence") == 2


def test_the_batch_stays_symbolic() -> None:
    module = Calls(lambda a, b: trees.strided_sweeps(a, b) + doubling(a, b))
    compiled = Raiser(module, IDIOMS)
    for batch in (3, 5, 4):
        a, b = ab(batch, 6, 4)
        torch._dynamo.mark_dynamic(a, 0)
        torch._dynamo.mark_dynamic(b, 0)
        close(compiled(a, b), module(a, b), "model_fp32")
    assert len(compiled.graphs) == 1 and compiled.count("linear_recurrence") == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    a, b = (v.to(dtype) for v in ab(2, 9, 4))
    compiled = Raiser(Calls(doubling), IDIOMS)
    actual = compiled(a, b)
    assert compiled.count("linear_recurrence") == 1
    close(actual, doubling(a, b), "model_bf16" if dtype is torch.bfloat16 else "model_fp32")


def test_a_cast_between_combines_stays() -> None:
    """Rounding in the middle of a tree is part of what it computes."""

    def rounded(a: Tensor, b: Tensor) -> Tensor:
        first = a[:, 1:] * b[:, :-1] + b[:, 1:]
        b = torch.cat([b[:, :1], first], 1).bfloat16().float()
        a = torch.cat([a[:, :1], a[:, 1:] * a[:, :-1]], 1)
        return torch.cat([b[:, :2], a[:, 2:] * b[:, :-2] + b[:, 2:]], 1)

    compiled = equal(Calls(rounded), ab(2, 4, 3), IDIOMS)
    assert compiled.count("linear_recurrence") == 0


CUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels swapped": lambda v: v.flip(-1),
    "channels turned": lambda v: v.roll(1, -1),
    "one channel": lambda v: v[..., :1].expand_as(v),
    "batch swapped": lambda v: v.flip(0),
    "detached": lambda v: v.detach(),
    "doubled": lambda v: v * 2,
}


@pytest.mark.parametrize("name", CUTS)
def test_a_change_between_combines_stays(name: str) -> None:
    """h over four tokens, in which the second round reads something else than the first wrote."""

    def broken(a: Tensor, b: Tensor) -> Tensor:
        first = torch.cat([b[:, :1], a[:, 1:] * b[:, :-1] + b[:, 1:]], 1)
        gain = torch.cat([a[:, :1], a[:, 1:] * a[:, :-1]], 1)
        second = CUTS[name](first)
        return torch.cat([first[:, :2], gain[:, 2:] * second[:, :-2] + first[:, 2:]], 1)

    compiled = equal(Calls(broken), ab(2, 4, 3), IDIOMS)
    assert compiled.count("linear_recurrence") == 0 and compiled.reasons


REASONS = {
    "left_coefficient": "the later value by the earlier coefficient",
    "added_coefficients": "it adds a[0] and a[1]",
    "left_factor_kept": "it multiplies a[3] and b[0..1]",
    "tripled_shift": "it multiplies a[2..3] and b[0]",
    "off_by_one_shift": "it multiplies a[2..3] and b[0]",
    "repeated_shift": "it multiplies a[0..1] and b[0]",
    "stops_early": "token 4 is made of tokens [1..4] only",
    "looks_ahead": "from the last token to the first",
    "pads_with_one": "it adds b[0..1] and a[0..1]",
    "coefficient_first": "it multiplies a[2] and a[0]",
    "circular": "it multiplies a[0] and a[7]",
}


@pytest.mark.parametrize("near", parallel_near_misses.NEAR_MISSES, ids=lambda n: n.name)
def test_near_misses_stay_and_say_why(near: NearMiss) -> None:
    compiled = equal(near.make(), near.inputs(8), IDIOMS)
    assert compiled.count("linear_recurrence") == 0
    if near.name not in REASONS:
        assert not compiled.reasons  # nothing of a parallel scan in them
        return
    (reason,) = compiled.reasons
    assert REASONS[near.name] in reason


@pytest.mark.parametrize("near", scan_near_misses.FLIPPED, ids=lambda n: n.name)
def test_flips_stay(near: NearMiss) -> None:
    compiled = equal(near.make(), near.inputs(8), IDIOMS)
    if compiled.count("linear_recurrence"):
        assert compiled.nodes("flip") >= 3


@pytest.mark.skipif(torch.__version__ < "2.13", reason="older torch returns every intermediate")
@pytest.mark.parametrize("spelling", BY_FUNCTION, ids=lambda s: s.name)
def test_bodies_of_an_autograd_function(spelling: Spelling) -> None:
    compiled = equal(spelling.make(), spelling.inputs(5), IDIOMS)
    assert compiled.count("linear_recurrence") == 2  # its forward, and its own backward


Body = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def operator(body: Body, states: int = 1, length: int = 6) -> tuple[GraphModule, Raising]:
    """The graph of an ``associative_scan`` operator (which only a GPU would get), raised."""
    found: list[tuple[GraphModule, Raising]] = []

    def backend(gm: GraphModule, inputs: Any) -> Any:
        made = GraphModule(gm, copy.deepcopy(gm.graph))
        made.add_submodule("combine", torch.fx.symbolic_trace(body))
        out = made.graph.output_node()
        (old,) = out.args[0]  # type: ignore[misc]
        with made.graph.inserting_before(out):
            combine = made.graph.get_attr("combine")
            pair = tuple(made.graph.find_nodes(op="placeholder"))
            scanned = made.graph.call_function(associative_scan_op, (combine, pair, ()))
            scanned.meta["example_value"] = (old.meta["example_value"],) * 2
            out.args = ((made.graph.call_function(getitem, (scanned, states)),),)
        graph = capture(made, inputs)
        found.append((graph, raise_ops(graph, proving=True, idioms=[scan_op.IDIOM], strict=True)))
        return gm.forward

    torch.compile(torch.add, backend=backend)(*ab(length, 2, 3))
    return found[0]


@pytest.mark.parametrize("states", [0, 1])
def test_the_operator_is_raised(states: int) -> None:
    bodies: list[Body] = [
        lambda b1, a1, b2, a2: (torch.addcmul(b2, b1, a2), a2 * a1),
        lambda a1, b1, a2, b2: (a1 * a2, b2 + b1 * a2),
    ]
    graph, raising = operator(bodies[states], states)
    assert len(raising.raised) == 1 and not raising.misses
    assert not graph.graph.find_nodes(op="call_function", target=associative_scan_op)
    a, b = ab(6, 2, 3)
    given = (a, b) if states else (b, a)
    close(graph(*given)[0], doubling(a, b, 0), "model_fp32")


NO_SCANS: dict[str, Body] = {
    "is not (a1 a2, a2 b1 + b2)": lambda a1, b1, a2, b2: (a1 * a2, a1 * b2 + b1),
    "applies exp": lambda a1, b1, a2, b2: (a1 * a2, a2.exp() * b1 + b2),
    "applies maximum": lambda a1, b1, a2, b2: (a1 * a2, torch.maximum(a2 * b1, b2)),
}


@pytest.mark.parametrize("reason", NO_SCANS)
def test_other_operators_stay_and_say_why(reason: str) -> None:
    graph, raising = operator(NO_SCANS[reason])
    assert graph.graph.find_nodes(op="call_function", target=associative_scan_op)
    (miss,) = raising.misses
    assert not raising.raised and reason in miss.reason


def test_the_operator_is_no_recurrence_where_only_products_are_read() -> None:
    graph, raising = operator(lambda a1, b1, a2, b2: (a1 * a2, a2 * b1 + b2), states=0)
    assert graph.graph.find_nodes(op="call_function", target=associative_scan_op)
    assert not raising.raised and not raising.misses
