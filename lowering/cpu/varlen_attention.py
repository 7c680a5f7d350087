"""Packed attention on CPUs by torch's fused kernel: one call for all sequences of one length.

The kernel takes (batch, heads, tokens, channels) and an additive mask. Sequences of equal lengths
are the batch; a mask that would be large is made for a stretch of queries at a time, over the keys
that this stretch sees. Around the kernel's gaps:

- its gradient is wrong for a query that sees no key: here such a query sees all keys in the call,
  and its output and its gradient are set to zero outside;
- it has no gradient of the mask: the gradient of a bias is that of one more channel, which is 1 in
  q and 0 in k;
- it gives 0 where every score is NaN: sequences with such numbers are left to the definition.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from effpass.ops.op import accumulate_dtype, empty_gradient, implements
from effpass.ops.varlen_attention import (
    attend,
    attend_backward,
    positions,
    score_scale,
    spans,
    varlen_attention,
    visible,
)

MASK_ELEMENTS = 1 << 22  # of the mask of one call: 16 MB
LARGE_SCORE = 1024.0  # beyond it, float32 keeps too few digits of exp(score - log-sum-exp)
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_attention_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


@dataclass(frozen=True)
class _Problem:
    """The arguments that say who sees whom."""

    spans: list[tuple[slice, slice]]
    causal: bool
    window: Sequence[int]
    bias: Tensor | None
    q_pos: Tensor | None
    k_pos: Tensor | None

    def limits(self, length: int, length_k: int) -> tuple[int, int]:
        """The window for sequences of these lengths, -1 where it hides nothing that is there."""
        left, right = self.window
        behind, ahead = self._distances or (length_k - 1, length - 1)
        hides_right = right < ahead and not self.causal
        return left if left < behind else -1, right if hides_right else -1

    @cached_property
    def _distances(self) -> tuple[int, int] | None:
        """How far any key stands behind any query, and ahead of it, if positions are given."""
        if self.q_pos is None or self.k_pos is None:
            return None
        behind, ahead = self.q_pos.max() - self.k_pos.min(), self.k_pos.max() - self.q_pos.min()
        return int(behind), int(ahead)

    def seen(self, which: int, like: Tensor) -> Tensor:
        """(queries, keys) of one sequence."""
        at = positions(*self.spans[which], self.q_pos, self.k_pos, like)
        return visible(*at, self.causal, self.window)


@dataclass(frozen=True)
class _Call:
    """One call of the kernel: a stretch of queries of some sequences, and the keys it reads.

    ``seen`` (n or 1, queries, keys), None where all is visible or ``causal`` says it; ``blind``
    (n or 1, queries) marks the queries that see no key, None where there are none.
    """

    members: list[int]
    queries: list[slice]
    keys: list[slice]
    causal: bool
    seen: Tensor | None
    blind: Tensor | None


def _plan(problem: _Problem, heads: int, like: Tensor) -> Iterator[_Call]:
    """The calls that together compute every query that sees a key; values are not looked at."""
    by_length: dict[tuple[int, int], list[int]] = {}
    for which, (i, j) in enumerate(problem.spans):
        lengths = i.stop - i.start, j.stop - j.start
        if min(lengths) > 0:
            by_length.setdefault(lengths, []).append(which)
    for (length, length_k), members in by_length.items():
        here = replace(problem, window=problem.limits(length, length_k))
        limited = here.causal or max(here.window) >= 0
        if not limited or (length == length_k and _in_order(here, members)):
            spans = [here.spans[which] for which in members]
            yield _Call(members, [i for i, _ in spans], [j for _, j in spans], limited, None, None)
            continue
        per_query = length_k * (1 if here.bias is None else heads)
        alike = here.q_pos is None and here.bias is None
        at_once = len(members) if alike else max(1, MASK_ELEMENTS // (length * per_query))
        stretch = max(1, min(MASK_ELEMENTS // per_query, _reach(here)))
        for first in range(0, len(members), at_once):
            for start in range(0, length, stretch):
                rows = slice(start, min(start + stretch, length))
                call = _masked(here, members[first : first + at_once], rows, like)
                if call is not None:
                    yield call


def _reach(problem: _Problem) -> int:
    """How many queries to take at once: the fewer, the fewer keys outside the window are read."""
    left, right = problem.window[0], 0 if problem.causal else problem.window[1]
    return max(256, left + right) if min(left, right) >= 0 else MASK_ELEMENTS


def _in_order(problem: _Problem, members: list[int]) -> bool:
    """Whether "causal" alone decides, and positions (of as many queries as keys) are as indices."""
    if not problem.causal or max(problem.window) >= 0:
        return False
    if problem.q_pos is None or problem.k_pos is None:
        return True
    for which in members:
        i, j = problem.spans[which]
        at = problem.q_pos[i]
        if not torch.equal(at, problem.k_pos[j]) or not bool((at.diff() > 0).all()):
            return False
    return True


def _masked(problem: _Problem, members: list[int], rows: slice, like: Tensor) -> _Call | None:
    """The call for these rows of these sequences, over the keys that any of them sees."""
    one_for_all = problem.q_pos is None
    each = [_rows(problem, which, rows, like) for which in members[: 1 if one_for_all else None]]
    seen = torch.stack(each)
    used = seen.flatten(0, 1).any(0).nonzero()
    if used.numel() == 0:
        return None
    first, last = int(used[0]), int(used[-1]) + 1
    seen = seen[:, :, first:last]
    blind = ~seen.any(-1)
    spans = [problem.spans[which] for which in members]
    return _Call(
        members,
        [slice(i.start + rows.start, i.start + rows.stop) for i, _ in spans],
        [slice(j.start + first, j.start + last) for _, j in spans],
        causal=False,
        seen=None if bool(seen.all()) else seen | blind[..., None],
        blind=blind if bool(blind.any()) else None,
    )


def _rows(problem: _Problem, which: int, rows: slice, like: Tensor) -> Tensor:
    q_at, k_at = positions(*problem.spans[which], problem.q_pos, problem.k_pos, like)
    return visible(q_at[rows], k_at, problem.causal, problem.window)


def _batch(tensor: Tensor, at: list[slice]) -> Tensor:
    """(tokens, heads, channels) to (n, heads, length, channels); a view of adjacent tokens."""
    start, length = at[0].start, at[0].stop - at[0].start
    if all(each.start == start + n * length for n, each in enumerate(at)):
        rows = tensor[start : start + len(at) * length].unflatten(0, (len(at), length))
    else:
        rows = torch.stack([tensor[each] for each in at])
    return rows.transpose(1, 2)


def _mask(call: _Call, bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The additive mask (n or 1, heads or 1, queries, keys) of a call."""
    add = None if bias is None else torch.stack([bias[..., j] for j in call.keys]).to(dtype)
    if add is not None:
        add = (add if add.dim() == 3 else add[:, None])[:, :, None]
    length = call.queries[0].stop - call.queries[0].start
    if call.seen is None:
        return None if add is None else add.expand(-1, -1, length, -1)
    zero = torch.zeros((), dtype=dtype, device=call.seen.device) if add is None else add
    return torch.where(call.seen[:, None], zero, float("-inf"))


