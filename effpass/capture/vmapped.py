"""vmap in a Dynamo graph: each outermost region becomes a call of its plain ATen operations.

Dynamo spells ``torch.vmap`` (and the generic ``associative_scan``) as nodes that enter a level,
wrap tensors, compute, unwrap and leave. Levels lie below the dialect that is captured, so each
region is traced on its own first, below them. No input of that trace requires a gradient: only what
the user wrote is recorded, and autograd later differentiates it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from operator import getitem
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import (
    _vmap_decrement_nesting,
    get_dynamic_layer_stack_depth,
    is_batchedtensor,
)
from torch._functorch.predispatch import lazy_load_decompositions
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.traceback import preserve_node_meta

from effpass.graph.writes import writes

ENTER, LEAVE = "_vmap_increment_nesting", "_vmap_decrement_nesting"
LOAD = "lazy_load_decompositions"
WRAPS = (ENTER, LEAVE, LOAD, "_add_batch_dim", "_remove_batch_dim")
GRAD_MODES = ("_set_grad_enabled", "set_grad_enabled")
# without a gradient these are chosen, or called, in a form that has none
FORWARD_ONLY = frozenset(
    (
        "_embedding_bag_forward_only",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
        "_scaled_dot_product_fused_attention_overrideable",
    )
)

Like = Callable[[Any, FakeTensorMode], Any]


class VmapError(Exception):
    """This vmap cannot be written out; the text says why."""


def is_vmap(node: Node) -> bool:
    """Whether this node enters, leaves or wraps for a vmap."""
    return node.op == "call_function" and _name(node) in WRAPS


def fold(gm: GraphModule, mode: FakeTensorMode, like: Like) -> GraphModule:
    """A copy of a Dynamo graph in which each vmap is one ``call_module`` of a traced graph.

    ``like`` makes a fake of a node's ``example_value`` in ``mode``. A graph without vmap is
    answered as it is. Raises VmapError.
    """
    if not any(is_vmap(node) for node in gm.graph.nodes):
        return gm
    lazy_load_decompositions()
    made = GraphModule(gm, _copied(gm.graph))
    made.meta.update(gm.meta)
    open_autocasts: list[Node] = []
    for part in _parts(made.graph):
        if isinstance(part, Node):
            _follow(part, open_autocasts)
            continue
        region = _Region(part)
        with _autocast(open_autocasts):
            traced = region.trace(made, mode, like)
        name = f"vmapped_{part[0].name}"
        made.add_submodule(name, traced)
        region.replace(name)
    made.recompile()
    return made


class _Region:
    """The nodes of one outermost vmap, the nodes it reads, and those of it that are read."""

    def __init__(self, nodes: list[Node]) -> None:
        self.nodes = nodes
        self.inside = set(nodes)
        read = [n for node in nodes for n in node.all_input_nodes if n not in self.inside]
        self.inputs = list(dict.fromkeys(read))
        self.outputs = [n for n in nodes if not self.inside.issuperset(n.users)]

    def trace(self, gm: GraphModule, mode: FakeTensorMode, like: Like) -> GraphModule:
        """The region as plain ATen operations, from its inputs to a tuple of its outputs."""
        _refuse_untraced(self.nodes)
        body = GraphModule(gm, self._body())

        def run(*args: Any) -> Any:
            outputs = Interpreter(body).run(*args)
            if any(is_batchedtensor(v) for v in outputs if isinstance(v, Tensor)):
                raise VmapError(f"a value leaves {self.nodes[0].name} without an output dim")
            return outputs

        examples = [_example(node) for node in self.inputs]
        values = [_without_gradient(like(value, mode)) for value in examples]
        with mode, _no_level_left(), preserve_node_meta():
            traced = make_fx(run)(*values)
            _SameDtypes(traced).run(*values)
        _refuse_effects(traced, any(_requires_grad(v) for v in examples))
        return traced

    def _body(self) -> Graph:
        graph, env = Graph(), {}
        for node in self.inputs:
            env[node] = graph.placeholder(node.name)
        for node in self.nodes:
            env[node] = graph.node_copy(node, env.__getitem__)
        graph.output(tuple(env[node] for node in self.outputs))
        return graph

    def replace(self, name: str) -> None:
        """Puts a call of the traced graph in the region's place."""
        graph = self.nodes[0].graph
        with graph.inserting_before(self.nodes[0]):
            call = graph.call_module(name, tuple(self.inputs))
            values = [graph.call_function(getitem, (call, i)) for i in range(len(self.outputs))]
        for node, value in zip(self.outputs, values, strict=True):
            value.meta = dict(node.meta)
            node.replace_all_uses_with(value, lambda user: user not in self.inside)
        for node in reversed(self.nodes):
            graph.erase_node(node)


