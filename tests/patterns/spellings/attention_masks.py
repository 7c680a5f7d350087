"""Masks of attention: causal, windows, prefixes, segments, padding, and rows with no key left."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.patterns.spellings.attention import join, sdpa
from tests.patterns.spellings.attention_biases import Projections
from tests.patterns.spellings.spelling import Inputs, Spelling, seeded, tokens


def past(length: int) -> Tensor:
    """(t t), True where a key is not after its query."""
    return torch.ones(length, length, dtype=torch.bool).tril()


class Masked(Projections):
    """Attention whose masked scores each subclass writes, from queries and keys (b h t d)."""

    def forward(self, x: Tensor, *given: Tensor) -> Tensor:
        q, k, v = self.project(x)
        probs = torch.softmax(self.scores(q, k, *given), dim=-1)
        return self.o(join(torch.matmul(probs, v)))

    def scores(self, q: Tensor, k: Tensor, *given: Tensor) -> Tensor:
        """(b h t t), masked"""
        raise NotImplementedError

    def kept(self, length: int, *given: Tensor) -> Tensor:
        """What the mask means: True where a query (dim -2) sees a key (dim -1)."""
        raise NotImplementedError

    def expected(self, x: Tensor, *given: Tensor) -> Tensor:
        """torch's attention; a query that sees nothing takes the mean of all values."""
        q, k, v = self.project(x)
        kept = self.kept(x.shape[1], *given)
        blind = ~kept.any(-1, keepdim=True)
        return self.o(join(sdpa(q.masked_fill(blind, 0), k, v, kept | blind)))


class Causal(Masked):
    """What is seen, for all the causal ones."""

    def kept(self, length: int, *given: Tensor) -> Tensor:
        return past(length)


class UpperTriangle(Causal):
    """Ones above the diagonal, as booleans, filled in place."""

    def scores(self, q: Tensor, k: Tensor, *given: Tensor) -> Tensor:
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        mask = torch.triu(torch.ones(q.shape[2], k.shape[2]), diagonal=1).bool()
        return scores.masked_fill_(mask, float("-inf"))


class LowerTriangle(Causal):
    """The triangle made anew and compared with zero; a very negative number."""

    def scores(self, q: Tensor, k: Tensor, *given: Tensor) -> Tensor:
        att = torch.einsum("bhqd,bhkd->bhqk", q * q.size(-1) ** -0.5, k)
        mask = torch.tril(att.new_ones(att.shape[-2:]))
        return att.masked_fill(mask == 0, -1e9)


class ComparedPositions(Causal):
    """Positions of queries and keys compared; the smallest number of the dtype."""

    def scores(self, q: Tensor, k: Tensor, *given: Tensor) -> Tensor:
        w = torch.matmul(q, k.mT) * (1.0 / q.shape[-1] ** 0.5)
        i, j = torch.arange(w.shape[-2])[:, None], torch.arange(w.shape[-1])[None, :]
        return torch.where(i >= j, w, torch.finfo(w.dtype).min)


class TimesTheTriangle(Causal):
    """The first GPT's: scores times the triangle, less ten thousand outside it."""

    def scores(self, q: Tensor, k: Tensor, *given: Tensor) -> Tensor:
        w = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(q.size(-1))
        b = torch.tril(torch.ones(w.shape[-1], w.shape[-1], dtype=w.dtype))
        return w * b + -1e4 * (1 - b)


class LogOfTheMask(Causal):
    """The logarithm of zeros and ones, added."""

    def scores(self, q: Tensor, k: Tensor, *given: Tensor) -> Tensor:
        mask = past(q.shape[2]).to(q.dtype)
        return q @ k.mT / q.shape[-1] ** 0.5 + mask.log()


class Window(Masked):
    """The token and the two before it."""

    def scores(self, q: Tensor, k: Tensor, *given: Tensor) -> Tensor:
        position = torch.arange(q.shape[2])
        distance = position.unsqueeze(1) - position.unsqueeze(0)
        inside = (distance >= 0) & (distance < 3)
        return (q @ k.mT).div(q.shape[-1] ** 0.5).masked_fill(~inside, float("-inf"))

    def kept(self, length: int, *given: Tensor) -> Tensor:
        return past(length) & ~past(length).tril(-3)


