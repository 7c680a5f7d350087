"""Token matching: for every source the most similar destination, by cosine (UTRC, arXiv 2410.14725,
section 4.2; ToMe, arXiv 2210.09461, section 3), one tile of the similarities at a time.

An op of passes, not of models: it has no gradient, and answers an index beside a similarity. So it
is not in ``OPS``; it has implementations to choose from like those that are.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from effpass.axes.notation import Axes
from effpass.ops.op import Lowering, Op

TILE = 256  # sources a tile: a tile is (TILE, destinations), never (sources, destinations)


def reference(
    a: Tensor, b: Tensor, open: Tensor, a_at: Tensor, b_at: Tensor, later: bool
) -> tuple[Tensor, Tensor]:
    """The most cosine-similar row of ``b`` for each row of ``a``; ties go to the earlier one.

    ``a`` (b, s, d) and ``b`` (b, t, d): sources and destinations, at positions ``a_at`` (b, s) and
    ``b_at`` (b, t), int64. Only destinations with ``open`` (b, t) true count, with ``later`` only
    those behind the source. Answers indices int64 (b, s) and similarities (b, s), at least float32:
    -inf and index 0 where no destination counts. A vector of zeros is similar to nothing: 0. One
    with a NaN does not count.
    """
    wide = torch.promote_types(a.dtype, torch.float32)
    targets = _unit(b.to(wide)).transpose(1, 2)
    index = torch.zeros(a.shape[:2], dtype=torch.int64, device=a.device)
    best = torch.full(a.shape[:2], -torch.inf, dtype=wide, device=a.device)
    if not a.shape[1] or not b.shape[1]:
        return index, best
    count = torch.arange(b.shape[1], device=a.device)
    for start in range(0, a.shape[1], TILE):
        tile = slice(start, start + TILE)
        similar = _unit(a[:, tile].to(wide)) @ targets
        closed = ~open[:, None] | similar.isnan()
        if later:
            closed = closed | (b_at[:, None] <= a_at[:, tile, None])
        similar = similar.masked_fill(closed, -torch.inf)
        best[:, tile] = similar.amax(-1)
        first = torch.where(similar == best[:, tile, None], count, b.shape[1]).amin(-1)
        index[:, tile] = torch.where(best[:, tile] == -torch.inf, 0, first)
    return index, best


def shapes(
    a: Tensor, b: Tensor, open: Tensor, a_at: Tensor, b_at: Tensor, later: bool
) -> tuple[Tensor, Tensor]:
    """Index and similarity without values."""
    wide = torch.promote_types(a.dtype, torch.float32)
    return a.new_empty(a.shape[:2], dtype=torch.int64), a.new_empty(a.shape[:2], dtype=wide)


closest = torch.library.custom_op("effpass::token_matching", reference, mutates_args=())
closest.register_fake(shapes)


def _unit(x: Tensor) -> Tensor:
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(1e-12)


def no_gradient(*_: Any) -> Any:
    """An index has none."""
    raise RuntimeError("effpass::token_matching has no gradient; detach what it matches")


token_matching = Op(
    name="token_matching",
    axes=Axes.parse(
        "a: b s d; b: b t d; open: b t; a_at: b s; b_at: b t -> index: b s; similar: b s"
    ),
    reference=reference,
    backward=no_gradient,
    state_dtype=lambda dtype: torch.promote_types(dtype, torch.float32),
    check=None,
    signature=inspect.signature(reference),
    integers={"open": torch.bool, "a_at": torch.int64, "b_at": torch.int64},
    per_head=(),
)
token_matching.lowerings.append(
    Lowering("inline", reference, no_gradient, lambda *_: None, token_matching.overload)
)
