"""Adapters: a library's scan or convolution, spelled as one effpass op.

Each public name takes the library's own torch function (``original``) and returns the function that
Dynamo traces in its place. An adapter maps arguments to the op's channel-last ones (views only), and
the results back to the shape, the dtype and the in-place updates that the library's callers rely on.
What the op cannot express exactly goes to ``original``, which is then traced as usual.

Sources: ``transformers`` 5.17 to 5.23 (``models/*/modeling_*.py``), ``mamba_ssm`` 2.3
(``ops/selective_scan_interface.py``, ``ops/triton/``), ``causal_conv1d`` 1.6, ``mambapy`` 1.2.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import effpass.ops  # noqa: F401  (registers the ops called below)

Function = Callable[..., Any]
SILU = ("silu", "swish")


def mamba_selective_scan(original: Function) -> Function:
    """transformers' Mamba scan: ``hidden_states``, ``dt``, ``z`` (b, d, t); ``B``, ``C`` (b, n, t)."""

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
        _refuse_packed("mamba_selective_scan", kwargs)
        bias, softplus = delta_bias, delta_softplus
        y, state = _scan_channel_first(hidden_states, dt, A, B, C, D, z, bias, softplus)
        out = y.to(_scan_dtype(hidden_states, D, z))
        return (out, state) if return_last_state else out

    return adapter


def mamba_selective_state_update(original: Function) -> Function:
    """transformers' Mamba decoding step: ``hidden_states``, ``dt``, ``z`` (b, d); ``B``, ``C`` (b, n)."""

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
        _refuse_packed("mamba_selective_state_update", kwargs)
        return _scan_step(state, hidden_states, dt, A, B, C, D, z, dt_bias, dt_softplus)

    return adapter


def mamba2_chunk_scan(original: Function) -> Function:
    """transformers' Mamba-2 scan: the op's own layout; always answers in at least float32."""

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
        _refuse_packed("mamba2_chunk_scan", kwargs)
        x, bias, start = hidden_states, dt_bias, initial_states
        low, high = _limits(dt_limit)
        y, state = torch.ops.effpass.ssd_scan.default(
            x, dt, A, B, C, D, None, bias, dt_softplus, low, high, start, None
        )
        dtype = torch.float32 if D is None else torch.promote_types(torch.float32, D.dtype)
        out = y.to(dtype)
        return (out, state.to(torch.float32)) if return_final_states else out

    return adapter


def mamba2_selective_state_update(original: Function) -> Function:
    """transformers' Mamba-2 decoding step: every argument expanded to (b, h, p), ``A`` to (h, p, n)."""

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
        _refuse_packed("mamba2_selective_state_update", kwargs)
        if not _tied(dt, A, D, dt_bias):
            return original(state, hidden_states, dt, A, B, C, D, dt_bias, dt_softplus, z)
        return _ssd_step(state, hidden_states, dt, A, B, C, D, z, dt_bias, dt_softplus)

    return adapter


def causal_conv1d_fn(original: Function) -> Function:
    """transformers' causal convolution: ``hidden_states`` (b, c, t), ``weight`` (c, w)."""

    def adapter(
        hidden_states: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
        **kwargs: Any,
    ) -> Tensor:
        _refuse_packed("causal_conv1d_fn", kwargs)
        if activation is not None and activation not in SILU:
            return original(hidden_states, weight, bias, activation)
        return _convolve(hidden_states, weight, bias, activation, None)[0]

    return adapter


def causal_conv1d_update(original: Function) -> Function:
    """transformers' convolution step: ``hidden_states`` (b, c, t), ``conv_state`` (b, c, >= w-1)."""

    def adapter(
        hidden_states: Tensor,
        conv_state: Tensor,
        weight: Tensor,
        bias: Tensor | None = None,
        activation: str | None = None,
    ) -> Tensor:
        too_short = conv_state.shape[-1] < weight.shape[-1] - 1
        if too_short or (activation is not None and activation not in SILU):
            return original(hidden_states, conv_state, weight, bias, activation)
        return _conv_step(hidden_states, conv_state, weight, bias, activation)

    return adapter


