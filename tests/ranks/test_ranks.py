"""Two processes (gloo, CPU) train as one does, whatever pieces DDP and FSDP2 cut the model into."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.ranks import work
from tests.tolerances import close

QUICK = [f"stack:packed:{engine}" for engine in work.ENGINES]
QUICK += ["mamba2:packed:fsdp", "mamba2:padded:ddp_around"]
PAIRS = [("mamba1", "padded"), ("mamba2", "padded"), ("bert", "padded")]
PAIRS += [("mamba1", "packed"), ("mamba2", "packed")]
REFUSED = [*(f"llama:packed:{engine}" for engine in work.ENGINES), "mamba1:packed:fsdp"]
SLOW = [
    f"{name}:{layout}:{engine}"
    for name, layout in PAIRS
    for engine in work.ENGINES
    if f"{name}:{layout}:{engine}" not in (*QUICK, *REFUSED)
]


def launch(folder: Path, compiler: str, cases: list[str]) -> dict[str, dict[str, Any]]:
    """What rank 0 found in each case."""
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", str(Path(work.__file__)), str(folder), compiler, *cases]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    return {case: torch.load(folder / f"{case.replace(':', '-')}.pt") for case in cases}


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return launch(tmp_path_factory.mktemp("quick"), "eager", QUICK)


@pytest.fixture(scope="module")
def slow(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return launch(tmp_path_factory.mktemp("slow"), "eager", SLOW + REFUSED)


@functools.cache
def expected(name: str) -> dict[str, Any]:
    return work.alone(name)


def check(case: str, found: dict[str, Any]) -> None:
    name, layout, _ = case.split(":")
    assert "error" not in found, found["error"]
    wanted = expected(name)
    losses = (torch.tensor(each["losses"]) for each in (found, wanted))
    close(*losses, "model_fp32")
    for kind in ("gradients", "parameters"):
        assert found[kind].keys() == wanted[kind].keys()
        for key, value in wanted[kind].items():
            close(found[kind][key], value, "model_gradient_fp32")
    if layout == "packed":
        for usual, poisoned in found["kept_apart"]:
            assert torch.equal(usual, poisoned)  # NaN is not equal to itself


@pytest.mark.parametrize("case", QUICK)
def test_two_ranks_train_as_one(case: str, quick: dict[str, dict[str, Any]]) -> None:
    check(case, quick[case])


@pytest.mark.slow
@pytest.mark.parametrize("case", SLOW)
def test_two_ranks_train_as_one_more(case: str, slow: dict[str, dict[str, Any]]) -> None:
    check(case, slow[case])


@pytest.mark.slow
@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_kept_apart_is_refused(case: str, slow: dict[str, dict[str, Any]]) -> None:
    """Attention in a later piece, and layers that are not handed the boundaries."""
    assert "packed_rows: " in slow[case]["error"]


@pytest.mark.parametrize("engine", work.ENGINES)
def test_the_model_is_cut_into_pieces(engine: str, quick: dict[str, dict[str, Any]]) -> None:
    """The tests above would say little of a model that stays in one graph."""
    ops = quick[f"stack:packed:{engine}"]["ops"]
    mixing = [each for each in ops if each]
    assert len(mixing) >= 2
    assert {"causal_conv1d", "selective_scan"} <= {op for each in mixing for op in each}


def test_padded_batches_run_packed_in_the_pieces_that_can(quick: dict[str, Any]) -> None:
    forms = quick["mamba2:padded:ddp_around"]["forms"]
    assert sum(each.get("packed", 0) for each in forms) >= 2


def test_a_wrong_boundary_would_be_seen() -> None:
    """The comparison can fail: without boundaries the losses are others."""
    model = work.built("stack")
    row = next(row for row in work.data(0) if len(row.indices) > 1)
    with torch.no_grad():
        kept = model(input_ids=row.input_ids, cu_seq_lens_q=row.cu_seqlens)
        leaked = model(input_ids=row.input_ids)
    with pytest.raises(AssertionError, match="off by"):
        close(leaked, kept, "model_gradient_fp32")
