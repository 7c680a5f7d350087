"""What chunks could spoil: order in time, digits of long sums, states that are no numbers."""

from typing import Any

import pytest
import torch
from torch import Tensor

from effpass.lowering.cpu import ssd_scan as cpu
from effpass.ops import ssd_scan
from tests.ops.samples import SAMPLES, doubled
from tests.tolerances import close


def sample(name: str) -> dict[str, Any]:
    """The named sample's arguments by name, its tensors free to be changed."""
    found = next(s for s in SAMPLES if s.op == "ssd_scan" and s.name == name)
    given = ssd_scan.bind(*found.arguments())
    return {n: a.clone() if isinstance(a, Tensor) else a for n, a in given.items()}


def agrees(given: dict[str, Any]) -> None:
    for found, wanted in zip(
        cpu.forward(*given.values()), ssd_scan.reference(*doubled([*given.values()])), strict=True
    ):
        close(found, wanted.float(), "kernel_fp32")


@pytest.mark.parametrize("name", ["x", "dt", "B", "C", "z"])
@pytest.mark.parametrize("token", [1, 7, 63, 64, 100])
def test_the_future_stays_out(name: str, token: int, isa: str) -> None:
    given = sample("two chunks and one")
    before, _ = cpu.forward(*given.values())
    given[name][:, token] = float("nan")
    after, _ = cpu.forward(*given.values())
    assert torch.equal(after[:, :token], before[:, :token])
    assert not after[:, token].isfinite().any()


def test_small_decays_after_large_ones_keep_their_digits(isa: str) -> None:
    given = sample("plain") | {"dt_softplus": False, "A": torch.full((4,), -1.0)}
    given["dt"] = torch.rand_like(given["dt"]) * 1e-3
    given["dt"][:, :20] = 100.0  # float32 sums near 2000 are apart by 1e-4
    y, _ = cpu.forward(*given.values())
    wanted, _ = ssd_scan.reference(*doubled([*given.values()]))
    close(y[:, 20:], wanted[:, 20:].float(), "kernel_fp32")


def test_states_may_grow(isa: str) -> None:
    agrees(sample("everything") | {"A": torch.linspace(0.01, 0.3, 6)})


def test_a_state_that_is_no_number_is_not_forgotten(isa: str) -> None:
    given = sample("vanishing")
    given["initial_state"][0, 0, 3, 5] = float("nan")
    agrees(given)


def test_slices_are_read_where_they_lie() -> None:
    found = next(s for s in SAMPLES if s.op == "ssd_scan" and s.name == "sliced")
    given = ssd_scan.bind(*found.arguments())
    call = cpu._Call(*given.values())
    for name, held in zip(("x", "dt", "B", "C", "z"), call.held, strict=True):
        assert held is not None and held.data_ptr() == given[name].data_ptr(), name


def test_no_heads_are_refused() -> None:
    given = sample("plain")
    none = {"x": given["x"][:, :, :0], "dt": given["dt"][..., :0], "A": given["A"][:0]}
    assert cpu._refuses(*(given | none).values()) == "x has no heads; needs at least 1"
