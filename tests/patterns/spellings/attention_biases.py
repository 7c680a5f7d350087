"""Attention with a bias on its scores, a cache, a learned query or keys of another length."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.patterns.spellings.attention import join, sdpa, split
from tests.patterns.spellings.spelling import Spelling, seeded, tokens


class Projections(nn.Module):
    """Queries, keys, values and an output: three heads of 4 on a width of 10."""

    def __init__(self, d: int = 10, heads: int = 3, size: int = 4) -> None:
        super().__init__()
        self.heads, self.size = heads, size
        self.q, self.k, self.v = (nn.Linear(d, heads * size, bias=False) for _ in range(3))
        self.o = nn.Linear(heads * size, d, bias=False)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(b h t d) each."""
        q, k, v = (split(f(x), self.heads) for f in (self.q, self.k, self.v))
        return q, k, v


class Buckets(Projections):
    """T5's: no scale at all, a learned bias of the bucketed distance."""

    def __init__(self) -> None:
        super().__init__()
        self.relative_attention_bias = nn.Embedding(8, self.heads)

    def compute_bias(self, length: int) -> Tensor:
        """(1 h t t)"""
        context = torch.arange(length)[:, None]
        distance = torch.arange(length)[None, :] - context
        bucket = (distance > 0).to(torch.long) * 4
        distance = torch.abs(distance)
        far = 2 + (torch.log(distance.float().clamp(min=1) / 2) / math.log(8) * 2).to(torch.long)
        far = torch.min(far, torch.full_like(far, 3))
        bucket = bucket + torch.where(distance < 2, distance, far)
        return self.relative_attention_bias(bucket).permute([2, 0, 1]).unsqueeze(0)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x)
        scores = torch.matmul(q, k.transpose(3, 2))
        scores += self.compute_bias(x.shape[1])
        weights = nn.functional.softmax(scores.float(), dim=-1).type_as(scores)
        return self.o(join(torch.matmul(weights, v)))

    def expected(self, x: Tensor) -> Tensor:
        bias = self.compute_bias(x.shape[1])
        return self.o(join(sdpa(*self.project(x), bias=bias, scale=1.0)))


class Alibi(Projections):
    """A slope a head times the distance, and the causal mask, in one tensor."""

    def slopes(self, x: Tensor) -> Tensor:
        """(h 1 1)"""
        powers = [2 ** (-8 * (i + 1) / self.heads) for i in range(self.heads)]
        return torch.tensor(powers, dtype=x.dtype).view(-1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x)
        t = x.shape[1]
        past = (torch.arange(t)[None] - torch.arange(t)[:, None]).to(x.dtype)
        future = torch.triu(torch.full((t, t), float("-inf"), dtype=x.dtype), 1)
        att = torch.einsum("bhid,bhjd->bhij", q, k) / math.sqrt(self.size)
        att = att + (self.slopes(x) * past + future)
        return self.o(join(att.softmax(-1) @ v))

    def expected(self, x: Tensor) -> Tensor:
        at = torch.arange(x.shape[1])
        bias = self.slopes(x) * (at[None] - at[:, None])
        bias = bias.masked_fill(at[None] > at[:, None], -torch.inf)
        return self.o(join(sdpa(*self.project(x), bias=bias)))


