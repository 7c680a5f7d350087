"""How long raising takes on a large graph: research code, 24 layers, about 20,000 nodes.

    python examples/benchmarks/raising.py

The model is captured once; the graph is then raised again and again, from a fresh copy, with and
without proof. Medians go to ``docs/results/raising.json``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from own_models import LoopModel
from setting import ROOT, setting
from torch.fx import GraphModule

from effpass.capture.dynamo import capture
from effpass.graph.clean import clean
from effpass.lower import reference_form
from effpass.patterns.raising import raise_ops


def measure(layers: int, tokens: int, width: int, rounds: int) -> dict[str, Any]:
    """Nodes before and after, what was raised, and the seconds of every round."""
    found: dict[str, Any] = {}

    def backend(gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        graph = capture(gm, inputs)
        clean(graph)
        found["nodes_before"] = len(graph.graph.nodes)
        for proving in (False, True):
            name = "proving_s" if proving else "raising_s"
            found[name] = [_raise(graph, proving, found) for _ in range(rounds)]
        return gm.forward

    model = LoopModel(width, layers).eval()
    with torch.no_grad():
        torch.compile(model, backend=backend)(torch.randn(1, tokens, width))
    return found


def _raise(graph: GraphModule, proving: bool, found: dict[str, Any]) -> float:
    copy = reference_form(graph)
    started = time.perf_counter()
    outcome = raise_ops(copy, proving)
    seconds = time.perf_counter() - started
    found["nodes_after"] = len(copy.graph.nodes)
    found["raised"] = dict(Counter(f"{r.op} <- {r.idiom}" for r in outcome.raised))
    return seconds


def main() -> None:
    """Measures, writes the JSON and prints the medians."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "raising.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result = {"setting": setting(args.threads), "sizes": vars(args) | {"out": None}}
    result |= measure(args.layers, args.tokens, args.width, args.rounds)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    for name in ("raising_s", "proving_s"):
        print(f"{name}: {statistics.median(result[name]):.1f} (median of {args.rounds})")
    print(f"{result['nodes_before']} -> {result['nodes_after']} nodes: {result['raised']}")


if __name__ == "__main__":
    main()
