"""Softmax attention over sequences that lie end to end, each seeing only itself.

    s[i, j] = scale q[i] . k[j];  s = c tanh(s / c) with a soft cap c;  s += bias[j]
    out[i]  = sum_j softmax_j(s[i, j] where j is visible to i) v[j]

(Vaswani et al. 2017, arXiv 1706.03762; packed as in Dao 2023, FlashAttention-2, arXiv 2307.08691,
``flash_attn_varlen_func``; grouped heads: Ainslie et al. 2023, arXiv 2305.13245; soft cap: Gemma 2,
arXiv 2408.00118; a bias linear in the key's position: Press et al. 2021, arXiv 2108.12409.)
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from effpass.axes.relation import Kind
from effpass.ops.op import accumulate_dtype, check_cu_seqlens, empty_gradient, op

NAME = "varlen_attention"


def spans(
    tokens: int,
    tokens_k: int,
    cu_seqlens: Tensor,
    max_seqlen: int,
    cu_seqlens_k: Tensor | None,
    max_seqlen_k: int | None,
) -> list[tuple[slice, slice]]:
    """``(queries, keys)`` of each sequence; ValueError when offsets or bounds are wrong."""
    check_cu_seqlens(NAME, cu_seqlens, 1, tokens)
    queries = [slice(*ends) for ends in pairwise(cu_seqlens.tolist())]
    _check_bound("max_seqlen", max_seqlen, queries)
    if cu_seqlens_k is None:
        if max_seqlen_k is not None:
            _check_bound("max_seqlen_k", max_seqlen_k, queries)
        return list(zip(queries, queries, strict=True))
    check_cu_seqlens(NAME, cu_seqlens_k, 1, tokens_k, "cu_seqlens_k")
    keys = [slice(*ends) for ends in pairwise(cu_seqlens_k.tolist())]
    if max_seqlen_k is not None:
        _check_bound("max_seqlen_k", max_seqlen_k, keys)
    return list(zip(queries, keys, strict=True))


def positions(
    queries: slice, keys: slice, q_pos: Tensor | None, k_pos: Tensor | None, like: Tensor
) -> tuple[Tensor, Tensor]:
    """Where the tokens of one sequence stand; by index the last query stands at the last key."""
    if q_pos is not None and k_pos is not None:
        return q_pos[queries], k_pos[keys]
    length, length_k = queries.stop - queries.start, keys.stop - keys.start
    at = torch.arange(length_k - length, length_k, device=like.device)
    return at, torch.arange(length_k, device=like.device)


def visible(q_at: Tensor, k_at: Tensor, causal: bool, window: Sequence[int]) -> Tensor:
    """(queries, keys) booleans: which key each query sees."""
    ahead = k_at - q_at[:, None]
    left, right = window
    seen = torch.ones_like(ahead, dtype=torch.bool)
    if causal:
        seen &= ahead <= 0
    if left >= 0:
        seen &= ahead >= -left
    if right >= 0:
        seen &= ahead <= right
    return seen


def score_scale(q: Tensor, scale: float | None) -> float:
    """``scale``, or 1 / sqrt(d)."""
    return float(q.shape[-1]) ** -0.5 if scale is None else scale


def _scores(
    q: Tensor, k: Tensor, bias: Tensor | None, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor | None]:
    """Scores (h, queries, keys) before the mask, and the tanh of the soft cap."""
    scores = torch.einsum("ihd,jhd->hij", q, k) * scale
    capped = None if softcap is None else torch.tanh(scores / softcap)
    if capped is not None and softcap is not None:
        scores = softcap * capped
    return (scores if bias is None else scores + bias[..., None, :]), capped


def _weights(scores: Tensor, seen: Tensor) -> Tensor:
    """Softmax over the keys that are seen; all zero where none is."""
    scores = torch.where(seen, scores, float("-inf"))
    return torch.where(seen, torch.softmax(scores, -1), 0.0)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor,
    scale: float | None,
    softcap: float | None,
    bias: Tensor | None,
) -> Tensor:
    """The definition for one sequence, all in one dtype: (queries, h, e)."""
    factor = score_scale(q, scale)
    group = q.shape[1] // k.shape[1]
    k, v = (each.repeat_interleave(group, 1) for each in (k, v))
    weights = _weights(_scores(q, k, bias, factor, softcap)[0], seen)
    return torch.einsum("hij,jhe->ihe", weights, v)


def attend_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Tensor,
    scale: float | None,
    softcap: float | None,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and of the bias for one sequence, the last (h, keys)."""
    factor = score_scale(q, scale)
    heads = k.shape[1]
    group = q.shape[1] // heads
    k, v = (each.repeat_interleave(group, 1) for each in (k, v))
    scores, capped = _scores(q, k, bias, factor, softcap)
    weights = _weights(scores, seen)
    dv = torch.einsum("hij,ihe->jhe", weights, grad)
    dweights = torch.einsum("ihe,jhe->hij", grad, v)
    dscores = weights * (dweights - (weights * dweights).sum(-1, keepdim=True))
    dbias = dscores.sum(1)
    if capped is not None:
        dscores = dscores * (1 - capped * capped)
    dq = torch.einsum("hij,jhd->ihd", dscores, k) * factor
    dk = torch.einsum("hij,ihd->jhd", dscores, q) * factor
    dk, dv = (each.unflatten(1, (heads, group)).sum(2) for each in (dk, dv))
    return dq, dk, dv, dbias


