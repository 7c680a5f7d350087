"""What no interpreter shows: that kernels compile for a GPU, and what a compiler sees of them."""

import json
import os
import subprocess
import sys

import pytest

from effpass.ops import OPS
from tests.lowering.realistic import CALLS

pytest.importorskip("triton", reason="Triton is not installed")


def _lines(module: str, *arguments: str) -> list[dict[str, object]]:
    """Runs a module where Triton compiles, and reads the JSON lines it prints."""
    command = [sys.executable, "-m", f"tests.lowering.{module}", *arguments]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("op", CALLS)
def test_kernels_compile_and_fit(op: str, dtype: str) -> None:
    found = _lines("compile_for_gpu", dtype, op)
    assert len({str(each["kernel"]) for each in found}) >= (3 if op in OPS else 1)
    if dtype == "bf16" and op in ("ssd_scan", "varlen_attention", "token_matching"):
        assert any(each["products"] for each in found), "no tensor core is used"
    walks = ("linear_recurrence", "carry", "selective_scan.states", "selective_scan.walk")
    for each in found:
        if str(each["kernel"]).startswith(walks) and each.get("BD", 32) >= 32:  # type: ignore[operator]
            assert each["shuffles"] == 0, f"threads exchange numbers: {each}"


@pytest.mark.slow
def test_a_compiler_sees_every_launch_and_only_outputs_change() -> None:
    found = _lines("trace_for_gpu")
    assert {each["op"] for each in found} == set(CALLS)
    outputs = {
        "causal_conv1d.forward": ["y"],
        "causal_conv1d.backward": ["dx", "dweight", "dbias"],
        "linear_recurrence.carry": ["ends", "starts"],
        "selective_scan.backward": [
            *("entering", "dx", "ddt", "dz", "dA", "dB", "dC", "dD", "dbias"),
        ],
        "ssd_scan.backward_bc": ["dB", "dC"],
        "varlen_attention.backward_q": ["dq"],
    }
    for name, wanted in outputs.items():
        op, _, kernel = name.partition(".")
        seen = [e["writes"] for e in found if e["op"] == op and e["kernel"] == kernel]
        assert seen and all(writes == wanted for writes in seen), name
    read = {"x", "dt", "A", "B", "C", "z", "q", "k", "v", "table", "offsets", "first", "init"}
    assert not read & {name for each in found for name in each["writes"]}  # type: ignore[attr-defined]
