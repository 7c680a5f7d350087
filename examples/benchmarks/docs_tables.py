"""Writes the measured tables of the documentation from ``docs/results/*.json``, between markers.

    python examples/benchmarks/docs_tables.py

A page says ``<!-- measured: NAME -->`` where the table NAME begins, and ``<!-- end -->`` behind it.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from setting import ROOT
from tables import between

DOCS, END = ROOT / "docs", "<!-- end -->"
NAMES = {"minilm": "MiniLM", "mamba1": "Mamba-1", "mamba2": "Mamba-2"}
Rows = Iterable[tuple[str, ...]]


def padding(result: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Rows of ``packing.json``: milliseconds, and how far packed is from the padding's due."""
    arms = ("eager", "torch.compile", "effpass, padded", "packed", "unpadded")
    yield ("", "padding", *arms, "vs eager", "of the padding's due")
    for order, row in result["sentences"].items():
        yield (f"MiniLM, sentences, {order}", *_times(row))
    for part, suffix in (("share", ""), ("training", ", training")):
        for name, rows in result[part].items():
            for i, row in enumerate(rows):
                yield ("" if i else NAMES[name] + suffix, *_times(row))


def _times(row: dict[str, Any]) -> Iterator[str]:
    yield f"{row['padding']:.0%}".replace("%", " %")
    for arm in ("eager", "inductor", "effpass", "packed", "unpadded"):
        seconds = row["median_s"].get(arm)
        yield f"{seconds * 1000:.0f} ms" if seconds else ""
    faster = row["speedup_over_eager"]
    yield f"**{faster:.2f}x**" if faster else ""
    yield f"{row['packed_over_bound']:.2f}"


