"""What the follower says of a tensor is what the tensor is: random programs, element by element."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import make_fx

import effpass.patterns.taps.shift_moves
import effpass.patterns.taps.shift_sums  # noqa: F401
from effpass.patterns.taps.shift_follow import Follower
from effpass.patterns.taps.shifted import ONE, ZERO, Value
from effpass.patterns.taps.taps import Leaf
from tests.tolerances import close

Step = Callable[[random.Random, Tensor, Tensor], Tensor]
SHAPE, TIME = (2, 5, 3), 1


def dim_of(r: random.Random, v: Tensor) -> int:
    """Mostly a dim of tokens, as it was at first."""
    return r.choice([1, 1, 1, *range(-v.dim(), v.dim())]) if v.dim() > 1 else 0


def weight(r: random.Random, v: Tensor) -> Tensor:
    """A tensor that broadcasts over v, sometimes of zeros and ones."""
    shape = [r.choice([1, n]) for n in v.shape][r.randrange(v.dim()) :]
    if r.random() < 0.3:
        return early(r, v).to(v.dtype)
    return torch.randn(shape, dtype=v.dtype)


def early(r: random.Random, v: Tensor) -> Tensor:
    """A mask that the graph holds, over the first dim of tokens."""
    shape = [1] * v.dim()
    shape[1] = -1
    return (torch.arange(v.shape[1]) > r.randrange(v.shape[1])).view(shape)


def padded(r: random.Random, v: Tensor, _: Tensor) -> Tensor:
    dim = dim_of(r, v) % v.dim()
    return F.pad(v, [0, 0] * (v.dim() - 1 - dim) + [r.randint(-1, 2), r.randint(-1, 2)])


def rolled(r: random.Random, v: Tensor, _: Tensor) -> Tensor:
    return torch.roll(v, r.randint(-2, 2), dim_of(r, v))


def sliced(r: random.Random, v: Tensor, _: Tensor) -> Tensor:
    start, end = r.choice([None, 1, -3]), r.choice([None, 4, -1])
    index = [slice(None)] * v.dim()
    index[dim_of(r, v) % v.dim()] = slice(start, end, r.choice([1, 1, 2]))
    return v[tuple(index)]


def scattered(r: random.Random, v: Tensor, u: Tensor) -> Tensor:
    dim = dim_of(r, v) % v.dim()
    start = r.randrange(v.shape[dim])
    part = u.narrow(dim, 0, v.shape[dim] - start) * r.choice([1.0, 2.0])
    return torch.slice_scatter(v, part, dim, start)


def written(r: random.Random, v: Tensor, u: Tensor) -> Tensor:
    dim = dim_of(r, v) % v.dim()
    return torch.select_scatter(v, u.select(dim, 0), dim, r.randrange(v.shape[dim]))


def masked(r: random.Random, v: Tensor, _: Tensor) -> Tensor:
    mask = early(r, v)
    if r.random() < 0.5:
        return v.masked_fill(mask, 0)
    return torch.where(mask, v, torch.zeros_like(v))


def windows(r: random.Random, v: Tensor, _: Tensor) -> Tensor:
    seen = v.unfold(dim_of(r, v), 2, r.choice([1, 1, 2]))
    return seen if r.random() < 0.4 else (seen * torch.randn(2, dtype=v.dtype)).sum(-1)


def gathered(r: random.Random, v: Tensor, _: Tensor) -> Tensor:
    index = (torch.arange(3) * r.choice([1, 2]) + r.randrange(3)) % v.shape[1]
    return v.index_select(1, index) if r.random() < 0.5 else v[:, index]


def contracted(r: random.Random, v: Tensor, u: Tensor) -> Tensor:
    stacked = torch.stack([v, u], r.choice([0, 1]))
    taps = torch.randn(2, v.shape[-1], dtype=v.dtype)
    if stacked.shape[0] == 2 and v.dim() == 3 and r.random() < 0.5:
        return torch.einsum("kbtc,kc->btc", stacked, taps)
    return torch.matmul(stacked.movedim(0, -1), torch.randn(stacked.shape[0], dtype=v.dtype))


def convolved(r: random.Random, v: Tensor, _: Tensor) -> Tensor:
    c = v.shape[-1]
    kernel, bias = torch.randn(c, 1, 2, dtype=v.dtype), torch.randn(c, dtype=v.dtype)
    padding, dilation = r.randrange(3), r.choice([1, 2])
    if v.dim() != 3:
        raise ValueError
    return F.conv1d(v.mT, kernel, bias, 1, padding, dilation, c).mT


STEPS: list[Step] = [
    *(padded, rolled, sliced, scattered, written, masked, windows, gathered, contracted),
    *(convolved, padded, sliced),
    lambda r, v, u: v + u,
    lambda r, v, u: v - u * r.choice([1.0, 0.5]),
    lambda r, v, u: torch.cat([v, u], dim_of(r, v)),
    lambda r, v, u: torch.cat([torch.zeros_like(v), u], dim_of(r, v)),
    lambda r, v, u: v * weight(r, v),
    lambda r, v, u: weight(r, v) + v,
    lambda r, v, u: torch.lerp(v, u, weight(r, v)),
    lambda r, v, u: torch.addcmul(u, v, weight(r, v), value=0.5),
    lambda r, v, u: v.flip(dim_of(r, v)),
    lambda r, v, u: v.transpose(dim_of(r, v), -1),
    lambda r, v, u: v.sum(dim_of(r, v), keepdim=True).expand(v.shape),
    lambda r, v, u: torch.stack([v, u, v]).sum(0),
    lambda r, v, u: 1 - v / 2,
    lambda r, v, u: v.unbind(1)[0].unsqueeze(1) * 3 + u,
]


def program(seed: int) -> Callable[[Tensor], list[Tensor]]:
    """A few random steps, each on what came before; steps that do not fit are left out."""

    def run(x: Tensor) -> list[Tensor]:
        r = random.Random(seed)
        torch.manual_seed(seed)
        values = [x]
        for _ in range(7):
            v = r.choice(values[-3:])
            u = r.choice([w for w in values if w.shape == v.shape])
            try:
                values.append(r.choice(STEPS)(r, v, u))
            except (RuntimeError, IndexError, ValueError):
                continue
        return values[1:]

    return run


def traced(seed: int, x: Tensor) -> GraphModule:
    """The graph of one program, less the steps that raised."""
    gm = make_fx(program(seed), pre_dispatch=True)(x)
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return gm


class Recorder(Interpreter):
    """Keeps every value."""

    def __init__(self, gm: Any) -> None:
        super().__init__(gm)
        self.seen: dict[Node, Any] = {}

    def run_node(self, n: Node) -> Any:
        self.seen[n] = super().run_node(n)
        return self.seen[n]


def rebuilt(value: Value, x: Tensor, seen: dict[Node, Any]) -> Tensor:
    """The tensor that a value describes."""
    grid = torch.meshgrid(*(torch.arange(n) for n in value.shape), indexing="ij")
    total = torch.zeros(value.shape, dtype=x.dtype)
    for term in value.terms:
        tokens = term.tokens.expand(value.shape)
        index = []
        for d in range(x.dim()):
            at = tokens.clamp(0, x.shape[TIME] - 1) if d == TIME else torch.zeros_like(tokens)
            index.append(grid[value.roles.index(d)] if d in value.roles else at)
        part = x[tuple(index)].where(tokens != ONE, 1).where(tokens != ZERO, 0)
        for factor in term.coefficient.factors:
            picks = [
                torch.full_like(tokens, p.start)
                if p.dim is None
                else p.start + p.step * grid[p.dim]
                for p in factor.picks
            ]
            part = part * seen[factor.node][tuple(picks)] if picks else part * seen[factor.node]
        total = total + term.coefficient.scale * part
    return total


def compared(seed: int) -> list[str]:
    """Checks every value of one program; answers by which operations they were made."""
    x = torch.randn(SHAPE, dtype=torch.float64)
    gm = traced(seed, x)
    recorder = Recorder(gm)
    recorder.run(x)
    (source,) = gm.graph.find_nodes(op="placeholder")
    start = Leaf(source, TIME).values({})
    follower = Follower(start, {})
    follower.follow(start)
    values = {n: v for n, v in follower.env.items() if isinstance(v, Value) and n is not source}
    for node, value in values.items():
        assert value.activation is None
        close(rebuilt(value, x, recorder.seen), recorder.seen[node], "kernel_fp32")
    return [getattr(node.target, "_opname", "") for node in values]


def test_values_are_what_they_say() -> None:
    """And the programs reach what they are meant to check."""
    made = [compared(seed) for seed in range(120)]
    assert sum(len(names) > 3 for names in made) > 40
    assert {name for names in made for name in names} >= {
        *("pad", "roll", "slice", "slice_scatter", "select_scatter", "masked_fill", "where"),
        *("unfold", "index_select", "index", "einsum", "matmul", "conv1d", "add", "sub", "cat"),
        *("mul", "lerp", "addcmul", "flip", "transpose", "sum", "stack", "rsub", "div", "select"),
    }


def test_writes_into_shared_memory_are_not_followed() -> None:
    """torch writes one element of a window and changes its neighbour."""

    def run(x: Tensor) -> Tensor:
        windows = x.unfold(1, 2, 1)
        return torch.slice_scatter(windows, 2 * windows[:, :2], 1, 2)

    x = torch.randn(SHAPE)
    gm = make_fx(run, pre_dispatch=True)(x)
    start = Leaf(gm.graph.find_nodes(op="placeholder")[0], TIME).values({})
    follower = Follower(start, {})
    follower.follow(start)
    names = [getattr(node.target, "_opname", "") for node in follower.env]
    assert "mul" in names and "slice_scatter" not in names
