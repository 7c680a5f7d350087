"""How kernels are launched, when they are refused, and how a compiler sees them.

Each op is registered as ``torch.library.triton_op`` would do it (that function itself would make
its own schema and gradient): called in eager mode it launches its kernels; AOTAutograd, and so
Inductor, trace through it and see every launch (``torch.library.wrap_triton``) and every
allocation. Nothing here waits for the device, and no grid depends on values of a tensor, so a CUDA
graph can hold every call.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.functional_tensor import FunctionalTensorMode

from effpass.ops.op import Op, empty_gradient

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CAPABILITY = (8, 0)  # bfloat16 products
_state = {"traced": False, "on cpu": False}
_libraries: dict[str, torch.library.Library] = {}


@functools.cache
def interpreting() -> bool:
    """Whether Triton's kernels run in its interpreter (``TRITON_INTERPRET=1``), on a CPU."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Inside, kernels accept tensors on a CPU: for tests under Triton's interpreter."""
    before = _state["on cpu"]
    _state["on cpu"] = True
    try:
        yield
    finally:
        _state["on cpu"] = before


def launch(kernel: Any, grid: Any, *arguments: Any, **meta: Any) -> None:
    """Runs ``kernel`` on ``grid``, sides or a function of block sizes; nothing if a side is 0."""
    if not callable(grid) and any(side == 0 for side in grid):
        return
    if _state["traced"]:
        kernel = torch.library.wrap_triton(kernel)
    kernel[grid](*arguments, **meta)


def tiled(count: Any, size: Any, block: str, *after: Any) -> Any:
    """A grid: ``count`` programs, times ``size`` in blocks as tuned, times ``after``."""
    if count == 0 or size == 0:
        return (0,)
    return lambda meta: (count, (size + meta[block] - 1) // meta[block], *after)


def refusal(
    arguments: Mapping[str, Any], dtypes: Sequence[torch.dtype] = DTYPES, integers: str = "cu_"
) -> str | None:
    """Why no kernel can take the tensors (perhaps fake) among the arguments, or None.

    Names that begin with ``integers`` are not asked for their dtype.
    """
    for name, tensor in arguments.items():
        if not isinstance(tensor, Tensor):
            continue
        reason = _device_refusal(name, tensor.device)
        if reason is not None:
            return reason
        if not name.startswith(integers) and tensor.is_floating_point():
            if tensor.dtype not in dtypes:
                found, needed = _name(tensor.dtype), [_name(d) for d in dtypes]
                return f"{name} is {found}; needs {', '.join(needed[:-1])} or {needed[-1]}"
    return None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _device_refusal(name: str, device: torch.device) -> str | None:
    if device.type == "cpu" and _state["on cpu"]:
        return None
    if device.type != "cuda":
        return f"{name} is on {device}; needs cuda"
    if importlib.util.find_spec("triton") is None:
        return "needs the package triton, which is not installed"
    if torch.version.hip is not None:
        return "needs an NVIDIA GPU, found an AMD one"
    found = _capability(device.index or 0)
    if found < CAPABILITY:
        return (
            f"needs compute capability {CAPABILITY[0]}.{CAPABILITY[1]}, found {found[0]}.{found[1]}"
        )
    return None


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def traceable(op: Op, forward: Callable[..., Any], backward: Callable[..., Any]) -> None:
    """Lets AOTAutograd trace through the registered ``gpu`` implementation of ``op``."""
    space = "effpass_gpu"
    library = _libraries.setdefault(space, torch.library.Library(space, "FRAGMENT"))
    defaults = [p.default for p in op.signature.parameters.values()]
    outputs = len(op.axes.outputs)
    for name, run, before in ((op.name, forward, 0), (f"{op.name}_backward", backward, outputs)):
        total = before + len(defaults)
        torch.library.register_torch_dispatch(
            f"{space}::{name}",
            FunctionalTensorMode,
            functools.partial(decompose, run, total, defaults),
            lib=library,
        )


def decompose(
    run: Callable[..., Any],
    total: int,
    defaults: Sequence[Any],
    mode: Any,
    overload: Any,
    types: Any,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """The kernels instead of the op, where a compiler traces; the op stays in exported programs."""
    from torch.export._trace import custom_triton_ops_decomposition_disabled

    if interpreting() or custom_triton_ops_decomposition_disabled():
        return mode.__torch_dispatch__(overload, types, args, kwargs or {})
    missing = total - len(args)  # the dispatcher drops trailing defaults
    filled = (*args, *(defaults[len(defaults) - missing :] if missing else ()))
    before = _state["traced"]
    _state["traced"] = True
    try:
        with mode:
            return run(*filled)
    finally:
        _state["traced"] = before


def gradients(
    op: Op, like: Tensor, given: Mapping[str, Any], found: Mapping[str, Any]
) -> tuple[Tensor, ...]:
    """One gradient for each tensor argument of ``op``, in its dtype; empty where there is none."""
    return tuple(
        found[n].to(given[n].dtype)
        if given[n] is not None and found.get(n) is not None
        else empty_gradient(like)
        for n in op.tensor_names
    )
