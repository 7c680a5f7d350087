"""The translation table that ``torch.onnx`` is given: every op of effpass, as ONNX nodes."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from effpass.lowering.ort import (
    causal_conv1d,
    grouped_mm,
    linear_recurrence,
    selective_scan,
    sort,
    ssd_scan,
    token_matching,
    varlen_attention,
)
from effpass.lowering.ort.operators import missing
from effpass.ops import OPS
from effpass.ops.token_matching import token_matching as matching


def table(portable: bool = False) -> tuple[dict[Any, Callable[..., Any]], list[str]]:
    """The translation of every op's overload, and what the runtime lacks for it.

    ``portable`` keeps to operators of ``ai.onnx``; so does an op whose operator of
    ``com.microsoft`` the installed runtime lacks, which is then said.
    """
    lacks: list[str] = []
    made: dict[str, Callable[..., Any]] = {
        "linear_recurrence": linear_recurrence.linear_recurrence,
        "selective_scan": selective_scan.selective_scan,
        "varlen_attention": varlen_attention.varlen_attention,
    }
    for name, translate, operator, attributes in (
        ("ssd_scan", ssd_scan.ssd_scan, ssd_scan.OPERATOR, ()),
        (
            "causal_conv1d",
            causal_conv1d.causal_conv1d,
            causal_conv1d.OPERATOR,
            causal_conv1d.ATTRIBUTES,
        ),
    ):
        reason = None if portable else missing(operator, attributes)
        if reason is not None:
            lacks.append(f"{reason}; {name} is written with ai.onnx")
        made[name] = functools.partial(translate, portable=portable or reason is not None)
    translations = {OPS[name].overload: _translation(name, made[name]) for name in made}
    for overloads, translate in (
        (grouped_mm.overloads(), grouped_mm.grouped_mm),
        ([matching.overload], token_matching.token_matching),
        (sort.overloads(), sort.sort),
    ):
        translations |= dict.fromkeys(overloads, translate)
    return translations, lacks


def _translation(name: str, translate: Callable[..., Any]) -> Callable[..., Any]:
    """Fills in the defaults that the dispatcher drops; ``torch.onnx`` wants a plain function."""

    def translated(*args: Any, **kwargs: Any) -> Any:
        return translate(**OPS[name].bind(*args, **kwargs))

    translated.__name__ = name
    return translated
