"""Calls of every op as models make them, without values (device "meta")."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

T, S = 512, 3


def _maker(storage: torch.dtype) -> tuple[Callable[..., Tensor], Callable[..., Tensor], Tensor]:
    def big(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=storage, device="meta")

    def small(*shape: int) -> Tensor:
        return torch.empty(shape, device="meta")

    return big, small, torch.empty(S + 1, dtype=torch.int32, device="meta")


def _scan(storage: torch.dtype) -> list[dict[str, Any]]:
    big, small, offsets = _maker(storage)

    def call(tokens: int, d: int = 256, **more: Any) -> dict[str, Any]:
        n = 16
        given = {name: big(1, tokens, d) for name in ("x", "dt", "z")}
        given |= {name: big(1, tokens, n) for name in ("B", "C")}
        return {**given, "A": small(d, n), "D": small(d), "dt_bias": small(d), **more}

    packed = {"cu_seqlens": offsets, "initial_state": small(S, 256, 16)}
    one = {"initial_state": small(1, 256, 16)}
    calls = ((T, {}), (T, packed), (1, one), (T, {"d": 2560}))  # the last is not cut into chunks
    return [call(tokens, dt_softplus=True, **more) for tokens, more in calls]


def _ssd(storage: torch.dtype) -> list[dict[str, Any]]:
    big, small, offsets = _maker(storage)

    def call(tokens: int, p: int, n: int, **more: Any) -> dict[str, Any]:
        h, g = 8, 2
        given = {"x": big(1, tokens, h, p), "z": big(1, tokens, h, p), "dt": big(1, tokens, h)}
        given |= {"B": big(1, tokens, g, n), "C": big(1, tokens, g, n)}
        return {**given, "A": small(h), "D": small(h), "dt_bias": small(h), **more}

    packed = {"cu_seqlens": offsets, "initial_state": small(S, 8, 64, 128), "dt_max": 0.1}
    one = {"initial_state": small(1, 8, 64, 128)}
    plain = {"dt_softplus": True}
    return [
        call(T, 64, 128, **plain),
        call(T, 64, 128, **packed),
        call(T, 128, 256, **plain),
        call(1, 64, 128, **plain, **one),
    ]


def _conv(storage: torch.dtype) -> list[dict[str, Any]]:
    big, _, offsets = _maker(storage)
    given = {"x": big(1, T, 256), "weight": big(256, 4), "bias": big(256), "activation": "silu"}
    first = {**given, "x": big(1, 256, T).transpose(1, 2)}
    packed = {"cu_seqlens": offsets, "initial_state": big(S, 256, 3)}
    return [given, first, {**given, **packed}]


def _recurrence(storage: torch.dtype) -> list[dict[str, Any]]:
    big, small, offsets = _maker(storage)
    given = {"a": big(1, T, 256), "b": big(1, T, 256)}
    return [given, {**given, "cu_seqlens": offsets, "initial_state": small(S, 256)}]


def _attention(storage: torch.dtype) -> list[dict[str, Any]]:
    big, small, offsets = _maker(storage)
    pos = torch.empty(T, dtype=torch.int64, device="meta")

    def call(d: int, **more: Any) -> dict[str, Any]:
        given = {"q": big(T, 8, d), "k": big(T, 2, d), "v": big(T, 2, d)}
        return {**given, "cu_seqlens": offsets, "max_seqlen": T, **more}

    every = {"softcap": 2.0, "bias": small(8, T), "q_pos": pos, "k_pos": pos}
    return [call(64, causal=True), call(128, window=(100, 0)), call(64, causal=True, **every)]


def _matching(storage: torch.dtype) -> list[dict[str, Any]]:
    big, _, _ = _maker(storage)
    at = torch.empty(1, T // 2, dtype=torch.int64, device="meta")
    given = {"a": big(1, T // 2, 768), "b": big(1, T // 2, 768), "a_at": at, "b_at": at}
    open = torch.empty(1, T // 2, dtype=torch.bool, device="meta")
    return [{**given, "open": open, "later": later} for later in (False, True)]


CALLS: dict[str, Callable[[torch.dtype], list[dict[str, Any]]]] = {
    "causal_conv1d": _conv,
    "linear_recurrence": _recurrence,
    "selective_scan": _scan,
    "ssd_scan": _ssd,
    "token_matching": _matching,
    "varlen_attention": _attention,
}


def filled(call: dict[str, Any]) -> dict[str, Any]:
    """The call with numbers: steps below 1, decays that forget, offsets of three sequences."""
    made = {}
    for name, value in call.items():
        if not isinstance(value, Tensor):
            made[name] = value
        elif value.dtype == torch.int32:
            made[name] = torch.tensor([0, 57, 300, T], dtype=torch.int32)
        elif value.dtype == torch.int64:
            made[name] = torch.arange(T)
        else:
            number = torch.randn(value.shape)
            number = -number.exp() if name == "A" else number.sigmoid() if name == "a" else number
            number = number.abs() if name == "dt" and not call.get("dt_softplus") else number
            made[name] = number.to(value.dtype)
    return made
