"""Eager, stock Inductor and effpass side by side: times, speed-ups, memory and parity.

    python examples/benchmarks/compare.py                 # all rows, about a quarter of an hour
    python examples/benchmarks/compare.py --rows mamba1_forward,cold --rounds 3
    python examples/benchmarks/compare.py --full          # the 24-layer models too
    python examples/benchmarks/compare.py --rows loop_forward,loop_training --out raise.json

Each arm is a process of its own with empty caches. The arms take turns, only one works at a time,
and the medians over all turns are compared. Results go to ``docs/results/compare.json``, and as
tables to ``compare.md`` beside it.
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

import torch
from arms import Arm, ArmError
from cases import CASES, Case, Goals
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from setting import ROOT, setting
from tables import page

ARMS = ("eager", "inductor", "effpass")
CHECKS = ("scan_alone", "scan_memory", "lengths")
COLD = "mamba1_cold"
COLD_GOALS = Goals(inductor=2.0)  # at most half of Inductor's time


class Driver:
    """Runs rows on living workers and collects what they answer."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder = args, folder
        self.arms = {name: self._arm(name, folder / name) for name in args.arms}

    def _arm(self, name: str, caches: Path, cold: bool = False) -> Arm:
        return Arm(name, caches, self.args.threads, self.args.quick, cold)

    def row(self, name: str) -> dict[str, Any]:
        """One case in all arms: prepared one after the other, then timed in turns."""
        case = CASES[name]
        found = {arm: self._prepare(arm, name, case) for arm in self.arms}
        for turn in range(self.args.rounds):
            order = list(found)[turn % len(found) :] + list(found)[: turn % len(found)]
            for arm in order:
                self._turn(arm, found[arm], case, turn)
        for entry in found.values():
            if entry.get("times_ms"):
                entry["median_ms"] = statistics.median(entry["times_ms"])
        return _compared(name, case.title, found, "median_ms", case.goals, self.folder)

    def _prepare(self, arm: str, name: str, case: Case) -> dict[str, Any]:
        settle = 0 if case.slow_eager and arm == "eager" else 2
        save = str(self.folder / f"{name}-{arm}.pt")
        try:
            return {**self.arms[arm].ask("prepare", case=name, save=save, settle=settle)}
        except ArmError as error:
            return {"error": str(error)}

    def _turn(self, arm: str, entry: dict[str, Any], case: Case, turn: int) -> None:
        slow = case.slow_eager and arm == "eager"
        if "error" in entry or (slow and turn >= 2):
            return
        least, warm = (1, 0) if slow else (2, 1)
        try:
            reply = self.arms[arm].ask("time", seconds=self.args.seconds, least=least, warm=warm)
        except ArmError as error:
            entry["error"] = str(error)
            return
        entry.setdefault("times_ms", []).extend(reply["times_ms"])
        for key in ("peak_mib", "added_mib"):
            entry[key] = reply[key]

    def cold(self) -> dict[str, Any]:
        """First call of Mamba-1 in fresh processes with empty caches, kernel build included."""
        arms = [arm for arm in self.arms if arm != "eager"]
        found: dict[str, dict[str, Any]] = {arm: {"times_s": []} for arm in arms}
        for turn in range(self.args.cold_rounds):
            for arm in arms:
                self._cold(arm, turn, found[arm])
        for entry in found.values():
            if entry["times_s"]:
                entry["median_s"] = statistics.median(entry["times_s"])
        title = "Mamba-1 cold compile, first call"
        return _compared(COLD, title, found, "median_s", COLD_GOALS, self.folder)

    def _cold(self, arm: str, turn: int, entry: dict[str, Any]) -> None:
        worker = self._arm(arm, self.folder / f"cold-{arm}-{turn}", cold=True)
        save = str(self.folder / f"{COLD}-{arm}.pt")
        try:
            reply = worker.ask("prepare", case="mamba1_forward", save=save, settle=0)
            entry["times_s"].append(reply["first_call_s"])
        except ArmError as error:
            entry["error"] = str(error)
        finally:
            worker.close()

    def check(self, name: str) -> dict[str, Any]:
        """One measurement of effpass with itself."""
        arguments = {} if name == "scan_memory" else {"repeats": self.args.repeats}
        try:
            return self.arms["effpass"].ask(name, **arguments)
        except ArmError as error:
            return {"error": str(error)}

    def close(self) -> None:
        """Ends all workers."""
        for arm in self.arms.values():
            arm.close()


