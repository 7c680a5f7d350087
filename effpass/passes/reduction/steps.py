"""What stands in a reduced graph: functions of tensors and plain numbers, traced by the compiler.

A choice is passed on as the tuple of its tensors. ``batch`` and ``token`` are the dims of a tensor
that hold rows and tokens; ``batch`` is None where there is a single row without a dim of its own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu, softplus

from effpass.passes.reduction import scores
from effpass.passes.reduction.choice import Choice, Rule, choose, classes
from effpass.passes.reduction.merge import gaps, grown, merge, pick, step
from effpass.passes.reduction.packed import (
    Offsets,
    Segments,
    choose_packed,
    first_seen,
    gaps_packed,
)

Chosen = tuple[Tensor, ...]


def rows_first(x: Tensor, batch: int | None, token: int) -> Tensor:
    """(b, N, ...) of a tensor."""
    return x.movedim(token, 0)[None] if batch is None else x.movedim((batch, token), (0, 1))


def rows_back(x: Tensor, batch: int | None, token: int) -> Tensor:
    """The inverse of ``rows_first``."""
    return x[0].movedim(0, token) if batch is None else x.movedim((0, 1), (batch, token))


def all_real(like: Tensor, batch: int | None, token: int) -> Tensor:
    """(b, N) true: without a padding mask every token is real."""
    rows = 1 if batch is None else like.shape[batch]
    return torch.ones(rows, like.shape[token], dtype=torch.bool, device=like.device)


def real_tokens(mask: Tensor) -> Tensor:
    """(b, N): what is not zero in a padding mask."""
    return mask != 0


def positions(real: Tensor) -> Tensor:
    """(b, N): 0, 1, ..."""
    return torch.arange(real.shape[1], device=real.device).expand_as(real)


def chosen(
    score: Tensor | None,
    metric: Tensor | None,
    real: Tensor,
    kept: Tensor,
    rule: tuple[Any, ...],
) -> Chosen:
    """The choice of one anchor, of a Rule's fields; ``kept`` has one element a token that stays."""
    made = Rule(*rule)
    kinds = classes(real, made.protect_first, made.protect_last)
    return _chosen(choose(made, score, metric, kinds, kept.shape[0]))


def chosen_packed(
    score: Tensor | None,
    metric: Tensor | None,
    real: Tensor,
    kept: Tensor,
    offsets: tuple[Tensor, Tensor, Tensor],
    anchor: int,
    rule: tuple[Any, ...],
) -> Chosen:
    """The choice of one anchor for a packed row.

    ``offsets``: where sequences begin before and behind it, int32 (S + 1,); and in front of every
    anchor, (anchors, S + 1) on the CPU.
    """
    ends = Offsets(offsets[0], offsets[1], offsets[2][anchor])
    row = Segments.of(ends.before, real.shape[1])
    return _chosen(choose_packed(Rule(*rule), score, metric, row, ends, kept.shape[0]))


def _chosen(found: Choice) -> Chosen:
    return found.kept, found.rank, found.leaving, found.into, found.residual, found.mixer


def left(
    x: Tensor, choice: Chosen, branch: str, sizes: Tensor | None, batch: int | None, token: int
) -> Tensor:
    """A tensor of the stream behind an anchor: ``branch`` is residual, mixer or none (pruned)."""
    found, rows = Choice(*choice), rows_first(x, batch, token)
    if branch == "none":
        return rows_back(pick(rows, found.kept), batch, token)
    merged = found.residual if branch == "residual" else found.mixer
    return rows_back(merge(rows, found, merged, sizes), batch, token)


def kept_of(x: Tensor, choice: Chosen) -> Tensor:
    """(b, N) -> (b, m): positions, or what is real, of the tokens that stay."""
    return pick(x, choice[0])


def grown_sizes(sizes: Tensor | None, choice: Chosen) -> Tensor:
    """(b, m): how many tokens each kept one stands for; ``sizes`` None: one each."""
    found = Choice(*choice)
    sizes = torch.ones_like(found.rank, dtype=torch.float32) if sizes is None else sizes
    return grown(sizes, found)


def read_at(before: Tensor | None, choice: Chosen, causal: bool) -> Tensor:
    """(b, N0): which kept token each of the first N0 reads, from the same of the stage before."""
    now = step(Choice(*choice), causal)
    return now if before is None else now.gather(1, before)


def gathered(x: Tensor, at: Tensor, batch: int | None, token: int) -> Tensor:
    """A tensor at positions ``at`` (b, m) of its tokens."""
    return rows_back(pick(rows_first(x, batch, token), at), batch, token)


def gathered_shared(x: Tensor, at: Tensor, batch: int, token: int, rank: int) -> Tensor:
    """A tensor that all rows share, at positions ``at`` (b, m), with as many dims as ``rank``.

    ``batch`` and ``token`` are dims of the result.
    """
    x = x[(None,) * (rank - x.dim())]
    return (
        x.select(batch, 0).movedim(token - (batch < token), 0)[at].movedim((0, 1), (batch, token))
    )


def gathered_flat(x: Tensor, at: Tensor, dim: int) -> Tensor:
    """A tensor with rows and tokens in one dim, at positions ``at`` (b, m) of each row."""
    rows = x.unflatten(dim, (at.shape[0], -1))
    return gathered(rows, at, dim, dim + 1).flatten(dim, dim + 1)


