"""What each of two processes does; ``alone`` is the same in one, sequence by sequence, in eager.

    python -m torch.distributed.run --standalone --nproc-per-node 2 tests/ranks/work.py
        FOLDER COMPILER CASE...

A case is ``model:layout:engine``. Rank 0 writes ``FOLDER/CASE.pt``: losses, gradients of the first
step, parameters after the last, the ops and the forms of each graph, and what a row's other
sequences give when the first becomes NaN.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

from training.layouts import LAYOUTS, summed_loss  # noqa: E402

import effpass  # noqa: E402
from effpass import ledger  # noqa: E402
from effpass.rows import Row  # noqa: E402
from tests.ranks.models import BUILD, Reader  # noqa: E402

WORLD = 2
LENGTHS = (3, 5, 7, 2, 11, 2, 13, 4, 9, 6, 17, 5)
POISON = 255  # a token that no sequence holds; its embedding is NaN where that is asked
ENGINES = ("ddp_around", "ddp_inside", "fsdp")


def data(rank: int) -> effpass.PackedDataset:
    """The same sequences on every rank: three rows each, of other sequences and lengths."""
    generator = torch.Generator().manual_seed(1)
    sequences = [torch.randint(POISON, (n,), generator=generator) for n in LENGTHS]
    return effpass.PackedDataset(sequences, 20, rank=rank, world_size=WORLD)


def built(name: str) -> Reader:
    """The same weights in every process."""
    torch.manual_seed(0)
    return BUILD[name]().train()


def called(model: Reader, layout: str, engine: str, compiler: str) -> nn.Module:
    """``model`` as one engine trains it."""
    options = {"compiler": compiler, "pack_varlen": layout == "padded"}

    def compiled(module: nn.Module) -> nn.Module:
        return torch.compile(module, backend="effpass", options=options)  # type: ignore[return-value]

    if engine == "ddp_around":
        return DistributedDataParallel(compiled(model), bucket_cap_mb=1)
    if engine == "ddp_inside":
        return compiled(DistributedDataParallel(model, bucket_cap_mb=1))
    assert engine == "fsdp"
    mesh = dist.init_device_mesh("cpu", (WORLD,))
    for module in (*model.blocks(), model):
        fully_shard(module, mesh=mesh)
    return compiled(model)


def train(model: Reader, step: Callable[[list[Row], int], float]) -> dict[str, Any]:
    """Three steps of plain gradient descent; ``step`` makes the gradients and answers the loss."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses, gradients = [], dict[str, Tensor]()
    for rows in zip(*(data(rank) for rank in range(WORLD)), strict=True):
        losses.append(step(list(rows), sum(row.target_count for row in rows)))
        if not gradients:
            gradients = {n: whole(p.grad) for n, p in model.named_parameters()}
        optimizer.step()
        optimizer.zero_grad()
    parameters = {n: whole(p) for n, p in model.named_parameters()}
    return {"losses": losses, "gradients": gradients, "parameters": parameters}


def alone(name: str) -> dict[str, Any]:
    """One process, eager, each sequence in a batch of its own."""
    model = built(name)

    def step(rows: list[Row], targets: int) -> float:
        total = 0.0
        for batch in (batch for row in rows for batch in LAYOUTS["single"](row)):
            loss = summed_loss(model(**batch.inputs), batch.labels) / targets
            loss.backward()
            total += loss.item()
        return total

    return train(model, step)


def together(case: str, compiler: str) -> dict[str, Any]:
    """This rank's part in one case."""
    name, layout, engine = case.split(":")
    torch._dynamo.reset()
    ledger._ENTRIES.clear()
    model = built(name)
    run = called(model, layout, engine, compiler)

    def step(rows: list[Row], targets: int) -> float:
        (batch,) = LAYOUTS[layout](rows[dist.get_rank()])
        loss = summed_loss(run(**batch.inputs), batch.labels) / targets
        (WORLD * loss).backward()
        summed = loss.detach().clone()
        dist.all_reduce(summed)
        return summed.item()

    found = train(model, step)
    reports = [entry.report for entry in ledger._ENTRIES]
    found["ops"] = [[each.op for each in report.chosen] for report in reports]
    found["forms"] = [dict(report.forms) for report in reports]
    found["declined"] = [[str(each) for each in report.declined] for report in reports]
    if layout == "packed":
        found["kept_apart"] = kept_apart(model, run)
    return found


def kept_apart(model: Reader, run: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """Logits of every sequence but the first, as they are and behind a first one of NaN."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                local = module.weight.to_local() if hasattr(module.weight, "to_local") else None
                poison(module.weight if local is None else local, local is not None)
        ids = torch.arange(1, 17)
        logits = []
        for first in (torch.zeros(4, dtype=torch.long), torch.full((4,), POISON)):
            (row,) = effpass.pack([first, ids[:5], ids[5:6], ids[6:]], 20)
            inputs = {k: v for k, v in row.kwargs().items() if k != "labels"}
            logits.append(row.unpack(run(**inputs))[1:])
    return list(zip(*logits, strict=True))


def poison(weight: Tensor, sharded: bool) -> None:
    """Makes the last row of a whole weight NaN: of a sharded one the last rank holds it."""
    if not sharded or dist.get_rank() == WORLD - 1:
        weight[-1] = float("nan")


def whole(value: Any) -> Tensor:
    """A plain copy, of a sharded tensor too."""
    full = value.full_tensor() if hasattr(value, "full_tensor") else value
    return full.detach().clone()


def main() -> None:
    """Runs all cases in one pair of processes."""
    folder, compiler, *cases = sys.argv[1:]
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(minutes=2))
    for case in cases:
        try:
            found = together(case, compiler)
        except (ValueError, BackendCompilerFailed) as error:  # boundaries that cannot be kept
            found = {"error": str(error)}
        if dist.get_rank() == 0:
            torch.save(found, Path(folder) / f"{case.replace(':', '-')}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
