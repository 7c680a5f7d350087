"""Schemas of an op and of its gradient, from the annotations of the reference function."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Sequence
from typing import Any

import torch


def schemas(
    reference: Callable[..., Any], tensors: Sequence[str], outputs: Sequence[str]
) -> tuple[str, str]:
    """``(arguments) -> (outputs)`` of the op, and of its gradient, which makes one for each tensor.

    A tuple of ints as a default (annotated ``Sequence[int]``) becomes a list of ints, which
    ``torch.library.infer_schema`` cannot write.
    """
    prototype, lists = _without_lists(reference)
    arguments = torch.library.infer_schema(prototype, mutates_args=()).partition(" -> ")[0]
    for name, default in lists.items():
        arguments = arguments.replace(f" {name}=None", f" {name}={default}")
    made = ", ".join(["Tensor"] * len(outputs))
    grads = ", ".join(f"Tensor grad_{name}" for name in outputs)
    found = ", ".join(["Tensor"] * len(tensors))
    return f"{arguments} -> ({made})", f"({grads}, {arguments[1:]} -> ({found})"


def _without_lists(
    reference: Callable[..., Any],
) -> tuple[Callable[..., Any], dict[str, list[int]]]:
    """The function with None for the defaults that are tuples, and these defaults."""
    parameters = inspect.signature(reference).parameters.values()
    lists = {p.name: list(p.default) for p in parameters if isinstance(p.default, tuple)}
    given = [None if isinstance(d, tuple) else d for d in reference.__defaults__ or ()]
    code, scope = reference.__code__, reference.__globals__
    prototype = types.FunctionType(code, scope, reference.__name__, tuple(given))
    prototype.__annotations__ = reference.__annotations__
    return prototype, lists
