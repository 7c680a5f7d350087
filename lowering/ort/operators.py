"""Which operators the installed ONNX Runtime has: asked of the runtime, never assumed."""

from __future__ import annotations

import functools

import onnxruntime
from onnxruntime.capi import onnxruntime_pybind11_state as runtime  # type: ignore[attr-defined]

CONTRIB = "com.microsoft"


@functools.cache
def _kernels() -> frozenset[tuple[str, str, str]]:
    return frozenset((k.provider, k.domain, k.op_name) for k in runtime.get_all_opkernel_def())


@functools.cache
def _attributes() -> dict[str, frozenset[str]]:
    schemas = runtime.get_all_operator_schema()
    return {s.name: frozenset(s.attributes) for s in schemas if s.domain == CONTRIB}


def missing(name: str, attributes: tuple[str, ...] = ()) -> str | None:
    """Why the CPU provider cannot run ``com.microsoft``'s operator ``name``; None if it can.

    ``attributes``: those of the operator that are needed.
    """
    if ("CPUExecutionProvider", CONTRIB, name) not in _kernels():
        return f"onnxruntime {onnxruntime.__version__} has no CPU kernel of {CONTRIB}.{name}"
    absent = [a for a in attributes if a not in _attributes()[name]]
    if absent:
        return (
            f"{CONTRIB}.{name} of onnxruntime {onnxruntime.__version__} has no attribute "
            f"{', '.join(absent)}"
        )
    return None
