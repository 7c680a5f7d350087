"""First-order recurrences as parallel scans: halving, doubling, sweeps and ``associative_scan``.

Each takes a and b with time somewhere and gives h, h[t] = a[t] h[t-1] + b[t].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._higher_order_ops.associative_scan import associative_scan

from tests.patterns.spellings.mixers import S6, GatedRNN, gated_by_op, s6_by_op
from tests.patterns.spellings.spelling import Spelling, seeded, tokens


def associative_tuples(a: Tensor, b: Tensor) -> Tensor:
    """Pairs as tuples, time in dim 1."""

    def combine(left: tuple[Tensor, Tensor], right: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
        a1, b1 = left
        a2, b2 = right
        return a1 * a2, a2 * b1 + b2

    return associative_scan(combine, (a, b), dim=1, combine_mode="generic")[1]


def associative_dicts(a: Tensor, b: Tensor) -> Tensor:
    """Pairs as dicts with the value first, time moved to dim 0, the sum in the other order."""

    def compose(f: dict[str, Tensor], g: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"shift": g["shift"] + f["shift"] * g["gain"], "gain": g["gain"] * f["gain"]}

    affine = {"shift": b.movedim(1, 0), "gain": a.movedim(1, 0)}
    return associative_scan(compose, affine, 0, combine_mode="generic")["shift"].movedim(0, 1)


def associative_last_dim(a: Tensor, b: Tensor) -> Tensor:
    """Channel-first, time last, one fused multiply-add."""
    pair = (a.transpose(1, -1).contiguous(), b.transpose(1, -1).contiguous())
    _, h = associative_scan(
        lambda p, q: (torch.mul(q[0], p[0]), torch.addcmul(q[1], q[0], p[1])),
        pair,
        dim=pair[0].dim() - 1,
        combine_mode="generic",
    )
    return h.transpose(-1, 1)


def associative_with_start(a: Tensor, b: Tensor) -> Tensor:
    """A step before the first holds the starting state (zeros), and is dropped afterwards."""
    h0 = torch.zeros_like(b[:, :1])
    gates = torch.cat([torch.ones_like(h0), a], dim=1)
    values = torch.cat([h0, b], dim=1)
    _, states = associative_scan(
        lambda i, j: (i[0] * j[0], j[0] * i[1] + j[1]), (gates, values), 1, combine_mode="generic"
    )
    return states[:, 1:]


def _up_sweep(a: Tensor, x: Tensor, levels: int) -> None:
    for level in range(levels):
        stride = 2 << level
        left, right = slice(stride // 2 - 1, None, stride), slice(stride - 1, None, stride)
        x[:, right] += a[:, right].clone() * x[:, left].clone()
        a[:, right] *= a[:, left].clone()


def _down_sweep(a: Tensor, x: Tensor, levels: int) -> None:
    for level in reversed(range(levels - 1)):
        stride = 2 << level
        left = slice(stride - 1, -1, stride)
        right = slice(stride + stride // 2 - 1, None, stride)
        before = slice(0, x[:, right].shape[1])
        x[:, right] += a[:, right].clone() * x[:, left][:, before].clone()
        a[:, right] *= a[:, left][:, before].clone()


def strided_sweeps(a: Tensor, b: Tensor) -> Tensor:
    """Up and down sweep over strided slices, in place, padded to a power of two."""
    length = b.shape[1]
    levels = math.ceil(math.log2(length))
    extra = [0, 0] * (b.dim() - 2) + [0, 2**levels - length]
    a, x = F.pad(a, extra), F.pad(b, extra)
    a, x = a.clone(), x.clone()
    _up_sweep(a, x, levels)
    _down_sweep(a, x, levels)
    return x[:, :length]


def _sweep_pairs(A: Tensor, X: Tensor) -> None:
    """X (b, d, L, n) becomes its scan, A its running products, L a power of two."""
    size, rounds = A.shape[0:2], X.shape[2].bit_length() - 1
    Aa, Xa = A, X
    for _ in range(rounds):
        Aa, Xa = (v.view(*size, v.shape[2] // 2, 2, -1) for v in (Aa, Xa))
        Xa[:, :, :, 1].add_(Aa[:, :, :, 1].mul(Xa[:, :, :, 0]))
        Aa[:, :, :, 1].mul_(Aa[:, :, :, 0])
        Aa, Xa = Aa[:, :, :, 1], Xa[:, :, :, 1]
    for k in reversed(range(rounds - 1)):
        Aa, Xa = (v[:, :, 2**k - 1 :: 2**k] for v in (A, X))
        Aa, Xa = (v.view(*size, v.shape[2] // 2, 2, -1) for v in (Aa, Xa))
        Xa[:, :, 1:, 0].add_(Aa[:, :, 1:, 0].mul(Xa[:, :, :-1, 1]))
        Aa[:, :, 1:, 0].mul_(Aa[:, :, :-1, 1])


class PairScan(torch.autograd.Function):
    """The sweeps over a view of pairs, in the manner of mamba.py, with a gradient by hand."""

    @staticmethod
    def scan(A: Tensor, X: Tensor) -> Tensor:
        """A and X (b, l, d, n) -> the states (b, d, l, n)."""
        length = X.shape[1]
        target = 1 << (length - 1).bit_length()
        A, X = (F.pad(v.transpose(1, 2), (0, 0, 0, target - length)).clone() for v in (A, X))
        _sweep_pairs(A, X)
        return X[:, :, :length]

    @staticmethod
    def forward(ctx: Any, A: Tensor, X: Tensor) -> Tensor:
        """(b, l, d, n), both -> (b, l, d, n)."""
        H = PairScan.scan(A, X).transpose(1, 2)
        ctx.save_for_backward(A, H)
        return H

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        """The same scan, backwards in time."""
        A, H = ctx.saved_tensors
        shifted = torch.cat([A[:, 1:], torch.zeros_like(A[:, :1])], dim=1)
        dX = PairScan.scan(shifted.flip(1), grads[0].flip(1)).transpose(1, 2).flip(1)
        before = torch.cat([torch.zeros_like(H[:, :1]), H[:, :-1]], dim=1)
        return dX * before, dX


def pair_scan(a: Tensor, b: Tensor) -> Tensor:
    """The autograd function, for (b, l, d, n)."""
    return PairScan.apply(a, b)  # type: ignore[no-untyped-call]


def doubling_by_pad(a: Tensor, b: Tensor) -> Tensor:
    """Hillis-Steele: each round looks twice as far back, past the start are 1 and 0."""
    length, shift = b.shape[1], 1
    rest = (0, 0) * (b.dim() - 2)
    while shift < length:
        b_prev = F.pad(b, (*rest, shift, 0))[:, :length]
        a_prev = F.pad(a, (*rest, shift, 0), value=1.0)[:, :length]
        b = a * b_prev + b
        a = a * a_prev
        shift *= 2
    return b


def doubling_by_cat(a: Tensor, b: Tensor) -> Tensor:
    """The same, with cat of ones and zeros, rounds counted by log2."""
    for k in range(math.ceil(math.log2(b.size(1)))):
        d = 2**k
        zeros, ones = torch.zeros_like(b[:, :d]), torch.ones_like(a[:, :d])
        b = b + torch.cat((zeros, b[:, :-d]), 1) * a
        a = torch.cat((ones, a[:, :-d]), 1) * a
    return b


def doubling_in_place(a: Tensor, b: Tensor) -> Tensor:
    """The same, written into slices; the first elements are already right."""
    a, b = a.clone(), b.clone()
    step = 1
    while step < b.shape[1]:
        new_b = b[:, step:] + a[:, step:].clone() * b[:, :-step].clone()
        new_a = a[:, step:].clone() * a[:, :-step].clone()
        b[:, step:] = new_b
        a[:, step:] = new_a
        step = step * 2
    return b


def doubling_keeps_head(a: Tensor, b: Tensor) -> Tensor:
    """The same with time last; the finished head and the new tail are joined."""
    a, b = a.transpose(1, -1), b.transpose(1, -1)
    n = 1
    while n < b.shape[-1]:
        tail = torch.addcmul(b[..., n:], a[..., n:], b[..., :-n])
        b = torch.cat([b[..., :n], tail], dim=-1)
        a = torch.cat([a[..., :n], a[..., n:] * a[..., :-n]], dim=-1)
        n += n
    return b.transpose(1, -1)


def odd_even(a: Tensor, b: Tensor) -> Tensor:
    """Recursive: scan pairs, then fill in the even positions; any length."""
    length = b.shape[1]
    if length == 1:
        return b
    a_even, a_odd = a[:, 0 : length - 1 : 2], a[:, 1::2]
    b_even, b_odd = b[:, 0 : length - 1 : 2], b[:, 1::2]
    odd = odd_even(a_even * a_odd, a_odd * b_even + b_odd)
    rest = b[:, 2::2] + a[:, 2::2] * odd[:, : b[:, 2::2].shape[1]]
    even = torch.cat([b[:, :1], rest], dim=1)
    if even.shape[1] == odd.shape[1]:
        return torch.stack([even, odd], dim=2).flatten(1, 2)
    woven = torch.stack([even[:, :-1], odd], dim=2).flatten(1, 2)
    return torch.cat([woven, even[:, -1:]], dim=1)


def odd_even_reshaped(a: Tensor, b: Tensor) -> Tensor:
    """Recursive with pairs in a dim of their own, padded to even, the scan shifted by one."""
    length = b.shape[1]
    if length == 1:
        return b
    pad = [0, 0] * (b.dim() - 2) + [0, length % 2]
    a0, a1 = F.pad(a, pad).unflatten(1, (-1, 2)).unbind(2)
    b0, b1 = F.pad(b, pad).unflatten(1, (-1, 2)).unbind(2)
    h1 = odd_even_reshaped(a1 * a0, b1 + a1 * b0)
    before = torch.cat([torch.zeros_like(h1[:, :1]), h1[:, :-1]], dim=1)
    h0 = a0 * before + b0
    return torch.stack((h0, h1), dim=2).reshape(b.shape[0], -1, *b.shape[2:])[:, :length]


def divide_and_conquer(a: Tensor, b: Tensor) -> Tensor:
    """Scans both halves; the last state of the first flows into the second."""

    def run(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        if b.shape[1] == 1:
            return a, b
        middle = b.shape[1] // 2
        p1, h1 = run(a[:, :middle], b[:, :middle])
        p2, h2 = run(a[:, middle:], b[:, middle:])
        carried = h2 + p2 * h1[:, -1:]
        return torch.cat([p1, p2 * p1[:, -1:]], 1), torch.cat([h1, carried], 1)

    return run(a, b)[1]


Tree = Callable[[Tensor, Tensor], Tensor]


class Selective:
    """The scan of an S6 block by a tree; ``einsum`` chooses one of two ways around it."""

    def __init__(self, tree: Tree, einsum: bool) -> None:
        self.tree, self.einsum = tree, einsum

    def __call__(self, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        """x, dt, A, B, C -> y, shapes as in S6."""
        if self.einsum:
            hs = self.tree(
                torch.einsum("bld,dn->bldn", dt, A).exp(),
                torch.einsum("bld,bln->bldn", dt * x, B),
            )
            return torch.einsum("bldn,bln->bld", hs, C)
        deltaA = torch.exp(dt.unsqueeze(-1) * A)
        deltaB = dt.unsqueeze(-1) * B.unsqueeze(2)
        hs = self.tree(deltaA, deltaB * x.unsqueeze(-1))
        return (hs @ C.unsqueeze(-1)).squeeze(3)


def _selective(tree: Tree, einsum: bool = False) -> Spelling:
    make = seeded(S6, Selective(tree, einsum))
    name = f"{tree.__name__}_selective"
    return Spelling(name, make, tokens(6), "selective_scan", reference=s6_by_op)


def _gated(tree: Tree) -> Spelling:
    make = seeded(GatedRNN, tree)
    name = f"{tree.__name__}_gated"
    return Spelling(name, make, tokens(6), "linear_recurrence", reference=gated_by_op)


SPELLINGS = [
    _selective(associative_tuples),
    _selective(associative_last_dim, einsum=True),
    _selective(strided_sweeps),
    _selective(pair_scan),
    _selective(doubling_by_pad),
    _selective(doubling_in_place, einsum=True),
    _selective(odd_even),
    _selective(divide_and_conquer, einsum=True),
    _gated(associative_dicts),
    _gated(associative_with_start),
    _gated(strided_sweeps),
    _gated(doubling_by_cat),
    _gated(doubling_keeps_head),
    _gated(odd_even),
    _gated(odd_even_reshaped),
]
