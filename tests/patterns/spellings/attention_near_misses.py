"""Near attention and not attention, each beside the attention that it looks like."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.patterns.spellings.attention import join, sdpa
from tests.patterns.spellings.attention_biases import Projections
from tests.patterns.spellings.attention_layouts import causal
from tests.patterns.spellings.spelling import NearMiss, Spelling, seeded, tokens


class Near(Projections):
    """Three heads of 4; what happens between queries, keys and values is for each subclass."""

    masked = False

    def forward(self, x: Tensor) -> Tensor:
        return self.o(join(self.attend(*self.project(x))))

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(b h t d) -> (b h t d)"""
        return self.probabilities(self.scores(q, k)) @ v

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """(b h t t)"""
        return torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(self.size)

    def probabilities(self, scores: Tensor) -> Tensor:
        """(b h t t) -> (b h t t)"""
        return F.softmax(scores, dim=-1)

    def mistaken(self, x: Tensor) -> Tensor:
        """Attention, causal where the model is."""
        return self.o(join(sdpa(*self.project(x), causal=self.masked)))


class OverQueries(Near):
    def probabilities(self, scores: Tensor) -> Tensor:
        return F.softmax(scores, dim=-2)


class OverHeads(Near):
    def probabilities(self, scores: Tensor) -> Tensor:
        return torch.softmax(scores, dim=1)


class OverPairs(Near):
    def probabilities(self, scores: Tensor) -> Tensor:
        return scores.flatten(2).softmax(-1).view_as(scores)


class OtherWayRound(Near):
    def probabilities(self, scores: Tensor) -> Tensor:
        return scores.softmax(-1).transpose(-1, -2)


class GatedTokens(Near):
    """A learned gate a key, on the probabilities."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        gate = torch.sigmoid(self.gate(k)).transpose(-1, -2)
        return (self.scores(q, k).softmax(-1) * gate) @ v


class GatedPairs(Near):
    """Probabilities that fade with the distance."""

    def __init__(self) -> None:
        super().__init__()
        self.rate = nn.Parameter(torch.rand(self.heads, 1, 1))

    def probabilities(self, scores: Tensor) -> Tensor:
        at = torch.arange(scores.shape[-1], dtype=scores.dtype)
        return scores.softmax(-1) * torch.exp(-self.rate * (at[:, None] - at).abs())


class MaskedLate(Near):
    masked = True

    def probabilities(self, scores: Tensor) -> Tensor:
        return scores.softmax(-1) * torch.ones_like(scores).tril()


class TrainingDropout(Near):
    """Dropout as in training, whatever the mode of the module."""

    def probabilities(self, scores: Tensor) -> Tensor:
        return F.dropout(scores.softmax(-1), p=0.5, training=True)


class ModuleDropout(Near):
    """Dropout of a module in training."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def probabilities(self, scores: Tensor) -> Tensor:
        return self.drop(F.softmax(scores, dim=-1))


class Relu(Near):
    def probabilities(self, scores: Tensor) -> Tensor:
        return F.relu(scores) / scores.shape[-1]


class Sigmoid(Near):
    def probabilities(self, scores: Tensor) -> Tensor:
        return torch.sigmoid(scores - math.log(scores.shape[-1]))


class PositiveScores(Near):
    def probabilities(self, scores: Tensor) -> Tensor:
        return F.softmax(F.relu(scores), dim=-1)


class QuietSoftmax(Near):
    """One more in the denominator."""

    def probabilities(self, scores: Tensor) -> Tensor:
        largest = scores.amax(-1, keepdim=True).clamp(min=0)
        e = torch.exp(scores - largest)
        return e / (e.sum(-1, keepdim=True) + torch.exp(-largest))


class Sink(Near):
    """A learned score a head that takes its share and gives no value."""

    def __init__(self) -> None:
        super().__init__()
        self.sinks = nn.Parameter(torch.randn(self.heads))

    def probabilities(self, scores: Tensor) -> Tensor:
        sinks = self.sinks.reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], -1)
        return torch.cat([scores, sinks], dim=-1).softmax(-1)[..., :-1]


