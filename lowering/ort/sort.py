"""``aten::sort.stable`` in ONNX: ``TopK`` of all entries, in which the earlier of equals is first.

Token reduction orders tokens by scores, and equal scores by place.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch

from effpass.lowering.ort.build import Value, cast, op, size

NARROW = (ir.DataType.FLOAT16, ir.DataType.BFLOAT16)  # float32 holds each exactly


def sort(
    self: Value, stable: bool | None = None, dim: int = -1, descending: bool = False
) -> tuple[Value, Value]:
    """Values and int64 indices, sorted along ``dim``; always stable."""
    wide = ir.DataType.FLOAT if self.dtype in NARROW else self.dtype
    values, order = op.TopK(
        cast(self, wide), size(self, dim), axis=dim, largest=int(descending), sorted=1
    )
    return op.Cast(values, to=self.dtype.value), order


def overloads() -> list[Any]:
    """The operators that this translates."""
    return [torch.ops.aten.sort.stable]
