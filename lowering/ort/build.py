"""Small pieces of ONNX that the translations of ops are made of.

Everything here records nodes into the graph that ``torch.onnx`` is building (onnxscript's current
evaluator), and works on values whose rank and dtype are known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
from onnxscript import evaluator, opset20

from effpass.lowering.ort.operators import CONTRIB

Value = Any  # onnxscript's recorded value: an onnx_ir.Value that knows operators
op: Any = opset20  # its own annotations are of tensors that are computed at once
END = 2**63 - 1


def ints(*numbers: int) -> Value:
    """A constant vector of int64."""
    return op.Constant(value_ints=list(numbers))


def size(x: Value, dim: int) -> Value:
    """The size of one dim as an int64 vector of length 1."""
    return op.Shape(x, start=dim, end=dim + 1 if dim != -1 else END)


def shape(*sizes: Value | int) -> Value:
    """An int64 vector of sizes, some known when running, some now."""
    return op.Concat(*(ints(s) if isinstance(s, int) else s for s in sizes), axis=0)


def accumulated(dtype: ir.DataType) -> ir.DataType:
    """The dtype in which states are kept: float32, or float64 for float64."""
    return ir.DataType.DOUBLE if dtype == ir.DataType.DOUBLE else ir.DataType.FLOAT


def cast(x: Value, dtype: ir.DataType) -> Value:
    """``x`` in ``dtype``; itself where it has that already."""
    return x if x.dtype == dtype else typed(op.Cast(x, to=dtype.value), dtype, x.shape)


def typed(x: Value, dtype: ir.DataType, known: Any = None) -> Value:
    """``x`` with its dtype, and its shape (or number of dims) where it is known, written down."""
    x.dtype = dtype
    if known is not None and x.shape is None:
        x.shape = ir.Shape([None] * known) if isinstance(known, int) else known
    return x


def full(number: float, dims: Value, dtype: ir.DataType) -> Value:
    """A tensor of one number."""
    return typed(op.Expand(cast(op.Constant(value_float=number), dtype), dims), dtype)


def rank(x: Value) -> int:
    """The number of dims."""
    assert x.shape is not None, f"{x.name} has no known rank"
    return len(x.shape)


def silu(x: Value) -> Value:
    """x sigmoid(x)."""
    return op.Mul(x, op.Sigmoid(x))


def contrib(name: str, *inputs: Value | None, outputs: int, **attributes: Any) -> list[Value]:
    """Records one operator of ONNX Runtime's own domain."""
    recorder = evaluator.default()
    attrs = ir.convenience.convert_attributes(attributes)
    node = ir.Node(CONTRIB, name, list(inputs), attrs, num_outputs=outputs, version=1)
    recorder.nodes.append(node)  # type: ignore[attr-defined]
    return list(node.outputs)


def scan(
    body: Callable[..., tuple[Value, ...]], carried: Sequence[Value], over: Sequence[Value]
) -> list[Value]:
    """A ``Scan`` along dim 1: ``body(*carried, *slices)`` gives the next carried, and one more.

    Answers the last carried values, then that one stacked along dim 1: of as many dims as the first
    of ``over``. The body may use values from outside.
    """
    recorder = evaluator.default()
    kinds, swap = [value.dtype for value in (*carried, *over)], _swap(rank(over[0]))
    over = [op.Transpose(value, perm=_swap(rank(value))) for value in over]
    inside = type(recorder)(recorder.opset, {})  # type: ignore[call-arg, attr-defined]
    given = [
        ir.Value(name=f"scan_in_{i}", type=ir.TensorType(kind)) for i, kind in enumerate(kinds)
    ]
    with evaluator.default_as(inside):
        made = body(*given)
    for i, node in enumerate(inside.nodes):  # type: ignore[attr-defined]
        for k, value in enumerate(node.outputs):
            value.name = f"scan_{i}_{k}"  # never a name of the graph outside
    attributes = [
        ir.AttrGraph("body", ir.Graph(given, made, nodes=inside.nodes, name="scan_body")),  # type: ignore[attr-defined]
        ir.AttrInt64("num_scan_inputs", len(over)),
    ]
    node = ir.Node("", "Scan", [*carried, *over], attributes, num_outputs=len(made))
    recorder.nodes.append(node)  # type: ignore[attr-defined]
    *last, stacked = node.outputs
    return [*last, op.Transpose(stacked, perm=swap)]


def _swap(dims: int) -> list[int]:
    """The first two of so many dims swapped; ``Scan`` runs along the first."""
    return [1, 0, *range(2, dims)]
