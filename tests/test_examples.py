"""The examples run, with tiny sizes; no time they print is looked at."""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.scripts import EXAMPLES, load

TINY = ["--layers=1", "--hidden=64", "--tokens=24", "--sentences=8", "--passes=1"]


def run(script: str, *arguments: str, folder: Path) -> str:
    command = [sys.executable, str(EXAMPLES / script), *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def refused(script: str, *arguments: str) -> str:
    command = [sys.executable, str(EXAMPLES / script), *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode != 0
    return done.stderr


def test_demo(tmp_path: Path) -> None:
    printed = run("demo.py", *TINY, "--arms", "eager,effpass", folder=tmp_path)
    assert "MiniLM embeds 8 sentences" in printed
    assert "Mamba, 1 layer, reads 24 tokens" in printed
    assert "selective_scan" in printed and "ssd_scan" in printed


@pytest.mark.slow
def test_demo_three_ways(tmp_path: Path) -> None:
    printed = run("demo.py", *TINY, folder=tmp_path)
    assert "torch.compile" in printed and "effpass" in printed


def test_demo_refuses_what_it_cannot_compare() -> None:
    assert "eager and effpass among them" in refused("demo.py", "--arms", "eager")


def quick(folder: Path, *arguments: str) -> dict[str, Any]:
    out = folder / "out.json"
    small = ["--quick", "--rounds=1", "--seconds=0.01", "--cold-rounds=1", "--repeats=2"]
    page = run("benchmarks/compare.py", *small, f"--out={out}", *arguments, folder=folder)
    assert out.with_suffix(".md").read_text() in page
    return json.loads(out.read_text())


@pytest.mark.slow
def test_compare(tmp_path: Path) -> None:
    rows = "mamba1_decoding,scan_alone,scan_memory"
    result = quick(tmp_path, "--rows", rows, "--arms", "eager,effpass")
    (row,) = result["rows"]
    assert {arm["median_ms"] > 0 for arm in row["arms"].values()} == {True}
    assert row["parity"]["effpass"]["outputs"] < 1e-4
    assert set(result["checks"]) == {"scan_alone", "scan_memory"}
    assert {"torch", "transformers", "effpass"} <= set(result["setting"]["versions"])


@pytest.mark.slow
def test_compare_every_row(tmp_path: Path) -> None:
    result = quick(tmp_path, "--full")
    errors = {
        (row["name"], arm): entry["error"]
        for row in result["rows"]
        for arm, entry in row["arms"].items()
        if "error" in entry
    }
    assert not errors
    cases = load("benchmarks/cases.py").CASES.values()
    assert len(result["rows"]) == sum(not case.own for case in cases) + 1  # and the cold one
    assert not [name for name, check in result["checks"].items() if "error" in check]


def test_compare_names_the_rows() -> None:
    said = refused("benchmarks/compare.py", "--rows", "mamba3")
    assert "unknown rows mamba3" in said and "mamba1_forward" in said


def test_parity_is_relative_to_the_largest_value(tmp_path: Path) -> None:
    compare = load("benchmarks/compare.py")
    torch.save({"y": torch.tensor([4.0, -8.0]), "gradient of w": torch.ones(1)}, tmp_path / "a.pt")
    torch.save({"y": torch.tensor([4.0, -6.0]), "gradient of w": torch.ones(1)}, tmp_path / "b.pt")
    found = compare.parity(tmp_path / "a.pt", tmp_path / "b.pt")
    assert found == {"outputs": 0.25, "gradients": 0.0}
    torch.save({}, tmp_path / "b.pt")
    with pytest.raises(ValueError, match="expected results"):
        compare.parity(tmp_path / "a.pt", tmp_path / "b.pt")


def test_a_failed_arm_is_shown(tmp_path: Path) -> None:
    arms, tables = load("benchmarks/arms.py"), load("benchmarks/tables.py")
    arm = arms.Arm("eager", tmp_path / "eager", threads=1, quick=True)
    try:
        with pytest.raises(arms.ArmError, match="KeyError: 'nothing'"):
            arm.ask("prepare", case="nothing", save="", settle=0)
        with pytest.raises(arms.ArmError, match="never to import effpass"):
            arm.ask("scan_memory")
    finally:
        arm.close()
    speedup = {"speedup": None, "goal": 2.0, "met": None}
    row = {"title": "T", "unit": "median_ms", "arms": {"eager": {"error": "E"}}, "parity": {}}
    result = {"rows": [{**row, "vs_eager": speedup, "vs_inductor": speedup}]}
    assert tables.table(result).splitlines()[-1] == "| T | failed |  |  |  |  |  |"


def test_a_missed_goal_is_shown() -> None:
    tables = load("benchmarks/tables.py")
    arms = {"eager": {"median_ms": 300.0}, "effpass": {"median_ms": 20.0}}
    row = {
        "title": "T",
        "unit": "median_ms",
        "arms": arms,
        "parity": {"effpass": {"outputs": 2e-7, "gradients": 3e-6}},
        "vs_eager": {"speedup": 15.0, "goal": 20.0, "met": False},
        "vs_inductor": {"speedup": None, "goal": None, "met": None},
    }
    assert tables.table({"rows": [row]}).splitlines()[-1] == (
        "| T | 300 ms |  | 20.00 ms | **15.00x** (goal 20x: missed) |  | 2e-07, 3e-06 (gradients) |"
    )


def test_readme_table_needs_its_markers() -> None:
    readme_table = load("benchmarks/readme_table.py")
    result = json.loads(readme_table.RESULT.read_text())
    with pytest.raises(ValueError, match="found them missing"):
        readme_table.rewritten("# effpass\n", result)


def test_rows_are_in_the_tables_order() -> None:
    compare = load("benchmarks/compare.py")
    args = argparse.Namespace(rows="lengths,bert,mamba1_forward", full=False)
    assert compare.names(args) == ["mamba1_forward", "bert", "lengths"]


@pytest.mark.slow
def test_exported_models(tmp_path: Path) -> None:
    out = tmp_path / "onnx.json"
    run("benchmarks/onnx_models.py", "--quick", "--rounds=1", f"--out={out}", folder=tmp_path)
    result = json.loads(out.read_text())
    assert {row["op"] for row in result["operators"]} >= {"ssd_scan", "selective_scan"}
    assert result["mamba2"]["nodes"] < result["mamba2"]["stock_nodes"]
    minilm = result["minilm"]["forms"]["effpass"]
    assert result["mamba2"]["error"] < 1e-4 and minilm["error"] < 1e-4
