"""UTRC as the paper states it, one row at a time, with NumPy and plain loops.

Written from the paper (arXiv 2410.14725, section 4) and the rules for ties, not from effpass.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

PADDING, REAL, PROTECTED = 0, 1, 2


@dataclass
class Result:
    """Positions that stay; the leaving ones with where they are merged (None: only dropped)."""

    kept: list[int]
    residual: dict[int, int | None]
    mixer: dict[int, int | None]


def lengths(tokens: int, keep: float, protected: int) -> int:
    """How many tokens stay: ``N - min(N - ceil(N keep), n // 2)``."""
    free = max(0, tokens - protected)
    return tokens - min(tokens - math.ceil(tokens * keep - 1e-9), free // 2)


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    scale = max(float(np.linalg.norm(a)), 1e-12) * max(float(np.linalg.norm(b)), 1e-12)
    return float(a @ b) / scale


def utrc(
    y: np.ndarray,
    kinds: list[int],
    leaving: int,
    q: float,
    protected: int,
    causal: bool = False,
    by: str = "clip_y",
) -> Result:
    """One row: ``y`` (N, d), the kind of every token, how many leave, the score."""
    tokens = len(y)
    score = np.maximum(y, 0).mean(1)
    if by == "deviation":
        mean = y[[i for i in range(tokens) if kinds[i] != PADDING]].mean(0)
        score = np.sqrt(((y - mean) ** 2).sum(1))
    order = sorted(range(tokens), key=lambda i: (kinds[i], score[i], i))
    sources = sorted(order[: (tokens - min(tokens, protected)) // 2])
    destinations = [i for i in range(tokens) if i not in sources and kinds[i] == REAL]
    edges = []
    for source in sources:
        best, target = -math.inf, None
        for d in destinations:
            if causal and d < source:
                continue
            if target is None or cosine(y[source], y[d]) > best:
                best, target = cosine(y[source], y[d]), d
        if kinds[source] == PADDING:
            best, target = math.inf, None
        edges.append((source, target, best))
    edges.sort(key=lambda edge: (-edge[2], edge[0]))
    return _applied(edges[:leaving], tokens, kinds, score, q)


def alternate(y: np.ndarray, kinds: list[int], leaving: int, protected: int) -> Result:
    """ToMe's bipartite matching of every second token into the others between them."""
    real = [i for i in range(len(y)) if kinds[i] == REAL]
    parity = {i: place % 2 for place, i in enumerate(real)}
    order = sorted(range(len(y)), key=lambda i: (kinds[i], parity.get(i, 0), i))
    free = len(y) - min(len(y), protected)
    sources = sorted(order[: free - free // 2])
    destinations = [i for i in real if i not in sources]
    edges = []
    for source in sources:
        similar = [cosine(y[source], y[d]) for d in destinations]
        best = int(np.argmax(similar)) if similar else None
        if kinds[source] == PADDING or best is None:
            edges.append((source, None, math.inf if kinds[source] == PADDING else -math.inf))
        else:
            edges.append((source, destinations[best], similar[best]))
    edges.sort(key=lambda edge: (-edge[2], edge[0]))
    return _applied(edges[:leaving], len(y), kinds, np.zeros(len(y)), 0.0)


def lowest(score: np.ndarray, kinds: list[int], leaving: int) -> Result:
    """EViT: the lowest scores leave."""
    order = sorted(range(len(score)), key=lambda i: (kinds[i], score[i], i))
    edges = [(source, None, 0.0) for source in order[:leaving]]
    return _applied(edges, len(score), kinds, score, 1.0)


def _applied(
    edges: list[tuple[int, int | None, float]],
    tokens: int,
    kinds: list[int],
    score: np.ndarray,
    q: float,
) -> Result:
    residual = {source: target for source, target, _ in edges}
    weakest = sorted(residual, key=lambda i: (kinds[i], score[i], i))
    pruned = set(weakest[: math.floor(q * len(edges) + 1e-9)])
    mixer = {s: None if s in pruned else t for s, t in residual.items()}
    return Result([i for i in range(tokens) if i not in residual], residual, mixer)


def merged(x: np.ndarray, result: Result, branch: dict[int, int | None]) -> np.ndarray:
    """``(f + sum a) / (1 + count)`` of the tokens that stay."""
    rows = []
    for i in result.kept:
        group = [x[i], *(x[s] for s, target in branch.items() if target == i)]
        rows.append(sum(group) / len(group))
    return np.stack(rows)


def reads(result: Result, tokens: int, causal: bool = False) -> list[int]:
    """Which of the tokens that stay each token reads afterwards."""
    found = []
    for i in range(tokens):
        target = result.residual.get(i)
        target = result.mixer.get(i) if target is None else target
        earlier = [k for k in result.kept if k <= i]
        if target is None or causal:
            target = earlier[-1] if earlier else result.kept[0]
        found.append(result.kept.index(target))
    return found
