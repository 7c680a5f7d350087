"""Every compiled implementation of every op against the definition in float64."""

import functools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx

from effpass.lowering.cpu import build
from effpass.ops import OPS
from tests.lowering.agreement import ROWS, agree, compiled, define, piece, run
from tests.ops.samples import SAMPLES, Sample, doubled
from tests.tolerances import close

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PACKED = [s for s in SAMPLES if "cu_seqlens" in s.make()]
KERNELS = list(dict.fromkeys(s.op for s in SAMPLES))  # attention: see test_varlen_attention.py
SAMPLES_OF = {op: next(s for s in SAMPLES if s.op == op) for op in KERNELS}
CALLS = [
    pytest.param(sample, dtype, id=f"{sample}-{name}")
    for sample in SAMPLES
    for name, dtype in DTYPES.items()
    if sample.storage or name == "fp32"
]


@functools.cache
def expected(sample: Sample, dtype: torch.dtype | None) -> dict[str, Tensor]:
    arguments = sample.arguments(dtype)
    return define(sample.op, arguments, run(sample.op, arguments))


@pytest.mark.parametrize(("sample", "dtype"), CALLS)
def test_is_the_definition(sample: Sample, dtype: torch.dtype, isa: str) -> None:
    arguments = sample.arguments(dtype if sample.storage else None)
    agree(run(sample.op, arguments), expected(sample, dtype if sample.storage else None))


@pytest.mark.parametrize("sample", SAMPLES, ids=str)
def test_is_a_sound_torch_op(sample: Sample) -> None:
    arguments = [a.clone() if isinstance(a, Tensor) else a for a in sample.arguments()]
    overload = compiled(sample.op).overload
    torch.library.opcheck(overload, tuple(arguments), test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("op", KERNELS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")], ids=["nan", "inf"])
def test_bad_numbers_come_through(op: str, bad: float, isa: str) -> None:
    sample = next(s for s in SAMPLES if s.op == op and s.name == "everything")
    arguments = [a.clone() if isinstance(a, Tensor) else a for a in sample.arguments()]
    arguments[0][0, -2, ..., -1] = bad
    arguments[0][1, -1, ..., 0] = bad
    outputs = compiled(op).forward(*arguments)
    for found, wanted in zip(outputs, OPS[op].reference(*doubled(arguments)), strict=True):
        assert wanted.isfinite().any() and not wanted.isfinite().all()
        close(found, wanted.to(found.dtype), ROWS[found.dtype])


def _large(op: str) -> tuple[list[Any], list[Any]]:
    """A call that several threads share by channels, and one they share by sequences."""
    samples = {s.name: s for s in SAMPLES if s.op == op}
    return samples["wide"].arguments(), samples["many sequences"].arguments()


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("op", KERNELS)
@pytest.mark.parametrize("which", [0, 1], ids=["channels", "sequences"])
def test_threads_agree_and_repeat(op: str, which: int, three_threads: None) -> None:
    arguments = _large(op)[which]
    found = run(op, arguments)
    again = run(op, arguments)
    for name, tensor in found.items():
        assert torch.equal(tensor, again[name]), name
    torch.set_num_threads(1)
    alone = run(op, arguments)
    agree(found, alone)
    for name in OPS[op].axes.outputs:
        assert torch.equal(found[name], alone[name]), name


@pytest.mark.parametrize("sample", PACKED, ids=str)
def test_packed_is_separate(sample: Sample, isa: str) -> None:
    op = OPS[sample.op]
    given = op.bind(*sample.arguments())
    packed = dict(zip(op.axes.outputs, compiled(sample.op).forward(*given.values()), strict=True))
    for i in range(given["cu_seqlens"].shape[0] - 1):
        one = {**piece(sample, i, given), "cu_seqlens": None}
        alone = compiled(sample.op).forward(*one.values())
        agree(piece(sample, i, packed), dict(zip(op.axes.outputs, alone, strict=True)))


@pytest.mark.parametrize("sample", PACKED, ids=str)
def test_a_bad_sequence_stays_alone(sample: Sample, isa: str) -> None:
    op = OPS[sample.op]
    arguments = sample.arguments()
    lengths = op.bind(*arguments)["cu_seqlens"].diff()
    worst = int(lengths.argmax())
    clean, spoilt = run(sample.op, arguments), sample.arguments()
    start = int(lengths[:worst].sum())
    spoilt[0][:, start : start + int(lengths[worst])] = float("nan")
    found = run(sample.op, spoilt)
    assert not found[next(iter(op.axes.outputs))].isfinite().all()
    shared = {f"grad {n}" for n, d in op.axes.inputs.items() if "t" not in d and "s" not in d}
    for i in set(range(len(lengths))) - {worst}:
        wanted = piece(sample, i, clean)
        for name, tensor in piece(sample, i, found).items():
            assert name in shared or torch.equal(tensor, wanted[name]), (i, name)


@pytest.mark.parametrize("op", KERNELS)
def test_refusals_say_what_is_needed(op: str) -> None:
    arguments, first = SAMPLES_OF[op].arguments(), OPS[op].tensor_names[0]
    refuses = compiled(op).refuses
    assert refuses(*arguments) is None
    expected = f"{first} is float64; needs float32, bfloat16 or float16"
    assert refuses(arguments[0].double(), *arguments[1:]) == expected
    meta = [a.to("meta") if isinstance(a, Tensor) else a for a in arguments]
    assert refuses(*meta) == f"{first} is on meta; needs cpu"


@pytest.mark.parametrize("op", KERNELS)
def test_accepts_fake_tensors_of_symbolic_sizes(op: str) -> None:
    arguments = SAMPLES_OF[op].arguments()
    tensors = [a for a in arguments if isinstance(a, Tensor)]

    def call(*fakes: Tensor) -> Tensor:
        assert isinstance(fakes[0].shape[1], torch.SymInt)
        given = iter(fakes)
        filled = [next(given) if isinstance(a, Tensor) else a for a in arguments]
        assert compiled(op).refuses(*filled) is None
        return compiled(op).overload(*filled)[0]

    traced = make_fx(call, tracing_mode="symbolic")(*tensors)
    assert torch.equal(traced(*tensors), compiled(op).overload(*arguments)[0])


@pytest.mark.parametrize("op", KERNELS)
def test_wrong_offsets_do_not_reach_the_kernel(op: str) -> None:
    sample = next(s for s in PACKED if s.op == op)
    given = OPS[op].bind(*sample.arguments())
    given["cu_seqlens"] = given["cu_seqlens"] * 1000
    with pytest.raises(ValueError, match=f"{op}: expected cu_seqlens to end at the token count"):
        compiled(op).overload(*given.values())


@pytest.mark.parametrize("isa_name", build.supported_isas())
def test_forced_instruction_set_is_the_one_loaded(isa_name: str) -> None:
    with build.force_isa(isa_name):
        assert f"-{isa_name}-" in build.load("selective_scan")._name
