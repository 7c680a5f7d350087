"""Without a compiler a model still runs, on the references, and the report says why."""

from pathlib import Path

import pytest
import torch

import effpass
from tests.tiny import Stack
from tests.tolerances import close


def test_no_compiler_falls_back_and_is_reported(
    fresh_build: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "/nowhere/c++")
    model, x = Stack(layers=1), torch.randn(2, 5, 8)
    compiled = torch.compile(model, backend="effpass", options={"compiler": "eager"})
    close(compiled(x), model(x), "model_fp32")
    for chosen in effpass.report(compiled).chosen:
        assert chosen.implementation == "inline"
        reason = dict(chosen.refused)["cpu"]
        assert "no working C++ compiler (/nowhere/c++: not found)" in reason


def test_float64_falls_back_and_is_reported() -> None:
    report = effpass.explain(Stack(layers=1).double(), torch.randn(1, 4, 8, dtype=torch.float64))
    assert {c.implementation for c in report.chosen} == {"inline"}
    assert "float64; needs float32" in dict(report.chosen[0].refused)["cpu"]
