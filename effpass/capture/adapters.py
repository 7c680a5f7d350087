"""Adapters: a function of ``transformers``, spelled as one effpass op.

Each public name takes the library's own torch function (``original``) and returns the function
that Dynamo traces in its place. An adapter maps arguments to the op's channel-last ones (views
only), and the results back to the shape, the dtype and the in-place updates that callers rely on.
What the op cannot express exactly goes to ``original``, which is then traced as usual.

Source: ``transformers`` 5.17 to 5.23, ``models/*/modeling_*.py``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from effpass.capture import calls

Function = Callable[..., Any]


def mamba_selective_scan(original: Function) -> Function:
    """Mamba's scan: ``hidden_states``, ``dt``, ``z`` (b, d, t); ``B``, ``C`` (b, n, t)."""

    def adapter(
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        z: Tensor | None = None,
        delta_bias: Tensor | None = None,
        delta_softplus: bool = False,
        return_last_state: bool = False,
        use_mambapy: bool = False,
        use_associative_scan: bool = False,
        **kwargs: Any,
    ) -> Any:
        bias, softplus = delta_bias, delta_softplus
        y, state = calls.scan_tokens_last(hidden_states, dt, A, B, C, D, z, bias, softplus)
        out = y.to(_scan_dtype(hidden_states, D, z))
        return (out, state) if return_last_state else out

    return adapter


def mamba_selective_state_update(original: Function) -> Function:
    """Mamba's decoding step: ``hidden_states``, ``dt``, ``z`` (b, d); ``B``, ``C`` (b, n)."""

    def adapter(
        state: Tensor,
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        dt_bias: Tensor | None = None,
        dt_softplus: bool = False,
        z: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        return calls.scan_step(state, hidden_states, dt, A, B, C, D, z, dt_bias, dt_softplus)

    return adapter


def mamba2_chunk_scan(original: Function) -> Function:
    """Mamba-2's scan: the op's own layout; always answers in at least float32."""

    def adapter(
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        chunk_size: int,
        D: Tensor | None = None,
        dt_bias: Tensor | None = None,
        initial_states: Tensor | None = None,
        dt_softplus: bool = False,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        return_final_states: bool = False,
        **kwargs: Any,
    ) -> Any:
        x, bias, start = hidden_states, dt_bias, initial_states
        low, high = calls.limits(dt_limit)
        y, state = torch.ops.effpass.ssd_scan.default(
            x, dt, A, B, C, D, None, bias, dt_softplus, low, high, start, None
        )
        dtype = torch.float32 if D is None else torch.promote_types(torch.float32, D.dtype)
        out = y.to(dtype)
        return (out, state.to(torch.float32)) if return_final_states else out

    return adapter


def mamba2_selective_state_update(original: Function) -> Function:
    """Mamba-2's decoding step: everything expanded to (b, h, p), ``A`` to (h, p, n)."""

    def adapter(
        state: Tensor,
        hidden_states: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        dt_bias: Tensor | None = None,
        dt_softplus: bool = False,
        z: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if not calls.tied(dt, A, D, dt_bias):
            return original(state, hidden_states, dt, A, B, C, D, dt_bias, dt_softplus, z)
        return calls.ssd_step(state, hidden_states, dt, A, B, C, D, z, dt_bias, dt_softplus)

    return adapter


def causal_conv1d_fn(original: Function) -> Function:
    """The causal convolution: ``hidden_states`` (b, c, t), ``weight`` (c, w)."""

    def adapter(
        hidden_states: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
        **kwargs: Any,
    ) -> Tensor:
        if not calls.is_silu(activation):
            return original(hidden_states, weight, bias, activation)
        return calls.convolve(hidden_states, weight, bias, activation, None)[0]

    return adapter


def causal_conv1d_update(original: Function) -> Function:
    """A convolution step: ``hidden_states`` (b, c, t), ``conv_state`` (b, c, >= w-1)."""

    def adapter(
        hidden_states: Tensor,
        conv_state: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
    ) -> Tensor:
        too_short = conv_state.shape[-1] < weight.shape[-1] - 1
        if too_short or not calls.is_silu(activation):
            return original(hidden_states, conv_state, weight, bias, activation)
        return calls.conv_step(hidden_states, conv_state, weight, bias, activation)

    return adapter


def mamba2_split_conv1d_scan_combined(original: Function) -> Function:
    """Mamba-2's layer in one kernel: without one it answers None, and the layer goes on."""

    def adapter(*args: Any, **kwargs: Any) -> Any:
        return original(*args, **kwargs)

    return adapter


def rnn_scan(original: Function) -> Function:
    """RecurrentGemma's loop over tokens, a method: ``hidden_states``, ``recurrent_gate`` (b, t, d);
    ``reset`` (b, t, 1) booleans, true where a sequence begins; ``recurrent_states`` (b, d)."""

    def adapter(
        self: Any,
        hidden_states: Tensor,
        recurrent_gate: Tensor,
        reset: Tensor,
        recurrent_states: Tensor | None,
        acc_dtype: torch.dtype = torch.float32,
    ) -> Any:
        gate, x, start = recurrent_gate * ~reset, hidden_states, recurrent_states
        if gate.dtype != x.dtype or acc_dtype != torch.float32 or x.dtype == torch.float64:
            return original(self, x, recurrent_gate, reset, start, acc_dtype)
        return torch.ops.effpass.linear_recurrence.default(gate, x, start, None)

    return adapter


def _scan_dtype(x: Tensor, D: Tensor | None, z: Tensor | None) -> torch.dtype:
    """What transformers' scan answers in: a matmul's dtype, promoted by ``D x`` and by ``z``."""
    device = x.device.type
    cast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if cast else x.dtype
    if D is not None:
        dtype = torch.promote_types(dtype, torch.promote_types(x.dtype, D.dtype))
    return dtype if z is None else torch.promote_types(dtype, z.dtype)