def _doubtful(call: _Call, out: Tensor, lse: Tensor, limit: float = float("inf")) -> list[int]:
    """Sequences whose scores overflowed: their log-sum-exp is not finite, or all is zero."""
    odd = ~(lse.abs() < limit)
    if bool((lse == 0).any()):
        odd |= (lse == 0) & (out == 0).all(-1)
    bad = odd.flatten(1).any(1).tolist()
    return [which for which, is_odd in zip(call.members, bad, strict=True) if is_odd]


def _all_doubtful(calls: list[tuple[_Call, Tensor]], out: Tensor) -> list[int]:
    """The same for all calls; mostly one look at all log-sum-exps says that there is none."""
    if not calls:
        return []
    everything = torch.cat([lse.flatten() for _, lse in calls])
    if _finite(everything) and bool(everything.all()):
        return []
    found = []
    for call, lse in calls:
        rows = torch.stack([out[each] for each in call.queries]).transpose(1, 2)
        found += _doubtful(call, rows, lse)
    return found


def _spoilt(problem: _Problem, of_queries: list[Tensor], of_keys: list[Tensor]) -> set[int]:
    """Sequences with a NaN or an infinity among their numbers."""
    if all(_finite(each) for each in (*of_queries, *of_keys)):
        return set()

    def bad(tensors: list[Tensor], at: slice) -> bool:
        return not all(_finite(each[at]) for each in tensors)

    pairs = enumerate(problem.spans)
    return {which for which, (i, j) in pairs if bad(of_queries, i) or bad(of_keys, j)}


