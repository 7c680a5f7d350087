"""``transformers``' grouped product, the experts of a mixture: one ``Loop`` over the experts.

out[i] = input[i] weight[e] for the rows i that belong to expert e, which lie together; rows behind
the last expert's are zero.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from onnxscript import evaluator

from effpass.lowering.ort.build import Value, full, ints, op, shape, size


def grouped_mm(input: Value, weight: Value, offs: Value) -> Value:
    """``input`` (S, k) sorted by expert, ``weight`` (E, k, n), ``offs`` (E,) ends of runs."""
    dtype = input.dtype
    ends = op.Concat(ints(0), op.Cast(offs, to=ir.DataType.INT64.value), axis=0)
    start = full(0.0, shape(0, size(weight, 2)), dtype)
    recorder = evaluator.default()
    inside = type(recorder)(recorder.opset, {})  # type: ignore[call-arg, attr-defined]
    kinds = (ir.DataType.INT64, ir.DataType.BOOL, dtype)
    shapes = (ir.Shape([]), ir.Shape([]), None)
    given = [
        ir.Value(name=f"loop_in_{i}", type=ir.TensorType(kind), shape=known)
        for i, (kind, known) in enumerate(zip(kinds, shapes, strict=True))
    ]
    with evaluator.default_as(inside):
        expert, go, done = given
        at = op.Reshape(expert, ints(1))
        first, last = op.Gather(ends, at), op.Gather(ends, op.Add(at, ints(1)))
        rows = op.Slice(input, first, last, ints(0))
        part = op.MatMul(rows, op.Gather(weight, expert, axis=0))
        made = [op.Identity(go), op.Concat(done, part, axis=0)]
    for i, node in enumerate(inside.nodes):  # type: ignore[attr-defined]
        for k, value in enumerate(node.outputs):
            value.name = f"loop_{i}_{k}"
    body = ir.Graph(given, made, nodes=inside.nodes, name="loop_body")  # type: ignore[attr-defined]
    always = op.Cast(op.Constant(value_int=1), to=ir.DataType.BOOL.value)
    experts = op.Squeeze(size(weight, 0))
    node = ir.Node("", "Loop", [experts, always, start], [ir.AttrGraph("body", body)])
    recorder.nodes.append(node)  # type: ignore[attr-defined]
    (found,) = node.outputs
    left = op.Sub(size(input, 0), op.Shape(found, start=0, end=1))
    return op.Concat(found, full(0.0, op.Concat(left, size(weight, 2), axis=0), dtype), axis=0)


def overloads() -> list[Any]:
    """The operators that this translates, of those that are loaded."""
    found = getattr(torch.ops.transformers, "grouped_mm_fallback", None)
    return [] if found is None else [found.default]
