"""The vector maths of vec.h against torch in float64, on every instruction set."""

import ctypes
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from effpass.lowering.cpu import build
from tests.tolerances import ULPS

HERE = Path(__file__).parent
INF, NAN = float("inf"), float("nan")
SPECIAL = torch.tensor([0.0, -0.0, INF, -INF, NAN, 1e30, -1e30, 88.7, 89.0, 127.9, 128.1, -150.0])
FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "exp": torch.exp,
    "exp2": torch.exp2,
    "sigmoid": torch.sigmoid,
    "silu": functional.silu,
    "softplus": functional.softplus,
}
SMALLEST = 2.0**-124  # below it, results may be flushed to zero


@pytest.fixture
def probe(isa: str, fresh_build: Path) -> ctypes.CDLL:
    shutil.copy(HERE / "vec_probe.cpp", build.SOURCES)
    shutil.copy(Path(build.__file__).parent / "vec.h", build.SOURCES)
    return build.load("vec_probe")


def _run(probe: ctypes.CDLL, name: str, given: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty(given.shape, dtype=dtype)
    call = getattr(probe, name)
    call(*(ctypes.c_void_p(v.data_ptr()) for v in (given, out)), ctypes.c_int64(given.numel()))
    return out


def _floats() -> Tensor:
    wide = torch.linspace(-130, 130, 200_003)
    return torch.cat([wide, torch.randn(50_001), torch.randn(50_001) * 1e-4, SPECIAL])


@pytest.mark.parametrize("name", FUNCTIONS)
def test_function_is_accurate(probe: ctypes.CDLL, name: str) -> None:
    given = _floats()
    found = _run(probe, f"{name}_all", given, torch.float32).double()
    expected = FUNCTIONS[name](given.double())
    overflow = expected.float().double()
    assert torch.equal(found.isnan(), overflow.isnan())
    assert torch.equal(found.isinf(), overflow.isinf())
    normal = overflow.isfinite() & (expected.abs() >= SMALLEST) & (expected / given > SMALLEST)
    error = ((found - expected).abs() / expected.abs())[normal].max().item()
    assert error <= ULPS[name][0] * torch.finfo(torch.float32).eps
    tiny = expected.abs() < SMALLEST
    assert found[tiny].abs().max().item() <= SMALLEST


def test_exponentials_are_exact_where_they_must(probe: ctypes.CDLL) -> None:
    assert _run(probe, "exp_all", torch.zeros(5), torch.float32).tolist() == [1.0] * 5
    assert _run(probe, "exp2_all", torch.zeros(5), torch.float32).tolist() == [1.0] * 5
    gone = _run(probe, "exp_all", torch.tensor([-INF, -1e30, -105.0]), torch.float32)
    assert gone.tolist() == [0.0] * 3


def _same(found: Tensor, expected: Tensor) -> bool:
    return bool(((found == expected) | (found.isnan() & expected.isnan())).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_storage_rounds_as_torch_does(probe: ctypes.CDLL, dtype: torch.dtype) -> None:
    name = str(dtype).removeprefix("torch.")
    every = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    assert _same(_run(probe, f"widen_{name}", every, torch.float32), every.float())
    finite = every[every.isfinite()].float().sort().values
    halfway = (finite[1:] + finite[:-1]) / 2
    edges = torch.tensor([65519.0, 65520.0, 65536.0, 3.4e38])
    given = torch.cat([_floats(), finite, halfway, torch.randn(9999) * 1e-6, edges, -edges])
    assert _same(_run(probe, f"narrow_{name}", given, dtype), given.to(dtype))


def test_partial_vectors_touch_nothing_else(probe: ctypes.CDLL) -> None:
    for count in range(40):
        given, out = torch.rand(count + 1), torch.full((count + 20,), 7.0)
        pointers = (ctypes.c_void_p(v.data_ptr()) for v in (given, out))
        probe.softplus_all(*pointers, ctypes.c_int64(count))
        assert (out[count:] == 7).all() and (out[:count] < 2).all()


def test_sum_of_lanes(probe: ctypes.CDLL) -> None:
    lanes = probe.lanes()
    given = torch.arange(4 * lanes, dtype=torch.float32)
    out = torch.empty(4)
    pointers = (ctypes.c_void_p(v.data_ptr()) for v in (given, out))
    probe.sums(*pointers, ctypes.c_int64(given.numel()))
    assert torch.equal(out, given.view(4, lanes).sum(1))
