"""Autotuning over a small, stated set; the choice is kept in Triton's cache folder.

Every kernel that has a choice states its set in one place, its ``tuned``. A set is measured at the
first call with new values of ``key``, or with other dtypes. While a CUDA graph is being captured
nothing can be measured: a kernel that has not run before then takes the first of its set, for that
call. Triton's interpreter, which has nothing to measure, takes ``interpreted``, or the first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from triton.runtime.autotuner import Autotuner

from effpass.lowering.gpu.launch import interpreting

LAUNCH = {"warps": "num_warps", "stages": "num_stages"}


class Fixed:
    """A kernel with one configuration, for the interpreter."""

    def __init__(self, kernel: Any, config: dict[str, int]) -> None:
        self.kernel, self.config = kernel, config

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        def run(*arguments: Any, **meta: Any) -> None:
            whole = {**meta, **self.config}
            self.kernel[grid(whole) if callable(grid) else grid](*arguments, **whole)

        return run


class CapturingError(RuntimeError):
    """A measurement was asked for inside a CUDA graph."""


class Measured(Autotuner):
    """Triton's autotuner, which measures nothing while a CUDA graph is being captured."""

    def _bench(self, *args: Any, config: Any, **meta: Any) -> Any:
        if torch.cuda.is_current_stream_capturing():
            raise CapturingError
        return super()._bench(*args, config=config, **meta)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the kernel with the configuration measured to be the fastest."""
        try:
            return super().run(*args, **kwargs)
        except CapturingError:
            return self.fn.run(*args, **kwargs, **self.configs[0].all_kwargs())


def tuned(
    key: Sequence[str], *configs: dict[str, int], interpreted: dict[str, int] | None = None
) -> Callable[[Any], Any]:
    """Measures ``configs`` (block sizes, ``warps``, ``stages``) for each value of ``key``."""
    blocks = [{n: v for n, v in c.items() if n not in LAUNCH} for c in configs]
    if interpreting():
        return lambda kernel: Fixed(kernel, interpreted or blocks[0])
    given = [
        triton.Config(block, **{LAUNCH[n]: v for n, v in c.items() if n in LAUNCH})
        for block, c in zip(blocks, configs, strict=True)
    ]

    def decorate(kernel: Any) -> Any:
        return Measured(kernel, kernel.arg_names, given, list(key), None, None, cache_results=True)

    return decorate
