"""What token reduction needs besides the ops: nearest tokens, and orders in which equals stay."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from onnxscript import evaluator
from onnxscript import opset20 as op
from torch import Tensor
from torch.onnx._internal.exporter._building import OpRecorder

from effpass.lowering.ort.sort import sort
from effpass.lowering.ort.token_matching import token_matching
from effpass.ops.token_matching import closest as definition
from tests.tolerances import close


def model_of(translate: Callable[..., Any], *given: Any) -> tuple[Any, dict[str, np.ndarray]]:
    """A model whose inputs are the tensors of a call, sizes of rows and tokens open."""
    values, arrays, arguments = [], {}, []
    for i, value in enumerate(given):
        if not isinstance(value, Tensor):
            arguments.append(value)
            continue
        arrays[f"x{i}"] = value.numpy()
        kind = ir.TensorType(ir.DataType.from_numpy(value.numpy().dtype))
        dims = [f"x{i}_0", f"x{i}_1", *value.shape[2:]]
        values.append(ir.Value(name=f"x{i}", type=kind, shape=ir.Shape(dims)))
        arguments.append(values[-1])
    recorder = OpRecorder(op, {})
    with evaluator.default_as(recorder):
        made = list(translate(*arguments))
    for i, value in enumerate(made):
        value.name = f"y{i}"
    graph = ir.Graph(values, made, nodes=recorder.nodes, opset_imports={"": 20})
    return ir.to_proto(ir.Model(graph, ir_version=10)), arrays


def both(translate: Callable[..., Any], *given: Any) -> list[list[Tensor]]:
    """What ONNX Runtime computes, and ONNX's reference evaluator."""
    model, arrays = model_of(translate, *given)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    found = session.run(None, arrays), ReferenceEvaluator(model).run(None, arrays)
    return [[torch.from_numpy(np.ascontiguousarray(v)) for v in each] for each in found]


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize(("sources", "targets"), [(5, 7), (1, 1), (3, 1), (0, 4)])
def test_closest(sources: int, targets: int, later: bool) -> None:
    a, b = torch.randn(2, sources, 6), torch.randn(2, targets, 6)
    b[1, -1] = 0  # similar to nothing
    if sources > 2 and targets > 2:
        b[0, 2] = b[0, 1]  # of equals the earlier
    order = torch.stack([torch.randperm(sources + targets) for _ in range(2)])
    a_at, b_at = order[:, :sources].sort(1).values, order[:, sources:].sort(1).values
    open = torch.rand(2, targets) < 0.7
    given = (a, b, open, a_at, b_at, later)
    index, similar = definition(*given)
    found = both(token_matching, *given) if sources else [both(token_matching, *given)[0]]
    for indices, similarities in found:
        assert torch.equal(indices, index)
        close(similarities, similar, "kernel_fp32")


@pytest.mark.parametrize("descending", [False, True])
def test_equals_stay_in_order(descending: bool) -> None:
    for values in (torch.randint(0, 3, (2, 17)), torch.randint(0, 3, (2, 17)).float()):
        expected = torch.sort(values, dim=1, descending=descending, stable=True)
        for found in both(lambda x: sort(x, True, 1, descending), values):
            assert torch.equal(found[0], expected.values)
            assert torch.equal(found[1], expected.indices)
