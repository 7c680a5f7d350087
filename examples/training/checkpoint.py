"""Checkpoints without pickle: tensors as safetensors, everything else as JSON.

One folder a checkpoint, ``step-000100``: ``model.safetensors``, ``optimizer.safetensors``
(``<parameter>/<name of the state>``), ``random.safetensors`` and ``state.json``. Parameters have
their full shapes and plain names whatever the number of ranks, so a run under DDP goes on under
FSDP2. A folder gets its name when it is complete; the newest two are kept.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from training.ranks import Ranks

KEPT = 2
STEPS = "step-[0-9][0-9][0-9][0-9][0-9][0-9]"


def save(
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    ranks: Ranks,
) -> None:
    """Writes the checkpoint of a step; every rank calls it, rank 0 writes.

    ``state``: whatever else JSON can hold, found again by ``load``.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=options)
    found: dict[str, Any] = get_optimizer_state_dict(model, optimizer, options=options)
    random = _random_states(ranks)
    if ranks.rank == 0:
        target = folder / f"step-{step:06d}"
        partial = folder / f"{target.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file(
            {name: t.contiguous() for name, t in weights.items()}, partial / "model.safetensors"
        )
        save_file(_flat(found["state"]), partial / "optimizer.safetensors")
        save_file(random, partial / "random.safetensors")
        state = {**state, "step": step, "optimizer": found["param_groups"]}
        (partial / "state.json").write_text(json.dumps(state, indent=1) + "\n")
        partial.rename(target)
        for old in sorted(folder.glob(STEPS))[:-KEPT]:
            shutil.rmtree(old)
    ranks.wait()


def latest(folder: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None."""
    return max(folder.glob(STEPS), default=None)


def read(path: Path) -> dict[str, Any]:
    """The ``state`` of a checkpoint, with its ``step``."""
    return json.loads((path / "state.json").read_text())


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, ranks: Ranks) -> None:
    """Puts a checkpoint into a model and its optimizer, and sets the random numbers; on every rank.

    Raises ValueError where it was saved by another number of ranks.
    """
    options = StateDictOptions(full_state_dict=True)
    set_model_state_dict(model, load_file(path / "model.safetensors"), options=options)
    groups = read(path)["optimizer"]
    found = {
        "state": _nested(load_file(path / "optimizer.safetensors")),
        "param_groups": [{k: _tuple(k, v) for k, v in group.items()} for group in groups],
    }
    set_optimizer_state_dict(model, optimizer, found, options=options)
    random = load_file(path / "random.safetensors")
    saved = len({name.partition("/")[2] for name in random})
    if saved != ranks.world:
        raise ValueError(f"expected a checkpoint of {ranks.world} ranks, found one of {saved}")
    torch.set_rng_state(random[f"cpu/{ranks.rank}"])
    if f"cuda/{ranks.rank}" in random and ranks.device.type == "cuda":
        torch.cuda.set_rng_state(random[f"cuda/{ranks.rank}"], ranks.device)


def _random_states(ranks: Ranks) -> dict[str, Tensor]:
    """The state of each rank's random numbers, by device and rank."""
    mine = {"cpu": torch.get_rng_state()}
    if ranks.device.type == "cuda":
        mine["cuda"] = torch.cuda.get_rng_state(ranks.device)
    return {
        f"{kind}/{rank}": state
        for kind, value in mine.items()
        for rank, state in enumerate(ranks.gathered(value))
    }


def _flat(state: dict[str, dict[str, Tensor]]) -> dict[str, Tensor]:
    return {
        f"{parameter}/{name}": value.contiguous()
        for parameter, values in state.items()
        for name, value in values.items()
    }


def _nested(flat: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    state: dict[str, dict[str, Tensor]] = {}
    for key, value in flat.items():
        parameter, _, name = key.rpartition("/")
        state.setdefault(parameter, {})[name] = value
    return state


def _tuple(key: str, value: Any) -> Any:
    """JSON has no tuples; the names of parameters are a list."""
    return tuple(value) if isinstance(value, list) and key != "params" else value
