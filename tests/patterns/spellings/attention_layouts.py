"""Attention in other layouts: einsum, grouped heads, tokens before heads, softmax written out."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.patterns.spellings.attention import join, sdpa, split
from tests.patterns.spellings.spelling import Inputs, Spelling, seeded, tokens


def causal(scores: Tensor) -> Tensor:
    """Minus infinity above the diagonal of the last two dimensions."""
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    return scores.masked_fill(hidden, -torch.inf)


class Einsum(nn.Module):
    """The open-source habit: chunk, rearrange, two einsums, ``sim`` and ``attn``."""

    def __init__(self, dim: int = 10, heads: int = 3, dim_head: int = 4) -> None:
        super().__init__()
        self.heads, self.scale = heads, dim_head**-0.5
        self.norm = nn.LayerNorm(dim)
        self.to_qkv = nn.Linear(dim, 3 * heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        qkv = self.to_qkv(self.norm(x)).chunk(3, dim=-1)
        q, k, v = (t.reshape(b, n, self.heads, -1).permute(0, 2, 1, 3) for t in qkv)
        sim = torch.einsum("bhid,bhjd->bhij", q, k) * self.scale
        attn = sim.softmax(dim=-1)
        out = torch.einsum("bhij,bhjd->bhid", attn, v)
        return x + self.to_out(out.permute(0, 2, 1, 3).reshape(b, n, -1))

    def expected(self, x: Tensor) -> Tensor:
        q, k, v = (split(y, self.heads) for y in self.to_qkv(self.norm(x)).chunk(3, -1))
        return x + self.to_out(join(sdpa(q, k, v)))


class TokensBeforeHeads(nn.Module):
    """JAX's layout (b t h d), with a weight (d, h, k) a projection; queries divided."""

    def __init__(self, d: int = 10, heads: int = 3, size: int = 4) -> None:
        super().__init__()
        self.wq, self.wk, self.wv = (
            nn.Parameter(torch.randn(d, heads, size) / d**0.5) for _ in range(3)
        )
        self.wo = nn.Parameter(torch.randn(heads, size, d) / d**0.5)

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values (b t h d)."""
        return tuple(torch.einsum("btd,dhk->bthk", x, w) for w in (self.wq, self.wk, self.wv))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x)
        q = q / self.wq.shape[-1] ** 0.5
        logits = causal(torch.einsum("bthd,bshd->bhts", q, k))
        weights = torch.softmax(logits, dim=-1)
        out = torch.einsum("bhts,bshd->bthd", weights, v)
        return torch.einsum("bthk,hkd->btd", out, self.wo)

    def expected(self, x: Tensor) -> Tensor:
        q, k, v = (y.transpose(1, 2) for y in self.project(x))
        return join(sdpa(q, k, v, causal=True)) @ self.wo.flatten(0, 1)


class Grouped(nn.Module):
    """Six query heads of 4 over three key heads, which each subclass spreads in its own way."""

    def __init__(self, d: int = 10, heads: int = 6, kv_heads: int = 3, size: int = 4) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.scaling = heads, kv_heads, size**-0.5
        self.q_proj = nn.Linear(d, heads * size, bias=False)
        self.k_proj = nn.Linear(d, kv_heads * size, bias=False)
        self.v_proj = nn.Linear(d, kv_heads * size, bias=False)
        self.o_proj = nn.Linear(heads * size, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q = split(self.q_proj(x), self.heads)
        k, v = (split(f(x), self.kv_heads) for f in (self.k_proj, self.v_proj))
        return self.o_proj(self.attend(q, k, v))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(b h t d), (b g t d), (b g t d) -> (b t h*d)"""
        raise NotImplementedError

    def expected(self, x: Tensor) -> Tensor:
        q = split(self.q_proj(x), self.heads)
        k, v = (
            split(f(x), self.kv_heads)[:, [0, 0, 1, 1, 2, 2]] for f in (self.k_proj, self.v_proj)
        )
        return self.o_proj(join(sdpa(q, k, v, causal=True)))


