"""New nodes for a graph: each with its fake value and the origin of the node it stands for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from effpass.graph.splice import KEPT

aten = torch.ops.aten
# these copy their first operand as it lies, and write a part of it
SCATTERS = (
    aten.select_scatter.default,
    aten.slice_scatter.default,
    aten.diagonal_scatter.default,
)


class Emitter:
    """Puts calls into a graph; ``made`` keeps them. Sizes that are symbols are read from nodes."""

    def __init__(self, graph: Graph, mode: FakeTensorMode) -> None:
        self.graph, self.mode = graph, mode
        self.made: list[Node] = []
        self.symbols: dict[Any, Node] = {}

    def see(self, node: Node) -> None:
        """Remembers a node that holds a size, for nodes put behind it."""
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt):
            self.symbols.setdefault(value.node.expr, node)

    def call(
        self,
        before: Node,
        origin: Node,
        target: Any,
        *args: Any,
        like: Node | None = None,
        **kwargs: Any,
    ) -> Node:
        """One call in front of ``before``, in its region; layer and line are ``origin``'s.

        ``like``: a node with a value laid out as that of the call is known to be.
        """
        with self.graph.inserting_before(before):
            node = self.graph.call_function(target, args, kwargs)
        node.meta = {key: origin.meta[key] for key in KEPT if key in origin.meta}
        node.meta["effpass_region"] = before.meta["effpass_region"]
        if like is None or not self.alike(node, like):
            self.run(node)
        self.made.append(node)
        return node

    def run(self, node: Node) -> None:
        """Gives a node the value that follows from those of its operands."""
        if node.target in SCATTERS and self.alike(node, node.args[0]):  # type: ignore[arg-type]
            return
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
        # what is put in is not for autocast to change: callers see to it
        with self.mode, torch.no_grad(), torch._C._DisableAutocast():
            node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]

    def alike(self, node: Node, other: Node) -> bool:
        """Gives a node a value laid out like another's: sooner than running an op. False, and no
        value, if there are symbols in it."""
        value = other.meta["val"]
        if not all(isinstance(n, int) for n in (*value.shape, *value.stride())):
            return False
        meta = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
        node.meta["val"] = FakeTensor(self.mode, meta, value.device)
        return True

    def sizes(self, before: Node, like: Node) -> list[int | Node]:
        """The shape of ``like``: numbers, and nodes in front of ``before`` for symbols."""
        return [self._size(before, like, d, n) for d, n in enumerate(like.meta["val"].shape)]

    def _size(self, before: Node, like: Node, dim: int, size: int | torch.SymInt) -> int | Node:
        if isinstance(size, int):
            return size
        known = self.symbols.get(size.node.expr)
        return known or self.call(before, like, aten.sym_size.int, like, dim)


def fake_mode(gm: GraphModule) -> FakeTensorMode | None:
    """The mode of a graph's fake values; None where there are none."""
    values = (node.meta.get("val") for node in gm.graph.nodes)
    return next((v.fake_mode for v in values if isinstance(v, FakeTensor)), None)


def storage_key(value: Tensor) -> int | None:
    """Equal for tensors that share memory; None for those without strides (sparse ones)."""
    return value.untyped_storage()._cdata if value.layout is torch.strided else None


def same_sizes(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Equal for certain, whatever the symbols stand for."""
    return len(a) == len(b) and all(
        _expression(x) == _expression(y) for x, y in zip(a, b, strict=True)
    )


def same_layout(a: Tensor, b: Tensor) -> bool:
    """Same shape, dtype, and strides where they matter."""
    if a.dtype != b.dtype or not same_sizes(a.shape, b.shape):
        return False
    wide = [d for d, n in enumerate(a.shape) if not (isinstance(n, int) and n == 1)]
    return same_sizes([a.stride(d) for d in wide], [b.stride(d) for d in wide])


def row_major(value: Tensor) -> bool:
    """Contiguous for certain, whatever the symbols stand for."""
    expected: Any = 1
    for size, stride in zip(reversed(value.shape), reversed(value.stride()), strict=True):
        if isinstance(size, int) and size == 1:
            continue
        if not same_sizes([stride], [expected]):
            return False
        expected = expected * size
    return True


def _expression(size: Any) -> Any:
    return size.node.expr if isinstance(size, torch.SymInt) else size
