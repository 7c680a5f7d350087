"""Triton's interpreter as a GPU computes: it cuts bfloat16 instead of rounding, multiplies its bit
patterns as integers, scans number by number, and does not know that numpy (2.4) no longer makes an
int of an array with one number.
"""

from typing import Any

import numpy as np
import torch


def _rounded(data: np.ndarray) -> np.ndarray:
    """float32 -> the bits of the nearest bfloat16."""
    made = torch.from_numpy(np.ascontiguousarray(data)).bfloat16()
    return made.view(torch.int16).numpy().view(np.uint16).reshape(data.shape)


def _widened(bits: np.ndarray) -> np.ndarray:
    """The bits of bfloat16 -> float32."""
    wide = np.ascontiguousarray(bits).view(np.uint16).astype(np.uint32) << np.uint32(16)
    return wide.view(np.float32).reshape(bits.shape)


def correct() -> None:
    """Puts right, for this process, what the interpreter does otherwise than a GPU."""
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float
    builder: Any = interpreter.InterpreterBuilder
    dot = builder.create_dot

    def converted(data: np.ndarray, found: Any, wanted: Any, rounding: Any) -> np.ndarray:
        if (found, wanted) == (tl.float32, tl.bfloat16):
            return _rounded(data.view(np.float32))
        if (found, wanted) == (tl.bfloat16, tl.float32):
            return _widened(data).view(np.uint32)
        return convert(data, found, wanted, rounding)

    def multiplied(self: Any, a: Any, b: Any, d: Any, *more: Any) -> Any:
        if a.dtype == tl.bfloat16:
            a, b = (interpreter.TensorHandle(_widened(x.data), tl.float32) for x in (a, b))
        return dot(self, a, b, d, *more)

    def scanned(self: Any, inputs: Any) -> list[Any]:
        rows = [np.moveaxis(x.handle.data, self.axis, 0) for x in inputs]
        held = [self.to_tensor(r[0].copy(), x.dtype) for r, x in zip(rows, inputs, strict=True)]
        made = [held]
        for i in range(1, len(rows[0])):
            new = [self.to_tensor(r[i].copy(), x.dtype) for r, x in zip(rows, inputs, strict=True)]
            held = list(self.combine_fn.fn(*held, *new))
            made.append(held)
        each = (
            np.stack([m[j].handle.data.reshape(rows[j][0].shape) for m in made], self.axis)
            for j in range(len(inputs))
        )
        return [self.to_tensor(data, x.dtype) for data, x in zip(each, inputs, strict=True)]

    def reduced(self: Any, inputs: Any) -> list[Any]:
        flat = self.axis is None
        data = [x.handle.data.reshape(-1) if flat else x.handle.data for x in inputs]
        rows = [np.moveaxis(each, 0 if flat else self.axis, 0) for each in data]
        held = [self.to_tensor(r[0].copy(), x.dtype) for r, x in zip(rows, inputs, strict=True)]
        for i in range(1, len(rows[0])):
            new = [self.to_tensor(r[i].copy(), x.dtype) for r, x in zip(rows, inputs, strict=True)]
            made = self.combine_fn.fn(*held, *new)
            held = list(made) if isinstance(made, tuple) else [made]
        held = [
            self.to_tensor(h.handle.data.reshape(r[0].shape), x.dtype)
            for h, r, x in zip(held, rows, inputs, strict=True)
        ]
        if self.keep_dims and not flat:
            held = [
                self.to_tensor(np.expand_dims(h.handle.data, self.axis), x.dtype)
                for h, x in zip(held, inputs, strict=True)
            ]
        return held

    language = interpreter._patch_lang_tensor

    def indexed(tensor: Any, scope: Any) -> None:
        language(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def flipped(x: Any, dim: int | None = None) -> Any:
        data = np.ascontiguousarray(np.flip(x.handle.data, dim))
        return tl.tensor(interpreter.TensorHandle(data, x.handle.dtype), x.type)

    tl.flip = flipped  # the same in one step
    interpreter._patch_lang_tensor = indexed
    interpreter._convert_float = converted
    builder.create_dot = multiplied
    interpreter.ScanOps.generic_scan = scanned
    interpreter.ReduceOps.generic_reduce = reduced