def selective_scan_fn(original: Function) -> Function:
    """``mamba_ssm``'s ``selective_scan_fn`` and ``selective_scan_ref``; answers in ``u``'s dtype."""

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
        y, state = _scan_channel_first(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
        return (y, state) if return_last_state else y

    return adapter


def mamba_chunk_scan_combined(original: Function) -> Function:
    """``mamba_ssm``'s Mamba-2 scan; ``D`` may be (h) or (h, p). Packed sequences go to ``original``."""

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
        low, high = _limits(dt_limit)
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
            return _scan_step(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)
        if not indexed and state.dim() == 4 and _tied(dt, A, D, dt_bias):
            return _ssd_step(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)
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
        if seq_idx is not None or (activation is not None and activation not in SILU):
            return original(
                *(x, weight, bias, seq_idx, initial_states, return_final_states),
                *(final_states_out, activation),
            )
        y, state = _convolve(x, weight, bias, activation, initial_states)
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
        if activation is not None and activation not in SILU:
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
        if indexed or (activation is not None and activation not in SILU):
            return original(x, conv_state, weight, bias, activation, cache_seqlens, **kwargs)
        if x.dim() == 2:
            return _conv_step(x[..., None], conv_state, weight, bias, activation)[..., 0]
        return _conv_step(x, conv_state, weight, bias, activation)

    return adapter


def mambapy_scan(original: Function) -> Function:
    """``mambapy``'s scan methods: ``x``, ``delta`` (b, t, d); ``B``, ``C`` (b, t, n); ``A`` (d, n)."""

    def adapter(
        self: Any, x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor
    ) -> Tensor:
        y, _ = torch.ops.effpass.selective_scan.default(
            x, delta, A, B, C, D, None, None, False, None, None
        )
        return y.to(torch.promote_types(x.dtype, D.dtype))

    return adapter


def _refuse_packed(name: str, kwargs: dict[str, Any]) -> None:
    for packed in ("seq_idx", "cu_seqlens"):
        if kwargs.get(packed) is not None:
            raise ValueError(
                f"`{name}` got `{packed}`, but the function it stands for cannot keep packed "
                f"sequences apart; expected {packed}=None. Pad the sequences instead."
            )


def _scan_dtype(x: Tensor, D: Tensor | None, z: Tensor | None) -> torch.dtype:
    """What transformers' scan answers in: a matmul's dtype, promoted by ``D x`` and by ``z``."""
    device = x.device.type
    cast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if cast else x.dtype
    if D is not None:
        dtype = torch.promote_types(dtype, torch.promote_types(x.dtype, D.dtype))
    return dtype if z is None else torch.promote_types(dtype, z.dtype)


def _limits(dt_limit: tuple[float, float]) -> tuple[float, float | None]:
    low, high = dt_limit  # -inf has no literal in generated code
    return (low if low > -1e38 else -1e38), (None if high == math.inf else high)


def _given(kwargs: dict[str, Any]) -> bool:
    for value in kwargs.values():
        if value is not None and value is not False:
            return True
    return False


def _tied(dt: Tensor, A: Tensor, D: Tensor | None, dt_bias: Tensor | None) -> bool:
    """Whether every channel of a head provably reads the same number: an expand, not a copy."""
    given = [v for v in (dt, D, dt_bias) if v is not None]
    alike = all(v.shape[-1] == 1 or v.stride(-1) == 0 for v in given)
    return alike and all(A.shape[dim] == 1 or A.stride(dim) == 0 for dim in (-1, -2))


def _flip(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.transpose(1, 2)


def _scan_channel_first(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
) -> tuple[Tensor, Tensor]:
    y, state = torch.ops.effpass.selective_scan.default(
        *(x.transpose(1, 2), dt.transpose(1, 2), A, B.transpose(1, 2), C.transpose(1, 2)),
        *(D, _flip(z), dt_bias, dt_softplus, None, None),
    )
    return y.transpose(1, 2), state


def _token(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor[:, None]


def _scan_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
) -> Tensor:
    y, after = torch.ops.effpass.selective_scan.default(
        *(x[:, None], dt[:, None], A, B[:, None], C[:, None]),
        *(D, _token(z), dt_bias, dt_softplus, state, None),
    )
    state.copy_(after)
    return y[:, 0]


def _ssd_step(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
) -> Tensor:
    D, dt_bias = (None if v is None else v[:, 0] for v in (D, dt_bias))
    low, high = _limits((-math.inf, math.inf))
    y, after = torch.ops.effpass.ssd_scan.default(
        *(x[:, None], dt[:, None, :, 0], A[:, 0, 0], B[:, None], C[:, None]),
        *(D, _token(z), dt_bias, dt_softplus, low, high, state, None),
    )
    state.copy_(after)
    return y[:, 0]


def _convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, start: Tensor | None
) -> tuple[Tensor, Tensor]:
    y, state = torch.ops.effpass.causal_conv1d.default(
        x.transpose(1, 2), weight, bias, None if activation is None else "silu", start, None
    )
    return y.transpose(1, 2), state


def _conv_step(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None
) -> Tensor:
    kept = conv_state.shape[-1]
    start = conv_state[..., kept - weight.shape[-1] + 1 :]
    y, _ = _convolve(x, weight, bias, activation, start)
    window = torch.cat([conv_state, x], -1).to(weight.dtype)
    conv_state.copy_(window[..., window.shape[-1] - kept :])
    return y
