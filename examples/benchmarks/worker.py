"""One arm in a process of its own: reads requests (a JSON line each) on stdin, answers on stdout.

The arms ``eager`` and ``inductor`` never import effpass, whose substitutions are process-global.
Requests: ``prepare`` (build, compile, first call), ``time``, ``scan_alone``, ``scan_memory``,
``lengths``. A failure is answered as ``{"error": ...}``; the process goes on.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import checks
import memory
import torch
from cases import CASES, QUICK, Job, Sizes

COMPILE: dict[str, Callable[[Any], Any]] = {
    "eager": lambda function: function,
    "inductor": torch.compile,
    "effpass": lambda function: torch.compile(function, backend="effpass"),
}


class Worker:
    """Holds the one case that is prepared now."""

    def __init__(self, arm: str, sizes: Sizes) -> None:
        self.arm, self.sizes = arm, sizes
        self.job: Job | None = None
        self.function: Any = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Does what ``request["do"]`` names, with the other entries as arguments."""
        do = {
            "prepare": self.prepare,
            "time": self.time,
            "scan_alone": lambda repeats: checks.scan_alone(self.sizes, repeats),
            "scan_memory": lambda: checks.scan_memory(self.sizes),
            "lengths": lambda repeats: checks.lengths(self.sizes, repeats, COMPILE[self.arm]),
        }[request.pop("do")]
        reply = do(**request)
        if self.arm != "effpass" and "effpass" in sys.modules:
            raise RuntimeError(f"expected the arm {self.arm} never to import effpass, but it did")
        return reply

    def prepare(self, case: str, save: str, settle: int) -> dict[str, Any]:
        """Builds a case, compiles it in its first call, whose results go to the file ``save``."""
        self.job = self.function = None
        torch._dynamo.reset()
        gc.collect()
        torch.manual_seed(0)
        self.job = CASES[case].build(self.sizes)
        started = time.perf_counter()
        self.function = COMPILE[self.arm](self.job.function)
        results = self.job.call(self.function)
        first = time.perf_counter() - started
        torch.save({name: value.clone() for name, value in results.items()}, save)
        for _ in range(settle):
            self.job.call(self.function)
        return {"first_call_s": first}

    def time(self, seconds: float, least: int, warm: int) -> dict[str, Any]:
        """Milliseconds of each call for about ``seconds``, and the peak memory meanwhile (MiB)."""
        assert self.job is not None
        for _ in range(warm):
            self.job.call(self.function)
        before = memory.reset_peak()
        times: list[float] = []
        while len(times) < least or sum(times) < 1e3 * seconds:
            started = time.perf_counter()
            self.job.call(self.function)
            times.append(1e3 * (time.perf_counter() - started))
        if before is None:
            return {"times_ms": times, "peak_mib": None, "added_mib": None}
        peak = memory.peak()
        return {"times_ms": times, "peak_mib": peak, "added_mib": peak - before}


def serve(answer: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """Answers each request on stdin by what ``answer`` makes of it, until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not mix with the answers
    for line in sys.stdin:
        try:
            reply = answer(json.loads(line))
        except Exception as error:
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {error}".strip()[:500]}
        answers.write(json.dumps(reply) + "\n")
        answers.flush()


def main() -> None:
    """Serves as one arm."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arm", choices=sorted(COMPILE), required=True)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--threads", type=int, required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    serve(Worker(args.arm, QUICK if args.quick else Sizes()).answer)


if __name__ == "__main__":
    main()
