"""All pieces and what stands around them: the recipe of the random programs."""

from __future__ import annotations

import torch

from tests.patterns.pieces import (
    attentions,
    blocks,
    chunked,
    convolutions,
    cumulative,
    loops,
    noise,
    scans,
    trees,
)
from tests.patterns.programs import Recipe

KINDS = (loops, scans, trees, cumulative, chunked, convolutions, attentions, blocks)
RECIPE = Recipe(
    [piece for kind in KINDS for piece in kind.PIECES],
    noise.NOISES,
    (torch.float64, torch.float64, torch.float64, torch.float32),
)
