"""What a kernel forgot to write is NaN here, and its scratch is full of huge numbers."""

import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from effpass.lowering.cpu import build
from effpass.lowering.gpu import launch
from tests.lowering.interpreter import correct

M_PERTURB = -6  # mallopt's name for: fill fresh memory with the complement of this byte


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)  # with it, torch.empty is filled with NaN
    perturb = ctypes.CDLL(None).mallopt if sys.platform == "linux" else lambda *_: None
    perturb(M_PERTURB, 0x80)  # 0x7f7f7f7f is 3e38
    yield
    perturb(M_PERTURB, 0)
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def triton_runs() -> Iterator[None]:
    """Triton's kernels run: on a GPU, or in Triton's interpreter without one."""
    if torch.cuda.is_available():
        yield
        return
    correct()
    with launch.interpreted(), np.errstate(all="ignore"):
        yield


@pytest.fixture(params=build.supported_isas())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each instruction set in turn; kernels inside are compiled for it."""
    with build.force_isa(request.param):
        yield request.param


@pytest.fixture
def fresh_build(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """Nothing found, nothing loaded, an empty cache (returned) and an empty folder of sources."""
    sources = tmp_path / "sources"
    sources.mkdir()
    monkeypatch.setattr(build, "SOURCES", sources)
    monkeypatch.setenv("EFFPASS_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    _forget()
    yield tmp_path / "cache"
    _forget()


def _forget() -> None:
    for cached in (build.find_compiler, build._load, build._unavailable, build._building):
        cached.cache_clear()
