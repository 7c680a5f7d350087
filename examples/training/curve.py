"""The loss of one or several runs as a picture: over steps, and over time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot


def draw(runs: Mapping[str, Mapping[str, Sequence[float]]], path: Path) -> None:
    """Draws ``losses`` (bits a byte) of each run over its steps and ``seconds``, to ``path``."""
    figure, (by_step, by_time) = pyplot.subplots(1, 2, figsize=(9, 3.5), sharey=True)
    for name, run in runs.items():
        smooth = smoothed(run["losses"])
        steps = range(1, len(smooth) + 1)
        by_step.plot(steps, smooth, label=name, linewidth=1.2)
        by_time.plot(list(accumulate(run["seconds"])), smooth, label=name, linewidth=1.2)
    by_step.set(xlabel="step", ylabel="loss, bits a byte")
    by_time.set(xlabel="seconds, compiling included")
    by_step.legend(frameon=False)
    _finish(figure, path)


def smoothed(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """A running mean that forgets: each new value counts ``1 - weight``."""
    found: list[float] = []
    for value in values:
        found.append(weight * found[-1] + (1 - weight) * value if found else value)
    return found


def _finish(figure: Any, path: Path) -> None:
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
