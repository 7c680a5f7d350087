"""mamba_ssm, causal_conv1d and mambapy at the front door.

The first two need CUDA to build, so stand-ins with their signatures and reference functions are
imported in their place, as they would be on a machine without a GPU.
"""

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from effpass.capture import cases, known
from tests.capture.traced import Traced
from tests.tolerances import close

PACKAGES = ("mamba_ssm", "causal_conv1d")
INTERFACE = "mamba_ssm.ops.selective_scan_interface"
UPDATE = "mamba_ssm.ops.triton.selective_state_update"
CONV = "causal_conv1d.causal_conv1d_interface"
COMBINED = "mamba_ssm.ops.triton.ssd_combined"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Imports a stand-in after effpass, and forgets it afterwards."""
    known.install()
    monkeypatch.syspath_prepend(str(Path(__file__).parent / "standins"))
    _forget()
    yield importlib.import_module
    _forget()


def _forget() -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] in PACKAGES]:
        del sys.modules[name]


def make(*shape: int) -> Tensor:
    return torch.randn(*shape)


def copied(arguments: dict[str, Any]) -> dict[str, Any]:
    return {
        name: v.clone() if isinstance(v, Tensor) and 0 not in v.stride() else v
        for name, v in arguments.items()
    }


FUNCTIONS = [
    (INTERFACE, "selective_scan_fn", "selective_scan_ref", cases.package_scan),
    (INTERFACE, "selective_scan_ref", "selective_scan_ref", cases.package_scan),
    (UPDATE, "selective_state_update", "selective_state_update_ref", cases.scan_step),
    (UPDATE, "selective_state_update_ref", "selective_state_update_ref", cases.scan_step),
    (CONV, "causal_conv1d_fn", "causal_conv1d_ref", cases.package_conv),
    (CONV, "causal_conv1d_ref", "causal_conv1d_ref", cases.package_conv),
    (CONV, "causal_conv1d_update", "causal_conv1d_update_ref", cases.package_conv_step),
    (CONV, "causal_conv1d_update_ref", "causal_conv1d_update_ref", cases.package_conv_step),
]


@pytest.mark.parametrize(("module", "name", "reference", "listed"), FUNCTIONS)
def test_functions_become_one_op(
    load: Callable[[str], ModuleType], module: str, name: str, reference: str, listed: Any
) -> None:
    """The last listed case (every option) compiles to one op with the reference's results."""
    library = load(module)
    arguments = listed(make, x="x") if listed is cases.scan_step else listed(make)
    theirs, ours = copied(arguments[-1]), copied(arguments[-1])
    traced = Traced(lambda values: getattr(library, name)(**values))
    expected, actual = getattr(library, reference)(**theirs), traced(ours)

    assert sum(traced.ops().values()) == 1
    _equal(expected, actual)
    for value, other in zip(theirs.values(), ours.values(), strict=True):
        if isinstance(value, Tensor):
            close(other, value, "model_fp32")


def _equal(expected: Any, actual: Any) -> None:
    if isinstance(expected, Tensor):
        expected, actual = (expected,), (actual,)
    for e, a in zip(expected, actual, strict=True):
        close(a, e, "model_fp32")


@pytest.mark.parametrize("case", [0, -2, -1])
def test_chunk_scan_becomes_one_op(load: Callable[[str], ModuleType], case: int) -> None:
    library = load(COMBINED)
    arguments = cases.package_chunk_scan(make)[case]
    traced = Traced(lambda values: library.mamba_chunk_scan_combined(**values))
    _equal(library.ssd_chunk_scan_combined_ref(**arguments), traced(arguments))
    assert traced.ops() == {"ssd_scan": 1}


def test_chunk_scan_takes_and_returns_states(load: Callable[[str], ModuleType]) -> None:
    """Two halves, the second from the first's state, are the whole."""
    scan = load(COMBINED).mamba_chunk_scan_combined
    x, dt, A = torch.randn(1, 8, 4, 3), torch.rand(1, 8, 4), -torch.rand(4)
    B, C = torch.randn(1, 8, 2, 5), torch.randn(1, 8, 2, 5)

    def halves(x: Tensor, dt: Tensor, B: Tensor, C: Tensor) -> Tensor:
        first, state = scan(x[:, :4], dt[:, :4], A, B[:, :4], C[:, :4], 4, return_final_states=True)
        second = scan(x[:, 4:], dt[:, 4:], A, B[:, 4:], C[:, 4:], 4, initial_states=state)
        return torch.cat([first, second], 1)

    traced = Traced(halves)
    whole = Traced(lambda *values: scan(values[0], values[1], A, values[2], values[3], 4))
    close(traced(x, dt, B, C), whole(x, dt, B, C), "model_fp32")
    assert traced.ops() == {"ssd_scan": 2}


def test_heads_become_one_op_when_provably_tied(load: Callable[[str], ModuleType]) -> None:
    library = load(UPDATE)
    traced = Traced(lambda values: library.selective_state_update_ref(**values))
    for loose, arguments in enumerate(cases.chunk_scan_step(make, x="x")[:2]):
        theirs, ours = copied(arguments), copied(arguments)
        expected = library.selective_state_update_ref(**theirs)
        _equal(expected, traced(ours))
        close(ours["state"], theirs["state"], "model_fp32")
        assert traced.ops(loose) == ({} if loose else {"ssd_scan": 1})


def test_packed_sequences_go_to_the_library(load: Callable[[str], ModuleType]) -> None:
    """The kernel keeps them apart; here it is absent, and says so."""
    library = load(CONV)
    arguments = {"x": make(1, 3, 5), "weight": make(3, 4)}
    packed = torch.zeros(1, 5, dtype=torch.int32)
    with pytest.raises(Exception, match="this kernel needs a GPU"):
        torch.compile(library.causal_conv1d_fn, backend="eager")(**arguments, seq_idx=packed)


def test_a_kernel_is_kept_on_a_gpu(
    load: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    load(INTERFACE)
    (reason,) = {d.reason for d in known.declined() if d.function == "selective_scan_fn"}
    assert "GPU kernel" in reason


@pytest.mark.parametrize("parallel", [True, False])
def test_mambapy(parallel: bool) -> None:
    mamba = pytest.importorskip("mambapy.mamba")
    config = mamba.MambaConfig(d_model=8, n_layers=2, d_state=4, pscan=parallel)
    model = mamba.Mamba(config)
    known.install()
    x = torch.randn(2, 11, 8)
    traced = Traced(model)
    expected, actual = model(x), traced(x)
    assert traced.ops() == {"selective_scan": 2}
    close(actual, expected, "model_fp32")
    weights = list(model.parameters())
    pairs = (torch.autograd.grad(y.square().mean(), weights) for y in (actual, expected))
    for ours, theirs in zip(*pairs, strict=True):
        close(ours, theirs, "model_gradient_fp32")
