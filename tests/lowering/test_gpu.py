"""The Triton kernels against the definition in float64: on a GPU, or in Triton's interpreter.

The samples and checks are those of the CPU kernels. In the interpreter most of them are slow tests.
"""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

import effpass
import effpass.lowering
from effpass.lowering.gpu import launch
from effpass.ops import OPS, varlen_attention
from tests.lowering.agreement import ROWS, agree, compiled, define, piece, run
from tests.lowering.test_lowerings import DTYPES, KERNELS, PACKED, SAMPLES_OF
from tests.ops.attention_samples import CAPPED, AttentionSample, results
from tests.ops.attention_samples import SAMPLES as ATTENTION
from tests.ops.attention_samples import doubled as doubled_by_name
from tests.ops.samples import SAMPLES, Sample, doubled
from tests.tiny import Stack
from tests.tolerances import close

pytest.importorskip("triton", reason="Triton is not installed")
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
pytestmark = pytest.mark.usefixtures("triton_runs")
QUICK = {
    "causal_conv1d": ("plain", "token last", "wider than long", "empty ends"),
    "linear_recurrence": ("plain", "one token", "no tokens", "empty ends", "resetting"),
    "selective_scan": ("one token", "one state", "empty ends", "vanishing", "mixed"),
    "ssd_scan": ("one of each", "one token from nothing", "clamped", "three tokens"),
}
LIGHT = ("causal_conv1d", "linear_recurrence")  # quick in the interpreter
QUICK_ATTENTION = ("one head", "cross, causal", "gaps and window", "no keys", "bias, cross")
QUICK_NARROW = ("plain", "clamped", "one state", "gaps and window")
PRODUCTS = {
    torch.float32: "products_fp32",
    torch.bfloat16: "products_bf16",
    torch.float16: "products_fp16",
}


def _marks(quick: bool) -> Any:
    return () if quick or GPU else pytest.mark.slow


NARROW = {  # what else than fp32 the interpreter tries, by what only loads, stores and tiles see
    "bf16": ("everything", "ragged", "token last", "sliced", "no tokens", *QUICK_NARROW),
    "fp16": ("everything", "ragged", "primes", "soft cap and bias"),
}
NARROW_ATTENTION = (
    *("one key head", "narrow values", "wide values", "alike, between others", "primes", "long"),
    *("long window", "gaps", "any order, shared", "cross, causal", "cross, wide window", "no keys"),
    *("bias of heads, causal", "bias, cross", "soft cap and bias", "gaps and window", "nothing"),
)


def _tried(op: str, name: str, dtype: str) -> bool:
    """A GPU runs every sample in every dtype; the interpreter those that may fail alone."""
    if GPU or dtype == "fp32" or name in NARROW[dtype]:
        return True
    return dtype == "bf16" and (op == "ssd_scan" or name in NARROW_ATTENTION)


def _quick(op: str, name: str, dtype: str) -> bool:
    return name in QUICK[op] and (dtype == "fp32" or (dtype == "bf16" and name in QUICK_NARROW))


CALLS = [
    pytest.param(s, dtype, id=f"{s}-{name}", marks=_marks(_quick(s.op, s.name, name)))
    for s in SAMPLES
    for name, dtype in DTYPES.items()
    if (s.storage or name == "fp32") and _tried(s.op, s.name, name)
]
ATTENTION_CALLS = [
    pytest.param(
        s,
        dtype,
        id=f"{s}-{name}",
        marks=_marks(
            s.name in QUICK_ATTENTION
            and (name == "fp32" or (name == "bf16" and s.name in QUICK_NARROW))
        ),
    )
    for s in ATTENTION + CAPPED
    for name, dtype in DTYPES.items()
    if _tried("varlen_attention", s.name, name)
]
PACKS = [
    pytest.param(s, id=str(s), marks=_marks(s.name == "empty ends" and s.op in LIGHT))
    for s in PACKED
]
EACH = [pytest.param(op, marks=_marks(op in LIGHT)) for op in KERNELS]


def moved(arguments: list[Any]) -> list[Any]:
    """The arguments on the device of this test run."""
    return [a.to(DEVICE) if isinstance(a, Tensor) else a for a in arguments]


def row_of(op: str, dtype: torch.dtype | None) -> str | None:
    """Products of matrices have rows of their own, by what they multiply."""
    return PRODUCTS[dtype or torch.float32] if op == "ssd_scan" else None