class Windows(nn.Module):
    """Swin's: windows of 2 x 2 as a batch, a table of biases, a mask for windows that wrapped."""

    relative_position_index: Tensor

    def __init__(self, dim: int = 9, heads: int = 3, window: int = 2) -> None:
        super().__init__()
        self.num_heads, self.scale, self.tokens = heads, (dim // heads) ** -0.5, window**2
        self.table = nn.Parameter(torch.randn((2 * window - 1) ** 2, heads))
        grid = torch.stack(torch.meshgrid(*[torch.arange(window)] * 2, indexing="ij")).flatten(1)
        apart = (grid[:, :, None] - grid[:, None, :]).permute(1, 2, 0) + window - 1
        index = apart[..., 0] * (2 * window - 1) + apart[..., 1]
        self.register_buffer("relative_position_index", index)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def bias(self) -> Tensor:
        """(h 4 4)"""
        flat = self.table[self.relative_position_index.view(-1)]
        return flat.view(self.tokens, self.tokens, -1).permute(2, 0, 1).contiguous()

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        B_, N, C = x.shape
        qkv = self.qkv(x).reshape(B_, N, 3, self.num_heads, C // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attn = (q * self.scale) @ k.transpose(-2, -1)
        attn = attn + self.bias().unsqueeze(0)
        nW = mask.shape[0]
        attn = attn.view(B_ // nW, nW, self.num_heads, N, N) + mask.unsqueeze(1).unsqueeze(0)
        attn = attn.view(-1, self.num_heads, N, N).softmax(-1)
        return self.proj((attn @ v).transpose(1, 2).reshape(B_, N, C))

    def expected(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (split(y, self.num_heads) for y in self.qkv(x).chunk(3, -1))
        bias = self.bias() + mask.repeat(x.shape[0] // mask.shape[0], 1, 1)[:, None]
        return self.proj(join(sdpa(q, k, v, bias)))


class TransformerXl(Projections):
    """Content and position scores, each with its own bias on the query; the shift of Dai et al."""

    def __init__(self) -> None:
        super().__init__()
        self.r_net = nn.Linear(10, self.heads * self.size, bias=False)
        self.r_w_bias, self.r_r_bias = (
            nn.Parameter(torch.randn(self.heads, self.size)) for _ in range(2)
        )

    def positions(self, x: Tensor) -> Tensor:
        """Projected sinusoids of the distances t-1 .. 0 (t h d)."""
        at = torch.arange(x.shape[1] - 1, -1, -1, dtype=x.dtype)
        angles = at[:, None] * 10.0 ** -torch.arange(5, dtype=x.dtype)
        return self.r_net(torch.cat([angles.sin(), angles.cos()], -1)).unflatten(
            -1, (self.heads, -1)
        )

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (self.heads, -1)) for f in (self.q, self.k, self.v))
        ac = torch.einsum("bind,bjnd->bnij", q + self.r_w_bias, k)
        bd = torch.einsum("bind,jnd->bnij", q + self.r_r_bias, self.positions(x))
        b, n, t, _ = bd.shape
        bd = F.pad(bd, (1, 0)).view(b, n, t + 1, t)[:, :, 1:].reshape(b, n, t, t)
        score = (ac + bd).mul_(1 / self.size**0.5)
        score = score.masked_fill(torch.triu(torch.ones(t, t), 1).bool(), -float("inf"))
        vec = torch.einsum("bnij,bjnd->bind", F.softmax(score, dim=3), v)
        return self.o(vec.flatten(2))

    def expected(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x)
        at = torch.arange(x.shape[1])
        r = self.positions(x).flip(0)[(at[:, None] - at[None]).clamp(min=0)]
        bias = torch.einsum("bnid,ijnd->bnij", q + self.r_r_bias[:, None], r) / self.size**0.5
        bias = bias.masked_fill(at[None] > at[:, None], -torch.inf)
        return self.o(join(sdpa(q + self.r_w_bias[:, None], k, v, bias)))


class Cross(Projections):
    """Queries of a decoder on seven tokens of an encoder of another width."""

    def __init__(self) -> None:
        super().__init__()
        self.k, self.v = (nn.Linear(8, 12) for _ in range(2))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q = self.q(x).view(*x.shape[:2], self.heads, self.size).transpose(1, 2)
        k = self.k(context).view(*context.shape[:2], self.heads, self.size).transpose(1, 2)
        v = self.v(context).view(*context.shape[:2], self.heads, self.size).transpose(1, 2)
        att = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(self.size)
        out = torch.matmul(torch.softmax(att, -1), v).transpose(1, 2)
        return x + self.o(out.reshape(*x.shape[:2], -1))

    def expected(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = (split(y, 3) for y in (self.q(x), self.k(context), self.v(context)))
        return x + self.o(join(sdpa(q, k, v)))


class Decoding(Projections):
    """One token against a cache (b h t d), which grows by it and is returned."""

    def forward(self, x: Tensor, past_k: Tensor, past_v: Tensor) -> tuple[Tensor, ...]:
        q, k, v = self.project(x)
        k, v = torch.cat((past_k, k), dim=-2), torch.cat((past_v, v), dim=-2)
        w = torch.matmul(q, k.transpose(-1, -2)) * self.size**-0.5
        a = torch.matmul(F.softmax(w, dim=-1), v)
        return self.o(join(a)), k, v

    def expected(self, x: Tensor, past_k: Tensor, past_v: Tensor) -> tuple[Tensor, ...]:
        q, k, v = self.project(x)
        k, v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
        return self.o(join(sdpa(q, k, v))), k, v


class LearnedQuery(Projections):
    """Pooling: two learned queries for all sequences, heads merged into the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(2, 10))

    def forward(self, x: Tensor) -> Tensor:
        b, n, _ = x.shape
        q = self.q(self.latents).view(2, self.heads, self.size).transpose(0, 1)
        q = q.unsqueeze(0).expand(b, -1, -1, -1).reshape(b * self.heads, 2, self.size)
        k, v = (f(x).view(b, n, self.heads, self.size) for f in (self.k, self.v))
        k = k.permute(0, 2, 3, 1).reshape(b * self.heads, self.size, n)
        v = v.transpose(1, 2).reshape(b * self.heads, n, self.size)
        out = torch.bmm((torch.bmm(q, k) / self.size**0.5).softmax(2), v)
        return self.o(out.view(b, self.heads, 2, self.size).transpose(1, 2).reshape(b, 2, -1))

    def expected(self, x: Tensor) -> Tensor:
        q = split(self.q(self.latents)[None], self.heads).expand(x.shape[0], -1, -1, -1)
        k, v = self.project(x)[1:]
        return self.o(join(sdpa(q, k, v)))


class Cosine(Projections):
    """Unit queries and keys; a learned scale a head on the queries."""

    def __init__(self) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.linspace(0.5, 1.5, self.heads)[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x)
        q = F.normalize(q, dim=-1) * self.log_scale.exp()
        return self.o(join((q @ F.normalize(k, dim=-1).mT).softmax(dim=-1) @ v))

    def expected(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x)
        q = F.normalize(q, dim=-1) * self.log_scale.exp()
        return self.o(join(sdpa(q, F.normalize(k, dim=-1), v, scale=1.0)))


class CosineScores(Cosine):
    """Swin v2's: the same scale, clamped, on the scores."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x)
        attn = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        attn = attn * torch.clamp(self.log_scale, max=math.log(100.0)).exp()
        return self.o(join(attn.softmax(dim=-1) @ v))


def _windows(count: int) -> tuple[Tensor, Tensor]:
    """``count`` windows an image of two; the first of them wrapped."""
    (x,) = tokens(9, batch=2 * count)(4)
    mask = torch.zeros(count, 4, 4)
    mask[0, :2, 2:] = mask[0, 2:, :2] = -100.0
    return x, mask


def _decoder(length: int) -> tuple[Tensor, ...]:
    return *tokens(10)(length), *tokens(8)(7)


def _cache(length: int) -> tuple[Tensor, ...]:
    past_k, past_v = (tokens(4, batch=6)(length + i)[0][:, :length] for i in (0, 1))
    return *tokens(10)(1), past_k.unflatten(0, (2, 3)), past_v.unflatten(0, (2, 3))


SPELLINGS: list[Spelling] = [
    Spelling(made.__name__, seeded(made), inputs, "sdpa", reference=made.expected)
    for made, inputs in (
        (Buckets, tokens(10)),
        (Alibi, tokens(10)),
        (Windows, _windows),
        (TransformerXl, tokens(10)),
        (Cross, _decoder),
        (Decoding, _cache),
        (LearnedQuery, tokens(10)),
        (Cosine, tokens(10)),
    )
]

# attention once the scale moves to the queries: raised or declined, the numbers must be eager's
EITHER: list[Spelling] = [
    Spelling("CosineScores", seeded(CosineScores), tokens(10), "sdpa", reference=Cosine.expected)
]
