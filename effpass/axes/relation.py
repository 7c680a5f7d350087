"""What one op does to the axes of its tensors: which dims are one axis, and what it does along it.

A Relation names, for one node, the axes of every tensor it reads and makes. Names are local to the
node; a dim may be several axes merged (``b t`` seen as one), or none (size 1). The **kind** of an
axis says what the op does along it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import Node

from effpass.axes.labels import Dim, Dims, Labels, aligned, opname


class Kind(StrEnum):
    """What an op does along an axis, from harmless to opaque."""

    FREE = "free"  # index by index: selecting before or after is the same
    SET = "set"  # mixes, blind to order: permuting before or after is the same
    FOLDED = "folded"  # reduced away, blind to order
    ORDERED = "ordered"  # mixes along order: what is later does not reach what is earlier
    BOUND = "bound"  # tied to an absolute position or to a fixed length
    UNKNOWN = "unknown"  # no rule: says nothing


@dataclass
class Relation:
    """Axes of one node's tensors.

    ``inputs``: each tensor read, in order, with its dims. ``outputs``: dims of each tensor made.
    ``kinds``: of axes that are not free. ``names``: of axes that an op names, ``t`` say.
    """

    node: Node
    labels: Labels = field(default_factory=Labels)
    inputs: list[tuple[Node, Dims]] = field(default_factory=list)
    outputs: tuple[Dims, ...] = ()
    kinds: dict[int, Kind] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)

    def take(self, source: Node) -> Dims:
        """Reads a tensor: a new axis for each of its dims."""
        return self.read(source, self.labels.of(source))

    def read(self, source: Node, dims: Dims) -> Dims:
        """Reads a tensor whose axes are known."""
        self.inputs.append((source, dims))
        return dims

    def fresh(self, output: int = 0) -> Dims:
        """New axes for the dims of one output."""
        return tuple(self.labels.fresh(size) for size in values(self.node)[output].shape)

    def mark(self, dim: Dim, kind: Kind) -> None:
        """Gives the axes of one dim this kind."""
        for label in self.labels.resolve(dim):
            self.kinds[label] = kind

    def kind(self, label: int) -> Kind:
        """The kind of one axis."""
        return self.kinds.get(label, Kind.FREE)

    def settle(self) -> Relation:
        """Replaces axes that were cut by their parts, everywhere."""
        self.inputs = [(node, self.labels.resolved(dims)) for node, dims in self.inputs]
        self.outputs = tuple(self.labels.resolved(dims) for dims in self.outputs)
        whole, self.kinds = self.kinds, {}
        for label, kind in whole.items():
            self.mark((label,), kind)
        return self


@dataclass(frozen=True)
class Each:
    """A rule's answer for an op with several outputs."""

    dims: tuple[Dims, ...]


Rule = Callable[[Relation, Mapping[str, Any]], Dims | Each | None]
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Registers a rule for ATen operations of these names.

    A rule takes an empty relation and the node's arguments by name; it reads the tensors and
    answers the dims of the output (or Each output's), or None where it knows nothing.
    """

    def register(made: Rule) -> Rule:
        for name in names:
            assert name not in RULES, name
            RULES[name] = made
        return made

    return register


def relation(node: Node) -> Relation | None:
    """The relation of one node; None for a node that makes no tensor."""
    made = values(node)
    if not made or not isinstance(node.target, OpOverload):
        return _boundary(node, made)
    found, name = Relation(node), opname(node) or node.target._schema.name
    if name in RULES:
        answer = RULES[name](found, arguments(node))
    elif torch.Tag.pointwise in node.target.tags:
        answer = elementwise(found, arguments(node))
    else:
        answer = None
    if answer is None:
        return opaque(node)
    found.outputs = answer.dims if isinstance(answer, Each) else (answer,) * len(made)
    if [len(dims) for dims in found.outputs] != [value.dim() for value in made]:
        raise AssertionError(
            f"the rule for {name} answers {found.outputs} for {node.format_node()}"
        )
    return found.settle()


def opaque(node: Node) -> Relation:
    """Nothing is known: every dim is an axis of its own."""
    found = Relation(node)
    dims = [found.take(n) for n in node.all_input_nodes if values(n)]
    found.outputs = tuple(found.fresh(i) for i in range(len(values(node))))
    for each in (*dims, *found.outputs):
        for dim in each:
            found.mark(dim, Kind.UNKNOWN)
    return found


def elementwise(found: Relation, given: Mapping[str, Any]) -> Dims:
    """Operands are broadcast against each other, aligned at the last dim."""
    dims = found.fresh()
    for source in given.values():
        if is_tensor(source):
            found.read(source, aligned(dims, source.meta["val"].shape))
    return dims


def values(node: Node) -> list[Tensor]:
    """The tensors that a node makes."""
    value = node.meta.get("val")
    if isinstance(value, list | tuple):
        return [v for v in value if isinstance(v, Tensor)]
    return [value] if isinstance(value, Tensor) else []


def is_tensor(value: object) -> TypeGuard[Node]:
    """Whether an argument is a node that makes one tensor."""
    return isinstance(value, Node) and isinstance(value.meta.get("val"), Tensor)


def arguments(node: Node) -> dict[str, Any]:
    """All arguments of a call by name, defaults filled in; none for what has no schema."""
    if not hasattr(node.target, "_schema"):
        return {}
    names = _defaults(node.target)
    return dict(names) | node.kwargs | dict(zip((n for n, _ in names), node.args, strict=False))


def draws(node: Node) -> bool:
    """Whether a node draws random numbers: an idle dropout does not."""
    if torch.Tag.nondeterministic_seeded not in getattr(node.target, "tags", ()):
        return False
    given = arguments(node)
    return bool(given.get("train", True)) and given.get("dropout_p") != 0.0


@functools.lru_cache(maxsize=1024)
def _defaults(target: Any) -> tuple[tuple[str, Any], ...]:
    return tuple((a.name, a.default_value) for a in target._schema.arguments)


def _boundary(node: Node, made: list[Tensor]) -> Relation | None:
    """Inputs, constants and calls of what is no ATen operation."""
    if not made:
        return None
    found = opaque(node)
    if node.op in ("placeholder", "get_attr"):
        found.kinds.clear()
    return found
