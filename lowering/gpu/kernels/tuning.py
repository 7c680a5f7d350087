"""Autotuning over a small, stated set; the choice is kept in Triton's cache folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import triton

from effpass.lowering.gpu.launch import interpreting


class Fixed:
    """A kernel with the first of its configurations: the interpreter has nothing to measure."""

    def __init__(self, kernel: Any, config: dict[str, int]) -> None:
        self.kernel, self.config = kernel, config

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        def run(*arguments: Any, **meta: Any) -> None:
            whole = {**meta, **self.config}
            self.kernel[grid(whole) if callable(grid) else grid](*arguments, **whole)

        return run


def tuned(key: Sequence[str], *configs: dict[str, int]) -> Callable[[Any], Any]:
    """Measures ``configs`` (block sizes, and ``warps``) once for each value of ``key``."""
    blocks = [{n: v for n, v in c.items() if n != "warps"} for c in configs]
    if interpreting():
        return lambda kernel: Fixed(kernel, blocks[0])
    given = [
        triton.Config(block, num_warps=c["warps"]) for block, c in zip(blocks, configs, strict=True)
    ]
    return triton.autotune(configs=given, key=list(key), cache_results=True)
