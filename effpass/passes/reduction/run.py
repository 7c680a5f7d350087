"""Runs a reduced graph: how many tokens stay is worked out on the host, from lengths alone."""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import sympy
import torch
from torch import SymInt, Tensor
from torch._dynamo import maybe_mark_dynamic
from torch.fx import GraphModule

from effpass.axes.labels import expression

Run = Callable[..., Any]
Compile = Callable[[GraphModule, Sequence[Any]], Run]
Source = tuple[int, int | None]  # an input, and its dim; None for an input that is a number


@dataclass(frozen=True)
class Length:
    """The number of tokens as a function of the inputs."""

    size: sympy.Expr
    sources: dict[Any, Source]
    captured: int = 0

    @staticmethod
    def of(size: sympy.Expr, gm: GraphModule) -> Length | None:
        """None where the inputs do not tell."""
        places, known = dict[Any, Source](), dict[Any, int]()
        for i, node in enumerate(gm.graph.find_nodes(op="placeholder")):
            value = node.meta.get("val")
            if isinstance(value, SymInt):
                places.setdefault(expression(value), (i, None))
                known[expression(value)] = int(value.node.hint)
            for d, each in enumerate(value.shape if isinstance(value, Tensor) else ()):
                places[expression(each)] = (i, d)
                if isinstance(each, SymInt):
                    known[expression(each)] = int(each.node.hint)
        symbols = size.free_symbols
        if not all(s in places for s in symbols):
            return None
        captured = int(size.subs({s: known[s] for s in symbols}))
        return Length(size, {s: places[s] for s in symbols}, captured)

    @property
    def hint(self) -> int:
        """The number of tokens of the inputs that the graph was captured with."""
        return int(self.size) if self.fixed else self.captured

    @property
    def fixed(self) -> bool:
        """Whether it is the same for all inputs."""
        return not self.sources

    def __call__(self, inputs: Sequence[Any]) -> int:
        """The number of tokens of these inputs."""
        known: Any = {
            symbol: inputs[i] if d is None else inputs[i].shape[d]
            for symbol, (i, d) in self.sources.items()
        }
        return int(self.size.subs(known))


Found = list[tuple[int, ...]]  # of each sequence: tokens in front of the first anchor, behind each


@dataclass(frozen=True)
class EqualRows:
    """How many tokens stay of rows that are all as long; ``lengths`` of a number of tokens."""

    length: Length
    lengths: Callable[[int], tuple[int, ...]]

    def __call__(self, inputs: Sequence[Any]) -> Found:
        """Of one row: every row is alike."""
        return [self.lengths(self.length(inputs))]

    def extra(self, found: Found, inputs: Sequence[Any]) -> list[Tensor]:
        """What a reduced graph reads besides ``inputs``."""
        made = carriers(found[0])
        for each in () if self.length.fixed else made:
            maybe_mark_dynamic(each, 0)
        return made


@dataclass(frozen=True)
class PackedRow:
    """The same of each sequence of a packed row, by its own length.

    ``place``: which input is ``cu_seqlens``, int32 (S + 1,). It is read on the host.
    """

    place: int
    lengths: Callable[[int], tuple[int, ...]]

    def __call__(self, inputs: Sequence[Any]) -> Found:
        """Of every sequence, in order."""
        offsets = inputs[self.place].tolist()
        return [self.lengths(end - start) for start, end in pairwise(offsets)]

    def extra(self, found: Found, inputs: Sequence[Any]) -> list[Tensor]:
        """Carriers, offsets behind every anchor, and those in front of each on the host."""
        table = [[0, *accumulate(numbers)] for numbers in zip(*found, strict=True)]
        device = inputs[self.place].device
        behind = [torch.tensor(row, dtype=torch.int32) for row in table[1:]]
        behind = [each.to(device, non_blocking=True) for each in behind]
        made = [*(torch.empty(row[-1]) for row in table[1:]), *behind]
        for each in made:
            maybe_mark_dynamic(each, 0)
        host = torch.tensor(table[:-1])
        maybe_mark_dynamic(host, 1)
        return [*made, host]


