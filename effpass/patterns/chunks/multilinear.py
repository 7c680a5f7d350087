"""A value as a sum of products of a few tensors, each at most once a product, times decays.

``Reader.value`` follows views, sums, masks, products and contractions, and ``exp`` of what is
linear in the exponent; anything else is a tensor of its own. It answers which tensors are
multiplied (a polynomial) and which of their dims run along each dim (``chunks.factors``).
What it can read is analytic in every tensor: masks are constants, nothing compares data.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.fx import Graph, Node

from effpass.axes import labels
from effpass.axes.relation import arguments
from effpass.patterns.chunks import factors
from effpass.patterns.chunks.factors import Classes, Dims, Factor, Key, Unreadable

Term = frozenset[int]
ONE: Term = frozenset()
MANY_TERMS = 8


class Value(NamedTuple):
    """``terms``: tensors that are multiplied, and the coefficient (NaN: no single one)."""

    terms: Mapping[Term, float]
    dims: Dims


class Reader:
    """Reads values; ``follows`` says of which nodes one looks at the operands.

    ``tensors`` are the nodes that are not followed, in order of their numbers (some may be given).
    ``exponent`` is what exp may be taken of. ``ordered`` collects the keys of dims in which order
    matters: summed cumulatively, padded, sliced, indexed or joined. ``rates`` are coefficients of
    the exponent where exp is taken of it, ``summed_rates`` where it is summed. ``rounded`` are
    casts to fewer digits.
    """

    def __init__(
        self,
        rules: Mapping[str, Callable[..., Value]],
        follows: Callable[[Node], bool],
        exponent: Iterable[Node] = (),
        tensors: Iterable[Node] = (),
    ) -> None:
        self.rules, self.follows = rules, follows
        self.tensors = list(tensors)
        self.exponent = frozenset(self._number(node) for node in exponent)
        self.classes = Classes()
        self.ordered: set[Key] = set()
        self.rounded: set[Node] = set()
        self.rates: set[float] = set()
        self.summed_rates: set[float] = set()
        self._values: dict[Node, Value] = {}
        self._cuts = 0

    def value(self, node: Any) -> Value:
        """The value of a node. Raises Unreadable for what is followed and has no rule."""
        if not isinstance(node, Node):
            raise Unreadable("an operand is no tensor")
        if node not in self._values:
            self._values[node] = self._read(node)
        return self._values[node]

    def forget(self, node: Node) -> None:
        """The value of a node is read anew when it is asked for again."""
        self._values.pop(node, None)

    def all_keys(self) -> set[Key]:
        """All keys of all dims read so far."""
        dims = [dim for value in self._values.values() for dim in value.dims]
        return set().union(*map(factors.sources, dims))

    def number(self, node: Node) -> int | None:
        """The number of a tensor, if it is one."""
        return self.tensors.index(node) if node in self.tensors else None

    def cut(self, dim: factors.Dim, size: int) -> factors.Dim:
        """The dim padded, sliced or joined to ``size``."""
        self.ordered |= factors.sources(dim)
        self._cuts += 1
        made = factors.recut(dim, size, self._cuts)
        self.ordered |= factors.sources(made)
        return made

    def order(self, size: int) -> factors.Dim:
        """A dim of ``size`` pieces that were put one behind the other."""
        self._cuts += 1
        key = Key(-1, 0, self._cuts, 1, size)
        self.ordered.add(key)
        return (Factor(size, frozenset({key})),) if size != 1 else ()

    def _number(self, node: Node) -> int:
        if node not in self.tensors:
            self.tensors.append(node)
        return self.tensors.index(node)

    def _read(self, node: Node) -> Value:
        shape = sizes(node)
        if is_zero(node):
            return Value({}, factors.of_shape(shape))
        if is_constant(node):
            return Value({ONE: 1.0}, factors.of_shape(shape))
        if not node.meta["val"].is_floating_point():
            raise Unreadable(f"{node.name} holds no floating-point numbers")
        rule = self.rules.get(opname(node))
        if not self.follows(node):
            number = self._number(node)
            return Value({frozenset({number}): 1.0}, factors.of_tensor(number, shape))
        if rule is None:
            raise Unreadable(f"{opname(node) or node.op} is applied")
        made = rule(self, node, arguments(node))
        if [factors.count(dim) for dim in made.dims] != shape:
            raise Unreadable(f"{opname(node)} changes sizes")
        return made


Rule = Callable[[Reader, Node, dict[str, Any]], Value]


def opname(node: Node) -> str:
    """``labels.opname``, and "getitem"."""
    return "getitem" if node.target is operator.getitem else labels.opname(node)


def sizes(node: Node) -> list[int]:
    """The shape of a node's value, symbols by their hints."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor):
        raise Unreadable(f"{node.name} is no tensor")
    return [s.node.hint if isinstance(s, torch.SymInt) else s for s in value.shape]


