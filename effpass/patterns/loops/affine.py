"""One step of a recurrence as ``decay * state + add``, whatever operations it is written with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.fx import Node

from effpass.patterns.products.algebra import CASTS
from effpass.patterns.proposal import Missed

aten = torch.ops.aten


class Affine(NamedTuple):
    """``decay * state + add``, elementwise; ``add`` None is zero."""

    decay: Any
    add: Any


def step(node: Node, args: Sequence[Any], kwargs: dict[str, Any]) -> Affine:
    """The value of ``node`` where some of ``args`` are Affine. Raises Missed for what is not."""
    rule, value = RULES.get(node.target), node.meta.get("val")
    if rule is None or not isinstance(value, Tensor) or not value.is_floating_point():
        raise Missed(f"{_name(node)} is applied to the state inside the recurrence", node)
    _refuse_rounding(node, value)
    try:
        return rule(*args, **kwargs)
    except _Nonlinear as error:
        raise Missed(str(error), node) from error


class _Nonlinear(Exception):
    pass


def _refuse_rounding(node: Node, value: Tensor) -> None:
    for source in node.all_input_nodes:
        before = source.meta.get("val")
        if node.target in CASTS and isinstance(before, Tensor):
            if before.device != value.device:
                raise Missed(f"the state moves to {value.device} inside the recurrence", node)
            if torch.promote_types(before.dtype, value.dtype) != value.dtype:
                raise Missed(f"the state is rounded to {value.dtype} inside the recurrence", node)


def _name(node: Node) -> str:
    return getattr(node.target, "_opname", str(node.target))


def _lift(value: Any) -> Affine:
    return value if isinstance(value, Affine) else Affine(None, value)


def _sum(x: Any, y: Any) -> Any:
    if x is None or y is None:
        return y if x is None else x
    return x + y


def _add(x: Any, y: Any, alpha: Any = 1) -> Affine:
    x, y = _lift(x), _scaled(_lift(y), alpha)
    return Affine(_sum(x.decay, y.decay), _sum(x.add, y.add))


def _sub(x: Any, y: Any, alpha: Any = 1) -> Affine:
    return _add(x, y, -alpha)


def _scaled(x: Affine, factor: Any) -> Affine:
    if isinstance(factor, int | float) and factor == 1:
        return x
    return Affine(_product(x.decay, factor), _product(x.add, factor))


def _product(x: Any, factor: Any) -> Any:
    if x is None or (isinstance(x, float) and x == 1.0):
        return None if x is None else factor
    return x * factor


def _mul(x: Any, y: Any) -> Affine:
    if isinstance(x, Affine) and isinstance(y, Affine):
        raise _Nonlinear("the coefficient of the state depends on the state")
    return _scaled(x, y) if isinstance(x, Affine) else _scaled(y, x)


def _div(x: Any, y: Any) -> Affine:
    if not isinstance(x, Affine) or isinstance(y, Affine):
        raise _Nonlinear("the recurrence divides by the state")
    return Affine(x.decay / y, None if x.add is None else x.add / y)


def _addcmul(x: Any, y: Any, z: Any, value: Any = 1) -> Affine:
    product = _mul(y, z) if isinstance(y, Affine) or isinstance(z, Affine) else y * z
    return _add(x, product, value)


def _lerp(start: Any, end: Any, weight: Any) -> Affine:
    """``start + weight * (end - start)``."""
    if isinstance(weight, Affine):
        raise _Nonlinear("the coefficient of the state depends on the state")
    kept = _mul(start, 1 - weight) if isinstance(start, Affine) else start * (1 - weight)
    return _add(kept, _mul(end, weight) if isinstance(end, Affine) else end * weight)


def _where(condition: Any, x: Any, y: Any) -> Affine:
    if isinstance(condition, Affine):
        raise _Nonlinear("which value is taken depends on the state")
    x, y = _lift(x), _lift(y)
    decay = torch.where(condition, _or_zero(x.decay), _or_zero(y.decay))
    return Affine(decay, torch.where(condition, _or_zero(x.add), _or_zero(y.add)))


def _plus_product(product: Callable[..., Tensor]) -> Callable[..., Affine]:
    """``beta * x + alpha * (y @ z)``."""

    def rule(x: Any, y: Any, z: Any, beta: Any = 1, alpha: Any = 1) -> Affine:
        if isinstance(y, Affine) or isinstance(z, Affine):
            raise _Nonlinear("the state is mixed by a matrix inside the recurrence")
        return _add(_scaled(x, beta), product(y, z), alpha)

    return rule


def _or_zero(value: Any) -> Any:
    return 0.0 if value is None else value


def _einsum(equation: str, operands: Sequence[Any]) -> Affine:
    """An elementwise product written as an einsum: the state keeps all of its labels."""
    terms, _, result = equation.replace(" ", "").partition("->")
    labels = terms.split(",")
    at = [i for i, o in enumerate(operands) if isinstance(o, Affine)]
    if len(at) != 1 or labels[at[0]] != result or len(set(result)) != len(result):
        raise _Nonlinear("the state is mixed by an einsum inside the recurrence")
    state = operands[at[0]]
    others = [(t, o) for i, (t, o) in enumerate(zip(labels, operands, strict=True)) if i != at[0]]
    kept = "".join(c for c in result if any(c in t for t, _ in others))
    if any(set(t) - set(result) for t, _ in others):
        raise _Nonlinear("the state is mixed by an einsum inside the recurrence")
    factor = torch.einsum(f"{','.join(t for t, _ in others)}->{kept}", [o for _, o in others])
    for i, c in enumerate(result):
        factor = factor if c in kept else factor.unsqueeze(i)
    return _scaled(state, factor)


def _same(x: Any, *_: Any, **__: Any) -> Affine:
    return x


RULES: dict[Any, Callable[..., Affine]] = {
    aten.add.Tensor: _add,
    aten.sub.Tensor: _sub,
    aten.rsub.Scalar: lambda x, y, alpha=1: _sub(y, x, alpha),
    aten.rsub.Tensor: lambda x, y, alpha=1: _sub(y, x, alpha),
    aten.mul.Tensor: _mul,
    aten.multiply.Tensor: _mul,
    aten.div.Tensor: _div,
    aten.neg.default: lambda x: _scaled(x, -1),
    aten.addcmul.default: _addcmul,
    aten.baddbmm.default: _plus_product(torch.bmm),
    aten.addmm.default: _plus_product(torch.mm),
    aten.lerp.Tensor: _lerp,
    aten.lerp.Scalar: _lerp,
    aten.where.self: _where,
    aten.einsum.default: _einsum,
    aten.clone.default: _same,
    aten.contiguous.default: _same,
    aten.alias.default: _same,
    **dict.fromkeys(CASTS, _same),
}


def parts(value: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Decay and addend of a step, broadcast against each other, in the dtype of ``like``.

    Raises ValueError when the state is not read at all.
    """
    if not isinstance(value, Affine) or value.decay is None:
        raise ValueError("expected a value that depends on the state")
    decay = _tensor(value.decay, like)
    add = _tensor(0.0 if value.add is None else value.add, like)
    return torch.broadcast_tensors(decay, add)  # type: ignore[return-value]


def _tensor(value: Any, like: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        return value.to(like.dtype)
    return like.new_full((), value)