@pytest.mark.parametrize(("sample", "dtype"), CALLS)
def test_is_the_definition(sample: Sample, dtype: torch.dtype) -> None:
    storage = dtype if sample.storage else None
    arguments = sample.arguments(storage)
    found = run(sample.op, moved(arguments), "gpu")
    found = {name: tensor.cpu() for name, tensor in found.items()}
    first = next(iter(found.values()))  # a sample of mixed dtypes answers in that of its first
    agree(found, define(sample.op, arguments, found), row_of(sample.op, first.dtype))


@functools.cache
def _attention(sample: AttentionSample, dtype: torch.dtype) -> dict[str, Tensor]:
    return results(varlen_attention.inline.overload, doubled_by_name(sample.given(dtype)))


@pytest.mark.parametrize(("sample", "dtype"), ATTENTION_CALLS)
def test_attention_is_the_definition(sample: AttentionSample, dtype: torch.dtype) -> None:
    given = dict(zip(sample.given(), moved([*sample.given(dtype).values()]), strict=True))
    row = PRODUCTS[dtype].replace("products", "attention")
    for name, tensor in results(compiled("varlen_attention", "gpu").overload, given).items():
        close(tensor.cpu(), _attention(sample, dtype)[name].to(tensor.dtype), row)


@pytest.mark.parametrize("op", KERNELS)
@pytest.mark.parametrize(
    "bad",
    [
        pytest.param(float("nan"), id="nan"),
        pytest.param(float("inf"), id="inf", marks=_marks(False)),
    ],
)
def test_bad_numbers_come_through(op: str, bad: float) -> None:
    sample = next(s for s in SAMPLES if s.op == op and s.name == "everything")
    arguments = [a.clone() if isinstance(a, Tensor) else a for a in sample.arguments()]
    arguments[0][0, -2, ..., -1] = bad
    arguments[0][1, -1, ..., 0] = bad
    outputs = compiled(op, "gpu").forward(*moved(arguments))
    for found, wanted in zip(outputs, OPS[op].reference(*doubled(arguments)), strict=True):
        assert wanted.isfinite().any() and not wanted.isfinite().all()
        close(found.cpu(), wanted.to(found.dtype), row_of(op, None) or ROWS[found.dtype])


@pytest.mark.parametrize("sample", PACKS)
def test_packed_is_separate(sample: Sample) -> None:
    op = OPS[sample.op]
    given = op.bind(*moved(sample.arguments()))
    forward = compiled(sample.op, "gpu").forward
    packed = dict(zip(op.axes.outputs, forward(*given.values()), strict=True))
    for i in range(given["cu_seqlens"].shape[0] - 1):
        one = {**piece(sample, i, given), "cu_seqlens": None}
        alone = forward(*one.values())
        wanted = dict(zip(op.axes.outputs, alone, strict=True))
        agree(piece(sample, i, packed), wanted, row_of(sample.op, None))


@pytest.mark.parametrize("sample", PACKS)
def test_a_bad_sequence_stays_alone(sample: Sample) -> None:
    op = OPS[sample.op]
    arguments = moved(sample.arguments())
    lengths = op.bind(*arguments)["cu_seqlens"].diff().tolist()
    worst = lengths.index(max(lengths))
    clean = run(sample.op, arguments, "gpu")
    start = sum(lengths[:worst])
    spoilt = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
    spoilt[0][:, start : start + lengths[worst]] = float("nan")
    found = run(sample.op, spoilt, "gpu")
    assert not found[next(iter(op.axes.outputs))].isfinite().all()
    shared = {f"grad {n}" for n, d in op.axes.inputs.items() if "t" not in d and "s" not in d}
    for i in set(range(len(lengths))) - {worst}:
        wanted = piece(sample, i, clean)
        for name, tensor in piece(sample, i, found).items():
            assert name in shared or torch.equal(tensor, wanted[name]), (i, name)


@pytest.mark.parametrize("op", EACH)
def test_results_repeat(op: str) -> None:
    sample = next(s for s in PACKED if s.op == op and s.name == "empty ends")
    arguments = moved(sample.arguments())
    again = run(op, arguments, "gpu")
    for name, tensor in run(op, arguments, "gpu").items():
        assert torch.equal(tensor, again[name]), name


@pytest.mark.parametrize("op", EACH)
def test_wrong_offsets_stay_inside_the_tensors(op: str) -> None:
    """Nothing can be raised without waiting for the device; what is written is written in place."""
    sample = next(s for s in PACKED if s.op == op and s.name == "empty ends")
    given = OPS[op].bind(*moved(sample.arguments()))
    given["cu_seqlens"] = given["cu_seqlens"] * 1000 - 7
    run(op, [*given.values()], "gpu")


