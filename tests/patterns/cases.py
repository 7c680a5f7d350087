"""Every test model of the spellings' folder, by what is expected of it."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from tests.patterns.spellings.spelling import NearMiss, Spelling

FOLDER = Path(__file__).parent / "spellings"
# seconds each, torch's associative_scan above all; the fast suite has one like each of them
LATER = {
    *("associative_last_dim_selective", "associative_dicts_gated", "associative_with_start_gated"),
    *("left_coefficient", "left_factor_kept", "maximum_of_values", "reversed_scan"),
    *("three_layers", "time_first", "all_inside", "step_by_step", "state_before_channel"),
    *("merged_heads", "grouped_state", "euler_step", "strided_sweeps_gated", "odd_even_gated"),
    *("sru", "s4d", "pointwise_convolutions", "channel_first", "growing_cat", "split_update"),
    *("quadratic_einsum", "states_passed", "upcast", "learned_start", "min_lstm"),
}


def named(model: Spelling | NearMiss) -> str:
    """The id of a test."""
    return model.name.replace(", ", "-").replace(" ", "_")


def inputs(model: Spelling | NearMiss, base: int) -> tuple[Tensor, ...]:
    """Inputs of the first legal length from ``base`` on."""
    multiple = model.multiple if isinstance(model, Spelling) else 1
    return model.inputs(-(-base // multiple) * multiple)


def files() -> Iterator[Any]:
    """The modules that hold test models."""
    for found in pkgutil.iter_modules([str(FOLDER)]):
        yield importlib.import_module(f"tests.patterns.spellings.{found.name}")


def _listed(name: str) -> list[Any]:
    """What all files hold under ``name``, each model once."""
    models = [model for file in files() for model in getattr(file, name, [])]
    return list({id(model): model for model in models}.values())


SPELLINGS: list[Spelling] = _listed("SPELLINGS")
FLIPPED = _listed("FLIPPED")
EITHER: list[Spelling | NearMiss] = [*_listed("EITHER"), *FLIPPED]
SOFTCAP: list[NearMiss] = _listed("SOFTCAP")
NEAR_MISSES: list[NearMiss] = [*_listed("NEAR_MISSES"), *_listed("RANDOM")]