def gathered_pairs(mask: Tensor, at: Tensor) -> Tensor:
    """A mask (.., N or 1, N or 1) of queries and keys, of the tokens at ``at`` (b, m): 4 dims."""
    mask = mask[(None,) * (4 - mask.dim())]
    for token in (2, 3):
        if mask.shape[token] == 1:
            continue
        if mask.shape[0] == 1:
            mask = gathered_shared(mask, at, 0, token, 4)
        else:
            mask = gathered(mask, at, 0, token)
    return mask


def weighted_mask(mask: Tensor | None, sizes: Tensor, causal: bool, like: Tensor) -> Tensor:
    """An additive mask under which a key counts as often as the tokens it stands for (ToMe)."""
    bias = sizes.log().to(like.dtype)[:, None, None, :]
    if causal:
        tokens = sizes.shape[1]
        mask = torch.ones(tokens, tokens, dtype=torch.bool, device=sizes.device).tril()
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, -torch.inf)
    return mask + bias


def weights_of_keys(bias: Tensor | None, sizes: Tensor) -> Tensor:
    """What is added to the scores of keys (N,) that count as often as ``sizes`` (1, N) says."""
    own = sizes[0].log()
    return own if bias is None else bias + own


def score_output(name: str, y: Tensor, batch: int | None, token: int) -> Tensor:
    """A score (b, N) of a mixer's output, or of the stream."""
    return scores.of_output(name, rows_first(y.detach(), batch, token))


def score_deviation(
    y: Tensor, batch: int | None, token: int, real: Tensor, offsets: Tensor | None
) -> Tensor:
    """The score (b, N) of how unlike the others a token is, in its sequence of a packed row."""
    rows = rows_first(y.detach(), batch, token)
    if offsets is None:
        return scores.of_deviation(rows, real)
    number = Segments.of(offsets, rows.shape[1]).number
    return scores.of_deviation_within(rows, number, offsets.shape[0] - 1)


def score_steps(dt: Tensor, dt_bias: Tensor | None, *rule: Any) -> Tensor:
    """The norm of step sizes (b, N); ``rule`` as of ``scores.of_steps``."""
    return scores.of_steps(dt.detach(), None if dt_bias is None else dt_bias.detach(), *rule)


def score_first(q: Tensor, k: Tensor, scale: float, mask: Tensor | None) -> Tensor:
    """What the first token attends to (b, N)."""
    row = None if mask is None else mask[(None,) * (4 - mask.dim())][:, :, :1].detach()
    return scores.of_first(q.detach(), k.detach(), scale, row)


def score_first_packed(
    q: Tensor, k: Tensor, scale: float, offsets: Tensor, positions: Tensor, right: int
) -> Tensor:
    """What the first token of each sequence attends to (1, N)."""
    return first_seen(q.detach(), k.detach(), scale, offsets, positions, right)


def metric_of(y: Tensor, batch: int | None, token: int) -> Tensor:
    """What similarity is taken of: a mixer's output, its channels flattened (b, N, d)."""
    return rows_first(y.detach(), batch, token).flatten(2)


def metric_of_keys(k: Tensor) -> Tensor:
    """The mean of keys (b, h, N, d) over heads (ToMe)."""
    return k.detach().mean(1)


def metric_of_packed_keys(k: Tensor) -> Tensor:
    """The same of packed keys (N, h, d): (1, N, d)."""
    return k.detach().mean(1)[None]


def pair(y: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """A scan's two outputs, as one."""
    return y, state


def gated(y: Tensor, z: Tensor) -> Tensor:
    """A scan's output and its gate, as the scan itself does it."""
    wide = torch.promote_types(y.dtype, torch.float32)
    return (y.to(wide) * silu(z.to(wide))).to(y.dtype)


def aligned_scan(
    name: str, mode: str, at: Tensor, given: dict[str, Any], first: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """A scan in which the state passes over gaps of tokens that left.

    ``at`` (b, m): original positions. ``repeat``: a token's decay counts once more for each token
    missing in front of it; ``bias_gap``: each missing one decays by ``softplus(dt_bias)``, as a
    token of zeros would. Only decays change: what a token writes is as it was. ``first``: of a
    packed row, where its sequences began before any token left.
    """
    x, bias, dt_max = given["x"], given["dt_bias"], given.get("dt_max")
    wide = torch.promote_types(x.dtype, torch.float32)
    steps = given["dt"].to(wide) if bias is None else given["dt"].to(wide) + bias
    steps = softplus(steps) if given["dt_softplus"] else steps
    if name == "ssd_scan":
        steps = steps.clamp(given["dt_min"], dt_max)
    offsets = given.get("cu_seqlens")
    missing = gaps(at) if offsets is None else gaps_packed(at, offsets, first)  # type: ignore[arg-type]
    gap = missing[..., None].to(wide)
    if mode == "repeat" or bias is None:
        longer, share = steps * (1 + gap), (1 / (1 + gap)).expand_as(steps)
    else:
        longer = steps + gap * softplus(bias.to(wide))
        share = torch.where(gap > 0, steps / longer, torch.ones_like(steps))
    heads = name == "ssd_scan"
    inputs = x.to(wide) * (share[..., None] if heads else share)
    B, C = given["B"].to(wide), given["C"].to(wide)
    plain: list[Any] = [inputs, longer, given["A"], B, C, None, None, None, False]
    plain += [0.0, None] if heads else []
    op = torch.ops.effpass.ssd_scan if heads else torch.ops.effpass.selective_scan
    y, state = op.default(*plain, given["initial_state"], offsets)
    if given["D"] is not None:
        y = y + (given["D"][:, None] if heads else given["D"]).to(wide) * x.to(wide)
    y = y if given["z"] is None else y * silu(given["z"].to(wide))
    return y.to(x.dtype), state