@dataclass
class Reduced:
    """Runs the reduced form of a graph, or the plain one for inputs too short to lose a token.

    ``sizes`` tells how many tokens stay. ``counts`` says how often each form ran, by its name in
    ``names``. ``warning``: what is said, once, when gradients are recorded.
    """

    sizes: EqualRows | PackedRow
    plain: Run
    reduced: Run
    counts: dict[str, int]
    names: tuple[str, str] = ("plain", "reduced")
    warning: str | None = None

    @property
    def lengths(self) -> Callable[[int], tuple[int, ...]]:
        """How many of so many tokens there are in front of the first anchor and behind each."""
        return self.sizes.lengths

    @property
    def length(self) -> Length:
        """The number of tokens of a row. Raises TypeError where sequences lie end to end in it."""
        if isinstance(self.sizes, PackedRow):
            raise TypeError("expected rows of one sequence each, found a packed row: use sizes")
        return self.sizes.length

    def __call__(self, *inputs: Any) -> Any:
        """Outputs of the graph for these inputs."""
        found = self.sizes(inputs)
        if all(each[-1] == each[0] for each in found):
            self.counts[self.names[0]] += 1
            return self.plain(*inputs)
        self.counts[self.names[1]] += 1
        if self.warning is not None and _trained(inputs):
            warnings.warn(self.warning, stacklevel=2)
            self.warning = None
        return self.reduced(*inputs, *self.sizes.extra(found, inputs))


def carriers(lengths: Sequence[int]) -> list[Tensor]:
    """A tensor of each length behind an anchor: the compiler sees its size as a symbol."""
    return [torch.empty(n) for n in lengths[1:]]


def _trained(inputs: Sequence[Any]) -> bool:
    return torch.is_grad_enabled() and any(getattr(v, "requires_grad", False) for v in inputs)


def compiled(gm: GraphModule, compile: Compile) -> Run:
    """A graph as a function that is compiled when it is first called, once for all sizes.

    Dims that the graph has as symbols are symbols from its first call. Sizes among its inputs are
    read from a tensor, where one has them: an integer would be a constant at first.
    """
    assert gm.code  # a lazy module writes its code now: Dynamo would not look into it
    values = [node.meta.get("val") for node in gm.graph.find_nodes(op="placeholder")]
    symbolic = {
        i: [d for d, size in enumerate(v.shape) if isinstance(size, SymInt)]
        for i, v in enumerate(values)
        if isinstance(v, Tensor)
    }
    read = {i: _source(v, values, symbolic) for i, v in enumerate(values) if isinstance(v, SymInt)}
    found = {i: place for i, place in read.items() if place is not None}

    def run(*given: Any) -> Any:
        every = list(given)
        for i, (tensor, dim) in found.items():
            every[i] = given[tensor].shape[dim]
        return gm(*every)  # Dynamo skips a GraphModule that it is given itself

    # a code object of its own: Dynamo counts recompilations by it
    code = run.__code__.replace(co_name="run_form")
    fresh = types.FunctionType(code, run.__globals__, "run_form", None, run.__closure__)
    made = torch.compile(fresh, backend=compile)

    def call(*given: Any) -> Any:
        every = [None if i in found else value for i, value in enumerate(given)]
        for i, dims in symbolic.items():
            if dims:
                # the user's tensor stays unmarked, unless Dynamo would warn of a view's gradient
                every[i] = given[i] if given[i].requires_grad else given[i].view_as(given[i])
                maybe_mark_dynamic(every[i], dims)
        return made(*every)

    return call


def _source(
    size: SymInt, values: Sequence[Any], symbolic: dict[int, list[int]]
) -> tuple[int, int] | None:
    """A tensor among the inputs, and its dim, of this size."""
    for i, dims in symbolic.items():
        for d in dims:
            if expression(values[i].shape[d]) == expression(size):
                return i, d
    return None
