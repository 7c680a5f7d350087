"""Taps: reads a value of shifted copies as a causal convolution, or says what it is instead."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import sympy
import torch
from torch import Tensor
from torch.fx import Node

from effpass.patterns.taps.shift_follow import Follower
from effpass.patterns.taps.shifted import ONE, ZERO, Coefficient, Pick, Term, Value

WIDEST = 64
LENGTH = "its output has"
TOKENWISE = "its taps depend on the token"
# token counts (and other symbolic sizes) at which a graph of symbolic sizes must mean the same
TRIED = (1, 2, 3, 4, 5, 6, 8, 16, 33, 67, 130)


class Unlike(Exception):
    """Not a causal convolution; the text, if any, says why in words for users."""


@dataclass(frozen=True)
class Leaf:
    """The tensor whose tokens are convolved, and perhaps the tokens before its first.

    ``time`` is its dim of tokens, None where it is one token. ``roles`` gives for each dim of
    ``state`` the dim of ``x``, None for its dim of tokens.
    """

    x: Node
    time: int | None
    state: Node | None = None
    roles: tuple[int | None, ...] = ()

    def values(self, sizes: Mapping[Any, int]) -> dict[Node, Value]:
        """Where following starts."""
        follower = Follower({}, sizes)
        shape = follower.shape(self.x)
        roles = tuple(None if d == self.time else d for d in range(len(shape)))
        found = {self.x: _source(shape, roles, self.time, 0)}
        if self.state is not None:
            before = follower.shape(self.state)
            dim = self.roles.index(None)
            found[self.state] = _source(before, self.roles, dim, -before[dim])
        return found

    def sizes(self) -> Iterator[dict[Any, int]]:
        """The captured sizes, then others where sizes are symbols."""
        nodes = [n for n in (self.x, self.state) if n is not None]
        given = [s for n in nodes for s in n.meta["val"].shape if isinstance(s, torch.SymInt)]
        symbols = {s: size for size in given for s in size.node.expr.free_symbols}
        order = sorted(symbols, key=str)
        if not order:
            yield {}
            return
        environment = symbols[order[0]].node.shape_env
        hints = getattr(environment, "backed_var_to_val", None) or environment.var_to_val
        yield {s: _integer(hints[s]) for s in order}
        for tried in TRIED:
            lower = {s: int(environment.var_to_range[s].lower) for s in order}
            yield {s: _integer(max(lower[s], tried + 3 * i)) for i, s in enumerate(order)}


@dataclass
class Taps:
    """``lags[j]`` multiplies the token j back; picks are along dims of the leaf."""

    lags: dict[int, list[Coefficient]] = field(default_factory=dict)
    bias: list[Coefficient] = field(default_factory=list)
    activation: str | None = None

    @property
    def width(self) -> int:
        """The number of tokens that are seen, gaps counted."""
        return max(self.lags, default=-1) + 1

    @property
    def channels(self) -> set[int]:
        """The dims of the leaf along which taps or bias change."""
        return {dim for c in self.all for dim in c.dims}

    @property
    def all(self) -> list[Coefficient]:
        """Those of all taps and of the bias."""
        return [c for each in (*self.lags.values(), self.bias) for c in each]

    def within(self, tokens: int) -> Taps:
        """Those that reach at most ``tokens`` tokens back."""
        kept = {lag: each for lag, each in self.lags.items() if lag < tokens}
        return replace(self, lags=kept)


def read(value: Value, start: Mapping[Node, Value], leaf: Leaf) -> Taps:
    """The taps of a value that is one sum over earlier tokens of the leaf. Raises Unlike."""
    source = start[leaf.x]
    count = 1 if leaf.time is None else source.shape[leaf.time]
    before = 0
    if leaf.state is not None:
        before = start[leaf.state].shape[leaf.roles.index(None)]
    span = _spread(value, source)
    if span != count:
        raise Unlike(f"{LENGTH} {span} tokens, its input {count}")
    if value.activation == "sigmoid":
        raise Unlike
    taps, reasons = Taps(activation=value.activation), {}
    for term in value.terms:
        coefficient = _along_leaf(term.coefficient, value)
        tokens = _row(term, value)
        try:
            _add(taps, tokens, before, coefficient)
        except _Future as future:
            reasons[future.tokens] = future
    if reasons:
        tokens = max(reasons)
        raise Unlike(f"it sees {tokens} token{'s' * (tokens > 1)} of the future")
    return taps


def settled(taps: Taps, leaf: Leaf, shape: tuple[int, ...]) -> Taps:
    """The taps, if they are those of a short causal depthwise convolution. Raises Unlike."""
    own = {d for d, n in enumerate(shape) if d != leaf.time and n != 1}
    weighted = {d for each in taps.lags.values() for c in each for d in c.dims}
    if len(taps.lags) < 2 or not weighted:
        raise Unlike
    if len(own) > 1 and min(own) in taps.channels:
        raise Unlike("its taps differ from row to row")
    if 0 not in taps.lags:
        near, far = min(taps.lags), max(taps.lags)
        raise Unlike(f"a token does not see itself, only those {near} to {far} before it")
    if len(taps.lags) != taps.width:
        lags = ", ".join(map(str, sorted(taps.lags)))
        raise Unlike(f"its taps lie apart: they are {lags} tokens back")
    if taps.width > WIDEST:
        raise Unlike(f"it is {taps.width} taps wide, at most {WIDEST} are taken")
    return taps


class _Future(Exception):
    def __init__(self, tokens: int) -> None:
        super().__init__()
        self.tokens = tokens


def _add(taps: Taps, tokens: Tensor, before: int, coefficient: Coefficient) -> None:
    if bool((tokens == ONE).all()):
        taps.bias.append(coefficient)
        return
    alive = tokens != ZERO
    if not bool(alive.any()):
        return
    if bool((tokens == ONE).any()):
        raise Unlike("its bias is not added to every token")
    position = torch.arange(len(tokens))
    lags = (position - tokens)[alive]
    lag = int(lags[-1])
    if bool((lags != lag).any()):
        round_the_end = bool((lags < 0).any() and (lags > 0).any())
        wrapped = "its first tokens read the last ones, where zeros belong"
        raise Unlike(wrapped if round_the_end else "its taps reach differently far at every token")
    if lag < 0:
        raise _Future(-lag)
    if not torch.equal(alive, position - lag >= -before):
        raise Unlike("some of the tokens that it sees are set to zero")
    taps.lags.setdefault(lag, []).append(coefficient)


def _spread(value: Value, source: Value) -> int:
    """The number of tokens; Unlike where dims are open that are not those of the leaf."""
    roles = [r for r in value.roles if r is not None]
    wanted = {d for d, n in enumerate(source.shape) if source.roles[d] is not None and n != 1}
    if len(set(roles)) != len(roles) or not wanted <= set(roles):
        raise Unlike
    open_dims = [n for n, role in zip(value.shape, value.roles, strict=True) if role is None]
    open_dims = [n for n in open_dims if n != 1]
    if len(open_dims) > 1:
        raise Unlike
    return open_dims[0] if open_dims else 1


def _along_leaf(coefficient: Coefficient, value: Value) -> Coefficient:
    def pick(p: Pick) -> Pick:
        if p.dim is None:
            return p
        role = value.roles[p.dim]
        if role is None:
            raise Unlike(TOKENWISE)
        return replace(p, dim=role)

    return coefficient.repicked(pick)


def _row(term: Term, value: Value) -> Tensor:
    """The tokens of a term along the one dim that is open."""
    shape = [n if role is None else 1 for n, role in zip(value.shape, value.roles, strict=True)]
    return term.tokens.expand(shape).flatten()


def _source(
    shape: tuple[int, ...], roles: tuple[int | None, ...], dim: int | None, first: int
) -> Value:
    count = 1 if dim is None else shape[dim]
    tokens = torch.arange(first, first + count)
    view = [count if d == dim else 1 for d in range(len(shape))]
    return Value(shape, roles, (Term(tokens.view(view)),))


def _integer(value: Any) -> Any:
    return sympy.Integer(int(value))
