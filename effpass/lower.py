"""Lower: choose one implementation for every op node, once, when compiling."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from effpass.graph.clean import graphs
from effpass.graph.source import keep_source, layer, line
from effpass.ops import OPS, Lowering, Op
from effpass.ops.token_matching import token_matching
from effpass.report import Chosen


def lower(gm: GraphModule, targets: Sequence[str] | None = None) -> list[Chosen]:
    """Gives every op node its implementation, in place; answers what was chosen, and why.

    Works on captured graphs (``meta["val"]``) and on Dynamo's own (``meta["example_value"]``).
    """
    ops = {op.overload: op for op in (*OPS.values(), token_matching)}
    chosen = []
    for body in graphs(gm):
        for node in list(body.graph.nodes):
            if node.target in ops:
                chosen.append(_lower(node, ops[node.target], targets))
        body.recompile()
    return chosen


def in_place(gm: GraphModule, implementation: str) -> list[Chosen]:
    """Records of ops that stay as they are, for a compiler that has a form of its own for each."""
    ops = {op.overload: op for op in OPS.values()}
    return [
        Chosen(ops[node.target].name, layer(node), implementation, (), line(node))
        for body in graphs(gm)
        for node in body.graph.nodes
        if node.target in ops
    ]


def reference_form(gm: GraphModule) -> GraphModule:
    """A copy in which every op runs its reference function: what verification compares with."""
    made = _copy(gm)
    ops = {op.overload: op for op in OPS.values()}
    for body in graphs(made):
        for node in body.graph.nodes:
            if node.target in ops:
                node.target = ops[node.target].inline.overload
        body.recompile()
    return made


def _copy(gm: GraphModule) -> GraphModule:
    """A copy of the graph and of the bodies inside it; tensors are shared."""
    graph = Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    made = GraphModule(gm, graph)
    for node in graph.find_nodes(op="get_attr"):
        body = getattr(gm, str(node.target), None)
        if isinstance(body, GraphModule):
            setattr(made, str(node.target), _copy(body))
    made.meta.update(gm.meta)
    return made


def _lower(node: Node, op: Op, targets: Sequence[str] | None) -> Chosen:
    given = list(op.bind(*node.args, **node.kwargs).values())
    lowering, refused = op.choose([_value(a) for a in given], targets)
    record = Chosen(op.name, layer(node), lowering.target, tuple(refused), line(node))
    if lowering.splice:
        _splice(node, given, lowering)
    else:
        node.target = lowering.overload
    return record


def _splice(node: Node, given: list[Any], lowering: Lowering) -> None:
    """Puts the traced body of an implementation in the node's place, for the compiler to fuse."""
    sources = [a for a in given if isinstance(a, Node)]
    tensors = [_value(source) for source in sources]

    def run(*values: Any) -> Any:
        each = iter(values)
        return lowering.forward(*(next(each) if isinstance(a, Node) else a for a in given))

    with tensors[0].fake_mode:
        traced = make_fx(run, pre_dispatch=True)(*tensors)
    env = dict(zip(traced.graph.find_nodes(op="placeholder"), sources, strict=True))
    graph = node.graph
    with graph.inserting_before(node):
        for inner in traced.graph.nodes:
            if inner.op in ("placeholder", "output"):
                continue
            env[inner] = keep_source(node, graph.node_copy(inner, lambda n: env[n]))
    results = [env[out] for out in traced.graph.output_node().args[0]]  # type: ignore[union-attr]
    for user in list(node.users):
        user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index]
        graph.erase_node(user)
    graph.erase_node(node)


def _value(arg: Any) -> Any:
    if not isinstance(arg, Node):
        return arg
    return arg.meta["val"] if "val" in arg.meta else arg.meta["example_value"]
