"""Nodes that treat every token by itself, on fewer tokens: same operation, other sizes."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from effpass.axes.labels import opname, single
from effpass.axes.relation import arguments, is_tensor, values
from effpass.passes.reduction.stream import Irreducible

if TYPE_CHECKING:
    from effpass.passes.reduction.rewrite import Reducer

aten = torch.ops.aten
SIZED = ("view", "reshape", "_unsafe_view", "expand", "unflatten", "view_as", "reshape_as")
CUTS = ("slice", "narrow", "split", "split_with_sizes", "chunk", "tensor_split")
FILLED_BESIDE = ("new_zeros", "new_ones", "new_full", "new_empty")


def resized(reducer: Reducer, node: Node, stage: int) -> Node:
    """A node that is free along rows and tokens, at a stage."""

    def operand(source: Node) -> Node:
        if is_tensor(source) and reducer.stream.holds_tokens(source):
            return reducer.at(source, stage, node)
        return reducer.env[source]

    name, given = opname(node), arguments(node)
    if name in CUTS:
        dim = given["dim"] % values(given["self"])[0].dim()
        if dim == reducer.stream.of(given["self"]).token:
            return _whole(reducer, node, operand)
    if name == "squeeze":
        return _squeezed(reducer, given, operand)
    if name in SIZED or name in FILLED_BESIDE:
        shape = _shape(reducer, node, stage)
        if name in FILLED_BESIDE:
            args, kwargs = map_arg((node.args, node.kwargs), operand)
            made = (args[0], shape, *args[2:])
            return reducer.graph.create_node("call_function", node.target, made, kwargs)
        target = aten.expand.default if name == "expand" else aten.reshape.default
        return reducer.call(target, operand(given["self"]), shape)
    args, kwargs = map_arg((node.args, node.kwargs), operand)
    return reducer.graph.create_node(node.op, node.target, args, kwargs)


def _whole(reducer: Reducer, node: Node, operand: Callable[[Node], Node]) -> Node:
    if opname(node) not in ("slice", "narrow"):
        raise Irreducible("cut", node, "it cuts the tokens, in one piece")
    return reducer.call(aten.alias.default, operand(arguments(node)["self"]))


def _squeezed(reducer: Reducer, given: dict[str, Any], operand: Callable[[Node], Node]) -> Node:
    """Only dims that had size 1 go; that of the tokens may now have it."""
    shape = values(given["self"])[0].shape
    dims = given.get("dim", list(range(len(shape))))
    dims = [d % len(shape) for d in (dims if isinstance(dims, list | tuple) else [dims])]
    gone = [d for d in dims if single(shape[d])]
    return reducer.call(aten.squeeze.dims, operand(given["self"]), gone)


def _shape(reducer: Reducer, node: Node, stage: int) -> list[Any]:
    """The sizes of a node's value, with the tokens of a stage."""
    stream, positions = reducer.stream, reducer.stages[stage].positions
    found: list[Any] = []
    for dim in stream.solution.dims(node):
        factors: list[Any] = []
        rest = 1
        for label in dim:
            size = stream.solution.classes.sizes[label]
            if (label,) == stream.token:
                factors.append(reducer.graph.call_method("size", (positions, 1)))
            elif size.is_Integer:
                rest *= int(size)
            elif (label,) == stream.batch:
                factors.append(reducer.graph.call_method("size", (positions, 0)))
            else:
                raise Irreducible("sizes", node, "its other sizes change, too")
        made: Any = rest
        for factor in factors:
            made = factor if made == 1 else reducer.call(operator.mul, made, factor)
        found.append(made)
    return found
