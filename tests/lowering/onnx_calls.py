"""One call of an op as an ONNX model, built by its translation alone: no exporter, 10 ms each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
from onnxscript import evaluator
from onnxscript import opset20 as op
from torch import Tensor
from torch.onnx._internal.exporter._building import OpRecorder

from effpass.lowering.ort.table import table
from effpass.ops import OPS

OPSETS = {"": 20, "com.microsoft": 1}
DYNAMIC = {  # dims that a model leaves open; the rest are numbers, as weights make them
    "cu_seqlens": (0,),
    "cu_seqlens_k": (0,),
    "q_pos": (0,),
    "k_pos": (0,),
    "initial_state": (0,),
}
ROWS = ("x", "dt", "z", "B", "C", "a", "b")


def dtype_of(value: Tensor) -> ir.DataType:
    return ir.DataType.from_numpy(numpy_of(value[:0] if value.dim() else value).dtype)


def numpy_of(value: Tensor) -> np.ndarray:
    if value.dtype == torch.bfloat16:
        import ml_dtypes

        return value.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return value.detach().contiguous().numpy()


def open_dims(op_name: str, name: str) -> tuple[int, ...]:
    if op_name == "varlen_attention" and name in ("q", "k", "v"):
        return (0,)
    if op_name == "varlen_attention" and name == "bias":
        return (-1,)
    return (0, 1) if name in ROWS else DYNAMIC.get(name, ())


def model_of(op_name: str, arguments: list[Any], portable: bool = False) -> ir.Model:
    """The model of one call; tensors among ``arguments`` are its inputs, by name."""
    translate: Callable[..., Any] = table(portable)[0][OPS[op_name].overload]
    given, values = dict(zip(OPS[op_name].signature.parameters, arguments, strict=True)), {}
    for name, value in given.items():
        if isinstance(value, Tensor):
            dims: list[Any] = list(value.shape)
            for dim in open_dims(op_name, name):
                dims[dim] = f"{name}_{dim}"
            kind = ir.TensorType(dtype_of(value))
            values[name] = ir.Value(name=name, type=kind, shape=ir.Shape(dims))
    recorder = OpRecorder(op, {})
    with evaluator.default_as(recorder):
        made = translate(**{**given, **values})
    outputs = list(made) if isinstance(made, list | tuple) else [made]
    for i, value in enumerate(outputs):
        value.name = f"output_{i}"
    graph = ir.Graph(list(values.values()), outputs, nodes=recorder.nodes, opset_imports=OPSETS)
    return ir.Model(graph, ir_version=10)


def inputs_of(op_name: str, arguments: list[Any]) -> dict[str, Any]:
    names = OPS[op_name].signature.parameters
    return {
        name: value
        for name, value in zip(names, arguments, strict=True)
        if isinstance(value, Tensor)
    }


def run(op_name: str, arguments: list[Any], portable: bool = False) -> list[Tensor]:
    """What ONNX Runtime computes for one call."""
    model = ir.to_proto(model_of(op_name, arguments, portable)).SerializeToString()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    given = {name: ort_value(value) for name, value in inputs_of(op_name, arguments).items()}
    names = [output.name for output in session.get_outputs()]
    return [torch.from_dlpack(value) for value in session.run_with_ort_values(names, given)]


def ort_value(value: Tensor) -> onnxruntime.OrtValue:
    if value.dtype == torch.bfloat16:
        kind = ir.DataType.BFLOAT16.value
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(numpy_of(value), kind)
    return onnxruntime.OrtValue.ortvalue_from_numpy(numpy_of(value))
