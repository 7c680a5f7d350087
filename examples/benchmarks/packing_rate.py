"""What each way of packing leaves empty, on lengths as in PackMamba's corpus: no time is measured.

    python examples/benchmarks/packing_rate.py

57 to 2048 tokens, 646 on average, into rows of 4096, for several seeds; every rate is kept, in
``docs/results/packing_rate.json``. The paper reports 19.1 % in arrival order and 0.41 % with its
local greedy policy, for its own corpus: it tells the range and the mean of the lengths, not more.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from setting import ROOT, setting

from effpass.rows import POLICIES, padding_rate
from effpass.rows.lengths import LONGEST, MAX_TOKENS, MU, SHORTEST, SIGMA, sample_lengths
from effpass.rows.policies import fill

WINDOWS = (1, 4, 8, 16, 32, 64, 128, 256, 1024)
PAPER = {"arrival": 0.191, "greedy": 0.0041}  # arXiv 2408.03865
GOAL = {"greedy": 0.01}  # with the default window: less than this


def measure(count: int, seeds: int) -> dict[str, Any]:
    """The lengths of each seed in numbers, and the rates of each policy and window, by seed."""
    corpora = [sample_lengths(count, seed) for seed in range(seeds)]
    described = [
        {
            "seed": seed,
            "sequences": count,
            "mean": statistics.fmean(lengths),
            "longest": max(lengths),
        }
        for seed, lengths in enumerate(corpora)
    ]
    ways = [(policy, None) for policy in POLICIES] + [("greedy", window) for window in WINDOWS]
    rates = [
        {
            "policy": policy,
            "window": window,
            "rates": [_rate(lengths, policy, window) for lengths in corpora],
        }
        for policy, window in ways
    ]
    padded = [1 - statistics.fmean(lengths) / max(lengths) for lengths in corpora]
    return {"corpora": described, "padded_to_the_longest": padded, "packed": rates}


def _rate(lengths: list[int], policy: str, window: int | None) -> float:
    rows = fill(lengths, MAX_TOKENS, policy, window)
    return padding_rate(sum(lengths), len(rows), MAX_TOKENS)


def lines(result: dict[str, Any]) -> list[str]:
    """One line a way of packing: its highest rate, beside the paper's where there is one."""
    found = [f"padded to the longest: at most {max(result['padded_to_the_longest']):.2%} empty"]
    for row in result["packed"]:
        policy, worst = row["policy"], max(row["rates"])
        window = "" if row["window"] is None else f", window {row['window']}"
        paper = (
            f" (paper: {PAPER[policy]:.2%})" if row["window"] is None and policy in PAPER else ""
        )
        found.append(f"{policy}{window}: at most {worst:.2%} empty{paper}")
    return found


def main() -> None:
    """Packs, writes the JSON and prints the highest rate of each way."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sequences", type=int, default=20_000)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "packing_rate.json")
    args = parser.parse_args()
    result = {
        "setting": setting(threads=1),
        "lengths": {
            "distribution": "log-normal, none below the shortest, cut at the longest",
            "mu": MU,
            "sigma": SIGMA,
            "shortest": SHORTEST,
            "longest": LONGEST,
            "max_tokens": MAX_TOKENS,
        },
        "paper": PAPER,
        "goal": GOAL,
        **measure(args.sequences, args.seeds),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print("\n".join(lines(result)))


if __name__ == "__main__":
    main()
