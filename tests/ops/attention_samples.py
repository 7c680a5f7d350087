"""Calls of ``varlen_attention``, and what torch's attention gives for each of their sequences.

Lengths are small and awkward: none, one, two, three, primes, several alike, one long.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from effpass.ops import varlen_attention
from tests.ops.samples import offsets

RAGGED = (3, 0, 7, 1, 2, 13, 7)


@dataclass(frozen=True)
class AttentionSample:
    """One call: lengths, ``(h, hk, d, e)``, and a function that makes the other arguments."""

    name: str
    lengths: tuple[int, ...] = RAGGED
    lengths_k: tuple[int, ...] | None = None
    sizes: tuple[int, int, int, int] = (4, 2, 8, 8)
    more: dict[str, Any] = field(default_factory=dict, hash=False)
    made: Callable[[int, int], dict[str, Any]] = lambda t, tk: {}

    def given(self, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
        """All arguments by name, the same numbers every time; a bias stays float32."""
        h, hk, d, e = self.sizes
        t, tk = sum(self.lengths), sum(self.lengths_k or self.lengths)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(len(self.name))
            q, k, v = torch.randn(t, h, d), torch.randn(tk, hk, d), torch.randn(tk, hk, e)
            made = self.made(t, tk)
        given = {"q": q.to(dtype), "k": k.to(dtype), "v": v.to(dtype)}
        given |= {"cu_seqlens": offsets(*self.lengths), "max_seqlen": max(self.lengths)}
        if self.lengths_k is not None:
            given |= {"cu_seqlens_k": offsets(*self.lengths_k)}
            given |= {"max_seqlen_k": max(self.lengths_k)}
        return varlen_attention.bind(**given, **self.more, **made)

    def __str__(self) -> str:
        return self.name


def differentiable(given: dict[str, Any]) -> dict[str, Any]:
    """The same numbers, every floating-point tensor a leaf with a gradient."""
    return {
        name: a.detach().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a
        for name, a in given.items()
    }


def doubled(given: dict[str, Any]) -> dict[str, Any]:
    """The same with every floating-point tensor in float64."""
    return {
        name: a.double() if isinstance(a, Tensor) and a.is_floating_point() else a
        for name, a in given.items()
    }


def grad_of(out: Tensor) -> Tensor:
    """Some gradient for this output, the same every time, and exact in every dtype."""
    made = torch.Generator().manual_seed(7)
    return torch.randint(-64, 65, out.shape, generator=made).to(out.dtype) / 32


def results(call: Callable[..., Tensor], given: dict[str, Any]) -> dict[str, Tensor]:
    """``out`` and the gradient of every floating-point tensor, by name."""
    leaves = differentiable(given)
    wanted = {n: a for n, a in leaves.items() if isinstance(a, Tensor) and a.requires_grad}
    out = call(*leaves.values())
    grads = torch.autograd.grad(out, list(wanted.values()), grad_of(out))
    return {"out": out.detach(), **dict(zip(wanted, grads, strict=True))}


def _sees(given: dict[str, Any], at: int, at_k: int) -> bool:
    left, right = given["window"]
    if given["causal"] and at_k > at:
        return False
    return (left < 0 or at_k >= at - left) and (right < 0 or at_k <= at + right)


def _seen(given: dict[str, Any], queries: range, keys: range) -> Tensor:
    """(queries, keys), pair by pair."""
    if given["q_pos"] is None:
        q_pos = [i - queries.start + len(keys) - len(queries) for i in queries]
        k_pos = [j - keys.start for j in keys]
    else:
        q_pos = [int(given["q_pos"][i]) for i in queries]
        k_pos = [int(given["k_pos"][j]) for j in keys]
    pairs = [[_sees(given, p, r) for r in k_pos] for p in q_pos]
    return torch.tensor(pairs, dtype=torch.bool).reshape(len(queries), len(keys))


def _one(given: dict[str, Any], queries: range, keys: range) -> Tensor:
    """One sequence by torch's attention, without the queries that see nothing."""
    q, k, v = given["q"][queries], given["k"][keys], given["v"][keys]
    out = torch.zeros(len(queries), q.shape[1], v.shape[2], dtype=q.dtype)
    seen = _seen(given, queries, keys)
    live = seen.any(1).nonzero().flatten()
    if len(live) == 0:
        return out
    add = torch.zeros(len(keys), dtype=q.dtype)
    add = add if given["bias"] is None else given["bias"][..., keys]
    mask = torch.where(seen[live], add[..., None, :], float("-inf"))
    heads = [each.transpose(0, 1)[None] for each in (q[live], k, v)]
    if given["softcap"] is None:
        with sdpa_kernel(SDPBackend.MATH):
            each = scaled_dot_product_attention(
                *heads, attn_mask=mask, scale=given["scale"], enable_gqa=True
            )
    else:
        group, cap = q.shape[1] // k.shape[1], given["softcap"]
        heads[1:] = [each.repeat_interleave(group, 1) for each in heads[1:]]
        scale = q.shape[-1] ** -0.5 if given["scale"] is None else given["scale"]
        scores = cap * torch.tanh(heads[0] @ heads[1].transpose(2, 3) * scale / cap) + mask
        each = scores.softmax(-1) @ heads[2]
    return out.index_copy(0, live, each[0].transpose(0, 1))


