"""Shifted copies: which tokens of a tensor x every element of another tensor is made of.

The domain in which convolutions written by hand are followed. A value is a sum of terms, each a
coefficient times one token of x, so shifts, windows, stacks and sums keep their meaning however
they are written, and what is not such a sum has no value. Only whole tokens are followed: batch
and channels stay where they are in x, element by element.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.fx import Node

ZERO = -(1 << 40)  # in place of a token: the element is 0
ONE = 1 << 40  # in place of a token: the element is the coefficient alone
MOST_TERMS = 256
MOST_ADDED = 64  # elements of a dim that is summed


class Lost(Exception):
    """The operation leads out of the domain."""


@dataclass(frozen=True)
class Pick:
    """One dim of a factor's tensor: entry ``start``, or those along ``dim`` of the value."""

    dim: int | None
    start: int = 0
    step: int = 1


@dataclass(frozen=True)
class Factor:
    """A tensor of the graph that multiplies; one Pick for each of its dims."""

    node: Node
    picks: tuple[Pick, ...]


@dataclass(frozen=True)
class Coefficient:
    """A number times some factors."""

    scale: float = 1.0
    factors: tuple[Factor, ...] = ()

    def times(self, other: Coefficient) -> Coefficient:
        """The product."""
        factors = sorted((*self.factors, *other.factors), key=lambda f: (f.node.name, str(f.picks)))
        return Coefficient(self.scale * other.scale, tuple(factors))

    def repicked(self, pick: Callable[[Pick], Pick]) -> Coefficient:
        """The same factors, read along other dims."""
        return Coefficient(
            self.scale,
            tuple(Factor(f.node, tuple(pick(p) for p in f.picks)) for f in self.factors),
        )

    @property
    def dims(self) -> set[int]:
        """The dims of the value along which it changes."""
        return {p.dim for f in self.factors for p in f.picks if p.dim is not None}


@dataclass(frozen=True)
class Term:
    """``tokens`` (of the value's rank, broadcast) says which token of x, ZERO or ONE."""

    tokens: Tensor
    coefficient: Coefficient = Coefficient()


@dataclass(frozen=True)
class Value:
    """A tensor of ``shape``: the sum of its terms, under an activation.

    ``roles`` gives for each dim the dim of x that it is, or None: a dim of tokens (or of copies, or
    windows), over which the terms' tokens and coefficients may change.
    """

    shape: tuple[int, ...]
    roles: tuple[int | None, ...]
    terms: tuple[Term, ...]
    activation: str | None = None

    def __post_init__(self) -> None:
        if len(self.terms) > MOST_TERMS:
            raise Lost

    @property
    def rank(self) -> int:
        """The number of dims."""
        return len(self.shape)

    def dim(self, dim: int) -> int:
        """A dim counted from the front."""
        return dim % self.rank

    def token_dim(self, dim: int) -> int:
        """The same; Lost where it is a dim of x."""
        dim = self.dim(dim)
        if self.roles[dim] is not None:
            raise Lost
        return dim

    def moved(self, order: Sequence[int | None]) -> Value:
        """Dims in another order; None is a new one of size 1, one left out must be of size 1."""
        if any(self.shape[d] != 1 for d in range(self.rank) if d not in order):
            raise Lost
        place = {old: new for new, old in enumerate(order) if old is not None}

        def tokens(t: Tensor) -> Tensor:
            kept = t.permute([*place, *(d for d in range(self.rank) if d not in place)])
            shape = iter(kept.shape[: len(place)])
            return kept.reshape([1 if d is None else next(shape) for d in order])

        def pick(p: Pick) -> Pick:
            return p if p.dim is None else replace(p, dim=place[p.dim])

        return Value(
            tuple(1 if d is None else self.shape[d] for d in order),
            tuple(None if d is None else self.roles[d] for d in order),
            tuple(Term(tokens(t.tokens), t.coefficient.repicked(pick)) for t in self.terms),
            self.activation,
        )

    def raised_to(self, rank: int) -> Value:
        """With dims of size 1 in front, up to ``rank``."""
        missing: list[int | None] = [None] * (rank - self.rank)
        return self.moved([*missing, *range(self.rank)]) if missing else self

    def narrowed(self, dim: int, start: int, length: int, step: int = 1) -> Value:
        """``length`` entries of a dim of tokens; a negative step runs backwards."""
        entries = torch.arange(length) * step + start

        def tokens(t: Tensor) -> Tensor:
            return t if t.shape[dim] == 1 else t.index_select(dim, entries)

        def pick(p: Pick) -> Pick:
            if p.dim != dim:
                return p
            return Pick(None if length == 1 else dim, p.start + start * p.step, p.step * step)

        return self._with(dim, length, tokens, pick)

    def filled(self, dim: int) -> Value:
        """With tokens written out along ``dim``; Lost where a coefficient changes along it."""
        if any(dim in t.coefficient.dims for t in self.terms):
            raise Lost

        def tokens(t: Tensor) -> Tensor:
            return t.expand(*t.shape[:dim], self.shape[dim], *t.shape[dim + 1 :])

        return self._with(dim, self.shape[dim], tokens, lambda p: p)

    def mapped(self, dim: int, function: Callable[[Tensor], Tensor]) -> Value:
        """``function`` moves the tokens along a dim of them."""
        filled = self.filled(dim)
        size = function(torch.empty(_set((1,) * self.rank, dim, self.shape[dim]))).shape[dim]
        return filled._with(dim, size, function, lambda p: p)

    def grown(self, dim: int, size: int) -> Value:
        """A dim of size 1 repeated."""
        if self.shape[dim] == size:
            return self
        if self.shape[dim] != 1 or self.roles[dim] is not None:
            raise Lost
        return replace(self, shape=_set(self.shape, dim, size))

    def times(self, coefficient: Coefficient) -> Value:
        """The product; the coefficient's picks are along this value's dims."""
        self.linear()
        terms = tuple(replace(t, coefficient=t.coefficient.times(coefficient)) for t in self.terms)
        return replace(self, terms=terms)

    def masked(self, mask: Tensor) -> Value:
        """Zero where the mask, which broadcasts over the value, is False."""
        self.linear()
        terms = tuple(replace(t, tokens=t.tokens.where(mask, ZERO)) for t in self.terms)
        return replace(self, terms=terms)

    def linear(self) -> Value:
        """Itself; Lost behind an activation."""
        if self.activation is not None:
            raise Lost
        return self

    def same(self, other: Value) -> bool:
        """Whether both are the same sum, activations aside."""
        if self.roles != other.roles or len(self.terms) != len(other.terms):
            return False
        return all(
            a.coefficient == b.coefficient and torch.equal(a.tokens, b.tokens)
            for a, b in zip(self.terms, other.terms, strict=True)
        )

    def _with(
        self, dim: int, size: int, tokens: Callable[[Tensor], Tensor], pick: Callable[[Pick], Pick]
    ) -> Value:
        terms = (Term(tokens(t.tokens), t.coefficient.repicked(pick)) for t in self.terms)
        return replace(self, shape=_set(self.shape, dim, size), terms=tuple(terms))


