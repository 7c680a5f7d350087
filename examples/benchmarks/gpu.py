"""Measures effpass on an NVIDIA GPU: kernels, models, packing, token reduction.

    python examples/benchmarks/gpu.py --out FILE.json [--section ops|models|packing|reduction]

Correctness comes first: a section that finds a wrong number writes no time and exits with 1. A
section takes less than 8 minutes and can be resumed: cases that are in FILE are not run again, and
a section starts no new case when its time is over (``"complete": false``). Cases that cannot run
say why. Needs no network: models have random weights. ``--tiny`` runs everything small, on a CPU
too (kernels in Triton's interpreter, graphs not compiled), to try the script; its times mean
nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
if "--tiny" in sys.argv:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported

SECTIONS = ("ops", "models", "packing", "reduction")
SECONDS = 7 * 60
Case = tuple[str, Callable[[], dict[str, Any]]]


class WrongNumber(AssertionError):
    """A result that disagrees with its reference."""


def main() -> int:
    """Runs the chosen sections; 1 where a number is wrong."""
    arguments = _arguments()
    import torch

    if not torch.cuda.is_available():
        if not arguments.tiny:
            print("expected an NVIDIA GPU, found none; --tiny tries the script on a CPU")
            return 1
        sys.path.insert(0, str(Path(__file__).parents[2]))
        from tests.lowering.interpreter import correct

        correct()
    done = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    done.setdefault("setting", _setting(arguments.tiny))
    for section in arguments.section or SECTIONS:
        try:
            _run(
                section,
                arguments.tiny,
                done.setdefault(section, {}),
                lambda: _write(arguments.out, done),
            )
        except WrongNumber as error:
            done[section] = {"wrong": str(error)}
            _write(arguments.out, done)
            print(f"{section}: WRONG NUMBER, nothing is reported: {error}")
            return 1
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file, read and written")
    parser.add_argument("--section", action="append", choices=SECTIONS, help="default: all")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try the script")
    return parser.parse_args()


def _cases(section: str, tiny: bool) -> Iterator[Case]:
    import gpu_models
    import gpu_ops

    if section == "ops":
        return gpu_ops.cases(tiny)
    if section == "models":
        return gpu_models.models(tiny)
    return gpu_models.packing(tiny) if section == "packing" else gpu_models.reduction(tiny)


def _run(section: str, tiny: bool, found: dict[str, Any], write: Callable[[], None]) -> None:
    started = time.perf_counter()
    found["complete"] = False
    for name, case in _cases(section, tiny):
        if name in found and "failed" not in found[name]:
            continue
        if time.perf_counter() - started > SECONDS:
            print(f"{section}: time is over; run the same command again for the rest")
            return
        try:
            found[name] = case()
        except WrongNumber:
            raise
        except Exception as error:  # one case that cannot run must not hide the others
            if name.endswith("correct"):
                raise WrongNumber(f"{name} could not be checked: {error}") from error
            found[name] = {"failed": f"{type(error).__name__}: {error}"[:600]}
        print(f"{section} / {name}: {found[name]}", flush=True)
        write()
    found["complete"] = True
    write()


def _setting(tiny: bool) -> dict[str, Any]:
    import torch
    from setting import setting

    made = {**setting(torch.get_num_threads()), "tiny": tiny}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        made |= {"gpu": properties.name, "memory": properties.total_memory}
        made |= {"processors": properties.multi_processor_count, "cuda": torch.version.cuda}
    return made


def _write(path: Path, done: dict[str, Any]) -> None:
    path.write_text(json.dumps(done, indent=1) + "\n")


if __name__ == "__main__":
    raise SystemExit(main())
