"""The step sizes of a state-space model: ``softplus(dt + dt_bias)``, at least in float32."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import softplus

from effpass.ops.op import accumulate_dtype


def step_sizes(dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool) -> Tensor:
    """``dt`` (..., c), with ``dt_bias`` (c) added when given, and softplus taken when asked."""
    dt = dt.to(accumulate_dtype(dt.dtype))
    dt = dt if dt_bias is None else dt + dt_bias
    return softplus(dt) if dt_softplus else dt
