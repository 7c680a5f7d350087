"""Every op in ONNX Runtime, and in ONNX's reference evaluator, against its definition."""

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from effpass.ops import OPS
from tests.lowering.onnx_calls import inputs_of, model_of, numpy_of, run
from tests.ops.attention_samples import CAPPED
from tests.ops.attention_samples import SAMPLES as ATTENTIONS
from tests.ops.samples import SAMPLES, Sample
from tests.tolerances import close

# onnxruntime ends the process on a Scan over no tokens; sessions refuse empty inputs instead
LONG = ("no tokens",)
RUN = [s for s in SAMPLES if s.name not in LONG]
EVALUATED = ("plain", "everything", "one token", "ragged", "empty ends", "width 1", "width 7")


def outputs(op: str, arguments: list[Any]) -> list[torch.Tensor]:
    made = OPS[op].reference(*arguments)
    return list(made) if isinstance(made, tuple) else [made]


@pytest.mark.parametrize("portable", [False, True], ids=["contrib", "portable"])
@pytest.mark.parametrize("sample", RUN, ids=str)
def test_runtime(sample: Sample, portable: bool) -> None:
    arguments = sample.arguments()
    found = run(sample.op, arguments, portable)
    for actual, expected in zip(found, outputs(sample.op, arguments), strict=True):
        close(actual, expected, "kernel_fp32")


@pytest.mark.parametrize("sample", [*ATTENTIONS, *CAPPED], ids=str)
def test_attention(sample: Any) -> None:
    arguments = list(sample.given().values())
    (found,) = run("varlen_attention", arguments)
    close(found, outputs("varlen_attention", arguments)[0], "attention_fp32")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("op", ["selective_scan", "ssd_scan", "linear_recurrence", "causal_conv1d"])
def test_dtypes(op: str, dtype: torch.dtype) -> None:
    row = {
        torch.bfloat16: "kernel_bf16",
        torch.float16: "kernel_fp16",
        torch.float64: "kernel_fp32",
    }[dtype]
    for name in ("everything", "ragged"):
        sample = next(s for s in SAMPLES if s.op == op and s.name == name)
        arguments = sample.arguments(dtype)
        for actual, expected in zip(run(op, arguments), outputs(op, arguments), strict=True):
            close(actual, expected, row)


def test_sequences_are_apart() -> None:
    """A NaN and an infinity in one sequence leave the others as they are."""
    for op in ("selective_scan", "ssd_scan", "linear_recurrence", "causal_conv1d"):
        sample = next(s for s in SAMPLES if s.op == op and s.name == "ragged")
        arguments = sample.arguments()
        clean = run(op, arguments)
        at = int(arguments[-1][1])  # the first token of the second sequence
        arguments[0] = arguments[0].clone()
        arguments[0][0, at] = torch.nan
        spoilt = run(op, arguments)
        assert spoilt[0][0, at].isnan().any()
        close(spoilt[0][:, :at], clean[0][:, :at], "kernel_fp32")
        end = int(arguments[-1][2])
        close(spoilt[0][:, end:], clean[0][:, end:], "kernel_fp32")
        close(spoilt[1][2:], clean[1][2:], "kernel_fp32")


@pytest.mark.parametrize("sample", [*ATTENTIONS, *CAPPED], ids=str)
def test_attention_in_the_reference_evaluator(sample: Any) -> None:
    arguments = list(sample.given().values())
    model = ir.to_proto(model_of("varlen_attention", arguments, portable=True))
    assert {node.domain for node in model.graph.node} == {""}
    given = {n: numpy_of(v) for n, v in inputs_of("varlen_attention", arguments).items()}
    (found,) = ReferenceEvaluator(model).run(None, given)
    expected = outputs("varlen_attention", arguments)[0]
    close(torch.from_numpy(np.ascontiguousarray(found)), expected, "attention_fp32")


@pytest.mark.parametrize("sample", [s for s in RUN if s.name in EVALUATED], ids=str)
def test_reference_evaluator(sample: Sample) -> None:
    """The portable form needs nothing of ONNX Runtime."""
    arguments = sample.arguments()
    model = ir.to_proto(model_of(sample.op, arguments, portable=True))
    assert {node.domain for node in model.graph.node} == {""}
    given = {name: numpy_of(v) for name, v in inputs_of(sample.op, arguments).items()}
    found = ReferenceEvaluator(model).run(None, given)
    for actual, expected in zip(found, outputs(sample.op, arguments), strict=True):
        close(torch.from_numpy(np.ascontiguousarray(actual)), expected, "kernel_fp32")


def test_one_model_serves_every_length() -> None:
    """Sizes of tokens, rows and sequences are read when running, not written into the model."""
    import onnxruntime

    for op, name in (("selective_scan", "everything"), ("ssd_scan", "everything")):
        sample = next(s for s in SAMPLES if s.op == op and s.name == name)
        arguments = sample.arguments()
        model = ir.to_proto(model_of(op, arguments)).SerializeToString()
        session = onnxruntime.InferenceSession(model)
        for rows, tokens in ((1, 1), (2, 5), (1, 31)):
            cut = dict(zip(OPS[op].signature.parameters, arguments, strict=True))
            for key in ("x", "dt", "z", "B", "C"):
                cut[key] = cut[key][:rows, :tokens]
            cut["initial_state"] = cut["initial_state"][:rows]
            given = inputs_of(op, list(cut.values()))
            found = session.run(None, {key: numpy_of(v) for key, v in given.items()})
            for actual, expected in zip(found, outputs(op, list(cut.values())), strict=True):
                close(torch.from_numpy(actual), expected, "kernel_fp32")
