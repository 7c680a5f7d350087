"""Causal depthwise convolutions, however they are written, become ``causal_conv1d``.

    y[t, c] = act(bias[c] + sum_j w[c, j] x[t - j, c])

A library convolution between pads and slices, shifted copies that are multiplied and added,
windows, a state joined in front, one step of decoding: all are followed as sums of shifted tokens
(``effpass.patterns.taps.shifted``), which says exactly which tokens each output reads. What reads a
token of the future, or has no such form, is left alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

import effpass.patterns.taps.shift_moves  # noqa: F401  registers its rules
from effpass.axes.labels import opname
from effpass.axes.relation import arguments
from effpass.graph.region import constant
from effpass.patterns.proposal import Idiom, Missed, Proposal
from effpass.patterns.taps.shift_follow import Follower, sizes_behind
from effpass.patterns.taps.shift_sums import geometry
from effpass.patterns.taps.shifted import ONE, Value
from effpass.patterns.taps.tap_build import TIME, Plan
from effpass.patterns.taps.tap_leaves import leaves
from effpass.patterns.taps.taps import LENGTH, TOKENWISE, Leaf, Taps, Unlike, read, settled

CONVOLUTIONS = ("conv1d", "convolution")
SHIFTS = ("pad", "constant_pad_nd", "roll", "unfold", "cat", "slice_scatter", "select_scatter")


MOST_USES = 8


def find(graph: Graph) -> Iterable[Node]:
    """Convolutions over one dim, then whatever shifts tokens, once for each of its uses."""
    nodes = [n for n in graph.nodes if n.op == "call_function"]
    yield from (n for n in nodes if opname(n) in CONVOLUTIONS)
    for node in nodes:
        if opname(node) in SHIFTS:
            yield from [node] * min(len(node.users), MOST_USES)


def check(node: Node) -> Proposal | None:
    """The convolution through ``node``, or why there is none."""
    plain = opname(node) in CONVOLUTIONS
    if plain and not _depthwise(node):
        return None
    miss: Missed | None = None
    for leaf in leaves(node):
        if not _float(leaf.x):
            continue
        attempt = _Attempt(node, leaf)
        found = attempt.best()
        if found is not None:
            return found
        if attempt.one_token:
            return None
        if attempt.reason and (plain or leaf.state is None):
            miss = Missed(attempt.reason, node if plain else attempt.at)
    if miss is not None:
        raise miss
    return None


def _float(node: Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


def _depthwise(node: Node) -> bool:
    """Raises Missed for a convolution that is nearly one of ours."""
    g = geometry(node)
    if g is None or not isinstance(g.groups, int) or g.groups == 1:
        return False
    channels, width = g.source.meta["val"].shape[-2], g.weight.meta["val"].shape[2]
    outputs = g.weight.meta["val"].shape[0]
    if width == 1:
        return False
    if g.groups != channels:
        raise Missed(f"{g.groups} groups for {channels} channels: not depthwise", node)
    if outputs != channels:
        raise Missed(f"{outputs // channels} outputs for each channel, not one", node)
    if g.stride != 1:
        raise Missed(f"stride {g.stride}", node)
    if g.dilation != 1:
        raise Missed(f"dilation {g.dilation}", node)
    _zero_padded(g.source)
    return True


def _zero_padded(source: Node) -> None:
    if opname(source) not in ("pad", "constant_pad_nd"):
        return
    given = arguments(source)
    if given.get("mode", "constant") != "constant":
        raise Missed(f"{given['mode']} padding, not zeros", source)
    if given["value"] not in (None, 0, 0.0):
        raise Missed(f"padded with {given['value']}, not with zeros", source)


@dataclass(frozen=True)
class _Found:
    """A node that is the whole convolution, or nearly."""

    node: Node
    taps: Taps

    @property
    def score(self) -> tuple[int, bool, bool]:
        """The more of the convolution, the better."""
        return len(self.taps.lags), bool(self.taps.bias), self.taps.activation is not None


class _Attempt:
    """Takes one leaf, follows its tokens, and reads what comes out behind the anchor."""

    def __init__(self, anchor: Node, leaf: Leaf) -> None:
        self.anchor, self.leaf = anchor, leaf
        self.reason, self.at = "", anchor
        self.sizes = leaf.sizes()
        sizes = next(self.sizes)
        self.start = leaf.values(sizes)
        self.follower = Follower(self.start, sizes)
        self.one_token = _tokens(self.start[leaf.x]) == 1

    def best(self) -> Proposal | None:
        """The proposal for the whole convolution; None, perhaps with a reason."""
        self.follower.follow(self.start)
        found = list(self._read())
        tried = list(self.sizes)
        for each in sorted(found, key=lambda f: f.score, reverse=True):
            region = self._region(each.node)
            if _shows(each, found, region) or not self._stays(each, tried):
                continue
            proposal = self._proposal(each, region)
            if proposal is not None:
                return proposal
        return None

    def _read(self) -> Iterator[_Found]:
        """What the nodes behind the anchor are, in the graph's order."""
        behind = {self.anchor}
        for node, value in self.follower.env.items():
            if node is not self.anchor and behind.isdisjoint(node.all_input_nodes):
                continue
            if opname(node) in CONVOLUTIONS and node is not self.anchor:
                continue
            behind.add(node)
            if not isinstance(value, Value) or node in self.start or not _float(node):
                continue
            try:
                taps = read(value, self.start, self.leaf)
                yield _Found(node, settled(taps, self.leaf, self.start[self.leaf.x].shape))
            except Unlike as reason:
                self._note(str(reason), node, value)

    def _note(self, reason: str, node: Node, value: Value) -> None:
        """Keeps the reason that says most: the last one that is not about the length."""
        if not reason or not self._nearly(reason, value):
            return
        if not self.reason or LENGTH in self.reason or LENGTH not in reason:
            self.reason, self.at = reason, node

    def _nearly(self, reason: str, value: Value) -> bool:
        """Whether users should hear of it: two tokens are weighed, by what is not made of them."""
        weights = [t.coefficient for t in value.terms if bool((t.tokens < ONE).any())]
        weights = [weight for weight in weights if weight.dims]
        if len(weights) < 2:
            return False
        if opname(self.anchor) in (*CONVOLUTIONS, "unfold"):
            return True
        own = [d for d, role in enumerate(value.roles) if role is not None]
        if len(own) > 1 and any(own[0] in weight.dims for weight in weights):
            return False
        return LENGTH not in reason and TOKENWISE not in reason

    def _stays(self, found: _Found, tried: Sequence[dict[Any, int]]) -> bool:
        """Whether other sizes give the same taps."""
        for sizes in tried:
            start = self.leaf.values(sizes)
            follower = Follower(start, sizes)
            follower.follow(start)
            value = follower.env.get(found.node)
            if not isinstance(value, Value):
                return False
            try:
                taps = read(value, start, self.leaf)
            except Unlike:
                return False
            if taps != found.taps.within(sum(_tokens(v) for v in start.values())):
                return False
        return True

    def _region(self, output: Node) -> dict[Node, None]:
        """The nodes from the leaf to ``output`` that have been followed."""
        found: dict[Node, None] = {}
        pending = [output]
        while pending:
            node = pending.pop()
            if node in found or node in self.start or node not in self.follower.env:
                continue
            found[node] = None
            pending += node.all_input_nodes
        return found

    def _proposal(self, found: _Found, region: dict[Node, None]) -> Proposal | None:
        """None where it also reads what only unreachable tokens would meet: that has a gradient."""
        zeros = self.follower.zeros
        inputs = dict.fromkeys(self.start)
        for node in region:
            outside = [n for n in node.all_input_nodes if n not in region]
            inputs |= dict.fromkeys(n for each in outside for n in self._needed(each))
        factors = dict.fromkeys(f.node for c in found.taps.all for f in c.factors)
        inputs |= factors  # constants too
        used = {*factors, *zeros, *self.start}
        if any(_float(node) and node not in used for node in inputs):
            return None
        value = self.follower.env[found.node]
        roles = _roles(value, self.leaf)
        dtype = found.node.meta["val"].dtype
        plan = Plan(self.leaf, found.taps, tuple(inputs), roles, dtype)
        return Proposal(
            op="causal_conv1d",
            inputs=plan.inputs,
            outputs=(found.node,),
            build=plan,
            draw={node: torch.zeros_like for node in inputs if node in zeros},
            tokens={} if self.leaf.time is None else {self.leaf.x: self.leaf.time},
            output_tokens=(roles.index(TIME),) if TIME in roles else (),
        )

    def _needed(self, operand: Node) -> list[Node]:
        """What must be given for an operand: itself, or the sizes that it is made of."""
        if operand in self.follower.zeros or self.follower.constant(operand) is None:
            return [operand] if constant(operand) is None else []
        return sizes_behind(operand)


def _shows(found: _Found, every: Sequence[_Found], region: dict[Node, None]) -> bool:
    """Whether the convolution before its bias or activation is used elsewhere too."""
    inside = [f for f in every if f.node in region and f.node is not found.node]
    whole = [f for f in inside if len(f.taps.lags) == len(found.taps.lags)]
    return any(user not in region for f in whole for user in f.node.users)


def _tokens(value: Value) -> int:
    """How many tokens a source has."""
    sizes = [n for n, role in zip(value.shape, value.roles, strict=True) if role is None]
    return sizes[0] if sizes else 1


def _roles(value: Value, leaf: Leaf) -> tuple[int | None, ...]:
    """The dims of the output as dims of the leaf, its tokens, or new ones."""
    roles: list[int | None] = list(value.roles)
    opened = [d for d, role in enumerate(roles) if role is None]
    long = [d for d in opened if value.shape[d] != 1]
    if long:
        roles[long[0]] = TIME
    elif opened and leaf.time is not None:
        roles[opened[0]] = TIME
    return tuple(roles)


IDIOM = Idiom("causal convolution", find, check)