def _finite(tensor: Tensor) -> bool:
    """Whether all numbers are; their sum, which is one pass, says so unless it overflows."""
    if math.isfinite(tensor.sum(dtype=accumulate_dtype(tensor.dtype)).item()):
        return True
    return bool(tensor.isfinite().all())


def _of_keys(k: Tensor, v: Tensor, bias: Tensor | None) -> list[Tensor]:
    return [k, v] if bias is None else [k, v, bias.movedim(-1, 0)]


def _as(dtype: torch.dtype, *tensors: Tensor) -> list[Tensor]:
    """The tensors in one dtype, their channels side by side."""
    cast = [each.to(dtype) for each in tensors]
    return [each if each.stride(-1) == 1 else each.contiguous() for each in cast]


def _widened(*tensors: Tensor) -> list[Tensor]:
    """The tensors with as many channels as the widest, the added ones zero."""
    widest = max(each.shape[-1] for each in tensors)
    missing = [widest - each.shape[-1] for each in tensors]
    return [pad(each, (0, m)) if m else each for each, m in zip(tensors, missing, strict=True)]


def _add(into: Tensor, at: list[slice], made: Tensor) -> None:
    """Adds (n, heads, length, channels) at its tokens, without the channels of ``_widened``."""
    for where, rows in zip(at, made[..., : into.shape[-1]].transpose(1, 2), strict=True):
        into[where] += rows


def _seeing(call: _Call, made: Tensor) -> Tensor:
    """``made`` (n, heads, queries, channels), zero for the queries that see no key."""
    if call.blind is None:
        return made
    return made.masked_fill(call.blind[:, None, :, None], 0.0)


def _gradients(
    call: _Call, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
) -> tuple[list[int], tuple[Tensor, Tensor, Tensor]]:
    """Doubtful sequences, and gradients of q, k and v of one call."""
    q, k, v, grad = _widened(q, k, v, _seeing(call, grad))
    out, lse = _attention(q, k, v, 0.0, call.causal, attn_mask=mask, scale=scale)
    made = _attention_backward(
        grad, q, k, v, out, lse, 0.0, call.causal, attn_mask=mask, scale=scale
    )
    return _doubtful(call, out, lse, LARGE_SCORE), made


def _gradients_with_bias(
    call: _Call, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float
) -> tuple[list[int], tuple[Tensor, Tensor, Tensor, Tensor]]:
    """The same, and the bias's (n, heads, keys): that of a channel of k that q multiplies by 1.

    Heads of k and v are repeated, so that each head of q has its own.
    """
    channels, group, heads = q.shape[-1], q.shape[1] // k.shape[1], k.shape[1]
    k, v = (each.repeat_interleave(group, 1) for each in (k, v))
    one = pad(q * scale, (0, 1), value=1.0)
    bad, (dq, dk, dv) = _gradients(call, grad, one, pad(k, (0, 1)), v, mask, 1.0)
    dbias = dk[..., channels]
    dk, dv = (each.unflatten(1, (heads, group)).sum(2) for each in (dk[..., :channels], dv))
    return bad, (dq[..., :channels] * scale, dk, dv, dbias)