ZEROS = ("zeros", "zeros_like", "new_zeros", "empty", "empty_like", "new_empty")
FULLS = ("full", "full_like", "new_full")
# of their tensor arguments these read only shape and dtype
SHAPED = (*ZEROS, *FULLS, "ones", "ones_like", "new_ones")


# by name: an entry lives as long as its graph
_constants: WeakKeyDictionary[Graph, dict[str, bool]] = WeakKeyDictionary()
KEEPS_ZEROS = (
    *("mul", "view", "reshape", "expand", "expand_as", "unsqueeze", "squeeze", "to", "clone"),
    *("contiguous", "transpose", "permute", "select", "slice"),
)


def is_zero(node: Any) -> bool:
    """Zeros, and what is made of them; memory that is not filled yet is as good."""
    if not isinstance(node, Node):
        return False
    name = opname(node)
    if name in ZEROS or (name in FULLS and arguments(node)["fill_value"] == 0):
        return True
    sources = node.args[:2] if name == "mul" else node.args[:1]
    return name in KEEPS_ZEROS and any(is_zero(source) for source in sources)


def is_constant(node: Node) -> bool:
    """Whether a node reads no data (masks of ones, triangles, comparisons of positions)."""
    known = _constants.setdefault(node.graph, {})
    if node.name not in known:
        known[node.name] = isinstance(node.meta.get("val"), Tensor) and _reads_nothing(node, known)
    return known[node.name]


def _reads_nothing(node: Node, known: dict[str, bool]) -> bool:
    pending, seen = [node], set()
    while pending:
        each = pending.pop()
        if known.get(each.name) is False:
            return False
        if each in seen or opname(each) in SHAPED or each.op == "get_attr" or is_size(each):
            continue
        seeded = torch.Tag.nondeterministic_seeded in getattr(each.target, "tags", ())
        if not opname(each) or seeded or len(seen) > 100:
            return False
        if not each.all_input_nodes and opname(each) not in CONSTANT:
            return False
        seen.add(each)
        pending += each.all_input_nodes
    return True


def is_size(node: Node) -> bool:
    """Whether a node is a number, e.g. a size that changes from call to call."""
    return isinstance(node.meta.get("val"), torch.SymInt | torch.SymFloat | torch.SymBool)


def data(node: Node) -> list[Node]:
    """The operands of a node that depend on data."""
    return [n for n in node.all_input_nodes if not is_size(n) and not is_constant(n)]


CONSTANT = ("arange", "eye", "linspace", "scalar_tensor", "tril_indices", "triu_indices")


def added(*terms: Mapping[Term, float]) -> dict[Term, float]:
    """The terms of a sum. A term with several coefficients has none; a difference the first one."""
    found: dict[Term, float] = {}
    for each in terms:
        for term, coefficient in each.items():
            first = found.setdefault(term, coefficient)
            found[term] = first if abs(first) == abs(coefficient) else math.nan
    return _few(found)


def multiplied(*terms: Mapping[Term, float]) -> dict[Term, float]:
    """The terms of a product. Raises Unreadable where a tensor is multiplied by itself."""
    found: dict[Term, float] = {ONE: 1.0}
    for each in terms:
        longer: dict[Term, float] = {}
        for a, x in found.items():
            for b, y in each.items():
                if a & b:
                    raise Unreadable("a product of a tensor with itself is taken")
                longer = added(longer, {a | b: x * y})
        found = longer
    return found


def scaled(terms: Mapping[Term, float], by: float) -> dict[Term, float]:
    """The terms times a number."""
    return {term: coefficient * by for term, coefficient in terms.items()}


def _few(terms: dict[Term, float]) -> dict[Term, float]:
    if len(terms) > MANY_TERMS:
        raise Unreadable("many different products are added")
    return terms
