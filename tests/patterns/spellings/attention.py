"""Attention as published models write it: projections, scores, mask, softmax, values, output."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.patterns.spellings.spelling import Inputs, Spelling, seeded, tokens


def split(x: Tensor, heads: int) -> Tensor:
    """(b t h*d) -> (b h t d)"""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def join(x: Tensor) -> Tensor:
    """(b h t d) -> (b t h*d)"""
    return x.transpose(1, 2).flatten(2)


def sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    scale: float | None = None,
    causal: bool = False,
) -> Tensor:
    """torch's own attention: what every spelling here must equal.

    Not the fused kernel, whose gradient is wrong for a query with a large finite bias on every key.
    """
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, bias, is_causal=causal, scale=scale)


class Bert(nn.Module):
    """An additive mask and dropout, which is off in ``eval``."""

    def __init__(self, d: int = 10, heads: int = 3, size: int = 4) -> None:
        super().__init__()
        self.num_attention_heads, self.attention_head_size = heads, size
        self.query, self.key, self.value = (nn.Linear(d, heads * size) for _ in range(3))
        self.dropout = nn.Dropout(0.1)
        self.dense = nn.Linear(heads * size, d)
        self.LayerNorm = nn.LayerNorm(d)

    def transpose_for_scores(self, x: Tensor) -> Tensor:
        """(b t h*d) -> (b h t d)"""
        shape = (*x.size()[:-1], self.num_attention_heads, self.attention_head_size)
        return x.view(shape).permute(0, 2, 1, 3)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
        query_layer = self.transpose_for_scores(self.query(hidden_states))
        key_layer = self.transpose_for_scores(self.key(hidden_states))
        value_layer = self.transpose_for_scores(self.value(hidden_states))
        scores = torch.matmul(query_layer, key_layer.transpose(-1, -2))
        scores = scores / math.sqrt(self.attention_head_size)
        scores = scores + attention_mask
        probs = self.dropout(nn.functional.softmax(scores, dim=-1))
        context = torch.matmul(probs, value_layer).permute(0, 2, 1, 3).contiguous()
        context = context.view((*context.size()[:-2], -1))
        return self.LayerNorm(self.dense(context) + hidden_states)

    def expected(self, hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
        q, k, v = (split(f(hidden_states), 3) for f in (self.query, self.key, self.value))
        return self.LayerNorm(self.dense(join(sdpa(q, k, v, attention_mask))) + hidden_states)


class Conv1D(nn.Module):
    """GPT-2's linear layer, its weight the other way round."""

    def __init__(self, out: int, inner: int) -> None:
        super().__init__()
        self.nf = out
        self.weight = nn.Parameter(torch.randn(inner, out) / math.sqrt(inner))
        self.bias = nn.Parameter(torch.randn(out))

    def forward(self, x: Tensor) -> Tensor:
        size_out = (*x.size()[:-1], self.nf)
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(size_out)


class Gpt2(nn.Module):
    """Fused projections, causal by a stored triangle and ``torch.where``; dropout of 0."""

    causal: Tensor
    c_attn: Conv1D

    def __init__(self, heads: int = 3, size: int = 4) -> None:
        super().__init__()
        self.heads, self.embed = heads, heads * size
        triangle = torch.tril(torch.ones((64, 64), dtype=torch.bool)).view(1, 1, 64, 64)
        self.register_buffer("causal", triangle, persistent=False)
        self.c_attn, self.c_proj = Conv1D(3 * self.embed, 12), Conv1D(12, self.embed)
        self.attn_dropout, self.resid_dropout = nn.Dropout(0.0), nn.Dropout(0.0)

    def forward(self, hidden: Tensor) -> Tensor:
        query, key, value = self.c_attn(hidden).split(self.embed, dim=2)
        shape = (*query.shape[:-1], -1, self.embed // self.heads)
        query, key, value = (x.view(shape).transpose(1, 2) for x in (query, key, value))
        weights = torch.matmul(query, key.transpose(-1, -2))
        weights = weights / torch.full([], value.size(-1) ** 0.5, dtype=weights.dtype)
        query_length, key_length = query.size(-2), key.size(-2)
        mask = self.causal[:, :, key_length - query_length : key_length, :key_length]
        lowest = torch.full([], torch.finfo(weights.dtype).min, dtype=weights.dtype)
        weights = torch.where(mask, weights.to(weights.dtype), lowest)
        weights = nn.functional.softmax(weights, dim=-1).type(value.dtype)
        output = torch.matmul(self.attn_dropout(weights), value).transpose(1, 2)
        output = output.reshape(*hidden.shape[:-1], -1).contiguous()
        return self.resid_dropout(self.c_proj(output))

    def expected(self, hidden: Tensor) -> Tensor:
        q, k, v = (split(x, self.heads) for x in self.c_attn(hidden).chunk(3, -1))
        return self.c_proj(join(sdpa(q, k, v, causal=True)))


class NanoGpt(nn.Module):
    """Karpathy's: ``masked_fill`` with minus infinity where a stored triangle is 0."""

    bias: Tensor

    def __init__(self, d: int = 12, heads: int = 3, block: int = 64) -> None:
        super().__init__()
        self.c_attn = nn.Linear(d, 3 * d, bias=False)
        self.c_proj = nn.Linear(d, d, bias=False)
        self.n_head, self.n_embd = heads, d
        self.register_buffer("bias", torch.tril(torch.ones(block, block)).view(1, 1, block, block))

    def forward(self, x: Tensor) -> Tensor:
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))
        att = F.softmax(att, dim=-1)
        y = att @ v
        y = y.transpose(1, 2).contiguous().view(B, T, C)
        return self.c_proj(y)

    def expected(self, x: Tensor) -> Tensor:
        q, k, v = (split(y, self.n_head) for y in self.c_attn(x).chunk(3, -1))
        return self.c_proj(join(sdpa(q, k, v, causal=True)))


