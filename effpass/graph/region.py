"""A region: the nodes between some inputs and some outputs, as one function that can be run alone.

Carving checks that the region may be taken out: it reads nothing but its inputs (and constants), is
pure, and lies in one grad mode and under one autocast.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._higher_order_ops.associative_scan import associative_scan_op
from torch._ops import HigherOrderOperator
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from effpass.graph.regions import region as region_of
from effpass.graph.regions import region_modes
from effpass.graph.writes import writes

SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)
WHOLE = (associative_scan_op, torch.ops.higher_order.autograd_function_apply)  # taken as they are
HALVES = (torch.float32, torch.bfloat16, torch.float16)


class CarveError(Exception):
    """The region cannot be taken out of its graph; the text says why, ``node`` where."""

    def __init__(self, reason: str, node: Node) -> None:
        super().__init__(reason)
        self.node = node


@dataclass(frozen=True)
class Region:
    """``nodes`` (in graph order) compute ``outputs`` from ``inputs``.

    Symbolic sizes that the nodes read come behind the inputs that were asked for.
    """

    inputs: tuple[Node, ...]
    outputs: tuple[Node, ...]
    nodes: tuple[Node, ...]

    @property
    def place(self) -> Node:
        """The node behind which a replacement goes: every input is there, no user yet."""
        return max((min(self.outputs), *(n for n in self.inputs if n.op != "placeholder")))

    def run(self, values: Sequence[Any], double: bool = False) -> list[Any]:
        """The outputs for real input ``values``; with ``double`` every half or float is float64."""
        return evaluate(
            self.nodes, self.outputs, dict(zip(self.inputs, values, strict=True)), double
        )

    def key(self) -> tuple[Any, ...]:
        """Equal for regions that compute the same function of inputs of the same shapes."""
        names = {node: f"i{k}" for k, node in enumerate(self.inputs)}
        names |= {node: f"n{k}" for k, node in enumerate(self.nodes)}
        return (
            tuple(_type(node) for node in self.inputs),
            tuple(
                (str(n.target), _spelled(n.args, names), _spelled(n.kwargs, names), _constant(n))
                for n in self.nodes
            ),
            tuple(names[node] for node in self.outputs),
        )


def carve(inputs: Sequence[Node], outputs: Sequence[Node]) -> Region:
    """The region from ``inputs`` to ``outputs``. Raises CarveError where there is none."""
    known, found, pending = dict.fromkeys(inputs), set(), list(outputs)
    while pending:
        node = pending.pop()
        if node in known or node in found:
            continue
        if isinstance(node.meta.get("val"), SYMBOLS):
            known[node] = None
            continue
        if node.op == "placeholder":
            raise CarveError(f"it also reads the graph's input {node.name}", node)
        _refuse(node)
        found.add(node)
        pending += node.all_input_nodes
    region = Region(tuple(known), tuple(outputs), tuple(sorted(found)))
    _one_mode(region)
    early_users(region)
    _unwritten(region)
    return region


def evaluate(
    nodes: Sequence[Node], outputs: Sequence[Node], values: Mapping[Node, Any], double: bool = False
) -> list[Any]:
    """Runs ``nodes`` in order from ``values``; answers the values of ``outputs``."""
    env = dict(values)
    last = {source: node for node in nodes for source in node.all_input_nodes}
    keep = {*outputs, *values}
    for node in nodes:
        if node.op == "get_attr":
            constant = operator.attrgetter(str(node.target))(node.graph.owning_module)
            env[node] = constant.double() if double and _is_float(constant) else constant
            continue
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: env[n])
        if double:
            args, kwargs = pytree.tree_map(_doubled, (args, kwargs))
        made = node.target(*args, **kwargs)  # type: ignore[operator]
        # factories without a dtype give the default one
        env[node] = pytree.tree_map(_widened, made) if double else made
        for source in node.all_input_nodes:
            if last[source] is node and source not in keep:
                env.pop(source, None)
    return [env[node] for node in outputs]


def ancestors(nodes: Iterable[Node]) -> set[Node]:
    """These nodes, and all that they are made of."""
    found: set[Node] = set()
    pending = list(nodes)
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending += node.all_input_nodes
    return found


def subgraph(gm: GraphModule, nodes: Iterable[Node]) -> tuple[Graph, dict[Node, Node]]:
    """All inputs of a graph and what makes ``nodes``, without an output; where each node is."""
    wanted = ancestors(nodes)
    graph, env = Graph(), dict[Node, Node]()
    for node in gm.graph.nodes:
        if node.op == "placeholder" or node in wanted:
            env[node] = graph.node_copy(node, env.__getitem__)
    return graph, env


def constant(node: Node, limit: int = 1 << 24) -> Tensor | None:
    """The value of a node that depends on no input, at most ``limit`` elements; else None."""
    found: set[Node] = set()
    pending = [node]
    while pending:
        each = pending.pop()
        if each in found:
            continue
        value = each.meta.get("val")
        fixed = not isinstance(value, Tensor) or all(isinstance(s, int) for s in value.shape)
        small = not isinstance(value, Tensor) or (fixed and value.numel() <= limit)
        if each.op not in ("call_function", "get_attr") or not small or len(found) > 500:
            return None
        if any(not isinstance(a, int | float | bool) for a in _symbols(each)):
            return None
        try:
            _refuse(each)
        except CarveError:
            return None
        found.add(each)
        pending += each.all_input_nodes
    with torch.no_grad():
        value = evaluate(sorted(found), [node], {})[0]
    return value if isinstance(value, Tensor) else None


def op_name(node: Node) -> str:
    """What a reader of a report calls a node: its operation, e.g. "the add"."""
    return f"the {getattr(node.target, '_opname', None) or getattr(node.target, '__name__', node)}"


def _symbols(node: Node) -> list[Any]:
    leaves = pytree.tree_leaves((node.args, node.kwargs))
    return [a for a in leaves if isinstance(a, SYMBOLS)]


def _refuse(node: Node) -> None:
    if node.op not in ("call_function", "get_attr"):
        raise CarveError(f"it contains {node.op} {node.target}", node)
    if isinstance(node.target, HigherOrderOperator) and node.target not in WHOLE:
        raise CarveError(f"it contains the higher-order op {node.target}", node)
    if writes(node):
        raise CarveError(f"{op_name(node)} in it writes in place", node)
    if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()) and _random(node):
        raise CarveError(f"{op_name(node)} in it is random", node)


def _random(node: Node) -> bool:
    """Dropout in evaluation is the identity."""
    name = getattr(node.target, "_opname", "")
    if name in ("dropout", "native_dropout") and len(node.args) == 3:
        return bool(node.args[2]) and bool(node.args[1] != 0)
    return True


def _one_mode(region: Region) -> None:
    """Refuses nodes of several modes; a ``no_grad`` block between two of them does not matter."""
    place, nodes = region.place, [n for n in region.nodes if n.op != "get_attr"]
    if len({n.meta.get("effpass_region") for n in (place, *nodes)}) == 1:
        return
    modes = region_modes(place.graph.owning_module)  # type: ignore[arg-type]
    # where the whole graph is in no_grad, its first modes are not those that region_modes takes
    known = torch.is_grad_enabled()
    if not known or any(modes[region_of(n)] != modes[region_of(place)] for n in nodes):
        raise CarveError("grad mode or autocast changes inside it", region.nodes[0])


def early_users(region: Region) -> list[Node]:
    """Nodes in front of the replacement's place that read the outputs: they must move behind it.

    Raises CarveError where they cannot: an input of the region depends on its output, or they
    have effects.
    """
    inside, late = set(region.nodes), set(region.outputs)
    found: list[Node] = []
    node, place = min(region.outputs).next, region.place
    while node is not place.next:
        if node not in inside and not late.isdisjoint(node.all_input_nodes):
            late.add(node)
            found.append(node)
        node = node.next
    for node in found:
        if node in region.inputs:
            raise CarveError(f"{op_name(node)} that it reads depends on what it computes", node)
        _refuse(node)
        if node.meta.get("effpass_region") != place.meta.get("effpass_region"):
            raise CarveError(f"{op_name(node)} uses it before all of its inputs exist", node)
    return found


def _unwritten(region: Region) -> None:
    """Nothing that it touches is written to before its replacement, nor its outputs afterwards.

    Nor its inputs, where a gradient may need them: the op may save what the nodes did not.
    """
    touched = {_storage(n) for n in (*region.nodes, *region.inputs)}
    kept = {_storage(n) for n in region.outputs}
    if any(_needs_gradient(n) for n in region.inputs):
        kept |= {_storage(n) for n in region.inputs}
    first, place = min(region.nodes, default=region.place), region.place
    for node in place.graph.nodes:
        for target in writes(node):
            storage = _storage(target)
            if first < node and (storage is None or storage in (kept if place < node else touched)):
                raise CarveError(f"{op_name(node)} writes in place to what it reads or makes", node)


def _needs_gradient(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.requires_grad


def _storage(node: Node) -> int | None:
    value = node.meta.get("val")
    return value.untyped_storage()._cdata if isinstance(value, Tensor) else None


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _widened(value: Any) -> Any:
    return value.double() if _is_float(value) else value


def _doubled(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value in HALVES else value


def _type(node: Node) -> Any:
    value = node.meta.get("val")
    return (tuple(map(str, value.shape)), value.dtype) if isinstance(value, Tensor) else str(value)


def _constant(node: Node) -> Any:
    """Constants are compared by identity: two masks need not be equal."""
    if node.op != "get_attr":
        return None
    return id(operator.attrgetter(str(node.target))(node.graph.owning_module))


def _spelled(argument: Any, names: Mapping[Node, str]) -> str:
    return str(map_arg(argument, lambda n: names[n]))