class Blocks(Masked):
    """Blocks of four tokens, each seen from within."""

    def scores(self, q: Tensor, k: Tensor, *given: Tensor) -> Tensor:
        block = torch.arange(q.shape[2]) // 4
        same = block[:, None] == block[None, :]
        return torch.where(same, q @ k.mT * q.shape[-1] ** -0.5, float("-inf"))

    def kept(self, length: int, *given: Tensor) -> Tensor:
        block = torch.ones(4, 4, dtype=torch.bool)
        return torch.block_diag(*[block] * (length // 4 + 1))[:length, :length].bool()


class Prefix(Masked):
    """Causal, except for a prefix (b) that every token sees."""

    def scores(self, q: Tensor, k: Tensor, *given: Tensor) -> Tensor:
        at = torch.arange(q.shape[2])
        prefix = at[None, :] < given[0][:, None]
        allowed = (at[:, None] >= at[None, :])[None] | prefix[:, None, :]
        weights = torch.matmul(q, k.transpose(2, 3)) * q.shape[-1] ** -0.5
        return weights.masked_fill(allowed.unsqueeze(1).logical_not(), torch.finfo(q.dtype).min)

    def kept(self, length: int, *given: Tensor) -> Tensor:
        rows = []
        for n in given[0].tolist():
            row = past(length)
            row[:, :n] = True
            rows.append(row)
        return torch.stack(rows)[:, None]


class Segments(Masked):
    """Several documents in one row: causal within each, by their ids (b t)."""

    def scores(self, q: Tensor, k: Tensor, *given: Tensor) -> Tensor:
        ids = given[0]
        mask = (ids[:, :, None] == ids[:, None, :]) & past(q.shape[2])
        bias = torch.zeros(mask.shape, dtype=q.dtype).masked_fill_(~mask, -torch.inf)
        return torch.matmul(q / q.shape[-1] ** 0.5, k.mT) + bias[:, None]

    def kept(self, length: int, *given: Tensor) -> Tensor:
        together = F.one_hot(given[0]) @ F.one_hot(given[0]).mT
        return together.bool()[:, None] & past(length)


class Padding(Masked):
    """What is seen, for those that hide the padding (b t), and their usual way of hiding it."""

    def scores(self, q: Tensor, k: Tensor, *given: Tensor) -> Tensor:
        scores = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(q.size(-1))
        return torch.where(given[0][:, None, None, :], scores, -1e9)

    def kept(self, length: int, *given: Tensor) -> Tensor:
        return given[0][:, None, None, :]


class PaddingFilled(Padding):
    """The smallest number of the dtype where there is no token."""

    def scores(self, q: Tensor, k: Tensor, *given: Tensor) -> Tensor:
        mask = given[0].view(given[0].size(0), 1, 1, -1).expand(-1, q.size(1), q.size(2), -1)
        scores = torch.einsum("bhtd,bhsd->bhts", q, k) * q.size(-1) ** -0.5
        return scores.masked_fill(~mask, torch.finfo(scores.dtype).min)


class PaddingAdded(Padding):
    """BERT's: ten thousand less for the padding; a row of padding only sees all of it alike."""

    def scores(self, q: Tensor, k: Tensor, *given: Tensor) -> Tensor:
        extended = given[0][:, None, None, :].to(dtype=q.dtype)
        extended = (1.0 - extended) * -10000.0
        return torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(q.size(-1)) + extended

    def expected(self, x: Tensor, *given: Tensor) -> Tensor:
        hidden = given[0][:, None, None].logical_not().to(x.dtype) * -10000
        return self.o(join(sdpa(*self.project(x), bias=hidden)))


class PaddingAndFuture(Padding):
    """One boolean mask of both, one fill."""

    def scores(self, q: Tensor, k: Tensor, *given: Tensor) -> Tensor:
        causal = torch.tril(torch.ones(q.shape[2], q.shape[2], dtype=torch.bool))
        mask = causal[None, None] & given[0][:, None, None, :]
        return torch.where(mask, q @ k.mT / q.shape[-1] ** 0.5, torch.finfo(q.dtype).min)

    def kept(self, length: int, *given: Tensor) -> Tensor:
        return given[0][:, None, None, :] & past(length)


class PaddingThenFuture(PaddingAndFuture):
    """The future filled with minus infinity, then the padding added as a large number."""

    def scores(self, q: Tensor, k: Tensor, *given: Tensor) -> Tensor:
        scores = (q * q.shape[-1] ** -0.5) @ k.mT
        scores = scores.masked_fill(~past(q.shape[2]), -torch.inf)
        return scores + (~given[0]).to(q.dtype)[:, None, None] * -1e6


class TwoInOne(PaddingAndFuture):
    """A decoder's prepared mask: the future, with the padding filled into it, added.

    A query that sees nothing takes the mean of all values, yet has a gradient: nothing was filled.
    """

    def scores(self, q: Tensor, k: Tensor, *given: Tensor) -> Tensor:
        lowest, length = torch.finfo(q.dtype).min, q.shape[2]
        mask = torch.full((length, length), lowest, dtype=q.dtype).triu(1)
        mask = mask[None, None].expand(given[0].shape[0], 1, -1, -1).clone()
        hidden = given[0][:, None, None, :].logical_not() & (mask == 0)
        mask = mask.masked_fill(hidden, lowest)
        return torch.matmul(q, k.transpose(2, 3)) * q.shape[-1] ** -0.5 + mask

    def expected(self, x: Tensor, *given: Tensor) -> Tensor:
        hidden = (~self.kept(x.shape[1], *given)).to(x.dtype) * torch.finfo(x.dtype).min
        return self.o(join(sdpa(*self.project(x), bias=hidden)))


class SmallFill(Padding):
    """Ten thousand filled in, not added: a row without tokens takes the mean of all values."""

    def scores(self, q: Tensor, k: Tensor, *given: Tensor) -> Tensor:
        scores = torch.matmul(q, k.mT) / math.sqrt(q.size(-1))
        return scores.masked_fill(~given[0][:, None, None, :], -1e4)


class ZeroedAgain(Padding):
    """Zeroed after the softmax too, which changes a row without tokens only: it gives nothing."""

    def forward(self, x: Tensor, *given: Tensor) -> Tensor:
        q, k, v = self.project(x)
        probs = self.scores(q, k, *given).softmax(-1)
        probs = probs.masked_fill(~given[0][:, None, None], 0.0)
        return self.o(join(probs @ v))

    def expected(self, x: Tensor, *given: Tensor) -> Tensor:
        q, k, v = self.project(x)
        kept = self.kept(x.shape[1], *given)
        y = sdpa(q, k, v, kept | ~kept.any(-1, keepdim=True))
        return self.o(join(y.masked_fill(~kept.any(-1, keepdim=True), 0)))


def _with(make: Callable[[int], Tensor]) -> Inputs:
    return lambda length: (*tokens(10)(length), make(length))


def _right(length: int) -> Tensor:
    return torch.arange(length) < torch.tensor([[length], [(length + 1) // 2]])


def _left(length: int) -> Tensor:
    return _right(length).flip(1)


def _whole(length: int) -> Tensor:
    """Every second row holds nothing but padding."""
    return torch.stack([torch.ones(length), torch.zeros(length)]).bool()


def _ids(length: int) -> Tensor:
    return torch.stack([torch.arange(length) // 3, torch.arange(length) // 4])


SPELLINGS: list[Spelling] = [
    Spelling(name, seeded(made), inputs, "sdpa", reference=made.expected)
    for name, made, inputs in (
        ("UpperTriangle", UpperTriangle, tokens(10)),
        ("LowerTriangle", LowerTriangle, tokens(10)),
        ("ComparedPositions", ComparedPositions, tokens(10)),
        ("TimesTheTriangle", TimesTheTriangle, tokens(10)),
        ("LogOfTheMask", LogOfTheMask, tokens(10)),
        ("Window", Window, tokens(10)),
        ("Blocks", Blocks, tokens(10)),
        ("Prefix", Prefix, _with(lambda _: torch.tensor([1, 2]))),
        ("Segments", Segments, _with(_ids)),
        ("Padding", Padding, _with(_right)),
        ("PaddingFilled", PaddingFilled, _with(_left)),
        ("PaddingAdded", PaddingAdded, _with(_right)),
        ("PaddingAndFuture", PaddingAndFuture, _with(_right)),
        ("PaddingThenFuture", PaddingThenFuture, _with(_right)),
        ("TwoInOne", TwoInOne, _with(_right)),
    )
]

# Queries that see nothing: a fill gives them the mean of all values and no gradient of their own, a
# sum another, and torch's fused kernels a wrong one. Raised or declined, the numbers are eager's.
EITHER: list[Spelling] = [
    Spelling(name, seeded(made), _with(given), "sdpa", reference=made.expected)
    for name, made, given in (
        ("Padding, a row of padding", Padding, _whole),
        ("PaddingFilled, a row of padding", PaddingFilled, _whole),
        ("PaddingAdded, a row of padding", PaddingAdded, _whole),
        ("PaddingAndFuture, on the left", PaddingAndFuture, _left),
        ("TwoInOne, on the left", TwoInOne, _left),
        ("SmallFill", SmallFill, _right),
        ("SmallFill, a row of padding", SmallFill, _whole),
        ("ZeroedAgain", ZeroedAgain, _right),
        ("ZeroedAgain, a row of padding", ZeroedAgain, _whole),
    )
]