class _SameDtypes(Interpreter):
    """Runs a traced graph again; under autocast every operation must keep the dtype it had."""

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        traced = n.meta.get("val")
        if isinstance(traced, Tensor) and traced.dtype != result.dtype:
            raise VmapError(f"autocast would cast {n.name}, traced inside a vmap, once more")
        return result


def _name(node: Node) -> str:
    return getattr(node.target, "__name__", "")


def _copied(graph: Graph) -> Graph:
    """The graph without the calls that load vmap's rules: they are loaded."""
    made, env = Graph(), {}
    for node in graph.nodes:
        if _name(node) != LOAD:
            env[node] = made.node_copy(node, env.__getitem__)
    return made


def _parts(graph: Graph) -> list[Node | list[Node]]:
    """The nodes in order, those of each outermost vmap together in a list.

    Attributes and inputs read within one stay outside, in front of it.
    """
    parts: list[Node | list[Node]] = []
    region: list[Node] = []
    depth = 0
    for node in list(graph.nodes):
        depth += _name(node) == ENTER
        if depth == 0:
            parts.append(node)
        elif node.op in ("get_attr", "placeholder"):
            parts.append(node)
            region[0].prepend(node)
        else:
            region.append(node)
        depth -= _name(node) == LEAVE
        if depth == 0 and region:
            parts.append(region)
            region = []
    return parts


def _follow(node: Node, open_autocasts: list[Node]) -> None:
    if node.target is _enter_autocast:
        open_autocasts.append(node)
    elif node.target is _exit_autocast:
        open_autocasts.remove(node.args[0])  # type: ignore[arg-type]


@contextmanager
def _autocast(entered: list[Node]) -> Iterator[None]:
    """The autocast that these nodes leave on; no cache, which would outlive the trace."""
    with ExitStack() as stack:
        for node in entered:
            device, dtype, enabled, _ = node.args
            stack.enter_context(torch.autocast(device, dtype, enabled, cache_enabled=False))  # type: ignore[arg-type]
        yield


@contextmanager
def _no_level_left() -> Iterator[None]:
    """Undoes the levels that a failed trace leaves open."""
    if get_dynamic_layer_stack_depth():
        raise VmapError("it is compiled inside another transform")
    try:
        yield
    finally:
        while get_dynamic_layer_stack_depth():  # every level of a region is a vmap's
            _vmap_decrement_nesting()


def _example(node: Node) -> Any:
    if "example_value" not in node.meta:
        raise VmapError(f"{node.name}, read inside a vmap, has no fake value")
    return node.meta["example_value"]


def _requires_grad(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def _without_gradient(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value


def _refuse_untraced(nodes: list[Node]) -> None:
    for node in nodes:
        if isinstance(node.target, HigherOrderOperator):
            raise VmapError(f"{node.name}, inside a vmap, has a body of its own")
        if _name(node) in GRAD_MODES:
            raise VmapError(f"{node.name} changes the gradient mode inside a vmap")
        if node.target is _enter_autocast:
            raise VmapError(f"{node.name} changes autocast inside a vmap")


def _refuse_effects(traced: GraphModule, gradient: bool) -> None:
    """Refuses random numbers, writes to tensors from outside, operations without gradients."""
    outside = {_storage(node) for node in traced.graph.find_nodes(op="placeholder")} - {None}
    for node in traced.graph.nodes:
        if not isinstance(node.target, OpOverload):
            continue
        if torch.Tag.nondeterministic_seeded in node.target.tags:
            raise VmapError(f"{node.name} draws random numbers inside a vmap")
        if gradient and node.target.overloadpacket.__name__ in FORWARD_ONLY:
            raise VmapError(f"{node.name}, inside a vmap, was traced without its gradient")
        if any(_storage(written) in outside for written in writes(node)):
            raise VmapError(f"{node.name} writes, inside a vmap, to a tensor made outside it")


def _storage(node: Node) -> int | None:
    value = node.meta.get("val")
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else None
