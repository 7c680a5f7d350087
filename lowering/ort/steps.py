"""What both selective scans do around their recurrence: step sizes before, skip and gate after."""

from __future__ import annotations

import onnx_ir as ir

from effpass.lowering.ort.build import Value, cast, op, silu


def step_sizes(dt: Value, dt_bias: Value | None, dt_softplus: bool, acc: ir.DataType) -> Value:
    """``softplus(dt + dt_bias)`` in ``acc``."""
    dt = cast(dt, acc)
    dt = dt if dt_bias is None else op.Add(dt, cast(dt_bias, acc))
    if not dt_softplus:
        return dt
    return op.Softplus(dt) if acc == ir.DataType.FLOAT else _softplus(dt)


def _softplus(x: Value) -> Value:
    """max(x, 0) + log(1 + exp(-|x|)): the runtime's own is for float32 alone."""
    small = op.Log(op.Add(op.Exp(op.Neg(op.Abs(x))), op.CastLike(op.Constant(value_int=1), x)))
    return op.Add(op.Max(x, op.CastLike(op.Constant(value_int=0), x)), small)


def finish(
    y: Value, x: Value, D: Value | None, z: Value | None, acc: ir.DataType, out: ir.DataType
) -> Value:
    """``(y + D x) silu(z)``, with D already shaped like x, in ``out``."""
    y = y if D is None else op.Add(y, op.Mul(D, x))
    y = y if z is None else op.Mul(y, silu(cast(z, acc)))
    return op.Cast(y, to=out.value)
