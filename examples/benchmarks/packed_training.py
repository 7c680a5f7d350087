"""Training on sequences of 57 to 2048 tokens: packed rows, one by one, and padded.

    python examples/benchmarks/packed_training.py                 # about ten minutes on two cores
    python examples/benchmarks/packed_training.py --hidden 768 --rows 8
    python examples/benchmarks/packed_training.py --device cuda

Lengths as in PackMamba's corpus (mean 646, ``effpass.rows.lengths``), packed into rows of 4096.
Every way makes the gradients of the same sequences: ``packed`` in one row, ``padded`` in one batch
padded to the longest of them, ``single`` in a batch of each. eager and stock Inductor cannot train
on packed rows: they would carry the state of one sequence into the next. Each arm is a process of
its own; the ways take turns, and medians go to ``docs/results/packed_training.json``.

Some ways run on less of it, and times are compared by the token: eager Mamba-1, a loop over tokens
whose gradient costs the square of their number, on one sequence of about the mean length; and
Inductor on one such sequence and on one padded batch, because it fails to compile the training of
Mamba for all lengths at once (torch 2.13), so that each shape costs a compilation.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from arms import Arm, ArmError
from compare import parity
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from setting import ROOT, setting

from effpass.rows.lengths import MAX_TOKENS, MEAN, sample_lengths
from effpass.rows.policies import fill

WAYS = (
    ("eager", "single"),
    ("eager", "padded"),
    ("inductor", "single"),
    ("inductor", "padded"),
    ("effpass", "single"),
    ("effpass", "padded"),
    ("effpass", "packed"),
)
MODELS = {"mamba1": "Mamba-1", "mamba2": "Mamba-2"}
OURS = ("effpass", "packed")
PAPER = {  # arXiv 2408.03865: packed over one-by-one
    "packed_over_single": [2.62, 3.06],
    "hardware": "NVIDIA A100",
    "models": ["2.8B", "1.4B"],
}
WORKER = Path(__file__).parent / "packed_training_worker.py"


def data(args: argparse.Namespace) -> list[list[int]]:
    """Lengths of the sequences of each row: as many of a seeded corpus as fill the rows."""
    scaled = [max(2, n * args.max_tokens // MAX_TOKENS) for n in sample_lengths(400, args.seed)]
    rows: list[list[int]] = []
    for count in range(1, len(scaled)):
        found = fill(scaled[:count], args.max_tokens, "best_fit", None)
        if len(found) > args.rows:
            break
        rows = found
    return [[scaled[i] for i in row] for row in rows]


def slow(model: str, arm: str) -> bool:
    """Whether a step takes minutes."""
    return (model, arm) == ("mamba1", "eager")


def partly(model: str, way: tuple[str, str]) -> bool:
    """Whether this way runs on a part of the sequences."""
    return slow(model, way[0]) or way[0] == "inductor"


class Driver:
    """Asks living workers: one a way, since all have a compiled model."""

    def __init__(self, args: argparse.Namespace, folder: Path, rows: list[list[int]]) -> None:
        self.args, self.folder, self.rows = args, folder, rows

    def model(self, name: str, said: Any) -> dict[str, Any]:
        """All ways of one model: prepared one after the other, then timed in turns."""
        workers = {way: self._worker(name, way) for way in self._ways(name)}
        try:
            found = {}
            for way, worker in workers.items():
                said(f"{MODELS[name]}: {' '.join(way)}, compiling")
                found[way] = self._prepare(name, way, worker)
            for turn in range(self.args.rounds):
                said(f"{MODELS[name]}: round {turn + 1}")
                order = list(found)[turn % len(found) :] + list(found)[: turn % len(found)]
                for way in order:
                    self._turn(name, way, workers[way], found[way], turn)
        finally:
            for worker in workers.values():
                worker.close()
        return self._result(name, found)

    def _ways(self, name: str) -> list[tuple[str, str]]:
        ways = [way for way in WAYS if way[0] in self.args.arms]
        return [way for way in ways if not (slow(name, way[0]) and way[1] == "padded")]

    def _worker(self, name: str, way: tuple[str, str]) -> Arm:
        sizes = ("hidden", "layers", "states", "device")
        more = [f"--{size}={getattr(self.args, size)}" for size in sizes]
        caches = self.folder / way[0]  # shared: first calls are not what is measured
        return Arm(way[0], caches, self.args.threads, False, script=WORKER, more=more)

    def _rows(self, name: str, way: tuple[str, str]) -> list[list[int]]:
        if not partly(name, way):
            return self.rows
        if way[1] == "padded":
            return self.rows[:1]
        mean = MEAN * self.args.max_tokens // MAX_TOKENS
        return [[min((n for row in self.rows for n in row), key=lambda n: abs(n - mean))]]

    def _prepare(self, name: str, way: tuple[str, str], worker: Arm) -> dict[str, Any]:
        rows = self._rows(name, way)
        save, warm = str(self._saved(name, way)), 0 if slow(name, way[0]) else 1
        entry: dict[str, Any] = {"tokens": sum(map(sum, rows)), "times_s": []}
        try:
            asked = {"model": name, "layout": way[1], "rows": rows, "save": save, "warm": warm}
            return entry | worker.ask("prepare", **asked)
        except ArmError as error:
            return entry | {"error": str(error)}

    def _turn(
        self, name: str, way: tuple[str, str], worker: Arm, entry: dict[str, Any], turn: int
    ) -> None:
        if "error" in entry or (slow(name, way[0]) and turn >= 2):
            return
        try:
            entry["times_s"] += worker.ask("time", repeats=1)["times_s"]
        except ArmError as error:
            entry["error"] = str(error)

    def _saved(self, name: str, way: tuple[str, str]) -> Path:
        return self.folder / f"{'-'.join((name, *way))}.pt"

    def _result(self, name: str, found: dict[tuple[str, str], dict[str, Any]]) -> dict[str, Any]:
        for entry in found.values():
            if entry["times_s"] and "error" not in entry:
                entry["median_s"] = statistics.median(entry["times_s"])
                entry["us_per_token"] = 1e6 * entry["median_s"] / entry["tokens"]
                entry["padding"] = 1 - entry["tokens"] / entry["computed"]
        ours = found[OURS].get("us_per_token")
        for way, entry in found.items():
            theirs = entry.get("us_per_token")
            entry["packed_is_faster"] = theirs / ours if theirs and ours else None
            if "error" not in entry and "error" not in found[OURS] and not partly(name, way):
                pair = self._saved(name, ("effpass", "single")), self._saved(name, way)
                entry["difference"] = parity(*pair)
        return {
            "title": MODELS[name],
            "ways": [{"arm": arm, "layout": layout, **e} for (arm, layout), e in found.items()],
        }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All models, with the setting, the sizes and the lengths."""
    rows = data(args)
    names = ("hidden", "layers", "states", "max_tokens", "seed", "rounds", "device")
    result: dict[str, Any] = {
        "setting": setting(args.threads),
        "sizes": {name: getattr(args, name) for name in names},
        "lengths": rows,
        "paper": PAPER,
        "models": {},
    }
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with (
        tempfile.TemporaryDirectory(prefix="effpass-packed-") as folder,
        Progress(*columns, console=Console(stderr=True)) as progress,
    ):
        task = progress.add_task("", total=1)
        driver = Driver(args, Path(folder), rows)
        for name in args.models:
            found = driver.model(name, lambda what: progress.update(task, description=what))
            result["models"][name] = found
    return result


