"""Boundaries of packed rows that a model was given and did not hand down to its layers.

Dynamo inlines a whole model into the function that it compiles. A layer's function, when traced,
can so be told what that outermost function was called with, whether or not the code in between
passes it on: ``MambaForCausalLM`` takes ``seq_idx`` and drops it.
"""

from __future__ import annotations

import inspect
from types import CodeType
from typing import Any

import torch
from torch._dynamo.comptime import comptime
from torch._dynamo.variables import ConstDictVariable, TensorVariable
from torch._dynamo.variables.lazy import LazyVariableTracker

NAMES = ("cu_seq_lens_q", "seq_idx", "position_ids")


def marked(function: Any, first: str) -> Any:
    """``function`` on a first argument that is marked as a packed row, where boundaries are given.

    ``first`` is that argument's name. Boundaries are given to the function itself (transformers
    hands down ``kwargs``), or to the model.
    """

    def traced(*args: Any, **kwargs: Any) -> Any:
        offsets = kwargs.get("cu_seqlens")
        if offsets is None:
            offsets = kwargs.get("cu_seq_lens_q")
        numbers, positions = kwargs.get("seq_idx"), kwargs.get("position_ids")
        if offsets is None and numbers is None:
            model_offsets, model_numbers, model_positions = None, None, None
            comptime(_tell)
            offsets, numbers = model_offsets, model_numbers
            positions = model_positions if positions is None else positions
        if offsets is None and numbers is None and positions is None:
            return function(*args, **kwargs)
        args = tuple(_not_parameter(value) for value in args)
        kwargs = {name: _not_parameter(value) for name, value in kwargs.items()}
        row = args[0] if args else kwargs[first]
        row = torch.ops.effpass.packed_row.default(row, offsets, numbers, positions)
        if args:
            return function(row, *args[1:], **kwargs)
        return function(**(kwargs | {first: row}))

    return traced


def _not_parameter(value: Any) -> Any:
    """A view of a parameter: DDP cuts before nodes that read one, so between mark and op."""
    return value.view(value.shape) if isinstance(value, torch.nn.Parameter) else value


def _tell(context: Any) -> None:
    """Sets locals of ``traced`` above, while Dynamo traces it."""
    frame = context._i_will_not_complain_if_bc_breaks_InstructionTranslator()
    root = frame
    while getattr(root, "parent", None) is not None:
        root = root.parent
    given = {name: value for name, value in _arguments(root) if _is_tensor(value)}
    offsets = given.get("cu_seq_lens_q")
    told = {"model_offsets": offsets, "model_numbers": given.get("seq_idx")}
    told["model_positions"] = given.get("position_ids")
    for name, value in told.items():
        if value is not None:
            frame.symbolic_locals[name] = value


def _arguments(root: Any) -> Any:
    """Names and variables of the outermost function, with those in its ``**kwargs``."""
    for name, value in list(root.symbolic_locals.items()):
        if name in NAMES:
            yield name, _realized(value)
        elif name == _keywords(root.f_code):
            every = _realized(value)
            if isinstance(every, ConstDictVariable):
                for key, each in list(every.items.items()):
                    key = key.vt.as_python_constant()
                    if key in NAMES:
                        yield key, _realized(each)


def _keywords(code: CodeType) -> str | None:
    """The name of ``**kwargs`` in a function's code."""
    if not code.co_flags & inspect.CO_VARKEYWORDS:
        return None
    positional = bool(code.co_flags & inspect.CO_VARARGS)
    return code.co_varnames[code.co_argcount + code.co_kwonlyargcount + positional]


def _realized(value: Any) -> Any:
    return value.realize() if isinstance(value, LazyVariableTracker) else value


def _is_tensor(value: Any) -> bool:
    return isinstance(value, TensorVariable)
