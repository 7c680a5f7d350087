"""The selective scan never holds its states for all tokens, forward or backward."""

import subprocess
import sys

import pytest

# 16384 tokens, 128 channels, 64 states: (b, t, d, n) would be 512 MiB, a (b, t, d) tensor is 8 MiB.
SCAN = """
import resource, sys, torch
from effpass.ops import selective_scan
import effpass.lowering
x, dt = torch.randn(1, 16384, 128), torch.rand(1, 16384, 128)
A, B, C = -torch.rand(128, 64), torch.randn(1, 16384, 64), torch.randn(1, 16384, 64)
x.requires_grad_(sys.argv[1] == "backward")
selective_scan(x[:, :64], dt[:, :64], A, B[:, :64], C[:, :64])[0].sum()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
y = selective_scan(x, dt, A, B, C)[0]
if y.requires_grad:
    y.sum().backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss in KiB")
@pytest.mark.parametrize(("which", "mebibytes"), [("forward", 40), ("backward", 160)])
def test_peak_stays_far_below_all_states(which: str, mebibytes: int) -> None:
    command = [sys.executable, "-c", SCAN, which]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    assert int(done.stdout) / 1024 < mebibytes
