"""The benchmarks of packing: their batches are what they say, and the picture is drawn."""

import json
from pathlib import Path

import pytest
import torch

from tests.scripts import EXAMPLES, load
from tests.test_examples import run

RESULTS = EXAMPLES.parent / "docs" / "results"


@pytest.mark.parametrize(("rows", "tokens"), [(32, 128), (8, 256)])
def test_batches_hold_the_padding_they_say(rows: int, tokens: int) -> None:
    packing = load("benchmarks/packing.py")
    for share in packing.SHARES:
        mask = packing.padded(rows, tokens, share, 100)["attention_mask"]
        assert abs(1 - mask.float().mean().item() - share) < 0.005
        assert mask.shape == (rows, tokens) and int(mask.sum(1).max()) == tokens


def test_rows_hold_the_papers_lengths() -> None:
    training = load("benchmarks/packed_training.py")
    rows = training.data(training.arguments([]))
    lengths = [n for row in rows for n in row]
    assert len(rows) == 4 and all(sum(row) <= 4096 for row in rows)
    assert sum(lengths) > 0.97 * 4 * 4096
    assert min(lengths) >= 57 and max(lengths) <= 2048 and 630 < sum(lengths) / len(lengths) < 660


def test_layouts_hold_the_same_targets() -> None:
    worker = load("benchmarks/packed_training_worker.py")
    parts = worker.sequences([5, 2, 9], "cpu")
    kept = []
    for layout in worker.LAYOUTS.values():
        labels = [labels[labels != worker.IGNORED] for _, labels in layout(parts)]
        kept.append(torch.cat(labels))
    assert len(kept) == 3 and len(kept[0]) == 16 - 3
    assert all(torch.equal(each, kept[0]) for each in kept)


def test_plot(tmp_path: Path) -> None:
    plot = load("benchmarks/packing_plot.py")
    result = json.loads((RESULTS / "packing.json").read_text())
    plot.draw(result | {"training": result["share"]}, tmp_path / "a.svg")
    drawn = (tmp_path / "a.svg").read_text()
    assert "<svg" in drawn and "training step" in drawn and "forward" in drawn  # as comments
    assert plot.points([{"padding": 0.5, "packed_over_padded": 0.6}]) == ([50.0], [0.6])
    with pytest.raises(ValueError, match="expected results of share or training, found setting"):
        plot.draw({"setting": {}}, tmp_path / "b.svg")


@pytest.mark.slow
def test_packed_training(tmp_path: Path) -> None:
    sizes = ["--hidden=64", "--layers=1", "--states=8", "--max-tokens=128", "--rounds=1"]
    more = ["--models", "mamba2", "--arms", "effpass", "--threads=1"]
    out = tmp_path / "out.json"
    printed = run("benchmarks/packed_training.py", *sizes, *more, f"--out={out}", folder=tmp_path)
    assert "packed is faster" in printed
    ways = json.loads(out.read_text())["models"]["mamba2"]["ways"]
    assert [way["layout"] for way in ways] == ["single", "padded", "packed"]
    for way in ways:
        assert "error" not in way and way["us_per_token"] > 0
        assert max(way["difference"].values()) < 1e-4
