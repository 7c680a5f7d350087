"""Builds the call of ``linear_recurrence`` that a match of cumulative sums stands for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.fx import Node
from torch.nn.functional import pad

from effpass.patterns.products.algebra import Dims, Label
from effpass.patterns.products.arranger import Arranger
from effpass.patterns.products.monomials import Key

Values = Mapping[Node, Tensor]


@dataclass
class Match:
    """h, of labels ``dims``: h[t] = decays[t] h[t-1] + scale inputs[t], in powers of keys.

    What is there before the first token is ``start_scale`` times ``start``, or nothing.
    """

    dims: Dims
    time: Label
    decays: dict[Key, float]
    inputs: dict[Key, float]
    scale: float
    start: dict[Key, float] | None
    start_scale: float

    @property
    def nodes(self) -> tuple[Node, ...]:
        """What it is made of."""
        keys = (*self.decays, *self.inputs, *(self.start or {}))
        return tuple(dict.fromkeys(key.node for key in keys if key.node is not None))

    @property
    def labels(self) -> set[Label]:
        """All labels of decays and inputs."""
        made = {r for key in (*self.decays, *self.inputs) for r in key.labels}
        return made | {k.time for k in self.decays if k.node is not None and k.inside is not None}  # type: ignore[misc]


def call(match: Match, values: Values, dtype: torch.dtype) -> Tensor:
    """h in its own layout, in ``dtype`` (float64 where the values are)."""
    lay = Arranger()
    labels = [label for dim in match.dims for label in dim]
    others = [label for label in labels if label is not match.time]
    order = [*others[:1], match.time, *others[1:]] if len(others) > 1 else [match.time, *others]
    like = next(iter(values.values()))
    double = any(value.dtype is torch.float64 for value in values.values())
    work = torch.float64 if double else dtype
    decay = _decay(match, values, lay, order, like)
    add = _product(match.inputs, match.scale, values, lay, order, like)
    start = None
    if match.start is not None:
        start = _product(match.start, match.start_scale, values, lay, others, like)
        start = _grouped(lay.full(start, others), len(others)).to(
            torch.promote_types(work, start.dtype)
        )
    a, b = (_cast(lay.full(v, order), work) for v in (decay, add))
    if len(others) > 1:
        a, b = (v.flatten(2) if len(others) > 2 else v for v in (a, b))
    else:
        a, b = (v.unsqueeze(0) if others else v[None, :, None] for v in (a, b))
    h, _ = torch.ops.effpass.linear_recurrence(a, b, start)
    h = h.reshape([lay.sizes[label] for label in order])
    return lay.merged(h, order, match.dims)


def _cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value if value.dtype == dtype else value.to(dtype)


def _grouped(start: Tensor, others: int) -> Tensor:
    """The start as (b, d)."""
    if others > 2:
        return start.flatten(1)
    return start if others == 2 else start.reshape(1, -1)


def _decay(match: Match, values: Values, lay: Arranger, order: list[Label], like: Tensor) -> Tensor:
    """The coefficients of the recurrence."""
    result: Tensor | None = None
    for key, power in match.decays.items():
        if key.node is None:
            laid = like.new_full([1] * len(order), key.number**power)
        else:
            one = _one_decay(key, power, values[key.node])
            dims = tuple((match.time,) if d == (key.inside,) else d for d in key.dims)
            laid = lay.lay(one, dims, order)
        result = laid if result is None else result * laid
    assert result is not None
    return result


def _one_decay(key: Key, power: float, value: Tensor) -> Tensor:
    """By how much one running product grows from token to token."""
    if key.kind in ("expsum", "exppow"):
        made = _exp(value, power)
    else:
        made = value if power == 1 else value.reciprocal() if power == -1 else value**power
    if not key.front:
        return made
    dim = key.dims.index((key.inside,))  # type: ignore[arg-type]
    return pad(made, [0, 0] * (made.dim() - dim - 1) + [key.front, 0], value=1.0)


def _exp(value: Tensor, power: float) -> Tensor:
    return value.exp() if power == 1 else (-value).exp() if power == -1 else (value * power).exp()


def _product(
    keys: Mapping[Key, float],
    scale: float,
    values: Values,
    lay: Arranger,
    order: list[Label],
    like: Tensor,
) -> Tensor:
    """``scale`` times powers of tensors and of exponentials."""
    result: Tensor | None = None
    exponent: Tensor | None = None
    for key, power in keys.items():
        assert key.node is not None
        laid = lay.lay(values[key.node], key.dims, order)
        if key.kind == "exp":
            laid = laid if power == 1 else laid * power
            exponent = laid if exponent is None else exponent + laid
        elif power == -1:
            result = laid.reciprocal() if result is None else result / laid
        else:
            laid = laid if power == 1 else laid**power
            result = laid if result is None else result * laid
    if exponent is not None:
        result = exponent.exp() if result is None else result * exponent.exp()
    if result is None:
        return like.new_full([1] * len(order), scale)
    return result if scale == 1 else result * scale
