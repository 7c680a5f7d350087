"""One process or many: who this process is, and a model that all of them train together."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

ENGINES = ("ddp", "fsdp")


@dataclass(frozen=True)
class Ranks:
    """This process's number among ``world``, and its device."""

    rank: int
    world: int
    device: torch.device

    @property
    def together(self) -> bool:
        """Whether processes talk to each other: they were started by torchrun."""
        return dist.is_initialized()

    def total(self, value: Tensor) -> Tensor:
        """The sum of a tensor over all ranks; ``value`` stays as it is."""
        summed = value.detach().clone()
        if self.together:
            dist.all_reduce(summed)
        return summed

    def gathered(self, value: Tensor) -> list[Tensor]:
        """A tensor of every rank, all of one shape, on the CPU; every rank gets the list."""
        if not self.together:
            return [value.cpu()]
        mine = value.to(self.device)
        found = [torch.empty_like(mine) for _ in range(self.world)]
        dist.all_gather(found, mine)
        return [each.cpu() for each in found]

    def wait(self) -> None:
        """Returns when every rank has come here."""
        if self.together:
            dist.barrier()

    def close(self) -> None:
        """Ends the talk between ranks."""
        if self.together:
            dist.destroy_process_group()


def start(device: str) -> Ranks:
    """Joins the processes that torchrun started, or is the only one; ``device``: cpu or cuda."""
    if not dist.is_torchelastic_launched():
        return Ranks(0, 1, torch.device(device))
    local = torch.device(device, int(os.environ["LOCAL_RANK"]) if device == "cuda" else None)
    if device == "cuda":
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    return Ranks(dist.get_rank(), dist.get_world_size(), local)


def distributed(
    model: nn.Module,
    blocks: nn.ModuleList,
    ranks: Ranks,
    engine: str,
    compile: Callable[[nn.Module], nn.Module],
    keep_gathered: bool,
) -> nn.Module:
    """The callable that trains ``model``; its parameters stay those of ``model``.

    ``ddp``: DDP around the compiled model, which it cuts into pieces by its gradient buckets.
    ``fsdp``: FSDP2 shards every block and the rest; gathering breaks the graph at each block.
    ``keep_gathered`` keeps sharded parameters whole between forward and backward, which ranks that
    run unequally many batches a step need: gathering is a talk that all must join.
    """
    if not ranks.together:
        return compile(model)
    if engine == "ddp":
        ids = [ranks.device] if ranks.device.type == "cuda" else None
        return DistributedDataParallel(compile(model), device_ids=ids)
    mesh = dist.init_device_mesh(ranks.device.type, (ranks.world,))
    for module in (*blocks, model):
        fully_shard(module, mesh=mesh, reshard_after_forward=not keep_gathered)
    return compile(model)


@contextmanager
def accumulating(model: nn.Module, called: nn.Module, last: bool) -> Iterator[None]:
    """Gradients of the batch inside are summed here; those of the last one bring all ranks' mean.

    ``model`` is what was given to ``distributed``, ``called`` what came of it.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
        model.set_reshard_after_backward(last)
    if isinstance(called, DistributedDataParallel) and not last:
        with called.no_sync():
            yield
    else:
        yield


def whole(value: Any) -> Any:
    """A plain tensor of one that is sharded."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value