def show(result: dict[str, Any]) -> Table:
    """Microseconds a real token, and how much faster packed rows are."""
    table = Table("", "arm", "layout", "padding", "us a token", "packed is faster", "difference")
    for model in result["models"].values():
        for way in model["ways"]:
            names = (model["title"], way["arm"], way["layout"])
            if "us_per_token" not in way:
                table.add_row(*names, "", "failed", "", way.get("error", "not timed")[:40])
                continue
            faster = way["packed_is_faster"]
            cells = (
                f"{way['padding']:.0%}",
                f"{way['us_per_token']:.1f}",
                f"{faster:.2f}x" if faster else "",
                f"{way['difference']['gradients']:.0e}" if "difference" in way else "",
            )
            table.add_row(*names, *cells)
    return table


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=tuple(MODELS), default=list(MODELS))
    parser.add_argument("--arms", nargs="+", default=["eager", "inductor", "effpass"])
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--states", type=int, default=64, help="of Mamba-2; Mamba-1 has 16")
    parser.add_argument("--rows", type=int, default=4, help="packed rows that a step goes through")
    parser.add_argument("--max-tokens", type=int, default=MAX_TOKENS, help="lengths scale with it")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seed", type=int, default=1, help="1: 25 sequences, mean 642")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    out = ROOT / "docs" / "results" / "packed_training.json"
    parser.add_argument("--out", type=Path, default=out)
    args = parser.parse_args(argv)
    if "effpass" not in args.arms:
        parser.error(f"expected effpass among --arms, found {', '.join(args.arms)}")
    return args


def main() -> None:
    """Measures, writes the JSON and prints the medians."""
    args = arguments()
    result = measure(args)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    Console(width=110).print(show(result))


if __name__ == "__main__":
    main()
