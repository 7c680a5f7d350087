"""Lengths of sequences as in PackMamba's corpus: 57 to 2048 tokens, 646 on average.

The paper (arXiv 2408.03865) tells the range and the mean, not the distribution. This one is
log-normal, as lengths of documents are: none below 57, those above 2048 cut there (as corpora are
cut to a model's context), spread (sigma) 1, and the median such that the mean is 646.
"""

from __future__ import annotations

import math
import random
from statistics import NormalDist

SHORTEST, LONGEST, MEAN = 57, 2048, 646
MAX_TOKENS = 4096  # of a row, in the paper
MU, SIGMA = 6.0771, 1.0  # of the logarithm of a length; MU gives MEAN to four digits


def sample_lengths(count: int, seed: int = 0) -> list[int]:
    """``count`` lengths; the same for the same seed, on every machine.

    A longer list begins with the shorter one.
    """
    normal, chance = NormalDist(MU, SIGMA), random.Random(seed)
    below = normal.cdf(math.log(SHORTEST))
    return [_length(normal, below + (1 - below) * chance.random()) for _ in range(count)]


def _length(normal: NormalDist, share: float) -> int:
    """The length that ``share`` of all documents do not exceed."""
    return max(SHORTEST, min(LONGEST, round(math.exp(normal.inv_cdf(share)))))