def _compared(
    name: str,
    title: str,
    found: dict[str, dict[str, Any]],
    key: str,
    goals: Goals,
    folder: Path,
) -> dict[str, Any]:
    row: dict[str, Any] = {"name": name, "title": title, "unit": key, "arms": found}
    ours = found.get("effpass", {}).get(key)
    for other, goal in (("eager", goals.eager), ("inductor", goals.inductor)):
        theirs = found.get(other, {}).get(key)
        speedup = theirs / ours if theirs and ours else None
        met = None if speedup is None or goal is None else speedup >= goal
        row[f"vs_{other}"] = {"speedup": speedup, "goal": goal, "met": met}
    reference = "eager" if "eager" in found else "inductor"
    row["parity"] = {
        arm: parity(folder / f"{name}-{reference}.pt", folder / f"{name}-{arm}.pt")
        for arm in found
        if arm != reference and "error" not in found[arm] and "error" not in found[reference]
    }
    return row


def parity(expected: Path, actual: Path) -> dict[str, float]:
    """Largest difference over the largest value: of the outputs, and of the worst gradient."""
    ours, theirs = torch.load(actual), torch.load(expected)
    if ours.keys() != theirs.keys():
        raise ValueError(f"expected results {sorted(theirs)}, found {sorted(ours)}")
    worst = {"outputs": 0.0}
    for name, value in theirs.items():
        kind = "gradients" if name.startswith("gradient of ") else "outputs"
        largest = value.abs().max().item() or 1.0
        difference = (ours[name] - value).abs().max().item() / largest
        worst[kind] = max(worst.get(kind, 0.0), difference)
    return worst


def names(args: argparse.Namespace) -> list[str]:
    """The rows to run, in the table's order. Raises SystemExit for an unknown one."""
    cases = [n for n, case in CASES.items() if (args.full or not case.full) and not case.own]
    known = [*cases, COLD, *CHECKS]
    if args.rows is None:
        return known
    chosen = args.rows.split(",")
    unknown = [name for name in chosen if name not in [*CASES, COLD, *CHECKS]]
    if unknown:
        raise SystemExit(f"unknown rows {', '.join(unknown)}; known: {', '.join(known)}")
    return [name for name in [*CASES, COLD, *CHECKS] if name in chosen]


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All chosen rows and checks, with the setting."""
    result: dict[str, Any] = {"setting": setting(args.threads), "rows": [], "checks": {}}
    result["settings"] = {"quick": args.quick, "rounds": args.rounds, "seconds": args.seconds}
    driver = Driver(args, folder)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    chosen = names(args)
    try:
        with Progress(*columns, console=Console(stderr=True)) as progress:
            for number, name in enumerate(chosen, 1):
                task = progress.add_task(f"{number}/{len(chosen)} {escape(name)}", total=1)
                if name in CHECKS:
                    result["checks"][name] = driver.check(name)
                else:
                    result["rows"].append(driver.cold() if name == COLD else driver.row(name))
                progress.update(task, completed=1)
    finally:
        driver.close()
    return result


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", help="names, separated by commas; default: all but --full's")
    parser.add_argument(
        "--full", action="store_true", help="also the 24-layer, 50k-vocabulary models"
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes: a smoke test, no numbers")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each arm")
    parser.add_argument("--seconds", type=float, default=1.0, help="time of one turn, at least")
    parser.add_argument("--cold-rounds", type=int, default=2, help="fresh processes a compiled arm")
    parser.add_argument("--repeats", type=int, default=15, help="calls timed in the checks")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--arms", type=lambda text: text.split(","), default=list(ARMS))
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "compare.json")
    args = parser.parse_args(argv)
    if "effpass" not in args.arms or not set(args.arms) <= set(ARMS):
        parser.error(f"expected --arms to be of {', '.join(ARMS)}, effpass among them")
    return args


def main() -> None:
    """Measures, writes the JSON and the page of tables, and prints the page."""
    args = arguments()
    with tempfile.TemporaryDirectory(prefix="effpass-compare-") as folder:
        result = measure(args, Path(folder))
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    args.out.with_suffix(".md").write_text(page(result))
    print(page(result))


if __name__ == "__main__":
    main()
