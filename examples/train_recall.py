"""Trains a tiny Mamba or Mamba-2 to recall far tokens: associative recall with filler between.

    python examples/train_recall.py --kind mamba2 --out recall        # minutes on two cores
    python examples/train_recall.py --kind mamba2 --seeds 0 1 2 3 4   # five models

A row holds pairs of a key and its value with filler tokens between them, then all keys once more,
in another order: the questions, each to be answered by its value. Answers are not shown, or a model
learns to guess by what was not answered yet, and nothing else.
After Arora et al. 2023, "Zoology" (arXiv 2312.04927, multi-query associative recall), with filler.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_model, save_model
from torch import Tensor, nn

IGNORED = -100
SHORTER, FIRST = (4, 2), 6  # a sixth of the steps on rows of a fourth, a sixth on rows of half


SLOT = 3  # a pair and one filler, in front of it or behind


@dataclass(frozen=True)
class Task:
    """Rows of ``tokens``; ``pairs`` in a row, of ``keys`` keys and as many values.

    Tokens 0..keys-1 are keys, the next are values, the last ``fillers`` fill.
    """

    tokens: int = 128
    pairs: int = 8
    keys: int = 32
    fillers: int = 64

    @property
    def vocabulary(self) -> int:
        """How many different tokens there are."""
        return 2 * self.keys + self.fillers

    def batch(self, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Tokens (rows, tokens), and what is asked at each: IGNORED, or the value of that key."""

        def shuffled(count: int) -> Tensor:
            return torch.rand(rows, count, generator=generator).argsort(1)

        slots = (self.tokens - self.pairs) // SLOT
        filler = torch.randint(0, self.fillers, (rows, self.tokens), generator=generator)
        ids = filler + 2 * self.keys
        keys = shuffled(self.keys)[:, : self.pairs]
        values = torch.randint(0, self.keys, keys.shape, generator=generator) + self.keys
        places = shuffled(slots)[:, : self.pairs] * SLOT
        places += torch.randint(0, 2, places.shape, generator=generator)  # even and odd ones
        ids.scatter_(1, places, keys).scatter_(1, places + 1, values)
        asked = shuffled(self.pairs)
        ids[:, -self.pairs :] = keys.gather(1, asked)
        targets = torch.full_like(ids, IGNORED)
        targets[:, -self.pairs :] = values.gather(1, asked)
        return ids, targets


# what a small model of each kind learns in minutes: the task, and the size of the state
LEARNED = {"mamba": (Task(pairs=4, keys=16), 32), "mamba2": (Task(), 16)}


def model_of(kind: str, task: Task, seed: int, layers: int = 4, width: int = 64) -> nn.Module:
    """A small model with random weights.

    Mamba's states all begin to forget alike (A = -1): of its own -1, -2, ..., most have forgotten
    a pair before it is asked for, and the task takes twice as long to learn.
    """
    from transformers import Mamba2Config, Mamba2ForCausalLM, MambaConfig, MambaForCausalLM

    torch.manual_seed(seed)
    shared: dict[str, Any] = {
        "vocab_size": task.vocabulary,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "use_cache": False,
        "pad_token_id": None,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    shared["state_size"] = LEARNED[kind][1]
    if kind == "mamba":
        model = MambaForCausalLM(MambaConfig(**shared))
        for block in model.backbone.layers:
            nn.init.zeros_(block.mixer.A_log)
        return model
    sizes = {"num_heads": 2 * width // 16, "head_dim": 16, "n_groups": 1, "chunk_size": 64}
    return Mamba2ForCausalLM(Mamba2Config(**sizes, **shared))


def accuracy(run: Callable[..., Any], task: Task, rows: int = 512, seed: int = 10_000) -> float:
    """The share of questions that are answered."""
    ids, targets = task.batch(rows, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        found = torch.cat([run(input_ids=part).logits.argmax(-1) for part in ids.split(64)])
    asked = targets != IGNORED
    return (found == targets)[asked].float().mean().item()


def train(
    model: nn.Module, task: Task, steps: int, rows: int, seed: int, quiet: bool, rate: float = 3e-3
) -> float:
    """Trains in place, on short rows first; stops when all held-out questions are answered.

    Answers their share.
    """
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.01)
    schedule = {"total_steps": max(steps, 2), "pct_start": 0.1}
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, **schedule)
    shorter = [replace(task, tokens=task.tokens // n) for n in SHORTER]
    run, started, found = torch.compile(model, backend="effpass"), time.perf_counter(), 0.0
    for step in range(steps):
        stage = step * FIRST // steps  # short rows are learned in less time
        ids, targets = (shorter[stage] if stage < len(shorter) else task).batch(rows, generator)
        logits = run(input_ids=ids).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rates.step()
        if (step + 1) % 100 == 0 or step + 1 == steps:
            found = accuracy(run, task, 128)
            if not quiet:
                spent = time.perf_counter() - started
                print(f"{step + 1}: loss {loss.item():.3f}, right {found:.3f}, {spent:.0f} s")
            if found >= 0.999:
                break
    return found


def trained(path: Path) -> tuple[nn.Module, str, Task]:
    """A model that was saved, its kind, and the task that it learned."""
    with safe_open(path, "pt") as file:
        told = file.metadata()
    task = Task(**json.loads(told["task"]))
    model = model_of(told["kind"], task, 0, int(told["layers"]))
    load_model(model, path)
    return model.eval(), told["kind"], task


def main() -> None:
    """Trains one model a seed and saves them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kind", choices=("mamba", "mamba2"), default="mamba2")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--rate", type=float, default=3e-3, help="of learning, the largest")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("recall"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    task = replace(LEARNED[args.kind][0], tokens=args.tokens)
    for seed in args.seeds:
        model = model_of(args.kind, task, seed, args.layers)
        found = train(model, task, args.steps, args.rows, seed, False, args.rate)
        path = args.out / f"{args.kind}_{seed}.safetensors"
        told = {"kind": args.kind, "layers": str(args.layers), "right": str(found)}
        save_model(model, str(path), {"task": json.dumps(asdict(task)), **told})
        print(f"{path}: {found:.1%} of the questions right")


if __name__ == "__main__":
    main()
