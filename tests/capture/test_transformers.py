"""Functions of transformers traced as ops: results, dtypes, in-place states, and what declines."""

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.mamba import modeling_mamba
from transformers.models.mamba2 import modeling_mamba2

from effpass.capture import cases, known
from effpass.capture.table import TRANSFORMERS, Row
from tests.capture.traced import Traced
from tests.models.zoo import FAMILIES
from tests.tolerances import close

SCANS = {"mamba_selective_scan", "mamba_selective_state_update"}
MODELS = "mamba falcon_mamba mamba2 bamba jamba zamba zamba2 granitemoehybrid nemotron_h falcon_h1"
CONVS = "lfm2 lfm2_moe qwen3_next olmo_hybrid kimi_linear"
CLOSED = "causal_conv1d_update"  # takes no further keyword arguments
# torch's own: Dynamo instantiates a model's autograd.Function, which torch deprecates
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


def named(row: Row) -> str:
    return row.name


WHOLE = "mamba2_split_conv1d_scan_combined"  # a kernel for a layer: None where there is none
COMPUTED = [row for row in TRANSFORMERS if row.name != WHOLE]
every_row = pytest.mark.parametrize("row", COMPUTED, ids=named)


@pytest.fixture(autouse=True)
def installed() -> None:
    known.install()


def make(*shape: int) -> Tensor:
    return torch.randn(*shape)


def function(row: Row) -> Callable[..., Any]:
    return getattr(modeling_mamba if row.name in SCANS else modeling_mamba2, row.name)


def copied(arguments: dict[str, Any]) -> dict[str, Any]:
    return {
        name: v.clone() if isinstance(v, Tensor) and 0 not in v.stride() else v
        for name, v in arguments.items()
    }


def compare(traced: Traced, plain: Callable[..., Any], arguments: dict[str, Any], row: str) -> None:
    """Outputs and written arguments of a compiled function and of the same function in eager."""
    theirs, ours = copied(arguments), copied(arguments)
    expected, actual = plain(**theirs), traced(ours)
    if isinstance(expected, Tensor):
        expected, actual = (expected,), (actual,)
    for e, a in zip(expected, actual, strict=True):
        close(a, e, row)
    for e, a in zip(theirs.values(), ours.values(), strict=True):
        if isinstance(e, Tensor):
            close(a, e, row)


@pytest.mark.parametrize("model", (MODELS + " " + CONVS).split())
def test_all_functions_are_substituted(model: str) -> None:
    """In every modeling file that holds a copy, whichever version is installed."""
    name = f"transformers.models.{model}.modeling_{model}"
    module = importlib.import_module(name)
    known.install()
    here = {row.name for row in TRANSFORMERS if hasattr(module, row.name)}
    assert here >= {"causal_conv1d_fn", "causal_conv1d_update"}
    assert {k.function for k in known.registered() if k.module == name} == here
    assert not [d for d in known.declined() if d.module == name]


@every_row
def test_one_op_with_all_options(row: Row) -> None:
    arguments = row.cases(make)[-1]  # type: ignore[index]
    traced = Traced(lambda values: function(row)(**values))
    compare(traced, inspect.unwrap(function(row)), arguments, "model_fp32")
    assert traced.ops() == {row.op: 1}


@pytest.mark.parametrize("row", [r for r in COMPUTED if "update" not in r.name], ids=named)
def test_lengths_are_dynamic(row: Row) -> None:
    """Three lengths, two compilations, the second with symbolic shapes."""
    traced = Traced(lambda values: function(row)(**values))
    longest = row.cases(make)[-1]  # type: ignore[index]
    along = 1 if row.op == "ssd_scan" else -1
    length = longest["hidden_states"].shape[along]
    for shorter in (0, 1, 2):
        sliced = {
            name: value.narrow(along, 0, length - shorter)
            if isinstance(value, Tensor) and value.dim() > 2 and value.shape[along] == length
            else value
            for name, value in longest.items()
        }
        compare(traced, inspect.unwrap(function(row)), sliced, "model_fp32")
    assert len(traced.graphs) == 2 and traced.ops(1) == {row.op: 1}


@every_row
def test_bfloat16_keeps_the_dtypes_of_the_library(row: Row) -> None:
    narrow = {
        name: value.bfloat16() if isinstance(value, Tensor) and name != "A" else value
        for name, value in row.cases(make)[1].items()  # type: ignore[index]
    }
    traced = Traced(lambda values: function(row)(**values))
    compare(traced, inspect.unwrap(function(row)), narrow, "front_door_bf16")


@pytest.mark.parametrize("options", [{}, {"D": torch.ones(cases.D)}], ids=["bare", "D"])
def test_autocast_keeps_the_dtype_of_the_scan(options: dict[str, Tensor]) -> None:
    arguments = cases.scan(make)[0] | options
    traced = Traced(lambda values: modeling_mamba.mamba_selective_scan(**values))
    with torch.autocast("cpu", torch.bfloat16):
        expected = inspect.unwrap(modeling_mamba.mamba_selective_scan)(**arguments)
        assert traced(arguments).dtype == expected.dtype
    assert traced.ops() == {"selective_scan": 1}


