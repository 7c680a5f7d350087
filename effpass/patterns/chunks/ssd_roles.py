"""Which tensor of a chunked scan is x, B, C, dt, A or the start, and which of its dims is what.

Read off how dims run along each other: the output keeps C's token and sums over those of x and B;
B and C share a dim that the output lacks (n); a dim of the output along which only x runs is p; the
rest are batch and heads.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from math import prod

from torch.fx import Node

from effpass.patterns.chunks.factors import Dim, Dims, Key, Unreadable
from effpass.patterns.chunks.growth import Growth
from effpass.patterns.chunks.log_decay import timed
from effpass.patterns.chunks.multilinear import Reader, Term, Value, sizes

TIME = "time"
Axis = Key | str
Axes = tuple[
    tuple[tuple[Axis, int], ...], ...
]  # of each dim: axes and their sizes, outermost first


@dataclass(frozen=True)
class Roles:
    """Tensors by role (``x``, ``dt``, ``A``, ``B``, ``C``, ``start``), and the axes of their dims.

    ``batch``, ``groups``, ``heads`` (in a group), ``p`` and ``n`` are the axes that make up the
    op's dims.
    """

    nodes: dict[str, Node]
    axes: dict[str, Axes]
    batch: tuple[Axis, ...]
    groups: tuple[Axis, ...]
    heads: tuple[Axis, ...]
    p: tuple[Axis, ...]
    n: tuple[Axis, ...]


class Naming:
    """Names the axes of dims: time, or a class of dims that run along each other."""

    def __init__(self, reader: Reader) -> None:
        self.reader, self.times, self.keys = reader, timed(reader), reader.all_keys()

    def axis(self, key: Key) -> Axis:
        """The axis of a key."""
        found = self.reader.classes.of(key)
        return TIME if found in self.times else found

    def dims(self, dims: Dims) -> Axes:
        """The axes of a value. Raises Unreadable where nothing runs along a dim."""
        return tuple(self._of_dim(dim) for dim in dims)

    def _of_dim(self, dim: Dim) -> tuple[tuple[Axis, int], ...]:
        if not all(factor.sources for factor in dim):
            raise Unreadable("a dim of the result is a copy")
        return _joined([(self.axis(next(iter(f.sources))), f.size) for f in dim])

    def tensor(self, node: Node) -> Axes:
        """The axes of a tensor. Raises Unreadable where a dim is used in several ways."""
        number = self.reader.number(node)
        return tuple(self._of_own(number, at, size) for at, size in enumerate(sizes(node)))

    def _of_own(self, number: int | None, at: int, size: int) -> tuple[tuple[Axis, int], ...]:
        own = [k for k in self.keys if (k.tensor, k.dim, k.cut) == (number, at, 0) and k.size > 1]
        found: list[tuple[Axis, int]] = []
        stride = 1
        while stride < size:
            key = min((k for k in own if k.stride == stride), key=lambda k: k.size, default=None)
            if key is None:
                raise Unreadable(f"a dim of {size} is used in several ways")
            found.insert(0, (self.axis(key), key.size))
            stride *= key.size
        return _joined(found)


def _joined(dim: list[tuple[Axis, int]]) -> tuple[tuple[Axis, int], ...]:
    """Parts of time that follow each other as one."""
    runs = [(axis, [s for _, s in run]) for axis, run in groupby(dim, key=lambda pair: pair[0])]
    if any(axis != TIME and len(run) > 1 for axis, run in runs):
        raise Unreadable("a dim runs along itself")
    return tuple((axis, prod(run)) for axis, run in runs)


def flat(axes: Axes) -> list[Axis]:
    """All axes of a tensor, in order."""
    return [axis for dim in axes for axis, _ in dim]


def length(axes: Axes) -> int:
    """How many tokens a tensor has; 1 where it has no time."""
    return prod(size for dim in axes for axis, size in dim if axis == TIME)


def main_term(growth: Growth, value: Value) -> Term | None:
    """The term of x, B and C, where a value is that and at most a start times C."""
    alone = [growth.without_decay(term) for term in value.terms]
    large = [term for term in value.terms if len(growth.without_decay(term)) == 3]
    if len(large) != 1 or len(alone) > 2:
        return None
    small = [term for term in value.terms if term != large[0]]
    fits = all(len(term) == 2 and len(term & large[0]) == 1 for term in small)
    return large[0] if fits else None


def roles(growth: Growth, reader: Reader, node: Node) -> Roles:
    """The roles of the tensors of which ``node`` is made. Raises Unreadable: they are unclear."""
    value = reader.value(node)
    term = main_term(growth, value)
    assert term is not None
    naming = Naming(reader)
    three = growth.without_decay(term)
    axes = {i: naming.tensor(reader.tensors[i]) for i in set().union(*value.terms)}
    result = naming.dims(value.dims)
    C = _reader_of_state(reader, naming, value.dims, three)
    n = [a for a in flat(axes[C]) if a != TIME and a not in flat(result)]
    x, B = _written(three - {C}, axes, n, flat(result))
    numbers = {"x": x, "B": B, "C": C}
    start = set().union(*value.terms) - term
    numbers |= {"start": start.pop()} if start else {}
    numbers |= {name: i for name, i in _decay(growth, reader)}
    named = {name: naming.tensor(reader.tensors[i]) for name, i in numbers.items()}
    _check_lengths(named, result)
    nodes = {name: reader.tensors[i] for name, i in numbers.items()}
    return _grouped(nodes, named, flat(result), tuple(n))


def _decay(growth: Growth, reader: Reader) -> Iterable[tuple[str, int]]:
    for name, node in (("dt", growth.decay.step), ("A", growth.decay.rate)):
        number = None if node is None else reader.number(node)
        if number is not None:
            yield name, number


def _reader_of_state(reader: Reader, naming: Naming, dims: Dims, three: Term) -> int:
    """C: the one tensor that runs along every dim of time of the result."""
    runs = [
        {key.tensor for key in factor.sources} & three
        for dim in dims
        for factor in dim
        if any(naming.axis(key) == TIME for key in factor.sources)
    ]
    found = set(three).intersection(*(run for run in runs if run)) if any(runs) else set()
    if len(found) != 1:
        raise Unreadable("it is unclear which tensor reads the state")
    return found.pop()


def _written(
    pair: Term, axes: dict[int, Axes], n: list[Axis], result: list[Axis]
) -> tuple[int, int]:
    """x and B: B has n, x not."""
    with_n = [i for i in pair if any(a in n for a in flat(axes[i]))]
    if not n:  # a state of one number a channel: either is x, the one with more dims of the result
        ordered = sorted(pair, key=lambda i: (len(set(flat(axes[i])) & set(result)), -i))
        return ordered[1], ordered[0]
    if len(with_n) != 1 or set(n) - set(flat(axes[with_n[0]])):
        raise Unreadable("it is unclear which tensor is written to the state")
    B = with_n[0]
    (x,) = pair - {B}
    return x, B


def _check_lengths(axes: dict[str, Axes], result: Axes) -> None:
    lengths = {name: length(axes[name]) for name in ("x", "dt", "B", "C") if name in axes}
    timed_ = {n: size for n, size in lengths.items() if TIME in flat(axes[n])}
    if len(set(timed_.values())) != 1 or "x" not in timed_:
        raise Unreadable(f"x, dt, B and C have different numbers of tokens: {lengths}")
    if length(result) < lengths["x"]:
        raise Unreadable(f"the result has {length(result)} tokens of {lengths['x']}")


def _grouped(
    nodes: dict[str, Node], axes: dict[str, Axes], result: list[Axis], n: tuple[Axis, ...]
) -> Roles:
    own = {name: set(flat(each)) - {TIME} for name, each in axes.items()}
    rest = own["B"] | own["C"] | own.get("dt", set()) | own.get("A", set())
    kept = [a for a in dict.fromkeys(result) if a != TIME]
    p = tuple(a for a in kept if a not in rest)
    free = [a for a in kept if a in rest]
    written = own["B"] | own["C"]
    batch = tuple(a for a in free[:1] if a in written and a not in own.get("A", set()))
    heads = [a for a in free if a not in batch]
    groups = tuple(a for a in heads if a in written)
    allowed = {"x": {*free, *p}, "B": {*free, *n}, "C": {*free, *n}, "start": {*free, *p, *n}}
    allowed |= {"dt": set(free), "A": set(heads)}
    for name, found in own.items():
        if found - allowed[name]:
            raise Unreadable(f"{name} has a dim that is none of its own")
    heads = tuple(a for a in heads if a not in groups)
    return Roles(nodes, axes, batch, groups, heads, p, n)