def training(result: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Rows of ``packed_training.json``: microseconds a real token."""
    yield ("", "compiled by", "layout", "padding", "a token", "packed effpass is faster")
    for model in result["models"].values():
        for i, way in enumerate(model["ways"]):
            ours = way["packed_is_faster"] == 1
            yield (
                "" if i else model["title"],
                *(way["arm"], way["layout"], f"{way['padding']:.0%}".replace("%", " %")),
                f"{way['us_per_token']:.0f} us",
                "" if ours else f"**{way['packed_is_faster']:.2f}x**",
            )


ONNX = {
    "mamba2": "Mamba-2, 4 layers, 512 tokens",
    "mamba1": "Mamba-1, 4 layers, 512 tokens",
    "mamba1_deep": "Mamba-1, 24 layers, 512 tokens",
    "mamba1_decoding": "Mamba-1, one token with states",
    "mamba2_decoding": "Mamba-2, one token with states",
    "llama": "Llama of 130M shape, 512 tokens",
    "mamba2_reduced": "Mamba-2, 8 layers, tokens reduced",
    "minilm": "MiniLM, 32 sentences",
}
BASES = ("eager", "whole")  # what others are compared with


def onnx(result: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Rows of ``onnx.json``: milliseconds, and how much faster than the first arm."""
    yield ("", "what runs", "time", "faster")
    for name, title in ONNX.items():
        seconds = {arm: each["median"] for arm, each in result[name]["seconds"].items()}
        base = next(arm for arm in BASES if arm in seconds)
        for i, arm in enumerate(sorted(seconds, key=lambda arm: (arm != base, arm))):
            faster = "" if arm == base else f"{seconds[base] / seconds[arm]:.2f}x"
            yield (title if not i else "", arm, f"{seconds[arm] * 1000:.1f} ms", faster)


def operators(result: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Rows of ``onnx.json``: one op at the shapes of a 130M model."""
    yield ("op", "the runtime's own operator", "`portable=True`", "torch, eager")
    for row in result["operators"]:
        each = (f"{row['seconds'][arm]['median'] * 1000:.1f} ms" for arm in OPERATORS)
        yield (f"`{row['op']}`", *each)


OPERATORS = ("contrib", "portable", "eager")


REDUCTION = {  # what is shown of each part of token_reduction.json
    "recall": ("accuracy",),
    "bytes": ("bits_per_byte", "last_word"),
    "minilm": ("kept", "cosine", "ranks"),
    "speed": ("median_s", "of_dense", "peak_mib"),
}


def reduction(part: str) -> Callable[[dict[str, Any]], Rows]:
    """Rows of one part of ``token_reduction.json``; several models as mean and deviation."""
    measures = REDUCTION[part]

    def rows(result: dict[str, Any]) -> Iterator[tuple[str, ...]]:
        yield ("", "method", "asked", "saved", *(MEASURES[name] for name in measures))
        groups: dict[tuple[str, str, float], list[dict[str, Any]]] = {}
        for row in result[part]:
            label = row.get("kind", row.get("model", ""))
            groups.setdefault((label, row["method"], row["ratio"]), []).append(row)
        last = ""
        for (label, method, ratio), found in groups.items():
            yield (
                *("" if label == last else NAMES.get(label, label), method, f"{ratio:.0%}"),
                *(_spread([row[name] for row in found]) for name in ("saved", *measures)),
            )
            last = label

    return rows


def margins(result: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """How far ``utrc`` is ahead of its rivals in the recall of each model, in points."""
    yield ("", "asked", "utrc ahead of", "points, mean", "standard error", "models ahead")
    groups: dict[tuple[str, float], dict[str, dict[str, float]]] = {}
    for row in result["recall"]:
        at = groups.setdefault((row["kind"], row["ratio"]), {})
        at.setdefault(row["method"], {})[row["model"]] = row["accuracy"]
    last = ""
    for (kind, ratio), methods in groups.items():
        ours = methods.get("utrc", {})
        for rival in RIVALS if ours else ():
            ahead = [100 * (ours[model] - other) for model, other in methods[rival].items()]
            error = statistics.stdev(ahead) / len(ahead) ** 0.5 if len(ahead) > 1 else 0.0
            mean = statistics.fmean(ahead)
            wins = f"{sum(each > 0 for each in ahead)} of {len(ahead)}"
            title = "" if kind == last else kind
            yield (title, f"{ratio:.0%}", rival, f"{mean:+.1f}", f"{error:.1f}", wins)
            last = kind


RIVALS = ("tome", "pumer", "evit", "random", "prefix", "utrc, published")
MEASURES = {
    "accuracy": "right answers",
    "bits_per_byte": "bits a byte",
    "last_word": "last word right",
    "median_s": "seconds",
    "of_dense": "of dense",
    "cosine": "cosine",
    "ranks": "rank correlation",
    "kept": "tokens kept",
    "peak_mib": "MiB above the weights",
}


def _spread(values: list[float]) -> str:
    spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{spread}"


TABLES: dict[str, tuple[str, str, Callable[[dict[str, Any]], Rows]]] = {
    "packing": ("packing.md", "packing.json", padding),
    "packed_training": ("packing.md", "packed_training.json", training),
    "onnx": ("onnx.md", "onnx.json", onnx),
    "operators": ("onnx.md", "onnx.json", operators),
    "margins": ("token_reduction.md", "token_reduction.json", margins),
    **{part: ("token_reduction.md", "token_reduction.json", reduction(part)) for part in REDUCTION},
}


def table(rows: Rows) -> str:
    """Markdown of rows, the first of which are the titles; numbers to the right."""
    titles, *body = rows
    sides = [":" if all(_wordy(row[i]) for row in body) else "" for i in range(len(titles))]
    lines = ["| " + " | ".join(titles) + " |"]
    lines.append("|" + "|".join("---" if side else "--:" for side in sides) + "|")
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in body)])


def _wordy(cell: str) -> bool:
    return not any(c.isdigit() for c in cell) or cell[:1].isalpha()


def made(name: str) -> tuple[str, str]:
    """A page as it is, and with the table ``name`` written anew."""
    page, source, rows = TABLES[name]
    text = (DOCS / page).read_text()
    result = json.loads((DOCS / "results" / source).read_text())
    return text, between(text, f"<!-- measured: {name} -->", END, table(rows(result)))


def main() -> None:
    """Rewrites every page in place."""
    for name, (page, _, _) in TABLES.items():
        (DOCS / page).write_text(made(name)[1])


if __name__ == "__main__":
    main()