def test_an_activation_without_an_op_runs_the_library() -> None:
    arguments = cases.conv(make)[2] | {"activation": "gelu"}
    traced = Traced(lambda values: modeling_mamba.causal_conv1d_fn(**values))
    compare(traced, inspect.unwrap(modeling_mamba.causal_conv1d_fn), arguments, "model_fp32")
    ((_, name, reason),) = known.find_unraised(traced.graphs[0].graph)
    assert traced.ops() == {}
    assert name == "causal_conv1d_fn" and "beyond what causal_conv1d expresses" in reason


def test_a_short_state_runs_the_library() -> None:
    arguments = cases.conv_step(make)[0] | {"conv_state": make(cases.B, cases.D, cases.W - 2)}
    arguments["hidden_states"] = make(cases.B, cases.D, 3)
    traced = Traced(lambda values: modeling_mamba.causal_conv1d_update(**values))
    compare(traced, inspect.unwrap(modeling_mamba.causal_conv1d_update), arguments, "model_fp32")
    assert traced.ops() == {}


def test_a_step_whose_heads_are_not_tied_runs_the_library() -> None:
    """The same shapes as an expand, with a number a channel: only strides can tell."""
    arguments = cases.chunk_scan_step(make)[1]
    traced = Traced(lambda values: modeling_mamba2.mamba2_selective_state_update(**values))
    plain = inspect.unwrap(modeling_mamba2.mamba2_selective_state_update)
    compare(traced, plain, arguments, "model_fp32")
    assert traced.ops() == {}
    names = [name for _, name, _ in known.find_unraised(traced.graphs[0].graph)]
    assert names == ["mamba2_selective_state_update"]


@pytest.mark.parametrize("packed", ["seq_idx", "cu_seqlens"])
@pytest.mark.parametrize("row", [r for r in COMPUTED if r.name != CLOSED], ids=named)
def test_packed_sequences_are_marked(row: Row, packed: str) -> None:
    """By keyword or not; what knows nothing of marks raises when it runs them."""
    arguments = row.cases(make)[0] | {packed: torch.zeros(1, 5, dtype=torch.int32)}  # type: ignore[index]
    first, *rest = arguments
    by_place = Traced(lambda values: function(row)(values[first], **{n: values[n] for n in rest}))
    for traced in (Traced(lambda values: function(row)(**values)), by_place):
        with pytest.raises(ValueError, match="cannot keep packed sequences apart"):
            traced(arguments)
        assert traced.ops() == {row.op: 1, "packed_row": 1}


def test_a_kernel_that_is_not_there_answers_none() -> None:
    """Its wrapper would raise for packed rows; the layer goes on with functions that are known."""
    (row,) = (row for row in TRANSFORMERS if row.name == WHOLE)
    arguments = row.cases(make)[0] | {"seq_idx": torch.zeros(1, 5, dtype=torch.int32)}  # type: ignore[index]
    with pytest.raises(ValueError, match="can't keep packed sequences apart"):
        function(row)(**arguments)

    def layer(values: dict[str, Any]) -> Tensor:
        assert function(row)(**values) is None
        return values["zxbcdt"] + 1

    assert torch.equal(Traced(layer)(arguments), arguments["zxbcdt"] + 1)


@pytest.mark.parametrize("family", ["qwen3_next", "rwkv"])
def test_what_is_not_raised_is_found_once_a_layer(family: str) -> None:
    model, make_inputs = FAMILIES[family]()
    traced = Traced(model)
    with torch.no_grad():
        traced(**make_inputs(2, 5, False))
    rows = known.find_unraised(traced.graphs[0].graph)
    assert [name for _, name, _ in rows] == (
        ["rwkv_linear_attention"] * 2 if family == "rwkv" else ["torch_chunk_gated_delta_rule"]
    )
    assert all(node.meta["nn_module_stack"] and reason for node, _, reason in rows)


BACKENDS = ["eager", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", ["mamba", "mamba2", "falcon_h1"])
def test_other_backends_trace_the_ops_too(family: str, backend: str) -> None:
    """Substitution is process-global; results under any backend stay those of eager mode."""
    model, make_inputs = FAMILIES[family]()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for length in (7, 12, 9):
        inputs = make_inputs(2, length, True)
        close(compiled(**inputs).logits, model(**inputs).logits, "zoo_fp32")


@pytest.mark.parametrize("family", ["mamba", "mamba2", "bamba"])
def test_decoding_under_another_backend(family: str) -> None:
    model, make_inputs = FAMILIES[family]()
    ids = make_inputs(2, 7, False)["input_ids"]
    compiled = torch.compile(model, backend="aot_eager")
    name = "past_key_values" if family == "bamba" else "cache_params"

    def decode(forward: Any) -> list[Tensor]:
        out = forward(input_ids=ids, use_cache=True)
        logits = [out.logits]
        for token in (3, 5, 7):
            step = torch.full((2, 1), token)
            out = forward(input_ids=step, use_cache=True, **{name: getattr(out, name)})
            logits.append(out.logits)
        return logits

    with torch.no_grad():
        for actual, expected in zip(decode(compiled), decode(model), strict=True):
            close(actual, expected, "zoo_fp32")
