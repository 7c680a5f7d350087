"""Small models whose reduced form is computed by hand: plain blocks, the NumPy oracle between."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.passes import reduction_oracle as oracle
from tests.passes.small import WIDTH


def scans(
    model: nn.Module, x: Tensor, keep: dict[int, float], q: float, last: int, by: str = "clip_y"
) -> Tensor:
    """``tests.tiny.Stack``, with fewer tokens behind the blocks of ``keep``."""
    whole = x.shape[1]
    reads = [list(range(whole)) for _ in x]
    for i, layer in enumerate(model.layers):  # type: ignore[arg-type]
        y, branch = _mixer(layer, x)
        x, reads = _behind(x, branch, y, keep.get(i, 1.0), q, last, reads, by)
    return torch.stack([row[read] for row, read in zip(x, reads, strict=True)])


def encoder(
    model: Any,
    ids: Tensor,
    mask: Tensor,
    keep: float,
    last: int,
    q: float = 0.5,
    by: str = "deviation",
) -> Tensor:
    """``tests.passes.small.Encoder``, with fewer tokens behind its first attention."""
    x = model.embed(ids) + model.positions(torch.arange(ids.shape[1]))
    bias = model.spell(mask)
    at = [list(range(ids.shape[1])) for _ in ids]
    reads = at
    for i, layer in enumerate(model.layers):
        rows = [_rows(bias, row, positions) for row, positions in enumerate(at)]
        y = torch.cat([_attention(layer, x[i : i + 1], rows[i]) for i in range(len(ids))])
        if i == 0:
            found = _oracles(x, y, y, keep, q, last, mask != 0, by)
            x = found[0] + found[1]
            at, reads = found[2], found[3]
        else:
            x = x + y
        x = x + layer.down(F.gelu(layer.up(x)))  # type: ignore[operator]
    return torch.stack([row[read] for row, read in zip(x, reads, strict=True)])


def _mixer(layer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """A scan's output before and after its gate."""
    u, z = layer.proj(x).chunk(2, -1)
    u, _ = torch.ops.effpass.causal_conv1d(u, layer.conv, None, "silu")
    B, C = layer.BC(u).chunk(2, -1)
    A = -torch.exp(layer.A_log)
    y, _ = torch.ops.effpass.selective_scan(u, layer.dt(u), A, B, C, None, None, None, True)
    return y, y * F.silu(z)


def _behind(
    x: Tensor,
    branch: Tensor,
    y: Tensor,
    keep: float,
    q: float,
    last: int,
    reads: list[list[int]],
    by: str,
) -> tuple[Tensor, list[list[int]]]:
    real = torch.ones(x.shape[:2], dtype=torch.bool)
    residual, mixer, _, now = _oracles(x, branch, y, keep, q, last, real, by)
    joined = [[new[i] for i in old] for old, new in zip(reads, now, strict=True)]
    return residual + mixer, joined


def _oracles(
    x: Tensor, branch: Tensor, y: Tensor, keep: float, q: float, last: int, real: Tensor, by: str
) -> tuple[Tensor, Tensor, list[list[int]], list[list[int]]]:
    """Both branches with fewer tokens, positions that stay, and what every token reads."""
    tokens = x.shape[1]
    leaving = tokens - oracle.lengths(tokens, keep, last)
    residual, mixer, kept, reads = [], [], [], []
    for row in range(len(x)):
        places = [i for i in range(tokens) if real[row, i]]
        ends = places[len(places) - last :] if last else []
        kinds = [2 if i in ends else int(real[row, i]) for i in range(tokens)]
        found = oracle.utrc(y[row].detach().flatten(1).numpy(), kinds, leaving, q, last, by=by)
        residual.append(_merged(x[row], found, found.residual))
        mixer.append(_merged(branch[row], found, found.mixer))
        kept.append(found.kept)
        reads.append(oracle.reads(found, tokens))
    return torch.stack(residual), torch.stack(mixer), kept, reads


def _merged(x: Tensor, found: oracle.Result, branch: dict[int, int | None]) -> Tensor:
    """Means of what is merged, differentiable."""
    rows = [[i, *(s for s, target in branch.items() if target == i)] for i in found.kept]
    return torch.stack([x[group].mean(0) for group in rows])


def _rows(bias: Tensor, row: int, at: list[int]) -> Tensor:
    bias = bias.expand(max(bias.shape[0], row + 1), *bias.shape[1:]) if bias.shape[0] == 1 else bias
    chosen = bias[row : row + 1]
    chosen = chosen[:, :, at] if chosen.shape[2] > 1 else chosen
    return chosen[..., at]


def _attention(layer: Any, x: Tensor, bias: Tensor) -> Tensor:
    b, t, _ = x.shape
    q, k, v = layer.qkv(layer.norm(x)).view(b, t, 3, 2, WIDTH // 2).unbind(2)
    q, k, v = (each.transpose(1, 2) for each in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    return y.transpose(1, 2).reshape(b, t, WIDTH)
