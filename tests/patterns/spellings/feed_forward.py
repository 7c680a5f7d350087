"""Feed-forward blocks: up, activation, down; perhaps gated."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.patterns.spellings.attention import Conv1D
from tests.patterns.spellings.spelling import Spelling, seeded, tokens


class Sequential(nn.Module):
    """Three layers in a row, pre-norm, a residual around."""

    def __init__(self, act: nn.Module, d: int = 6, hidden: int = 14) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d)
        self.net = nn.Sequential(nn.Linear(d, hidden), act, nn.Linear(hidden, d))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.net(self.norm(x))


class Stack(nn.Module):
    """Two blocks, one above the other."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Sequential(act()) for act in (nn.SiLU, nn.ReLU))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


class Vanilla(nn.Module):
    """The first Transformer's: post-norm, dropout of 0."""

    def __init__(self, d: int = 6, hidden: int = 14) -> None:
        super().__init__()
        self.w_1, self.w_2 = nn.Linear(d, hidden), nn.Linear(hidden, d)
        self.layer_norm, self.dropout = nn.LayerNorm(d), nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:
        output = self.dropout(self.w_2(self.dropout(F.relu(self.w_1(x)))))
        return self.layer_norm(output + x)


class BertIntermediate(nn.Module):
    def __init__(self, d: int, hidden: int) -> None:
        super().__init__()
        self.dense = nn.Linear(d, hidden)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return nn.functional.gelu(self.dense(hidden_states))


class BertOutput(nn.Module):
    def __init__(self, d: int, hidden: int) -> None:
        super().__init__()
        self.dense, self.LayerNorm = nn.Linear(hidden, d), nn.LayerNorm(d)
        self.dropout = nn.Dropout(0.1)

    def forward(self, hidden_states: Tensor, input_tensor: Tensor) -> Tensor:
        return self.LayerNorm(self.dropout(self.dense(hidden_states)) + input_tensor)


class Bert(nn.Module):
    """Up and down in modules of their own; dropout, which is off in ``eval``."""

    def __init__(self, d: int = 7, hidden: int = 10) -> None:
        super().__init__()
        self.intermediate, self.output = BertIntermediate(d, hidden), BertOutput(d, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.output(self.intermediate(x), x)


class TwoWeights(nn.Module):
    """Up and down with biases; each subclass writes its activation."""

    def __init__(self, d: int = 6, hidden: int = 14) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(d, hidden), nn.Linear(hidden, d)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))

    def act(self, h: Tensor) -> Tensor:
        """Element by element."""
        raise NotImplementedError