class Head(nn.Module):
    """One head of Karpathy's lecture."""

    tril: Tensor

    def __init__(self, d: int, size: int) -> None:
        super().__init__()
        self.key, self.query, self.value = (nn.Linear(d, size, bias=False) for _ in range(3))
        self.register_buffer("tril", torch.tril(torch.ones(64, 64)))

    def forward(self, x: Tensor) -> Tensor:
        _, T, _ = x.shape
        k, q = self.key(x), self.query(x)
        wei = q @ k.transpose(-2, -1) * k.shape[-1] ** -0.5
        wei = wei.masked_fill(self.tril[:T, :T] == 0, float("-inf"))
        return F.softmax(wei, dim=-1) @ self.value(x)

    def expected(self, x: Tensor) -> Tensor:
        return sdpa(self.query(x), self.key(x), self.value(x), causal=True)


class HeadByHead(nn.Module):
    """Heads as modules of their own, joined at the end: three-dimensional attention, twice."""

    def __init__(self, d: int = 10, size: int = 4) -> None:
        super().__init__()
        self.heads = nn.ModuleList(Head(d, size) for _ in range(2))
        self.proj = nn.Linear(2 * size, d)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(torch.cat([h(x) for h in self.heads], dim=-1))

    def expected(self, x: Tensor) -> Tensor:
        return self.proj(torch.cat([h.expected(x) for h in self.heads], dim=-1))  # type: ignore