def zeros(shape: tuple[int, ...]) -> Value:
    """No terms at all; every dim may stand for any dim of x."""
    return Value(shape, (None,) * len(shape), ())


def constants(rank: int, coefficient: Coefficient) -> Term:
    """A term without a token: the coefficient itself."""
    return Term(torch.full((1,) * rank, ONE), coefficient)


def added(a: Value, b: Value) -> Value:
    """The sum, broadcast."""
    rank = max(a.rank, b.rank)
    a, b = a.linear().raised_to(rank), b.linear().raised_to(rank)
    if not a.terms:
        a, b = b, a
    if b.terms and a.roles != b.roles:
        raise Lost
    for dim in range(rank):
        x, y = a.shape[dim], b.shape[dim]
        if x == 1 < y:
            a = a.grown(dim, y)
        elif y not in (1, x):
            raise Lost
        elif b.terms:
            b = b.grown(dim, x)
    return replace(a, terms=(*a.terms, *b.terms))


def summed(value: Value, dim: int) -> Value:
    """The sum over a dim of tokens, which stays as one of size 1."""
    dim, size = value.linear().token_dim(dim), value.shape[value.dim(dim)]
    if size > MOST_ADDED or size * len(value.terms) > 16 * MOST_TERMS:
        raise Lost
    terms = [t for i in range(size) for t in value.narrowed(dim, i, 1).terms]
    alive: list[Term] = []
    for term in terms:
        tokens = term.tokens.select(dim, 0).unsqueeze(dim)
        if bool((tokens != ZERO).any()):
            alive.append(replace(term, tokens=tokens))
    return Value(_set(value.shape, dim, 1), value.roles, tuple(alive))


def joined(parts: Sequence[Value], dim: int) -> Value:
    """The parts end to end along a dim of tokens; parts without terms are zeros."""
    first = next((p for p in parts if p.terms), None)
    if first is None:
        raise Lost
    dim = first.linear().token_dim(dim)
    size, start = sum(p.shape[dim] for p in parts), 0
    groups: dict[Coefficient, list[Tensor]] = {}
    for part in parts:
        if part.terms and (part.linear().roles != first.roles):
            raise Lost
        if _set(part.shape, dim, 1) != _set(first.shape, dim, 1):
            raise Lost
        for term in part.filled(dim).terms:
            _place(groups.setdefault(term.coefficient, []), term.tokens, dim, start, size)
        start += part.shape[dim]
    terms = tuple(Term(t, c) for c, tokens in groups.items() for t in tokens)
    return Value(_set(first.shape, dim, size), first.roles, terms)


def _place(group: list[Tensor], tokens: Tensor, dim: int, start: int, size: int) -> None:
    """Writes into the first tensor of the group that is ZERO there."""
    end = start + tokens.shape[dim]
    for whole in group:
        span = whole.narrow(dim, start, end - start)
        if span.shape == tokens.shape and bool((span == ZERO).all()):
            span.copy_(tokens)
            return
    whole = torch.full(_set(tuple(tokens.shape), dim, size), ZERO)
    whole.narrow(dim, start, end - start).copy_(tokens)
    group.append(whole)


def _set(shape: tuple[int, ...], dim: int, size: int) -> tuple[int, ...]:
    return (*shape[:dim], size, *shape[dim + 1 :])