class NoNormalising(Near):
    def probabilities(self, scores: Tensor) -> Tensor:
        return torch.exp(scores - scores.amax(-1, keepdim=True))


class TalkingProbabilities(Near):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Parameter(torch.randn(self.heads, self.heads))

    def probabilities(self, scores: Tensor) -> Tensor:
        return torch.einsum("bhij,hg->bgij", scores.softmax(-1), self.mix)


class TalkingScores(TalkingProbabilities):
    def probabilities(self, scores: Tensor) -> Tensor:
        return torch.einsum("bhij,hg->bgij", scores, self.mix).softmax(-1)


class WeightsReturned(Near):
    """The probabilities are an output too."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        q, k, v = self.project(x)
        probs = self.scores(q, k).softmax(dim=-1)
        return self.o(join(probs @ v)), probs


class Linear(Near):
    """Katharopoulos's: a positive feature map and no softmax."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k = F.elu(q) + 1, F.elu(k) + 1
        kv = torch.einsum("bhsd,bhse->bhde", k, v)
        return q @ kv / (q * k.sum(2, keepdim=True)).sum(-1, keepdim=True)


class Efficient(Near):
    """Two softmaxes, over channels of queries and tokens of keys, and no scores."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        context = k.softmax(dim=-2).transpose(-1, -2) @ v
        return (q * self.size**-0.5).softmax(dim=-1) @ context


class BestTwo(Near):
    """Only the two best scores of each query."""

    def probabilities(self, scores: Tensor) -> Tensor:
        least = scores.topk(2, dim=-1).values[..., -1:]
        return scores.masked_fill(scores < least, -torch.inf).softmax(-1)


class Hard(Near):
    """The value of the best key, gradients through the softmax."""

    def probabilities(self, scores: Tensor) -> Tensor:
        soft = scores.softmax(-1)
        hard = F.one_hot(scores.argmax(-1), scores.shape[-1]).to(soft.dtype)
        return hard - soft.detach() + soft


class NormalisedTwice(Near):
    """External attention's: softmax over queries, then each query's weights made to sum to 1."""

    def probabilities(self, scores: Tensor) -> Tensor:
        attn = scores.softmax(dim=-2)
        return attn / (1e-9 + attn.sum(dim=-1, keepdim=True))


class NormalisedWeights(Near):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(self.heads, 1, 1))

    def probabilities(self, scores: Tensor) -> Tensor:
        return F.normalize(scores.softmax(-1), dim=-1) * self.gain


class StickBreaking(Near):
    """Each key takes its part of what nearer ones have left."""

    masked = True

    def probabilities(self, scores: Tensor) -> Tensor:
        before = torch.ones_like(scores).tril(-1).bool()
        left = F.logsigmoid(-scores).masked_fill(~before, 0)
        after = left.flip(-1).cumsum(-1).flip(-1) - left
        return (F.logsigmoid(scores) + after).exp().masked_fill(~before, 0)


class CapThenMask(Near):
    """Gemma 2's: scores squashed by tanh, then causal, softmax in float32."""

    cap = 0.3
    masked = True

    def probabilities(self, scores: Tensor) -> Tensor:
        weights = torch.tanh(scores / self.cap) * self.cap
        length = weights.shape[-1]
        lowest = torch.full((length, length), torch.finfo(weights.dtype).min, dtype=weights.dtype)
        weights = weights + torch.triu(lowest, 1)
        return F.softmax(weights, dim=-1, dtype=torch.float32).to(scores.dtype)


class CappedInOneLine(Near):
    """The same without a mask, in another order."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        logits = torch.einsum("bhtd,bhsd->bhts", q * self.size**-0.5, k)
        logits = 0.2 * (logits * (1 / 0.2)).tanh()
        return torch.einsum("bhts,bhsd->bhtd", logits.softmax(-1), v)


class RenormalisedMask(Near):
    """The mask after the softmax, and the rest made to sum to 1: causal attention."""

    masked = True

    def probabilities(self, scores: Tensor) -> Tensor:
        probs = scores.softmax(-1) * torch.ones_like(scores).tril()
        return probs / probs.sum(-1, keepdim=True)


class WeightsReused(Near):
    """One softmax, two sets of values: two attentions."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        probs = self.scores(q, k).softmax(-1)
        return probs @ v + torch.tanh(probs @ k)

    def expected(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x)
        return self.o(join(sdpa(q, k, v) + torch.tanh(sdpa(q, k, k))))