def _refuses(*args: Any) -> str | None:
    given = dict(zip(varlen_attention.signature.parameters, args, strict=True))
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor):
            continue
        if tensor.device.type != "cpu":
            return f"{name} is on {tensor.device}; needs cpu"
        if tensor.is_floating_point() and tensor.dtype not in _DTYPES:
            found = str(tensor.dtype).removeprefix("torch.")
            return f"{name} is {found}; needs float32, float64, bfloat16 or float16"
    if given["softcap"] is not None:
        return "has no soft cap"
    return None


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
    at = spans(q.shape[0], k.shape[0], cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k)
    problem = _Problem(at, causal, window, bias, q_pos, k_pos)
    dtype = _working_dtype(q, k, v)
    acc = accumulate_dtype(dtype)
    qs, ks, vs, grad = _as(dtype if bias is None else acc, q, k, v, grad_out)
    dq, dk, dv = (torch.zeros(each.shape, dtype=acc, device=each.device) for each in (q, k, v))
    dbias = None if bias is None else bias.new_zeros(q.shape[1], k.shape[0], dtype=acc)
    bad = _spoilt(problem, [q, grad_out], _of_keys(k, v, bias))
    for call in _plan(problem, q.shape[1], q):
        given = (_batch(grad, call.queries), _batch(qs, call.queries))
        keyed = (_batch(ks, call.keys), _batch(vs, call.keys), _mask(call, bias, acc))
        run = _gradients if dbias is None else _gradients_with_bias
        doubtful, made = run(call, *given, *keyed, score_scale(q, scale))
        bad.update(doubtful)
        _add(dq, call.queries, made[0])
        _add(dk, call.keys, made[1])
        _add(dv, call.keys, made[2])
        if dbias is not None:
            for j, rows in zip(call.keys, made[-1], strict=True):
                dbias[:, j] += rows
    for which in bad:
        i, j = at[which]
        exact = (grad_out[i].to(acc), q[i].to(acc), k[j].to(acc), v[j].to(acc))
        add = None if bias is None else bias[..., j].to(acc)
        made = attend_backward(*exact, problem.seen(which, q), scale, softcap, add)
        dq[i], dk[j], dv[j], by_head = made
        if dbias is not None:
            dbias[:, j] = by_head
    none = [empty_gradient(grad_out) for _ in range(5)]
    if bias is not None and dbias is not None:
        none[2] = (dbias if bias.dim() == 2 else dbias.sum(0)).to(bias.dtype)
    return (dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), *none)


def _working_dtype(q: Tensor, k: Tensor, v: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.promote_types(k.dtype, v.dtype))


@implements(varlen_attention, target="cpu", backward=_backward, refuses=_refuses)
def forward(
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
) -> Tensor:
    """``varlen_attention``; contiguous, in q's dtype."""
    at = spans(q.shape[0], k.shape[0], cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k)
    problem = _Problem(at, causal, window, bias, q_pos, k_pos)
    dtype = _working_dtype(q, k, v)
    acc = accumulate_dtype(dtype)
    qs, ks, vs = _as(dtype, q, k, v)
    out = q.new_zeros(*q.shape[:2], v.shape[2], dtype=dtype)
    bad = _spoilt(problem, [q], _of_keys(k, v, bias))
    calls: list[tuple[_Call, Tensor]] = []
    for call in _plan(problem, q.shape[1], q):
        batch = (_batch(qs, call.queries), _batch(ks, call.keys), _batch(vs, call.keys))
        made, lse = _attention(
            *_widened(*batch),
            *(0.0, call.causal),
            attn_mask=_mask(call, bias, acc),
            scale=score_scale(q, scale),
        )
        calls.append((call, lse))
        _add(out, call.queries, _seeing(call, made))
    bad.update(_all_doubtful(calls, out))
    for which in bad:
        i, j = at[which]
        exact = (q[i].to(acc), k[j].to(acc), v[j].to(acc))
        add = None if bias is None else bias[..., j].to(acc)
        out[i] = attend(*exact, problem.seen(which, q), scale, softcap, add).to(dtype)
    return out.to(q.dtype)
