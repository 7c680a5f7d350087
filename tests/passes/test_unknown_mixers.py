"""Code of one's own that mixes tokens: an error in packed rows, right in padded ones."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import effpass
from tests.tolerances import close

D = 16
KERNEL = torch.randn(D, 1, 4, generator=torch.Generator().manual_seed(0)) * 0.3


def before(x: Tensor) -> Tensor:
    """(1, T): the place before each, but for the first."""
    return (torch.arange(x.shape[1]) - 1).clamp(min=0)[None]


def cut_and_written(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 1:] = y[:, 1:] + x[:, :-1]
    return y


def chosen(x: Tensor) -> Tensor:
    best = x.sum(-1).topk(3, 1)[1]
    return torch.zeros_like(x).scatter(1, best[..., None].expand(-1, -1, D), 1.0)


def past(x: Tensor) -> Tensor:
    return torch.ones(x.shape[1], x.shape[1]).tril()


def channels_first(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


MIXERS: dict[str, Callable[[Tensor], Tensor]] = {
    "cumsum": lambda x: x.cumsum(1),
    "cummax": lambda x: x.cummax(1)[0],
    "logcumsumexp": lambda x: x.logcumsumexp(1),
    "cumprod": lambda x: x.sigmoid().cumprod(1),
    "pad": lambda x: F.pad(x, (0, 0, 1, -1)),
    "roll": lambda x: x.roll(1, 1),
    "cat": lambda x: torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1),
    "index": lambda x: x[:, before(x)[0]],
    "gather": lambda x: x.gather(1, before(x)[..., None].expand_as(x)),
    "in_place": cut_and_written,
    "conv_same": lambda x: channels_first(
        F.conv1d(channels_first(x), KERNEL[..., :3], padding=1, groups=D)
    ),
    "conv2d": lambda x: channels_first(
        F.conv2d(channels_first(x)[:, :, None], KERNEL[:, :, None], padding=(0, 3), groups=D)[
            :, :, 0, : x.shape[1]
        ]
    ),
    "unfold": lambda x: F.pad(x, (0, 0, 2, 0)).unfold(1, 3, 1).mean(-1),
    "pool": lambda x: channels_first(F.avg_pool1d(F.pad(channels_first(x), (2, 0)), 3, 1)),
    "matmul": lambda x: past(x) @ x,
    "einsum": lambda x: torch.einsum("ts,bsd->btd", past(x), x),
    "linear_attention": lambda x: ((F.elu(x) + 1) @ (F.elu(-x) + 1).transpose(1, 2)).tril() @ x,
    "mean": lambda x: x.mean(1, keepdim=True).expand_as(x),
    "max": lambda x: x.amax(1, keepdim=True).expand_as(x),
    "norm": lambda x: channels_first(F.layer_norm(channels_first(x), (x.shape[1],))),
    "softmax": lambda x: x.softmax(1),
    "flip": lambda x: x.flip(1),
    "sort": lambda x: x.sort(1)[0],
    "scale": lambda x: x / x.abs().amax(),
    "first": lambda x: x[:, :1].expand_as(x),
    "diff": lambda x: torch.diff(x, dim=1, prepend=x[:, :1]),
    "strided": lambda x: F.pad(x, (0, 0, 1, 0)).contiguous().as_strided(x.shape, (x.numel(), D, 1)),
    "topk": chosen,
    "cdist": lambda x: torch.cdist(x, x).sum(-1, keepdim=True) * x,
    "token_scale": lambda x: x / x.abs().amax(-1, keepdim=True),
    "regrouped": lambda x: x.unflatten(2, (-1, 2)).cumsum(3).flatten(2),
}  # fmt: skip
APART = ("token_scale", "regrouped")  # each token for itself


class Model(nn.Module):
    """One mixer behind an embedding; ``reads`` makes positions a part of it."""

    def __init__(self, mix: Callable[[Tensor], Tensor], reads: bool) -> None:
        super().__init__()
        self.mix, self.reads = mix, reads
        self.tokens, self.places = nn.Embedding(64, D), nn.Embedding(64, D)
        self.inside, self.head = nn.Linear(D, D), nn.Linear(D, 64)

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        x = self.tokens(input_ids)
        if self.reads:
            x = x + self.places(position_ids)
        return self.head(x + self.mix(self.inside(x)))


def row(*lengths: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(64, (1, sum(lengths)), generator=torch.Generator().manual_seed(1))
    return ids, torch.cat([torch.arange(n) for n in lengths])[None]


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("reads", [False, True])
@pytest.mark.parametrize("name", MIXERS)
def test_honoured_or_refused(name: str, reads: bool, late: bool) -> None:
    torch.manual_seed(0)
    model = Model(MIXERS[name], reads).eval()
    run = torch.compile(model, backend="effpass", options={"compiler": "eager"})
    with torch.no_grad():
        if late:  # compiled when no row has been packed yet
            ids, positions = row(18)
            close(run(ids, position_ids=positions), model(ids, positions), "zoo_fp32")
        ids, positions = row(3, 10, 5)
        parts = ids.split((3, 10, 5), 1)
        alone = torch.cat([model(each, torch.arange(each.shape[1])[None]) for each in parts], 1)
        try:
            found = run(ids, position_ids=positions)
        except (ValueError, torch._dynamo.exc.BackendCompilerFailed) as error:
            assert "packed_rows: " in str(error) and name not in APART
            return
    close(found, alone, "zoo_fp32")


def test_graph_breaks_are_told() -> None:
    model = Model(torch._dynamo.disable(MIXERS["cumsum"]), reads=False).eval()
    run = torch.compile(model, backend="effpass", options={"compiler": "eager"})
    with torch.no_grad():
        run(row(3, 5)[0], position_ids=row(3, 5)[1])
    codes = [each.code for graph in effpass.report(run).graphs for each in graph.declined]
    assert codes == ["packed_rows:graph_break"]


class Attended(nn.Module):
    """One mixer behind an attention, whose mask tells what is padding."""

    def __init__(self, mix: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.mix, self.tokens, self.head = mix, nn.Embedding(64, D), nn.Linear(D, 64)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.tokens(input_ids) * attention_mask[..., None]
        seen = attention_mask[:, None, None].bool()
        x = x + F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None], seen)[:, 0]
        return self.head(x + self.mix(x))


@pytest.mark.parametrize("name", sorted(MIXERS.keys() - {"strided"}))  # which wants one row
def test_padded_rows_stay_what_they_were(name: str) -> None:
    torch.manual_seed(0)
    model = Attended(MIXERS[name]).eval()
    options = {"compiler": "eager", "pack_varlen": True}
    run = torch.compile(model, backend="effpass", options=options)
    places, lengths = torch.arange(12), torch.tensor([[7], [3], [12], [1]])
    for real in (places < lengths, places >= 12 - lengths):
        ids = torch.randint(64, real.shape)
        with torch.no_grad():
            found = run(ids, attention_mask=real.long())[real]
            close(found, model(ids, real.long())[real], "zoo_fp32")
    (graph,) = effpass.report(run).graphs
    assert graph.forms["packed"] if graph.forms else graph.declined