def _backward(
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    cu_seqlens_k: Tensor | None,
    max_seqlen_k: int | None,
    causal: bool,
    window: Sequence[int],
    scale: float | None,
    softcap: float | None,
    bias: Tensor | None,
    q_pos: Tensor | None,
    k_pos: Tensor | None,
) -> tuple[Tensor, ...]:
    """The softmax's gradient, P (dP - sum P dP), sequence by sequence."""
    acc = accumulate_dtype(q.dtype)
    qs, ks, vs, grad = (each.to(acc) for each in (q, k, v, grad_out))
    add = None if bias is None else bias.to(acc)
    dq, dk, dv = (torch.zeros(e.shape, dtype=acc, device=e.device) for e in (qs, ks, vs))
    dbias = None if add is None else torch.zeros_like(add)
    at = spans(q.shape[0], k.shape[0], cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k)
    for i, j in at:
        seen = visible(*positions(i, j, q_pos, k_pos, q), causal, window)
        add_j = None if add is None else add[..., j]
        found = attend_backward(grad[i], qs[i], ks[j], vs[j], seen, scale, softcap, add_j)
        dq[i], dk[j], dv[j], by_head = found
        if dbias is not None:
            dbias[..., j] = by_head if dbias.dim() == 2 else by_head.sum(0)
    dbias = empty_gradient(grad_out) if bias is None or dbias is None else dbias.to(bias.dtype)
    none = [empty_gradient(grad_out) for _ in range(4)]
    grads = (dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype))
    return (*grads, *none[:2], dbias, *none[2:])


def _check(
    *,
    sizes: dict[str, Any],
    cu_seqlens: Tensor,
    max_seqlen: int,
    cu_seqlens_k: Tensor | None,
    max_seqlen_k: int | None,
    window: Sequence[int],
    softcap: float | None,
    bias: Tensor | None,
    q_pos: Tensor | None,
    k_pos: Tensor | None,
    **_: Any,
) -> None:
    _check_heads(sizes)
    _check_keys(sizes, cu_seqlens, cu_seqlens_k)
    if (q_pos is None) != (k_pos is None):
        found = "q_pos" if k_pos is None else "k_pos"
        raise ValueError(
            f"{NAME}: expected q_pos and k_pos together, found {found} alone; give the position of "
            "every query and of every key, or neither"
        )
    if len(window) != 2 or window[0] < -1 or window[1] < -1:
        raise ValueError(
            f"{NAME}: expected window to be (left, right), each a number of keys or -1 for no "
            f"limit, found {tuple(window)}"
        )
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(f"{NAME}: expected softcap to be None or above 0, found {softcap}")
    if torch.compiler.is_compiling():
        return
    spans(sizes["t"], sizes["tk"], cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k)
    if bias is not None and bias.isinf().any():
        raise ValueError(
            f"{NAME}: expected bias to be finite, found infinity; leave keys out by causal, window "
            "and positions, or pack without them"
        )


def _check_heads(sizes: dict[str, Any]) -> None:
    for axis, where in (("h", "q (t, h, d)"), ("d", "q (t, h, d)"), ("hk", "k (tk, hk, d)")):
        if sizes[axis] < 1:
            raise ValueError(f"{NAME}: expected {where} with {axis} >= 1, found {axis} = 0")
    if sizes["h"] % sizes["hk"]:
        raise ValueError(
            f"{NAME}: expected the {sizes['h']} heads of q to be a multiple of those of k and v, "
            f"found {sizes['hk']}"
        )


