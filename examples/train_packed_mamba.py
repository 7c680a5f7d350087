"""Trains a small Mamba-2 on the bytes of two plays, in rows without padding.

    python examples/train_packed_mamba.py                               # a few minutes
    python examples/train_packed_mamba.py --modes packed padded single  # compares three layouts
    python examples/train_packed_mamba.py --resume                      # goes on where it stopped
    torchrun --nproc-per-node 2 examples/train_packed_mamba.py          # DDP; FSDP2: --engine fsdp

Passages of 40 to 2048 bytes are packed into rows of ``--max-tokens``; every layout learns from the
same sequences in the same steps, so their losses are the same and only the time differs. Ranks get
rows of near-equal tokens, and the loss is the mean over the targets of all ranks. Checkpoints hold
weights, optimizer, random numbers and the place in the data: a run that is resumed is the run that
was not interrupted. Needs the extra ``examples``: pip install -e ".[examples]".
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader
from training import checkpoint, curve
from training.layouts import LAYOUTS, summed_loss
from training.ranks import ENGINES, Ranks, accumulating, distributed, start
from training.text import PLAYS, VOCABULARY, sequences

import effpass
from effpass.rows import Row

BACKENDS = ("effpass", "inductor", "eager")
# what decides the numbers of a run; one that is resumed must have the same
SETTINGS = ("hidden", "layers", "states", "max_tokens", "longest", "lr", "warmup", "seed")


class ByteModel(nn.Module):
    """transformers' Mamba-2 and a head that predicts the next byte: logits (b, t, 256).

    transformers' own head does not pass the boundaries of a packed row on to its layers.
    """

    def __init__(self, hidden: int, layers: int, states: int) -> None:
        super().__init__()
        from transformers import Mamba2Config, Mamba2Model

        config = Mamba2Config(
            vocab_size=VOCABULARY,
            hidden_size=hidden,
            num_hidden_layers=layers,
            state_size=states,
            num_heads=hidden * 2 // 32,
            head_dim=32,
            n_groups=1,
            chunk_size=64,
        )
        self.backbone = Mamba2Model(config)
        self.head = nn.Linear(hidden, VOCABULARY, bias=False)

    def forward(self, **kwargs: Any) -> Tensor:
        """Logits of whatever the backbone takes."""
        return self.head(self.backbone(**kwargs, use_cache=False)[0])


@dataclass
class Run:
    """One model in training, and what it has been through: a loss and seconds for each step."""

    mode: str
    model: nn.Module
    called: nn.Module
    optimizer: torch.optim.Optimizer
    dataset: effpass.PackedDataset
    ranks: Ranks
    history: dict[str, list[float]] = field(
        default_factory=lambda: {"losses": [], "seconds": [], "tokens": [], "computed": []}
    )

    @property
    def steps(self) -> int:
        """Steps made so far."""
        return len(self.history["losses"])


def build(args: argparse.Namespace, mode: str, ranks: Ranks) -> Run:
    """A run from its beginning: the same weights and rows for each mode and number of steps."""
    torch.manual_seed(args.seed)
    model = ByteModel(args.hidden, args.layers, args.states).to(ranks.device).train()

    def compile(module: nn.Module) -> nn.Module:
        if args.backend == "eager":
            return module
        options = {"compiler": args.compiler} if args.backend == "effpass" else None
        return torch.compile(module, backend=args.backend, options=options)  # type: ignore[return-value]

    blocks = model.backbone.layers
    called = distributed(model, blocks, ranks, args.engine, compile, mode == "single")
    dataset = effpass.PackedDataset(
        sequences(args.longest, args.text)[0],
        args.max_tokens,
        shuffle=True,
        seed=args.seed,
        rank=ranks.rank,
        world_size=ranks.world,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.01)
    return Run(mode, model, called, optimizer, dataset, ranks)


def resume(run: Run, folder: Path, settings: dict[str, Any]) -> bool:
    """Goes on from the newest checkpoint in ``folder``; whether there is one.

    Raises ValueError, naming what differs, for a checkpoint of other settings.
    """
    path = checkpoint.latest(folder)
    if path is None:
        return False
    state = checkpoint.read(path)
    differing = [
        f"{name} {state['settings'].get(name)!r} (here {value!r})"
        for name, value in settings.items()
        if state["settings"].get(name) != value
    ]
    if differing:
        raise ValueError(f"expected a checkpoint of the same run, found {', '.join(differing)}")
    run.dataset.load_state_dict(state["data"])
    checkpoint.load(path, run.model, run.optimizer, run.ranks)
    run.history = state["history"]
    return True


def rows(dataset: effpass.PackedDataset) -> Iterator[Row]:
    """Rows of this rank, epoch after epoch; no draw from the random numbers of the model."""
    loader = DataLoader(dataset, batch_size=None, generator=torch.Generator())
    while True:
        yield from loader
        dataset.set_epoch(dataset.epoch + 1)


def learn(run: Run, row: Row, rate: float) -> None:
    """One step on this rank's row: the mean loss over the targets of all ranks' rows.

    DDP and FSDP2 take the mean of the ranks' gradients; ``world`` makes it their sum.
    """
    started = time.perf_counter()
    ranks = run.ranks
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    targets = ranks.total(torch.tensor(row.target_count, device=ranks.device))
    batches = LAYOUTS[run.mode](row.to(ranks.device))
    loss = torch.zeros((), device=ranks.device)
    for number, batch in enumerate(batches, 1):
        with accumulating(run.model, run.called, number == len(batches)):
            part = summed_loss(run.called(**batch.inputs), batch.labels) / targets
            (ranks.world * part).backward()
        loss += part.detach()
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), 1.0)
    run.optimizer.step()
    run.optimizer.zero_grad()
    computed = sum(batch.computed for batch in batches)
    counts = ranks.total(torch.tensor([row.tokens, computed], device=ranks.device)).tolist()
    run.history["losses"].append(ranks.total(loss).item() / math.log(2))
    run.history["seconds"].append(time.perf_counter() - started)
    for name, count in zip(("tokens", "computed"), counts, strict=True):
        run.history[name].append(count)


def rate_at(step: int, args: argparse.Namespace) -> float:
    """The learning rate of a step, from 1 on: rising for ``warmup`` steps, then as 1 / root."""
    return args.lr * min(step / args.warmup, math.sqrt(args.warmup / step))


def held_out_loss(run: Run, args: argparse.Namespace) -> float:
    """Bits a byte of passages that were not learned from; the same on every rank.

    Gradients stay on (and unused), so that nothing is compiled anew.
    """
    summed, count = 0.0, 0
    for row in effpass.pack(sequences(args.longest, args.text)[1], args.max_tokens):
        count += row.target_count
        for batch in LAYOUTS[run.mode](row.to(run.ranks.device)):
            summed += summed_loss(run.called(**batch.inputs), batch.labels).item()
    return summed / count / math.log(2)


def train(run: Run, args: argparse.Namespace, folder: Path, progress: Progress) -> None:
    """Steps until there are ``--steps``, with checkpoints on the way and at the end."""
    settings = {"mode": run.mode, **{name: getattr(args, name) for name in SETTINGS}}
    resumed = resume(run, folder, settings) if args.resume else False
    if not resumed and checkpoint.latest(folder):
        raise ValueError(f"expected no run in {folder}: pass --resume to go on, or another --out")
    task = progress.add_task(run.mode, total=args.steps, completed=run.steps)
    for row in rows(run.dataset):
        if run.steps >= args.steps:
            break
        learn(run, row, rate_at(run.steps + 1, args))
        done = run.steps
        bits = run.history["losses"][-1]
        progress.update(task, completed=done, description=f"{run.mode}, {bits:.3f} bits a byte")
        if done % args.every == 0 or done == args.steps:
            data = run.dataset.state_dict(row)
            state = {"settings": settings, "data": data, "history": run.history}
            checkpoint.save(folder, done, run.model, run.optimizer, state, run.ranks)


def summary(runs: dict[str, dict[str, Any]]) -> Table:
    """What each layout computed, how fast it was and what it reached."""
    table = Table("", "padding", "tokens a second", "last losses", "held out", title="bits a byte")
    for mode, run in runs.items():
        padding = 1 - sum(run["tokens"]) / sum(run["computed"])
        speed = statistics.median(n / s for n, s in zip(run["tokens"], run["seconds"], strict=True))
        last = statistics.fmean(run["losses"][-10:])
        cells = (f"{padding:.0%}", f"{speed:.0f}", f"{last:.3f}", f"{run['held_out']:.3f}")
        table.add_row(mode, *cells)
    return table


def arguments(argv: list[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--modes", nargs="+", choices=tuple(LAYOUTS), default=["packed"])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--max-tokens", type=int, default=4096, help="of a row")
    parser.add_argument("--text", type=Path, default=PLAYS, help="another text, in ASCII")
    parser.add_argument("--longest", type=int, default=2048, help="of a passage, in bytes")
    parser.add_argument("--hidden", type=int, default=128, help="width, a multiple of 32")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--states", type=int, default=32)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--warmup", type=int, default=20, help="steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--every", type=int, default=50, help="steps between checkpoints")
    parser.add_argument("--resume", action="store_true", help="from the newest checkpoint in --out")
    parser.add_argument("--engine", choices=ENGINES, default="ddp", help="under torchrun")
    parser.add_argument("--backend", choices=BACKENDS, default="effpass")
    parser.add_argument("--compiler", choices=("inductor", "eager"), default="inductor")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--out", type=Path, default=Path("packed_mamba"))
    args = parser.parse_args(argv)
    if "packed" in args.modes and args.backend != "effpass":
        parser.error(
            f"expected --backend effpass for packed rows, found {args.backend}: it carries the "
            "state of one sequence into the next"
        )
    return args


def main() -> None:
    """Trains one run a mode, draws their losses and prints what they reached."""
    args = arguments(sys.argv[1:])
    ranks = start(args.device)
    console = Console(width=100, quiet=ranks.rank != 0)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    found: dict[str, dict[str, Any]] = {}
    try:
        with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
            for mode in args.modes:
                torch._dynamo.reset()
                run = build(args, mode, ranks)
                train(run, args, args.out / mode, progress)
                found[mode] = {**run.history, "held_out": held_out_loss(run, args)}
        if ranks.rank == 0:
            curve.draw(found, args.out / "loss.png")
            console.print(summary(found), f"checkpoints and loss.png: {args.out}")
    finally:
        ranks.close()


if __name__ == "__main__":
    main()
