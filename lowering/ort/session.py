"""A session of ONNX Runtime: reads torch's tensors where they lie, and answers torch tensors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor

TYPES: dict[str, torch.dtype] = {
    "tensor(float)": torch.float32,
    "tensor(double)": torch.float64,
    "tensor(float16)": torch.float16,
    "tensor(bfloat16)": torch.bfloat16,
    "tensor(int64)": torch.int64,
    "tensor(int32)": torch.int32,
    "tensor(int8)": torch.int8,
    "tensor(uint8)": torch.uint8,
    "tensor(bool)": torch.bool,
}
ELEMENTS: dict[torch.dtype, int] = {  # onnx.TensorProto.DataType
    torch.float32: 1,
    torch.uint8: 2,
    torch.int8: 3,
    torch.int32: 6,
    torch.int64: 7,
    torch.bool: 9,
    torch.float16: 10,
    torch.float64: 11,
    torch.bfloat16: 16,
}


class SessionError(Exception):
    """ONNX Runtime could not load or run a model; the text is its reason."""


def available() -> tuple[str, ...]:
    """CUDA where the installed runtime and torch both have it, and the CPU."""
    cuda = "CUDAExecutionProvider"
    found = cuda in onnxruntime.get_available_providers() and torch.cuda.is_available()
    return (cuda, "CPUExecutionProvider") if found else ("CPUExecutionProvider",)


class Session:
    """A loaded model. ``inputs`` and ``outputs``: names and dtypes, in order."""

    def __init__(
        self,
        model: bytes | str | Path,
        providers: Sequence[str] | None = None,
        threads: int | None = None,
    ) -> None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # errors are raised
        options.intra_op_num_threads = threads or torch.get_num_threads()
        source = model if isinstance(model, bytes) else str(model)
        try:
            self._session = onnxruntime.InferenceSession(
                source, options, providers=list(providers or available())
            )
        except Exception as error:  # the runtime's own classes, one a status code
            raise SessionError(_first_line(error)) from error
        self.inputs = {i.name: TYPES[i.type] for i in self._session.get_inputs()}
        self.shapes = {i.name: i.shape for i in self._session.get_inputs()}
        self.outputs = {o.name: TYPES[o.type] for o in self._session.get_outputs()}
        self.metadata: dict[str, str] = dict(self._session.get_modelmeta().custom_metadata_map)
        self.providers: list[str] = list(self._session.get_providers())

    def run(self, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Runs on tensors by name, without copies of contiguous ones. Raises SessionError."""
        binding = self._session.io_binding()
        kept = []
        for name, dtype in self.inputs.items():
            tensor = given[name].detach()
            if tensor.dtype != dtype:
                raise SessionError(f"expected input {name} to be {dtype}, found {tensor.dtype}")
            tensor = tensor.contiguous()
            kept.append(tensor)
            device = tensor.device
            binding.bind_input(
                name,
                device.type,
                device.index or 0,
                ELEMENTS[dtype],
                tuple(tensor.shape),
                tensor.data_ptr() or _NOTHING.data_ptr(),
            )
        where = "cuda" if "CUDAExecutionProvider" in self.providers else "cpu"
        for name in self.outputs:
            binding.bind_output(name, where)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:
            raise SessionError(_first_line(error)) from error
        made = zip(self.outputs.items(), binding.get_outputs(), strict=True)
        return {name: _tensor(value, dtype) for (name, dtype), value in made}


_NOTHING = torch.zeros(1)


def _tensor(value: Any, dtype: torch.dtype) -> Tensor:
    """The tensor that lies where the runtime put it."""
    made = torch.from_dlpack(value._get_c_value().to_dlpack() if _opaque(value) else value)
    return made.view(dtype) if made.dtype != dtype else made


def _opaque(value: Any) -> bool:
    return not hasattr(value, "__dlpack__")


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]