def _check_keys(sizes: dict[str, Any], cu_seqlens: Tensor, cu_seqlens_k: Tensor | None) -> None:
    if cu_seqlens_k is None:
        if sizes["t"] != sizes["tk"]:
            raise ValueError(
                f"{NAME}: expected as many keys as queries without cu_seqlens_k, found "
                f"{sizes['tk']} keys and {sizes['t']} queries; give cu_seqlens_k"
            )
    elif cu_seqlens_k.shape != cu_seqlens.shape:
        raise ValueError(
            f"{NAME}: expected cu_seqlens_k to have as many sequences as cu_seqlens, found shapes "
            f"{tuple(cu_seqlens_k.shape)} and {tuple(cu_seqlens.shape)}"
        )


def _check_bound(name: str, bound: int, runs: list[slice]) -> None:
    longest = max(run.stop - run.start for run in runs)
    if longest > bound:
        raise ValueError(
            f"{NAME}: expected {name} to be at least the longest sequence, {longest} tokens, "
            f"found {bound}"
        )


@op(
    axes="q: t h d; k: tk hk d; v: tk hk e; bias: h tk; q_pos: t; k_pos: tk -> out: t h e",
    backward=_backward,
    check=_check,
    # heads belong to groups
    kinds={"t": Kind.ORDERED, "tk": Kind.ORDERED, "h": Kind.BOUND, "hk": Kind.BOUND},
    integers={"cu_seqlens_k": torch.int32, "q_pos": torch.int64, "k_pos": torch.int64},
    per_head=("bias",),
)
def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    max_seqlen: int,
    cu_seqlens_k: Tensor | None = None,
    max_seqlen_k: int | None = None,
    causal: bool = False,
    window: Sequence[int] = (-1, -1),
    scale: float | None = None,
    softcap: float | None = None,
    bias: Tensor | None = None,
    q_pos: Tensor | None = None,
    k_pos: Tensor | None = None,
) -> Tensor:
    """Attention inside each of the sequences packed in ``q``, ``k`` and ``v``.

    Args: ``q`` (t, h, d); ``k`` (tk, hk, d) and ``v`` (tk, hk, e), where h is a multiple of hk and
    query head i reads key head i // (h / hk). ``cu_seqlens`` int32 (S + 1,): sequence i has the
    queries from ``cu_seqlens[i]`` up to ``cu_seqlens[i + 1]``, perhaps none; ``max_seqlen``, a
    bound on their number. ``cu_seqlens_k`` and ``max_seqlen_k``: the same of the keys, where they
    are others than the queries. ``scale``: 1 / sqrt(d) when None. ``softcap``: c tanh(s / c) of the
    scaled scores, before the bias and the mask. ``bias`` (tk,) or (h, tk), finite: added to the
    scores of each key.

    ``causal``: a query at position p sees the keys at positions up to p. ``window`` (left, right):
    it sees those from p - left up to p + right, where -1 sets no limit; both may be given.
    Positions are ``q_pos`` (t,) and ``k_pos`` (tk,), int64, in any order. Without them, a key's is
    its index in its sequence, and the last query stands at the last key: query i of m, among n
    keys, at i + n - m (flash-attention's bottom-right alignment).

    Returns ``out`` (t, h, e) in q's dtype; zero, with zero gradients, for a query that sees no key.
    What is in one sequence does not reach another, NaN neither; inside a sequence, a NaN in a value
    reaches every query. Raises TypeError or ValueError on shapes, dtypes, devices, offsets and
    bounds that disagree.
    """
    acc = accumulate_dtype(q.dtype)
    add = None if bias is None else bias.to(acc)
    out = q.new_zeros(*q.shape[:2], v.shape[2])
    at = spans(q.shape[0], k.shape[0], cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k)
    for i, j in at:
        seen = visible(*positions(i, j, q_pos, k_pos, q), causal, window)
        add_j = None if add is None else add[..., j]
        each = (q[i].to(acc), k[j].to(acc), v[j].to(acc))
        out[i] = attend(*each, seen, scale, softcap, add_j).to(q.dtype)
    return out