class ErfWrittenOut(TwoWeights):
    def act(self, h: Tensor) -> Tensor:
        return h * 0.5 * (1.0 + torch.erf(h / math.sqrt(2.0)))

    def expected(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class TanhWrittenOut(TwoWeights):
    def act(self, h: Tensor) -> Tensor:
        inner = math.sqrt(2.0 / math.pi) * (h + 0.044715 * torch.pow(h, 3.0))
        return 0.5 * h * (1.0 + torch.tanh(inner))

    def expected(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class TanhFactored(TwoWeights):
    """The same with the powers as products and the constant as a number."""

    def act(self, h: Tensor) -> Tensor:
        return 0.5 * h * (1 + torch.tanh(h * 0.7978845608 * (1 + 0.044715 * h * h)))

    def expected(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class QuickGelu(TwoWeights):
    def act(self, h: Tensor) -> Tensor:
        return h * torch.sigmoid(1.702 * h)

    def expected(self, x: Tensor) -> Tensor:
        h = self.fc1(x)
        return self.fc2(F.silu(1.702 * h) / 1.702)


class SquaredRelu(TwoWeights):
    def act(self, h: Tensor) -> Tensor:
        return torch.square(torch.relu(h))

    def expected(self, x: Tensor) -> Tensor:
        return self.fc2(F.relu(self.fc1(x)) * F.relu(self.fc1(x)))


class SiluWrittenOut(TwoWeights):
    def act(self, h: Tensor) -> Tensor:
        return h / (1 + torch.exp(-h))

    def expected(self, x: Tensor) -> Tensor:
        return self.fc2(F.silu(self.fc1(x)))


class Gpt2(nn.Module):
    """``addmm`` on weights the other way round."""

    def __init__(self, d: int = 6, hidden: int = 14) -> None:
        super().__init__()
        self.c_fc, self.c_proj = Conv1D(hidden, d), Conv1D(d, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))

    def expected(self, x: Tensor) -> Tensor:
        h = F.gelu(x @ self.c_fc.weight + self.c_fc.bias, approximate="tanh")
        return h @ self.c_proj.weight + self.c_proj.bias


class Matrices(nn.Module):
    """Bare parameters: ``@`` and a bias, relu as a clamp, tokens flattened meanwhile."""

    def __init__(self, d: int = 6, hidden: int = 14) -> None:
        super().__init__()
        self.w1, self.w2 = (
            nn.Parameter(torch.randn(a, b) / a**0.5) for a, b in ((d, hidden), (hidden, d))
        )
        self.b1, self.b2 = nn.Parameter(torch.randn(hidden)), nn.Parameter(torch.randn(d))

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        h = torch.clamp(flat @ self.w1 + self.b1, min=0)
        return (h @ self.w2 + self.b2).view_as(x)

    def expected(self, x: Tensor) -> Tensor:
        return F.linear(F.relu(F.linear(x, self.w1.t(), self.b1)), self.w2.t(), self.b2)


class Gated(nn.Module):
    """Llama's; no bias."""

    def __init__(self, d: int = 6, hidden: int = 14) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(d, hidden, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(hidden, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))

    def expected(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(gate * torch.sigmoid(gate) * up)


class UpFirst(Gated):
    """The other order, the gate's swish written out."""

    def forward(self, x: Tensor) -> Tensor:
        up = self.up_proj(x)
        gate = self.gate_proj(x)
        return self.down_proj(up * (gate.sigmoid() * gate))


class EinsumGated(Gated):
    """Each product an einsum, the activation gelu."""

    def forward(self, x: Tensor) -> Tensor:
        gate = torch.einsum("btd,fd->btf", x, self.gate_proj.weight)
        up = torch.einsum("btd,fd->btf", x, self.up_proj.weight)
        return torch.einsum(
            "btf,df->btd", F.gelu(gate, approximate="tanh") * up, self.down_proj.weight
        )

    def expected(self, x: Tensor) -> Tensor:
        return self.down_proj(F.gelu(self.gate_proj(x), approximate="tanh") * self.up_proj(x))


class Fused(nn.Module):
    """Gate and up in one matrix: SiLU of the first half."""

    def __init__(self, d: int = 6, hidden: int = 14) -> None:
        super().__init__()
        self.hidden = hidden
        self.gate_up_proj, self.down_proj = nn.Linear(d, 2 * hidden), nn.Linear(hidden, d)

    def forward(self, x: Tensor) -> Tensor:
        gate, up_states = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(up_states * F.silu(gate))

    def halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The two halves of the projection, each by its own rows of the weight."""
        w, b, f = self.gate_up_proj.weight, self.gate_up_proj.bias, self.hidden
        return F.linear(x, w[:f], b[:f]), F.linear(x, w[f:], b[f:])

    def expected(self, x: Tensor) -> Tensor:
        first, second = self.halves(x)
        return self.down_proj(F.silu(first) * second)


class Geglu(Fused):
    """Gelu of the second half."""

    def forward(self, x: Tensor) -> Tensor:
        x, gate = torch.split(self.gate_up_proj(x), self.hidden, dim=-1)
        return self.down_proj(x * F.gelu(gate))

    def expected(self, x: Tensor) -> Tensor:
        first, second = self.halves(x)
        return self.down_proj(first * F.gelu(second))


class Glu(Fused):
    """torch's own gate: sigmoid of the second half."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.glu(self.gate_up_proj(x), dim=-1))

    def expected(self, x: Tensor) -> Tensor:
        first, second = self.halves(x)
        return self.down_proj(first * torch.sigmoid(second))


class EveryOther(Fused):
    """Gate and up interleaved in one matrix, one added to up."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.gate_up_proj(x)
        return self.down_proj(F.silu(h[..., ::2]) * (h[..., 1::2] + 1))

    def expected(self, x: Tensor) -> Tensor:
        (gate, up), (b, c) = (
            y.unflatten(0, (-1, 2)).unbind(1)
            for y in (self.gate_up_proj.weight, self.gate_up_proj.bias)
        )
        return self.down_proj(F.silu(F.linear(x, gate, b)) * F.linear(x, up, c + 1))


class Bilinear(Gated):
    """A gate without an activation."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.gate_proj(x) * self.up_proj(x))


class PointwiseConv(nn.Module):
    """Convolutions of width 1 in the place of linear layers."""

    def __init__(self, d: int = 6, hidden: int = 14) -> None:
        super().__init__()
        self.w_1, self.w_2 = nn.Conv1d(d, hidden, 1), nn.Conv1d(hidden, d, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.w_2(F.relu(self.w_1(x.transpose(1, 2)))).transpose(1, 2)

    def expected(self, x: Tensor) -> Tensor:
        h = F.linear(x, self.w_1.weight[..., 0], self.w_1.bias)
        return F.linear(F.relu(h), self.w_2.weight[..., 0], self.w_2.bias)


class TiedWeight(nn.Module):
    """Down is up transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(14, 6) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x @ self.weight.t()) @ self.weight


def _plain(name: str, make: Callable[[], nn.Module], width: int = 6, count: int = 1) -> Spelling:
    """A block that is its own definition: it needs no reference."""
    return Spelling(name, seeded(make), tokens(width), "ffn", count)


SPELLINGS: list[Spelling] = [
    _plain("Sequential, gelu", lambda: Sequential(nn.GELU())),
    _plain("Sequential, tanh gelu", lambda: Sequential(nn.GELU("tanh"))),
    _plain("Sequential, relu, in place", lambda: Sequential(nn.ReLU(inplace=True))),
    _plain("Stack", Stack, count=2),
    _plain("Vanilla", Vanilla),
    _plain("Bert", lambda: Bert().eval(), width=7),
] + [
    Spelling(made.__name__, seeded(made), tokens(6), "ffn", reference=made.expected)
    for made in (
        *(ErfWrittenOut, TanhWrittenOut, TanhFactored, QuickGelu, SquaredRelu, SiluWrittenOut),
        *(Gpt2, Matrices, Gated, UpFirst, EinsumGated, Fused, Geglu, Glu),
    )
]

# seldom seen, or seldom worth it: recorded or not, the numbers must be eager's
EITHER: list[Spelling] = [
    _plain("Bilinear", Bilinear),
    _plain("TiedWeight", TiedWeight),
    Spelling("EveryOther", seeded(EveryOther), tokens(6), "ffn", reference=EveryOther.expected),
    Spelling(
        "PointwiseConv", seeded(PointwiseConv), tokens(6), "ffn", reference=PointwiseConv.expected
    ),
]