class Differential(Near):
    """The difference of two attentions on half of the channels each."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        (q1, q2), (k1, k2) = q.chunk(2, -1), k.chunk(2, -1)
        first, second = (causal(a @ b.mT / 2**0.5).softmax(-1) for a, b in ((q1, k1), (q2, k2)))
        return (first - 0.4 * second) @ v

    def expected(self, x: Tensor) -> Tensor:
        q, k, v = self.project(x)
        first, second = (
            sdpa(a, b, v, causal=True) for a, b in zip(q.chunk(2, -1), k.chunk(2, -1), strict=True)
        )
        return self.o(join(first - 0.4 * second))


class AlongChannels(Near):
    """XCiT's: channels attend to channels; the op with channels in the place of tokens."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (y.transpose(-2, -1) for y in (q, k, v))
        attn = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)).softmax(-1)
        return (attn @ v).transpose(-2, -1)

    def expected(self, x: Tensor) -> Tensor:
        q, k, v = (y.mT for y in self.project(x))
        y = sdpa(F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, scale=1.0)
        return self.o(join(y.mT))


NEAR_MISSES: list[NearMiss] = [
    NearMiss(made.__name__, seeded(made), tokens(10), why, mistaken=made.mistaken)
    for made, why in (
        (OverQueries, "softmax over queries"),
        (OverHeads, "softmax over heads"),
        (OverPairs, "softmax over all pairs of a head"),
        (OtherWayRound, "values weighted by the transposed probabilities"),
        (GatedTokens, "probabilities scaled by a tensor, one gate a key"),
        (GatedPairs, "probabilities scaled by a tensor, one factor a pair"),
        (MaskedLate, "masked after the softmax, not normalised again"),
        (TrainingDropout, "dropout is active"),
        (ModuleDropout, "dropout is active in training"),
        (Relu, "no softmax: relu over the number of keys"),
        (Sigmoid, "no softmax: sigmoid"),
        (PositiveScores, "a nonlinearity on the scores"),
        (QuietSoftmax, "one more in the denominator"),
        (Sink, "a learned sink takes part of the weight"),
        (NoNormalising, "exponentials that do not sum to 1"),
        (TalkingProbabilities, "heads mixed between softmax and values"),
        (TalkingScores, "heads mixed before the softmax"),
        (Linear, "no softmax: a feature map"),
        (Efficient, "softmax of queries and of keys, not of scores"),
        (BestTwo, "the mask depends on the scores"),
        (Hard, "one key a query"),
        (NormalisedTwice, "softmax over queries, then sums over keys"),
        (NormalisedWeights, "weights of unit length, not of unit sum"),
        (StickBreaking, "what is left over, not a softmax"),
    )
] + [
    NearMiss(
        *("WeightsReturned", seeded(WeightsReturned), tokens(10), "the probabilities are returned"),
        around=True,
    )
]

# attention with a squashing of its scores: recorded, not raised to plain attention
SOFTCAP: list[NearMiss] = [
    NearMiss(made.__name__, seeded(made), tokens(10), "soft cap", mistaken=made.mistaken)
    for made in (CapThenMask, CappedInOneLine)
]

# attention after some algebra: raised or declined, the numbers must be eager's
EITHER: list[Spelling] = [
    Spelling(name, seeded(made), tokens(10), "sdpa", count, reference=reference)
    for name, made, count, reference in (
        ("RenormalisedMask", RenormalisedMask, 1, RenormalisedMask.mistaken),
        ("WeightsReused", WeightsReused, 2, WeightsReused.expected),
        ("Differential", Differential, 2, Differential.expected),
        ("AlongChannels", AlongChannels, 1, AlongChannels.expected),
    )
]