@pytest.mark.parametrize("op", [*KERNELS, "varlen_attention"])
def test_is_a_sound_torch_op(op: str) -> None:
    if op == "varlen_attention":
        arguments = [*ATTENTION[1].given().values()]
    else:
        arguments = [a.clone() if isinstance(a, Tensor) else a for a in SAMPLES_OF[op].arguments()]
    torch.library.opcheck(
        compiled(op, "gpu").overload,
        tuple(moved(arguments)),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize("op", KERNELS)
def test_refusals_say_what_is_needed(op: str) -> None:
    arguments, first = moved(SAMPLES_OF[op].arguments()), OPS[op].tensor_names[0]
    refuses = compiled(op, "gpu").refuses
    assert refuses(*arguments) is None
    expected = f"{first} is float64; needs float32, bfloat16 or float16"
    assert refuses(arguments[0].double(), *arguments[1:]) == expected
    meta = [a.to("meta") if isinstance(a, Tensor) else a for a in arguments]
    assert refuses(*meta) == f"{first} is on meta; needs cuda"


@pytest.mark.parametrize(
    ("op", "change", "reason"),
    [
        ("causal_conv1d", {"weight": torch.ones(24, 17)}, "weight has 17 taps; needs at most 16"),
        ("selective_scan", {"A": torch.ones(24, 129)}, "A has 129 states; needs 1 to 128"),
        (
            "ssd_scan",
            {"x": torch.ones(1, 37, 4, 129)},
            "x has heads of 129 channels; needs 1 to 128",
        ),
        ("ssd_scan", {"B": torch.ones(1, 37, 1, 257)}, "B has 257 states; needs 1 to 256"),
    ],
)
def test_sizes_without_a_kernel_are_refused(op: str, change: dict[str, Any], reason: str) -> None:
    given = OPS[op].bind(*SAMPLES_OF[op].arguments()) | change
    assert compiled(op, "gpu").refuses(*moved([*given.values()])) == reason


def test_an_old_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_capability", lambda index: (7, 5))
    reason = launch._device_refusal("x", torch.device("cuda"))
    assert reason == "needs compute capability 8.0, found 7.5"


def test_a_model_runs_on_the_kernels_and_the_report_says_so() -> None:
    model, x = Stack(layers=1).to(DEVICE), torch.randn(2, 5, 8, device=DEVICE)
    options = {"compiler": "eager", "targets": ["gpu"]}
    compiled_model = torch.compile(model, backend="effpass", options=options)
    for length in (5, 3):
        found, wanted = compiled_model(x[:, :length]), model(x[:, :length])
        close(found, wanted, "model_fp32")
        parameters = list(model.parameters())
        grads = torch.autograd.grad(found.square().sum(), parameters)
        others = torch.autograd.grad(wanted.square().sum(), parameters)
        for grad, other in zip(grads, others, strict=True):
            close(grad, other, "model_gradient_fp32")
    chosen = effpass.report(compiled_model).chosen
    assert chosen and {c.implementation for c in chosen} == {"gpu"}


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op", [*KERNELS, "varlen_attention"])
def test_large_calls_on_a_gpu(op: str, dtype: torch.dtype) -> None:
    from tests.lowering.realistic import CALLS as LARGE
    from tests.lowering.realistic import filled

    for call in LARGE[op](dtype):
        arguments = [*OPS[op].bind(**filled(call)).values()]
        found = run(op, moved(arguments), "gpu") if op != "varlen_attention" else None
        if found is None:
            given = dict(zip(OPS[op].signature.parameters, moved(arguments), strict=True))
            found = results(compiled(op, "gpu").overload, given)
            wanted = results(varlen_attention.inline.overload, doubled_by_name(given))
            wanted = {n: t.to(found[n].dtype) for n, t in wanted.items()}
        else:
            wanted = define(op, moved(arguments), found)
        agree(found, wanted, PRODUCTS[dtype])


@pytest.mark.gpu
@pytest.mark.skipif(not GPU, reason="needs a CUDA device")
@pytest.mark.parametrize("name", ["one token", "empty ends"])
@pytest.mark.parametrize("op", KERNELS)
def test_a_cuda_graph_holds_a_call(op: str, name: str) -> None:
    sample = next(s for s in SAMPLES if s.op == op and s.name == name)
    arguments, forward = moved(sample.arguments()), compiled(op, "gpu").forward
    wanted = forward(*arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = forward(*arguments)
    graph.replay()
    torch.cuda.synchronize()
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)