class Vit(nn.Module):
    """timm's: one projection, unbound; no mask."""

    def __init__(self, d: int = 12, heads: int = 3) -> None:
        super().__init__()
        self.num_heads, self.scale = heads, (d // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(d, 3 * d), nn.Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        B, N, C = x.shape
        qkv = self.qkv(x).reshape(B, N, 3, self.num_heads, C // self.num_heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attn = (q * self.scale) @ k.transpose(-2, -1)
        attn = attn.softmax(dim=-1)
        return self.proj((attn @ v).transpose(1, 2).reshape(B, N, C))

    def expected(self, x: Tensor) -> Tensor:
        q, k, v = (split(y, self.num_heads) for y in self.qkv(x).chunk(3, -1))
        return self.proj(join(sdpa(q, k, v)))


class Bart(nn.Module):
    """Queries scaled as they are made, heads merged into the batch, ``bmm``; an optional mask."""

    def __init__(self, d: int = 10, heads: int = 3, size: int = 4) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.scaling = heads, size, size**-0.5
        self.k_proj, self.v_proj, self.q_proj = (nn.Linear(d, heads * size) for _ in range(3))
        self.out_proj = nn.Linear(heads * size, d)

    def _shape(self, tensor: Tensor, bsz: int) -> Tensor:
        return tensor.view(bsz, -1, self.num_heads, self.head_dim).transpose(1, 2).contiguous()

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        bsz, tgt_len, _ = hidden.size()
        query = self._shape(self.q_proj(hidden) * self.scaling, bsz)
        key, value = self._shape(self.k_proj(hidden), bsz), self._shape(self.v_proj(hidden), bsz)
        proj_shape = (bsz * self.num_heads, -1, self.head_dim)
        query, key, value = (x.view(*proj_shape) for x in (query, key, value))
        src_len = key.size(1)
        weights = torch.bmm(query, key.transpose(1, 2))
        weights = weights.view(bsz, self.num_heads, tgt_len, src_len) + mask
        weights = weights.view(bsz * self.num_heads, tgt_len, src_len)
        output = torch.bmm(nn.functional.softmax(weights, dim=-1), value)
        output = output.view(bsz, self.num_heads, tgt_len, self.head_dim).transpose(1, 2)
        return self.out_proj(output.reshape(bsz, tgt_len, -1))

    def expected(self, hidden: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (split(f(hidden), 3) for f in (self.q_proj, self.k_proj, self.v_proj))
        return self.out_proj(join(sdpa(q, k, v, mask)))


class Whisper(nn.Module):
    """The fourth root of the scale on queries and on keys, keys transposed by ``permute``."""

    mask: Tensor

    def __init__(self, d: int = 12, heads: int = 3) -> None:
        super().__init__()
        self.n_head = heads
        self.query, self.value, self.out = (nn.Linear(d, d) for _ in range(3))
        self.key = nn.Linear(d, d, bias=False)
        self.register_buffer("mask", torch.empty(64, 64).fill_(-torch.inf).triu_(1))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.query(x), self.key(x), self.value(x)
        _, n_ctx, n_state = q.shape
        scale = (n_state // self.n_head) ** -0.25
        q = q.view(*q.shape[:2], self.n_head, -1).permute(0, 2, 1, 3) * scale
        k = k.view(*k.shape[:2], self.n_head, -1).permute(0, 2, 3, 1) * scale
        v = v.view(*v.shape[:2], self.n_head, -1).permute(0, 2, 1, 3)
        qk = (q @ k + self.mask[:n_ctx, :n_ctx]).float()
        w = F.softmax(qk, dim=-1).to(q.dtype)
        return self.out((w @ v).permute(0, 2, 1, 3).flatten(start_dim=2))

    def expected(self, x: Tensor) -> Tensor:
        q, k, v = (split(f(x), self.n_head) for f in (self.query, self.key, self.value))
        return self.out(join(sdpa(q, k, v, causal=True)))


class Bloom(nn.Module):
    """``baddbmm`` with a bias per key (ALiBi) and the scale as its ``alpha``."""

    def __init__(self, d: int = 12, heads: int = 4) -> None:
        super().__init__()
        self.num_heads, self.head_dim = heads, d // heads
        self.inv_norm_factor = 1.0 / math.sqrt(self.head_dim)
        self.query_key_value, self.dense = nn.Linear(d, 3 * d), nn.Linear(d, d)

    def slopes(self, x: Tensor) -> Tensor:
        """(h)"""
        return 2.0 ** (-torch.arange(1, self.num_heads + 1, dtype=x.dtype) * 8 / self.num_heads)

    def forward(self, x: Tensor) -> Tensor:
        b, q_length, _ = x.shape
        fused = self.query_key_value(x).view(b, q_length, self.num_heads, 3, self.head_dim)
        query = fused[..., 0, :].transpose(1, 2).reshape(-1, q_length, self.head_dim)
        key = fused[..., 1, :].permute(0, 2, 3, 1).reshape(-1, self.head_dim, q_length)
        value = fused[..., 2, :].transpose(1, 2).reshape(-1, q_length, self.head_dim)
        alibi = self.slopes(x)[:, None] * torch.arange(q_length, dtype=x.dtype)
        alibi = alibi[None].expand(b, -1, -1).reshape(b * self.num_heads, 1, q_length)
        scores = alibi.baddbmm(query, key, beta=1.0, alpha=self.inv_norm_factor)
        scores = scores.view(b, self.num_heads, q_length, q_length)
        future = torch.ones(q_length, q_length, dtype=torch.bool).triu(1)
        scores = torch.masked_fill(scores, future, torch.finfo(scores.dtype).min)
        probs = F.softmax(scores, dim=-1, dtype=torch.float32).to(x.dtype)
        context = torch.bmm(probs.view(-1, q_length, q_length), value)
        context = context.view(b, self.num_heads, q_length, self.head_dim).permute(0, 2, 1, 3)
        return self.dense(context.reshape(b, q_length, -1))

    def expected(self, x: Tensor) -> Tensor:
        q, k, v = self.query_key_value(x).unflatten(-1, (self.num_heads, 3, -1)).unbind(-2)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        length = x.shape[1]
        bias = self.slopes(x)[:, None, None] * torch.arange(length, dtype=x.dtype)
        future = torch.ones(length, length).triu(1).bool()
        return self.dense(join(sdpa(q, k, v, bias.masked_fill(future, -torch.inf))))


def additive_mask(width: int, smallest: float = torch.finfo(torch.float32).min) -> Inputs:
    """Tokens, and an additive mask (b, 1, 1, t) that hides the last tokens of the second row."""

    def inputs(length: int) -> tuple[Tensor, ...]:
        (x,) = tokens(width)(length)
        kept = torch.arange(length) < torch.tensor([[length], [(length + 1) // 2]])
        return x, (~kept[:, None, None]).to(x.dtype) * smallest

    return inputs


SPELLINGS: list[Spelling] = [
    Spelling(
        "Bert", seeded(lambda: Bert().eval()), additive_mask(10), "sdpa", reference=Bert.expected
    ),
    Spelling(
        "HeadByHead", seeded(HeadByHead), tokens(10), "sdpa", 2, reference=HeadByHead.expected
    ),
    Spelling("Bart", seeded(Bart), additive_mask(10), "sdpa", reference=Bart.expected),
] + [
    Spelling(made.__name__, seeded(made), tokens(12), "sdpa", reference=made.expected)
    for made in (Gpt2, NanoGpt, Vit, Whisper, Bloom)
]