def by_sequence(*arguments: Any) -> Tensor:
    """What ``varlen_attention`` should give, one sequence at a time."""
    given = dict(zip(varlen_attention.signature.parameters, arguments, strict=True))
    keys = given["cu_seqlens"] if given["cu_seqlens_k"] is None else given["cu_seqlens_k"]
    runs = [
        [range(*ends) for ends in pairwise(each.tolist())] for each in (given["cu_seqlens"], keys)
    ]
    out = torch.cat([_one(given, i, j) for i, j in zip(*runs, strict=True)])
    tensors = (given["q"], given["k"], given["v"], given["bias"])
    return out + sum(0 * each.sum() for each in tensors if each is not None)  # all have a gradient


def _gaps(t: int, tk: int) -> dict[str, Any]:
    """Rising positions with holes, as padding leaves them."""
    pos = torch.arange(t) * 2 + torch.randint(0, 2, (t,))
    return {"q_pos": pos, "k_pos": pos}


def _shuffled(t: int, tk: int) -> dict[str, Any]:
    return {"q_pos": torch.randint(0, 9, (t,)), "k_pos": torch.randint(0, 9, (tk,))}


def _shared(t: int, tk: int) -> dict[str, Any]:
    """Queries and keys at the same positions, in no order, some twice."""
    pos = torch.randint(0, 9, (t,))
    return {"q_pos": pos, "k_pos": pos}


def _slope(t: int, tk: int) -> dict[str, Any]:
    """A bias linear in the position of the key, another slope for each head."""
    return {"bias": -torch.tensor([0.5, 0.25, 0.1, 0.0])[:, None] * torch.arange(tk)}


def _key_bias(t: int, tk: int) -> dict[str, Any]:
    return {"bias": torch.randn(tk)}


CAUSAL = {"causal": True}
CROSS = (5, 2, 0, 9, 1, 13, 0)
SAMPLES = [
    AttentionSample("plain"),
    AttentionSample("one head", sizes=(1, 1, 5, 5)),
    AttentionSample("one key head", sizes=(6, 1, 8, 8), more=CAUSAL),
    AttentionSample("narrow values", sizes=(4, 4, 16, 5)),
    AttentionSample("wide values", sizes=(4, 2, 3, 16), more=CAUSAL),
    AttentionSample("causal", more=CAUSAL),
    AttentionSample("scaled", more={"scale": -0.3}),
    AttentionSample("single tokens", lengths=(1, 1, 1), more=CAUSAL),
    AttentionSample("pairs", lengths=(2, 2, 2, 2, 0, 2), more=CAUSAL),
    AttentionSample("alike, between others", lengths=(5, 3, 5, 5, 2, 5), more=CAUSAL),
    AttentionSample("nothing", lengths=(0, 0)),
    AttentionSample("primes", lengths=(31, 17, 2, 23), sizes=(3, 3, 13, 13), more=CAUSAL),
    AttentionSample("long", lengths=(3, 401, 1), sizes=(2, 1, 8, 8), more=CAUSAL),
    AttentionSample(
        "long window", lengths=(3, 401, 1), sizes=(2, 1, 8, 8), more={"window": (9, 2)}
    ),
    AttentionSample("left window", more={"window": (2, -1)}),
    AttentionSample("right window", more={"window": (-1, 1)}),
    AttentionSample("causal window", more={"window": (3, 0), **CAUSAL}),
    AttentionSample("wide windows", more={"window": (6, 1)}),
    AttentionSample("wide window, causal", more={"window": (2, 4), **CAUSAL}),
    AttentionSample("only itself", more={"window": (0, 0)}),
    AttentionSample("positions unused", made=_shuffled),
    AttentionSample("gaps", more=CAUSAL, made=_gaps),
    AttentionSample("gaps and window", more={"window": (4, 3)}, made=_gaps),
    AttentionSample("gaps and wide window", more={"window": (60, 70)}, made=_gaps),
    AttentionSample("any order", more=CAUSAL, made=_shuffled),
    AttentionSample("any order, shared", more=CAUSAL, made=_shared),
    AttentionSample("any order, window", more={"window": (1, 2)}, made=_shuffled),
    AttentionSample("cross", lengths_k=CROSS),
    AttentionSample("cross, causal", lengths_k=CROSS, more=CAUSAL),
    AttentionSample("cross, wide window", lengths_k=CROSS, more={"window": (7, 4)}),
    AttentionSample("cross, window", lengths_k=CROSS, more={"window": (2, 1)}),
    AttentionSample("cross, positions", lengths_k=CROSS, more=CAUSAL, made=_shuffled),
    AttentionSample("no keys", lengths=(2, 3), lengths_k=(0, 0)),
    AttentionSample("bias", made=_key_bias),
    AttentionSample("bias, causal", more=CAUSAL, made=_key_bias),
    AttentionSample("bias of heads", made=_slope),
    AttentionSample("bias of heads, causal", more=CAUSAL, made=_slope),
    AttentionSample("bias, alike", lengths=(4, 4, 4), more={"window": (1, 1)}, made=_slope),
    AttentionSample("bias, cross", lengths_k=CROSS, more=CAUSAL, made=_key_bias),
]
CAPPED = [
    AttentionSample("soft cap", more={"softcap": 0.8}),
    AttentionSample("soft cap, causal", more={"softcap": 2.0, "scale": 0.9, **CAUSAL}),
    AttentionSample("soft cap and bias", more={"softcap": 0.8, **CAUSAL}, made=_slope),
]


def transposed(given: dict[str, Any]) -> dict[str, Any]:
    """The same numbers as slices of a wider tensor, tokens or channels far apart."""
    q, k, v = given["q"], given["k"], given["v"]
    apart = torch.stack([q, q], -1)[..., 0]
    heads_first = k.transpose(0, 1).contiguous().transpose(0, 1)
    tokens_last = v.permute(1, 2, 0).contiguous().permute(2, 0, 1)
    return {**given, "q": apart, "k": heads_first, "v": tokens_last}