class RepeatedKeys(Grouped):
    """``repeat_interleave`` over heads."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (y.repeat_interleave(self.heads // self.kv_heads, dim=1) for y in (k, v))
        scores = causal(torch.matmul(q, k.transpose(2, 3)) * self.scaling)
        return join(torch.matmul(F.softmax(scores, dim=-1), v))


class ExpandedKeys(Grouped):
    """Llama's ``repeat_kv``, rotary positions, softmax in float32, an additive mask."""

    def rotate(self, x: Tensor) -> Tensor:
        """Rotary positions on (b h t d)."""
        half = x.shape[-1] // 2
        rates = 10000.0 ** (-torch.arange(half, dtype=x.dtype) / half)
        angles = torch.arange(x.shape[2], dtype=x.dtype)[:, None] * rates
        cos, sin = (torch.cat([f(angles)] * 2, -1) for f in (torch.cos, torch.sin))
        return x * cos + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin

    def repeat_kv(self, hidden: Tensor) -> Tensor:
        """(b g t d) -> (b h t d)"""
        batch, groups, slen, head_dim = hidden.shape
        n_rep = self.heads // groups
        hidden = hidden[:, :, None, :, :].expand(batch, groups, n_rep, slen, head_dim)
        return hidden.reshape(batch, groups * n_rep, slen, head_dim)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = self.rotate(q), self.rotate(k)
        weights = torch.matmul(q, self.repeat_kv(k).transpose(2, 3)) * self.scaling
        lowest = weights.new_full(weights.shape[-2:], torch.finfo(weights.dtype).min)
        weights = weights + torch.triu(lowest, diagonal=1)[None, None]
        weights = F.softmax(weights, dim=-1, dtype=torch.float32).to(q.dtype)
        output = torch.matmul(weights, self.repeat_kv(v)).transpose(1, 2).contiguous()
        return output.reshape(*output.shape[:2], -1).contiguous()

    def expected(self, x: Tensor) -> Tensor:
        q = self.rotate(split(self.q_proj(x), self.heads))
        k = self.rotate(split(self.k_proj(x), self.kv_heads)).repeat_interleave(2, 1)
        v = split(self.v_proj(x), self.kv_heads).repeat_interleave(2, 1)
        return self.o_proj(join(sdpa(q, k, v, causal=True)))


class QueriesInGroups(Grouped):
    """The queries regrouped (b g r t d), the keys as they are, five-dimensional scores."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q = q.unflatten(1, (self.kv_heads, -1)) * self.scaling
        scores = causal(torch.einsum("bgrtd,bgsd->bgrts", q, k))
        out = torch.einsum("bgrts,bgsd->bgrtd", scores.softmax(-1), v)
        return out.permute(0, 3, 1, 2, 4).flatten(2)


class OneKeyHead(nn.Module):
    """Multi-query: keys and values have no head dimension at all."""

    def __init__(self, d: int = 10, heads: int = 4, size: int = 6) -> None:
        super().__init__()
        self.heads, self.size = heads, size
        self.to_q = nn.Linear(d, heads * size, bias=False)
        self.to_kv = nn.Linear(d, 2 * size, bias=False)
        self.to_out = nn.Linear(heads * size, d)

    def forward(self, x: Tensor) -> Tensor:
        q = split(self.to_q(x), self.heads)
        k, v = self.to_kv(x).split(self.size, dim=-1)
        sim = causal(torch.einsum("bhid,bjd->bhij", q * self.size**-0.5, k))
        out = torch.einsum("bhij,bjd->bhid", sim.softmax(-1), v)
        return self.to_out(join(out))

    def expected(self, x: Tensor) -> Tensor:
        q = split(self.to_q(x), self.heads)
        k, v = (y[:, None].repeat(1, self.heads, 1, 1) for y in self.to_kv(x).chunk(2, -1))
        return self.to_out(join(sdpa(q, k, v, causal=True)))


class Written(nn.Module):
    """Three heads of 4 with values of 5; each subclass writes the softmax in its own way."""

    def __init__(self, d: int = 10, heads: int = 3, size: int = 4, value_size: int = 5) -> None:
        super().__init__()
        self.heads, self.size = heads, size
        self.q, self.k = (nn.Linear(d, heads * size) for _ in range(2))
        self.v, self.o = nn.Linear(d, heads * value_size), nn.Linear(heads * value_size, d)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (split(f(x), self.heads) for f in (self.q, self.k, self.v))
        return self.o(join(self.attend(q, k, v)))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(b h t d), (b h t d), (b h t e) -> (b h t e)"""
        raise NotImplementedError

    def expected(self, x: Tensor) -> Tensor:
        q, k, v = (split(f(x), self.heads) for f in (self.q, self.k, self.v))
        return self.o(join(sdpa(q, k, v)))


class KeysScaled(Written):
    """The scale on the keys."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k = k / self.size**0.5
        return (q @ k.mT).softmax(-1) @ v


class FloatSoftmax(Written):
    """Cast to float32 and back."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.matmul(q, k.transpose(-1, -2)) / self.size**0.5
        probs = torch.softmax(scores.float(), dim=-1).type_as(scores)
        return torch.matmul(probs, v)


class SoftmaxWrittenOut(Written):
    """The largest subtracted, exponentials, their sum."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = self.size**-0.5 * (q @ k.transpose(-2, -1))
        scores = scores - scores.amax(dim=-1, keepdim=True)
        weights = torch.exp(scores)
        return (weights / weights.sum(dim=-1, keepdim=True)) @ v


class NormalisedLast(Written):
    """Exponentials times values first, the division by their sum last; the largest detached."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.einsum("bhtd,bhsd->bhts", q, k).div(self.size**0.5)
        weights = (scores - scores.max(-1, keepdim=True).values.detach()).exp()
        return (weights @ v) / weights.sum(-1, keepdim=True)


