"""Draws quality against the operations and the time that are saved."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

PANELS = (
    ("recall", "accuracy", "recall"),
    ("bytes", "bits_per_byte", "bits a byte, last 32 bytes"),
    ("minilm", "cosine", "MiniLM: cosine to full"),
)


def plot(result: dict[str, Any], path: Path) -> None:
    """Writes an SVG: one row a measure of quality, against operations and against prefill time.

    Time is that of the same method and ratio in the part ``speed`` (the mean of its models).
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    times = defaultdict(list)
    for row in result.get("speed", ()):
        times[row["method"], row["ratio"]].append(row["of_dense"])
    panels = list(_panels(result))
    if not panels:
        return
    figure, axes = pyplot.subplots(len(panels), 2, figsize=(10, 3 * len(panels)), squeeze=False)
    for (rows, measure, title), (left, right) in zip(panels, axes, strict=True):
        for method, points in _lines(rows, measure).items():
            left.plot([1 - p[1] for p in points], [p[2] for p in points], "o-", label=method)
            timed = [(fmean(times[method, p[0]]), p[2]) for p in points if times[method, p[0]]]
            if timed:
                right.plot(*zip(*timed, strict=True), "o-", label=method)
        left.set(xlabel="operations of the stack, of dense", ylabel=title)
        right.set(xlabel="prefill time, of dense", ylabel=title)
    axes[0][0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    pyplot.close(figure)


def _panels(result: dict[str, Any]) -> Iterator[tuple[list[dict[str, Any]], str, str]]:
    """The rows, the measure and the title of each panel: one a kind of model."""
    for part, measure, title in PANELS:
        kinds = defaultdict(list)
        for row in result.get(part, ()):
            kinds[row.get("kind", "")].append(row)
        for kind, rows in kinds.items():
            yield rows, measure, f"{title}: {kind}" if kind else title


def _lines(rows: list[dict[str, Any]], measure: str) -> dict[str, list[tuple[float, ...]]]:
    """Each method's (ratio, saved, quality), means over models, beginning with the dense one."""
    groups = defaultdict(list)
    for row in rows:
        groups[row["method"], row["ratio"]].append((row["saved"], row[measure]))
    means = {key: tuple(fmean(v) for v in zip(*each, strict=True)) for key, each in groups.items()}
    dense = means.pop(("dense", 0.0))
    lines: dict[str, list[tuple[float, ...]]] = defaultdict(lambda: [(0.0, *dense)])
    for (method, ratio), point in means.items():
        lines[method].append((ratio, *point))
    return lines
