"""Sizes that a file works out from the length of its input: how many tokens stay behind an anchor.

A reduced graph takes a tensor of as many elements as tokens stay, one for each anchor: the host
makes them for torch.compile. In a file they are made of the input's shape instead.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir import tape

Plan = Callable[[tape.Tape, ir.Value], list[ir.Value]]


def fill_in(model: ir.Model, carriers: Sequence[str], source: str, dim: int, plan: Plan) -> None:
    """Takes inputs ``carriers`` out of ``model``, each made of size ``dim`` of input ``source``.

    ``plan`` records the sizes, int64 (1,), from that of the source.
    """
    graph, recorder = model.graph, tape.Tape()
    inputs = {str(value.name): value for value in graph.inputs}
    tokens = recorder.op("Shape", [inputs[source]], {"start": dim, "end": dim + 1})
    sizes = plan(recorder, tokens)
    zero = recorder.op("Constant", [], {"value_float": 0.0})
    for name, size in zip(carriers, sizes, strict=True):
        if name not in inputs:
            continue  # nothing in the graph reads it
        made = recorder.op("Expand", [zero, size])
        made.type, made.shape = inputs[name].type, inputs[name].shape
        ir.convenience.replace_all_uses_with(inputs[name], made)
        graph.inputs.remove(inputs[name])
    for i, node in enumerate(recorder.nodes):
        for value in node.outputs:
            value.name = f"plan_{i}"
    graph.insert_before(graph[0], recorder.nodes)


def by_share(share: Fraction, anchors: int, protected: int) -> Plan:
    """``n - min(n - ceil(n share), max(0, n - protected) // 2)`` behind every anchor."""

    def plan(recorder: tape.Tape, tokens: ir.Value) -> list[ir.Value]:
        def op(name: str, *values: Any) -> ir.Value:
            inputs = [v if isinstance(v, ir.Value) else _number(recorder, v) for v in values]
            return recorder.op(name, inputs)

        found = [tokens]
        for _ in range(anchors):
            now = found[-1]
            up = op("Add", op("Mul", now, share.numerator), share.denominator - 1)
            leaving = op("Sub", now, op("Div", up, share.denominator))
            free = op("Div", op("Max", op("Sub", now, protected), 0), 2)
            found.append(op("Sub", now, op("Min", leaving, free)))
        return found[1:]

    return plan


def by_table(lengths: Sequence[Sequence[int]]) -> Plan:
    """``lengths[n]`` behind the anchors, of n tokens; the runtime refuses longer inputs."""

    def plan(recorder: tape.Tape, tokens: ir.Value) -> list[ir.Value]:
        found = []
        for column in zip(*lengths, strict=True):
            table = ir.tensor(np.array(column, dtype=np.int64))
            values = recorder.op("Constant", [], {"value": table})
            found.append(recorder.op("Gather", [values, tokens], {"axis": 0}))
        return found

    return plan


def _number(recorder: tape.Tape, value: int) -> ir.Value:
    return recorder.op("Constant", [], {"value_ints": [value]})
