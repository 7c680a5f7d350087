"""Draws time against padding from ``docs/results/packing.json``; nothing is measured.

    python examples/benchmarks/packing_plot.py

One panel for forward passes, one for training where that was measured: what a batch costs without
its padding, over what it costs with it. The dashed line is the share of real tokens. The picture
goes beside the JSON, as ``packing.svg``. Needs the extra ``examples``.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
from setting import ROOT

matplotlib.use("Agg")

from matplotlib import pyplot

NAMES = {"minilm": "MiniLM", "mamba1": "Mamba-1", "mamba2": "Mamba-2"}
PANELS = {"share": "forward", "training": "training step"}
LIMIT = 1.15  # of the padding's due: the goal


def points(rows: Sequence[dict[str, Any]]) -> tuple[list[float], list[float]]:
    """Padding in percent, and packed time over padded time, from the least padding on."""
    found = sorted((100 * row["padding"], row["packed_over_padded"]) for row in rows)
    return [x for x, _ in found], [y for _, y in found]


def draw(result: dict[str, Any], path: Path) -> None:
    """Draws all measured series of ``result`` to ``path``; ValueError where there is none."""
    matplotlib.rcParams["svg.hashsalt"] = "packing"  # the same numbers give the same file
    panels = {part: title for part, title in PANELS.items() if result.get(part)}
    if not panels:
        raise ValueError(f"expected results of {' or '.join(PANELS)}, found {', '.join(result)}")
    size = (4 * len(panels), 3.4)
    figure, every = pyplot.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False)
    for axes, (part, title) in zip(every[0], panels.items(), strict=True):
        due = [0, 100], [1.0, 0.0]
        axes.plot(*due, color="gray", linestyle="--", linewidth=1, label="real tokens")
        goal = [0, 100], [LIMIT, 0.0]
        axes.plot(*goal, color="gray", linestyle=":", linewidth=1, label=f"goal: {LIMIT} x that")
        for name, rows in result[part].items():
            axes.plot(*points(rows), marker="o", markersize=3.5, label=NAMES.get(name, name))
        axes.set(title=title, xlabel="padding, %", xlim=(0, 90), ylim=(0, 1.25))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    every[0][0].set_ylabel("packed time / padded time")
    every[0][0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot.close(figure)


def main() -> None:
    """Draws the picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    results = ROOT / "docs" / "results"
    parser.add_argument("--results", type=Path, default=results / "packing.json")
    parser.add_argument("--out", type=Path, help="by default beside the results, as .svg")
    args = parser.parse_args()
    out = args.out or args.results.with_suffix(".svg")
    draw(json.loads(args.results.read_text()), out)
    print(out)


if __name__ == "__main__":
    main()
