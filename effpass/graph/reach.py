"""Which inputs of a graph a value may pass a gradient on to.

Memory that is overwritten passes gradients of zero to what it was made of; dataflow that drops the
old contents passes none. They are the same only where the new contents reach the same inputs.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterable, Mapping

from torch import Tensor
from torch.fx import Node
from torch.utils import _pytree as pytree

from effpass.graph.regions import region
from effpass.graph.storages import Storages

# these read the shape alone, or a constant
MADE_NEW = (
    "lift_fresh_copy",
    "new_empty",
    "new_zeros",
    "new_ones",
    "new_full",
    "new_empty_strided",
)


class Reach:
    """A set of inputs per node, as the bits of a number; written storages count as inputs too.

    ``instead`` names nodes that are read in place of others, ``behind`` what a node reads alone.
    """

    def __init__(
        self,
        found: Storages,
        instead: Mapping[Node, Node] | None = None,
        behind: Mapping[Node, Node] | None = None,
    ) -> None:
        self.found, self.instead, self.behind = found, instead or {}, behind or {}
        self.bits: dict[object, int] = {}
        self.known: dict[Node, int] = {}

    def of(self, node: Node) -> int:
        """The inputs that ``node`` reaches; what it reads must not be rewritten afterwards."""
        start = self.instead.get(node, node)
        pending = [start]
        while pending:
            each = pending[-1]
            if each not in self.known:
                sources = self._sources(each)
                unknown = [n for n in sources if n not in self.known]
                if unknown:
                    pending += unknown
                    continue
                self.known[each] = self._reached(each, sources)
            pending.pop()
        return self.known[start]

    def together(self, nodes: Iterable[Node]) -> int:
        """The inputs that any of ``nodes`` reaches."""
        return functools.reduce(operator.or_, map(self.of, nodes), 0)

    def _sources(self, node: Node) -> list[Node]:
        """What gradients go to from ``node``."""
        if not self._differentiable(node):
            return []
        read = [self.behind[node]] if node in self.behind else node.all_input_nodes
        return [self.instead.get(n, n) for n in read] if self.instead else read

    def _reached(self, node: Node, sources: list[Node]) -> int:
        storage = self.found.of.get(node)
        written = storage is not None and storage.written
        reached = 0
        if (written or _given(node)) and self._differentiable(node):
            reached = self._bit(storage if written else node)
        for source in sources:
            reached |= self.known[source]
        return reached

    def _differentiable(self, node: Node) -> bool:
        recorded = node.op != "call_function" or self.found.modes[region(node)].grad
        if not recorded and node not in self.found.results:  # in place, it is what it was before
            return False
        name = getattr(node.target, "_opname", "")
        if name == "detach" or name in MADE_NEW or name.endswith("_like"):
            return False
        value = node.meta.get("val")
        if isinstance(value, Tensor):
            return value.is_floating_point() or value.is_complex()
        tensors = [v for v in pytree.tree_leaves(value) if isinstance(v, Tensor)]
        floats = any(v.is_floating_point() or v.is_complex() for v in tensors)
        return floats or "val" not in node.meta

    def _bit(self, key: object) -> int:
        return self.bits.setdefault(key, 1 << len(self.bits))


def _given(node: Node) -> bool:
    """An input, or an attribute that takes gradients."""
    if node.op != "get_attr":
        return node.op == "placeholder"
    value = operator.attrgetter(str(node.target))(node.graph.owning_module)
    return isinstance(value, Tensor) and value.requires_grad