class LogSoftmax(Written):
    """The exponential of a log-softmax."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        logits = torch.einsum("bhqd,bhkd->bhqk", q, k) * self.size**-0.5
        return torch.einsum("bhqk,bhkd->bhqd", F.log_softmax(logits, -1).exp(), v)


class LogSumExp(Written):
    """Scores less their log-sum-exp, exponentiated."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT * self.size**-0.5
        return torch.exp(scores - torch.logsumexp(scores, -1, keepdim=True)) @ v


class KeysByQueries(Written):
    """Scores the other way round (keys, queries), softmax over dimension -2: over keys still."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = torch.matmul(k, q.transpose(-1, -2)) * self.size**-0.5
        return torch.matmul(F.softmax(scores, dim=-2).transpose(-1, -2), v)


class ValuesByHand(Written):
    """Products and sums in place of matrix products."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = (q[:, :, :, None, :] * k[:, :, None, :, :]).sum(-1) / self.size**0.5
        return (scores.softmax(-1)[..., None] * v[:, :, None]).sum(-2)


class SpatialBlock(nn.Module):
    """A diffusion model's: 1x1 convolutions over an image, one head, values (b, c, pixels)."""

    def __init__(self, c: int = 6) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(2, c)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(c, c, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h_ = self.norm(x)
        q, k, v = self.q(h_), self.k(h_), self.v(h_)
        b, c, h, w = q.shape
        q = q.reshape(b, c, h * w).permute(0, 2, 1)
        w_ = torch.bmm(q, k.reshape(b, c, h * w)) * (int(c) ** (-0.5))
        w_ = torch.nn.functional.softmax(w_, dim=2).permute(0, 2, 1)
        h_ = torch.bmm(v.reshape(b, c, h * w), w_).reshape(b, c, h, w)
        return x + self.proj_out(h_)

    def expected(self, x: Tensor) -> Tensor:
        h_ = self.norm(x)
        q, k, v = (f(h_).flatten(2).mT for f in (self.q, self.k, self.v))
        return x + self.proj_out(sdpa(q, k, v).mT.unflatten(-1, x.shape[2:]))


class Axial(nn.Module):
    """Along the rows of a grid (b r t c): five-dimensional, rows a second batch."""

    def __init__(self, d: int = 10, heads: int = 3, size: int = 4) -> None:
        super().__init__()
        self.heads, self.size = heads, size
        self.qkv = nn.Linear(d, 3 * heads * size)
        self.out = nn.Linear(heads * size, d)

    def project(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values (b r h t d)."""
        parts = self.qkv(x).unflatten(-1, (3, self.heads, self.size))
        return parts.permute(3, 0, 1, 4, 2, 5).unbind(0)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x)
        att = torch.einsum("brhid,brhjd->brhij", q, k).mul(self.size**-0.5).softmax(-1)
        out = torch.einsum("brhij,brhjd->brihd", att, v)
        return self.out(out.flatten(-2))

    def expected(self, x: Tensor) -> Tensor:
        return self.out(sdpa(*self.project(x)).transpose(2, 3).flatten(-2))


def _shaped(width: int, shape: tuple[int, ...], channels_first: bool = False) -> Inputs:
    def inputs(length: int) -> tuple[Tensor, ...]:
        (x,) = tokens(width)(length * shape[0])
        x = x.unflatten(1, (shape[0], length))
        return (x.permute(0, 3, 1, 2).contiguous() if channels_first else x,)

    return inputs


SPELLINGS: list[Spelling] = [
    Spelling(made.__name__, seeded(made), tokens(10), "sdpa", reference=made.expected)
    for made in (
        *(Einsum, TokensBeforeHeads, RepeatedKeys, ExpandedKeys, QueriesInGroups, OneKeyHead),
        *(KeysScaled, FloatSoftmax, SoftmaxWrittenOut, LogSoftmax, LogSumExp, KeysByQueries),
    )
] + [
    Spelling(
        "SpatialBlock",
        seeded(SpatialBlock),
        _shaped(6, (3,), True),
        "sdpa",
        reference=SpatialBlock.expected,
    ),
    Spelling("Axial", seeded(Axial), _shaped(10, (7,)), "sdpa", reference=Axial.expected),
]

# far-fetched, though attention: raised or declined, the numbers must be eager's
EITHER: list[Spelling] = [
    Spelling(made.__name__, seeded(made), tokens(10), "sdpa", reference=made.expected)
    for made in (NormalisedLast, ValuesByHand)
]
