"""Small models as users write them: padded, with heads of every kind."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.tiny import Mixer

VOCAB, WIDTH = 20, 8
Bias = Callable[[Tensor], Tensor]
Head = Callable[[Tensor, Tensor], Tensor]


class Encoder(nn.Module):
    """One layer of attention with a mask that ``spell`` makes of (b, t), and a head."""

    def __init__(self, spell: Bias, head: Head, layers: int = 2) -> None:
        super().__init__()
        self.spell, self.head = spell, head
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.positions = nn.Embedding(64, WIDTH)
        self.layers = nn.ModuleList(Block() for _ in range(layers))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.embed(ids) + self.positions(torch.arange(ids.shape[1]))
        bias = self.spell(mask)
        for layer in self.layers:
            x = layer(x, bias)
        return self.head(x, mask)


class Block(nn.Module):
    """Attention with two heads and a feed-forward block."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        b, t, _ = x.shape
        q, k, v = self.qkv(self.norm(x)).view(b, t, 3, 2, WIDTH // 2).unbind(2)
        q, k, v = (each.transpose(1, 2) for each in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        x = x + y.transpose(1, 2).reshape(b, t, WIDTH)
        return x + self.down(F.gelu(self.up(x)))


class TimeFirst(nn.Module):
    """Tokens before rows, the two merged for the feed-forward part, heads merged with rows."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.embed(ids).transpose(0, 1)
        t, b, _ = x.shape
        x = self.out(x.reshape(t * b, WIDTH)).tanh().view(t, b, WIDTH)
        q, k, v = self.qkv(x).chunk(3, -1)
        q, k, v = (e.reshape(t, b, 2, WIDTH // 2).permute(1, 2, 0, 3) for e in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, boolean(mask))
        x = x + y.permute(2, 0, 1, 3).reshape(t, b, WIDTH)
        return x.transpose(0, 1)


class Flat(TimeFirst):
    """Its output has tokens and rows in one dim, tokens first."""

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        return super().forward(ids, mask).transpose(0, 1).flatten(0, 1)


class Recurrent(nn.Module):
    """A mixer whose inputs the mask makes zero, or (``masked=False``) does not."""

    def __init__(self, masked: bool = True, head: Head | None = None) -> None:
        super().__init__()
        self.embed, self.masked = nn.Embedding(VOCAB, WIDTH), masked
        self.first, self.second = MaskedMixer(masked), MaskedMixer(masked)
        self.head = head or tokens

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.first(x, mask)
        x = x + self.second(x, mask)
        return self.head(x, mask)


class MaskedMixer(Mixer):
    """The mixer of ``tests.tiny``, with the mask around its convolution, as transformers has it."""

    def __init__(self, masked: bool) -> None:
        super().__init__(WIDTH)
        self.masked = masked

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        keep = mask[..., None] if self.masked else torch.ones_like(mask[..., None])
        u, z = self.proj(x).chunk(2, -1)
        u, _ = torch.ops.effpass.causal_conv1d(u * keep, self.conv, None, "silu")
        u = u * keep
        B, C = self.BC(u).chunk(2, -1)
        A = -torch.exp(self.A_log)
        return torch.ops.effpass.selective_scan(u, self.dt(u), A, B, C, None, z, None, True)[0]


def additive(mask: Tensor) -> Tensor:
    return (1.0 - mask[:, None, None, :].float()) * torch.finfo(torch.float32).min


def boolean(mask: Tensor) -> Tensor:
    return mask[:, None, None, :].bool()


def filled(mask: Tensor) -> Tensor:
    b, t = mask.shape
    bias = torch.zeros(b, 1, t, t)
    return bias.masked_fill(mask[:, None, None, :] == 0, float("-inf"))


def causal(mask: Tensor) -> Tensor:
    t = mask.shape[1]
    return mask[:, None, None, :].bool() & torch.ones(t, t, dtype=torch.bool).tril()


def banded(mask: Tensor) -> Tensor:
    at = torch.arange(mask.shape[1])
    near = (at[:, None] - at).abs() <= 2
    return mask[:, None, None, :].bool() & near


def local_and_causal(mask: Tensor) -> Tensor:
    at = torch.arange(mask.shape[1])
    back = at[:, None] - at
    return mask[:, None, None, :].bool() & (back >= 0) & (back < 3)


def both_ways(mask: Tensor) -> Tensor:
    m = mask.bool()
    return (m[:, None, :, None] & m[:, None, None, :]) | ~m[:, None, :, None]


def nothing(mask: Tensor) -> Tensor:
    return torch.ones(1, 1, mask.shape[1], mask.shape[1], dtype=torch.bool)


def inverted(mask: Tensor) -> Tensor:
    return mask[:, None, None, :] == 0


def prefix(mask: Tensor) -> Tensor:
    at = torch.arange(mask.shape[1])
    return mask[:, None, None, :].bool() & ((at <= at[:, None]) | (at < 3))


def biased(mask: Tensor) -> Tensor:
    at = torch.arange(mask.shape[1])
    return additive(mask) - 0.1 * (at[:, None] - at).abs().float()


def shifted(mask: Tensor) -> Tensor:
    return mask.roll(1, 1)[:, None, None, :].bool()


def other_rows(mask: Tensor) -> Tensor:
    return mask.flip(0)[:, None, None, :].bool()


def tokens(x: Tensor, mask: Tensor) -> Tensor:
    return x


def first(x: Tensor, mask: Tensor) -> Tensor:
    return x[:, 0].tanh()


def last(x: Tensor, mask: Tensor) -> Tensor:
    return x[torch.arange(len(x)), mask.sum(1) - 1] * 2


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    weights = mask[..., None].to(x.dtype)
    return (x * weights).sum(1) / weights.sum(1).clamp(min=1e-9)


def plain_mean(x: Tensor, mask: Tensor) -> Tensor:
    return x.mean(1)


def maximum(x: Tensor, mask: Tensor) -> Tensor:
    return x.masked_fill(mask[..., None] == 0, -1e9).amax(1)


def backwards(x: Tensor, mask: Tensor) -> Tensor:
    return x.flip(1).sum(1)


def centred(x: Tensor, mask: Tensor) -> Tensor:
    return x - x.mean(1, keepdim=True)


def steered(x: Tensor, mask: Tensor) -> Tensor:
    return x * masked_mean(x, mask).sigmoid()[:, None]
