"""Adapters, as in ``effpass.capture.adapters``, for packages that are scans and convolutions only.

Sources: ``mamba_ssm`` 2.3 (``ops/selective_scan_interface.py``, ``ops/triton/``), ``causal_conv1d``
1.6 (``causal_conv1d_interface.py``), ``mambapy`` 1.2 (``mamba.py``, ``vim.py``).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from effpass.capture import calls
from effpass.capture.adapters import Function


def selective_scan_fn(original: Function) -> Function:
    """``mamba_ssm.selective_scan_fn`` and its reference; answers in ``u``'s dtype."""

    def adapter(
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        z: Tensor | None = None,
        delta_bias: Tensor | None = None,
        delta_softplus: bool = False,
        return_last_state: bool = False,
    ) -> Any:
        if A.is_complex() or B.dim() != 3 or C.dim() != 3:  # complex, constant or grouped B and C
            return original(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state)
        y, state = calls.scan_tokens_last(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
        return (y, state) if return_last_state else y

    return adapter


def mamba_chunk_scan_combined(original: Function) -> Function:
    """``mamba_ssm``'s Mamba-2 scan; ``D`` (h) or (h, p). Packed sequences go to ``original``."""

    def adapter(
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        chunk_size: int,
        D: Tensor | None = None,
        z: Tensor | None = None,
        dt_bias: Tensor | None = None,
        initial_states: Tensor | None = None,
        seq_idx: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        dt_softplus: bool = False,
        dt_limit: tuple[float, float] = (0.0, math.inf),
        return_final_states: bool = False,
        return_varlen_states: bool = False,
        **kwargs: Any,
    ) -> Any:
        packed = seq_idx is not None or cu_seqlens is not None or return_varlen_states
        if packed or _given(kwargs):
            return original(
                *(x, dt, A, B, C, chunk_size, D, z, dt_bias, initial_states, seq_idx, cu_seqlens),
                *(dt_softplus, dt_limit, return_final_states, return_varlen_states),
                **kwargs,
            )
        skip, inner_D, inner_z = None, D, z
        if D is not None and D.dim() == 2:  # one D a channel: added outside the op
            skip, inner_D, inner_z = x * D, None, None
        low, high = calls.limits(dt_limit)
        y, state = torch.ops.effpass.ssd_scan.default(
            *(x, dt, A, B, C, inner_D, inner_z, dt_bias, dt_softplus, low, high),
            *(initial_states, None),
        )
        if skip is not None:
            y = y + skip
            y = (y if z is None else y * torch.nn.functional.silu(z)).to(x.dtype)
        return (y, state) if return_final_states else y

    return adapter


def selective_state_update(original: Function) -> Function:
    """``mamba_ssm``'s decoding step: Mamba's (b, d) or Mamba-2's (b, h, p) form."""

    def adapter(
        state: Tensor,
        x: Tensor,
        dt: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor | None = None,
        z: Tensor | None = None,
        dt_bias: Tensor | None = None,
        dt_softplus: bool = False,
        **kwargs: Any,
    ) -> Tensor:
        indexed = _given(kwargs)
        if not indexed and state.dim() == 3 and B.dim() == 2:
            return calls.scan_step(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)
        if not indexed and state.dim() == 4 and calls.tied(dt, A, D, dt_bias):
            return calls.ssd_step(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)
        return original(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, **kwargs)

    return adapter


def conv1d_package_fn(original: Function) -> Function:
    """``causal_conv1d.causal_conv1d_fn`` and its reference: ``x`` (b, c, t), states (b, c, w-1)."""

    def adapter(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        seq_idx: Tensor | None = None,
        initial_states: Tensor | None = None,
        return_final_states: bool = False,
        final_states_out: Tensor | None = None,
        activation: str | None = None,
    ) -> Any:
        if seq_idx is not None or not calls.is_silu(activation):
            return original(
                *(x, weight, bias, seq_idx, initial_states, return_final_states),
                *(final_states_out, activation),
            )
        y, state = calls.convolve(x, weight, bias, activation, initial_states)
        if not return_final_states:
            return y
        return y, state if final_states_out is None else final_states_out.copy_(state)

    return adapter


def conv1d_package_ref(original: Function) -> Function:
    """``causal_conv1d``'s ``causal_conv1d_ref``: as ``causal_conv1d_fn``, without ``seq_idx``."""
    with_seq_idx = conv1d_package_fn(original)

    def adapter(
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        initial_states: Tensor | None = None,
        return_final_states: bool = False,
        final_states_out: Tensor | None = None,
        activation: str | None = None,
    ) -> Any:
        states = (initial_states, return_final_states, final_states_out)
        if not calls.is_silu(activation):
            return original(x, weight, bias, *states, activation)
        return with_seq_idx(x, weight, bias, None, *states, activation)

    return adapter


def conv1d_package_update(original: Function) -> Function:
    """``causal_conv1d.causal_conv1d_update`` and its reference: ``x`` (b, c) or (b, c, t)."""

    def adapter(
        x: Tensor,
        conv_state: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
        cache_seqlens: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        indexed = cache_seqlens is not None or _given(kwargs)
        if indexed or not calls.is_silu(activation):
            return original(x, conv_state, weight, bias, activation, cache_seqlens, **kwargs)
        if x.dim() == 2:
            return calls.conv_step(x[..., None], conv_state, weight, bias, activation)[..., 0]
        return calls.conv_step(x, conv_state, weight, bias, activation)

    return adapter


def mambapy_scan(original: Function) -> Function:
    """``mambapy``'s scans: ``x``, ``delta`` (b, t, d); ``B``, ``C`` (b, t, n); ``A`` (d, n)."""

    def adapter(
        self: Any, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor
    ) -> Tensor:
        y, _ = torch.ops.effpass.selective_scan.default(
            x, delta, A, B, C, D, None, None, False, None, None
        )
        return y.to(torch.promote_types(x.dtype, D.dtype))

    return adapter


def _given(kwargs: dict[str, Any]) -> bool:
    return any(value is not None and value is not False for value in kwargs.values())
