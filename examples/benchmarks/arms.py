"""The driver's end of a worker: one process an arm, one request at a time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

WORKER = Path(__file__).parent / "worker.py"
REST = 0.05  # seconds; lets the other process's idle OpenMP threads stop spinning


class ArmError(RuntimeError):
    """The arm could not do what was asked; the text is its error."""


class Arm:
    """A running worker. Its Inductor and kernel caches lie in ``caches``; new, they are empty.

    A ``cold`` one also has a temporary folder of its own, where Inductor keeps the header that it
    precompiles once a machine. ``script`` is another worker, ``more`` are arguments of its own.
    """

    def __init__(
        self,
        name: str,
        caches: Path,
        threads: int,
        quick: bool,
        cold: bool = False,
        script: Path = WORKER,
        more: Sequence[str] = (),
    ) -> None:
        self.name = name
        caches.mkdir(parents=True, exist_ok=True)
        self.log = caches / f"stderr-{len(list(caches.glob('stderr-*')))}.txt"
        command = [sys.executable, str(script), "--arm", name, "--threads", str(threads), *more]
        with self.log.open("w") as errors:
            self._process = subprocess.Popen(
                command + ["--quick"] * quick,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=_environment(caches, cold),
            )

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """The worker's answer. Raises ArmError when it failed or died."""
        assert self._process.stdin is not None and self._process.stdout is not None
        time.sleep(REST)
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise ArmError(f"the worker is gone: {self._last_words()}") from None
        line = self._process.stdout.readline()
        if not line:
            raise ArmError(f"the worker died in {do}: {self._last_words()}")
        reply = json.loads(line)
        if "error" in reply:
            raise ArmError(reply["error"])
        return reply

    def close(self) -> None:
        """Ends the worker."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def _last_words(self) -> str:
        self._process.wait()
        lines = self.log.read_text().strip().splitlines()
        return f"exit code {self._process.returncode}, {lines[-1] if lines else 'no message'}"


def _environment(caches: Path, cold: bool) -> dict[str, str]:
    return {
        **os.environ,
        "TORCHINDUCTOR_CACHE_DIR": str(caches / "inductor"),
        "EFFPASS_CACHE_DIR": str(caches / "effpass"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        **({"TMPDIR": str(caches)} if cold else {}),
    }
