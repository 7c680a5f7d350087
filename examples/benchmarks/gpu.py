"""Measures effpass on an NVIDIA GPU: kernels, models, packing, token reduction.

    python examples/benchmarks/gpu.py --out FILE.json [--section ops|models|packing|reduction]

Correctness comes first: a section that finds a wrong number writes no time and exits with 1. Every
case is a process of its own, since stock torch must not share one with effpass, whose substitutions
are for a whole process; it is ended after CASE_SECONDS. A section starts no case that it could not
end within SECTION_SECONDS (``"complete": false``): the same command goes on where it stopped, and
tries again what failed. Needs no network: models have random weights. ``--tiny`` runs everything
small, on a CPU too (kernels in Triton's interpreter, graphs not compiled), to try the script; its
times mean nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
if "--tiny" in sys.argv:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported

SECTIONS = ("ops", "models", "packing", "reduction")
SECTION_SECONDS = 470
CASE_SECONDS = 200
RESULT = "result: "
WRONG = 3  # exit status of a case with a wrong number


def main() -> int:
    """Runs the chosen sections, or one case; 1 where a number is wrong."""
    arguments = _arguments()
    import torch

    if not torch.cuda.is_available() and not arguments.tiny:
        print("expected an NVIDIA GPU, found none; --tiny tries the script on a CPU")
        return 1
    if arguments.case:
        return _case(*arguments.case, arguments.tiny)
    done = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    done.setdefault("setting", _setting(arguments.tiny))

    def write() -> None:
        arguments.out.write_text(json.dumps(done, indent=1) + "\n")

    for section in arguments.section or SECTIONS:
        wrong = _run(section, arguments, done.setdefault(section, {}), write)
        if wrong:
            done[section] = {"wrong": wrong}
            write()
            print(f"{section}: WRONG NUMBER, nothing is reported: {wrong}")
            return 1
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="JSON file, read and written")
    parser.add_argument("--section", action="append", choices=SECTIONS, help="default: all")
    parser.add_argument("--tiny", action="store_true", help="small sizes, to try the script")
    parser.add_argument("--case", nargs=2, metavar=("SECTION", "NAME"), help="one case, here")
    return parser.parse_args()


def _cases(section: str, tiny: bool) -> Iterator[tuple[str, Callable[[], dict[str, Any]]]]:
    if section == "ops":
        import gpu_ops

        return gpu_ops.cases(tiny)
    import gpu_models

    return {
        "models": gpu_models.models,
        "packing": gpu_models.packing,
        "reduction": gpu_models.reduction,
    }[section](tiny)


def _run(
    section: str, arguments: argparse.Namespace, found: dict[str, Any], write: Callable[[], None]
) -> str | None:
    """Fills ``found``; answers what is wrong, or None."""
    started = time.monotonic()
    found["complete"] = False
    for name, _ in _cases(section, arguments.tiny):
        if name in found and "failed" not in found[name]:
            continue
        if time.monotonic() - started > SECTION_SECONDS - CASE_SECONDS:
            print(f"{section}: time is over; run the same command again for the rest")
            return None
        found[name] = _child(section, name, arguments)
        if "wrong" in found[name]:
            return f"{name}: {found[name]['wrong']}"
        if "correct" in name and not found[name].get("checked"):
            return f"{name} could not be checked: {found[name]}"
        print(f"{section} / {name}: {found[name]}", flush=True)
        write()
    found["complete"] = True
    write()
    return None


def _child(section: str, name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """What one case found in a process of its own, with whatever it started ended."""
    command = [sys.executable, __file__, "--out", str(arguments.out), "--case", section, name]
    command += ["--tiny"] if arguments.tiny else []
    pipe = subprocess.PIPE
    child = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True)
    try:
        out, err = child.communicate(timeout=CASE_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(child.pid, signal.SIGKILL)
        child.communicate()
        return {"over": f"took more than {CASE_SECONDS} s"}
    for line in out.splitlines():
        if line.startswith(RESULT):
            return json.loads(line.removeprefix(RESULT))
    last = err.strip().splitlines()[-1:] or [f"exit status {child.returncode}"]
    return {"wrong" if child.returncode == WRONG else "failed": last[0][:600]}


def _case(section: str, name: str, tiny: bool) -> int:
    """Runs one case and prints what it found."""
    import torch
    from gpu_timing import WrongNumber

    if not torch.cuda.is_available():
        sys.path.insert(0, str(HERE.parents[1]))
        from tests.lowering.interpreter import correct

        correct()
    try:
        found = dict(_cases(section, tiny))[name]()
    except WrongNumber as error:
        print(str(error), file=sys.stderr)
        return WRONG
    print(RESULT + json.dumps(found), flush=True)
    return 0


def _setting(tiny: bool) -> dict[str, Any]:
    import torch
    from setting import setting

    made = {**setting(torch.get_num_threads()), "tiny": tiny}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        made |= {"gpu": properties.name, "memory": properties.total_memory}
        made |= {"processors": properties.multi_processor_count, "cuda": torch.version.cuda}
    return made


if __name__ == "__main__":
    raise SystemExit(main())
