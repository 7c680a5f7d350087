"""The proof that an adapter equals the function it stands for, on tiny inputs, before it is used.

Both run eagerly on the same random numbers: with and without optional arguments, for one token and
for several chunks, in float32 and twice in bfloat16. Results, their dtypes and shapes, and every
argument afterwards (states are written in place) must agree. Nothing global is touched: an own
random generator, no gradients, no autocast, no active modes, no default device.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from effpass.ops import OPS

Arguments = dict[str, Any]
Make = Callable[..., Tensor]
Cases = Callable[[Make], Iterable[Arguments]]

# largest difference allowed, as a part of the largest value
FLOAT32 = 1e-4  # sums of a few dozen terms in another order
BFLOAT16 = (
    5e-2  # libraries round dt, a state or an output to 8 bits where ops do not, and vice versa
)
IN_FLOAT32 = ("A",), ("A", "D", "delta_bias", "dt_bias", "state")  # as models mix their dtypes


def prove(
    original: Callable[..., Any], adapter: Callable[..., Any], cases: Cases, bfloat16: bool = True
) -> str | None:
    """None when ``adapter`` computes what ``original`` does, else the first disagreement."""
    accepted = inspect.signature(original).parameters.keys()
    with _alone():
        for arguments, limit in _all_cases(cases, bfloat16):
            if not arguments.keys() <= accepted:
                continue  # a kernel's reference function may take less than the kernel
            reason = _compare(original, adapter, arguments, limit)
            if reason is not None:
                return f"{reason} (given {', '.join(arguments)})"
    return None


class _Definitions(TorchDispatchMode):
    """Runs each op's definition, so that proving a function builds no kernel."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        reference = next((op.reference for op in OPS.values() if op.overload is func), func)
        return reference(*args, **(kwargs or {}))


def _alone() -> ExitStack:
    stack = ExitStack()
    stack.enter_context(_disable_current_modes())
    stack.enter_context(torch._C.DisableTorchFunction())  # a default device is such a mode
    stack.enter_context(torch.no_grad())
    stack.enter_context(torch.autocast("cpu", enabled=False))
    stack.enter_context(_Definitions())
    return stack


def _all_cases(cases: Cases, bfloat16: bool) -> Iterator[tuple[Arguments, float]]:
    generator = torch.Generator(device="cpu").manual_seed(0)

    def make(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu")

    every = list(cases(make))
    for arguments in every:
        yield arguments, FLOAT32
    for keep in IN_FLOAT32 if bfloat16 else ():
        yield {n: v if n in keep else _narrow(v) for n, v in every[-1].items()}, BFLOAT16


def _narrow(value: Any) -> Any:
    """A tensor in bfloat16; an expanded one stays expanded, since adapters look at strides."""
    if not isinstance(value, Tensor):
        return value
    base = value[tuple(slice(0, 1) if step == 0 else slice(None) for step in value.stride())]
    return base.to(torch.bfloat16).expand(value.shape)


def _compare(original: Any, adapter: Any, arguments: Arguments, limit: float) -> str | None:
    theirs, ours = _copy(arguments), _copy(arguments)
    try:
        expected = original(**theirs)
    except Exception as error:
        return f"the function itself failed: {type(error).__name__}: {error}"
    try:
        actual = adapter(**ours)
    except Exception as error:
        return f"its adapter failed: {type(error).__name__}: {error}"
    for what, a, b in _pairs(expected, actual, theirs, ours):
        reason = _differ(a, b, limit)
        if reason is not None:
            return f"{what} {reason}"
    return None


def _copy(arguments: Arguments) -> Arguments:
    return {
        name: v.clone() if isinstance(v, Tensor) and 0 not in v.stride() else v
        for name, v in arguments.items()
    }


def _pairs(
    expected: Any, actual: Any, theirs: Arguments, ours: Arguments
) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(expected, tuple) and isinstance(actual, tuple) and len(expected) == len(actual):
        for i, (a, b) in enumerate(zip(expected, actual, strict=True)):
            yield f"output {i}", a, b
    else:
        yield "the output", expected, actual
    for name, value in theirs.items():
        if isinstance(value, Tensor):
            yield f"{name} afterwards", value, ours[name]


def _differ(expected: Any, actual: Any, limit: float) -> str | None:
    if expected is None and actual is None:
        return None
    if not isinstance(expected, Tensor) or not isinstance(actual, Tensor):
        return f"is a {type(expected).__name__}, the op's a {type(actual).__name__}"
    if expected.shape != actual.shape or expected.dtype != actual.dtype:
        return (
            f"has shape {tuple(expected.shape)} and {expected.dtype}, "
            f"the op's {tuple(actual.shape)} and {actual.dtype}"
        )
    a, b = expected.double(), actual.double()
    scale = max(float(a.abs().max()), 1.0)
    worst = float((a - b).abs().max())
    if worst <= limit * scale:  # false for nan
        return None
    return f"differs by {worst:.3g} where values reach {scale:.3g}"
