"""Attention as one op: queries, keys and values in any layout, a mask, and the call they become.

Its fused kernels round gradients otherwise than eager does: scores get ``p (dO . v - dO . out)``,
whose terms cancel where a weight p is 1 but for their rounding, in eager exactly.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from effpass.axes.labels import Dim, Dims, Labels, expression, single
from effpass.patterns.blocks.layout import arrange, sizes
from effpass.patterns.proposal import Missed
from effpass.patterns.softmax.mask_facts import Mask, lost
from effpass.patterns.softmax.masks import Operand, Step, bias, operands
from effpass.patterns.softmax.scores import Multiplier

Env = Mapping[Node, Tensor]
# by which scores are made small, and gradients large in turn
TINY = {torch.float16: 2.0**-10, torch.float64: 2.0**-40}


@dataclass(frozen=True)
class Groups:
    """Which labels make up each dim of (batch, head, token, channel).

    ``key_head``: with grouped queries, the first labels of ``head``.
    """

    batch: Dim
    head: Dim
    key_head: Dim
    query: Dim
    key: Dim
    channel: Dim
    value_channel: Dim

    @property
    def scores(self) -> Dims:
        """Dims of scores and of what is added to them."""
        return (self.batch, self.head, self.query, self.key)

    def resolved(self, labels: Labels) -> Groups:
        """With the parts of labels that were cut since."""
        parts = {each.name: labels.resolve(getattr(self, each.name)) for each in fields(self)}
        return Groups(**parts)


@dataclass(frozen=True)
class Attention:
    """``weight * softmax(mask(scale * q k^T)) v``; with a ``cap``, of ``cap tanh(scale q k^T)``."""

    labels: Labels
    groups: Groups
    query: Operand
    key: Operand
    value: Operand
    multipliers: tuple[Multiplier, ...]
    scale: float
    cap: float | None
    mask: Mask
    weight: float
    out: Dims

    def operands(self) -> list[Operand]:
        """Every tensor that is read."""
        factors = [m.operand for m in self.multipliers]
        return [self.query, self.key, self.value, *factors, *operands(self.mask.steps)]

    def inputs(self) -> tuple[Node, ...]:
        """The nodes of the operands, each once."""
        return tuple(dict.fromkeys(operand.node for operand in self.operands()))

    def compute(self, *tensors: Tensor) -> tuple[Tensor]:
        """The result from the values of ``inputs``, in the dims of ``out``, contiguous."""
        env = dict(zip(self.inputs(), tensors, strict=False))
        known = sizes(
            self.labels, [(env[o.node], self.labels.resolved(o.dims)) for o in self.operands()]
        )
        q, k, v = self._vectors(env, known)
        added, filled = self._bias(self.mask.steps, env, known, q)
        empty = None if added is None else added == -torch.inf
        rests = None
        if self.mask.rests:
            assert added is not None
            rests, added = _rested(q, added, filled)
        added = None if added is None else self._fit(added, q)
        if rests is not None and self.mask.swallowed:
            out = self._swallowed(q, k, v, added, rests, env, known)
        else:
            q = q if rests is None else q.masked_fill(rests, 0.0)
            out = self._attend(q, k, v, added)
        if self.mask.empty:
            assert empty is not None
            out = out.masked_fill(empty.all(-1, keepdim=True), torch.nan)
        out = out if self.weight == 1 else out * self.weight
        dtype = env[self.value.node].dtype
        if q.dtype != dtype and not torch.is_autocast_enabled(q.device.type):
            out = out.to(dtype)  # values narrower than queries
        dims = (*self.groups.scores[:3], self.groups.value_channel)
        return (arrange(out, dims, self.labels.resolved(self.out), known).contiguous(),)

    def _vectors(self, env: Env, known: Mapping[int, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values as (batch, head, token, channel), in one dtype."""
        g = self.groups
        queries = (g.batch, g.head, g.query, g.channel)
        keys = (g.batch, g.key_head, g.key, g.channel)
        made = []
        for operand, groups in (
            (self.query, queries),
            (self.key, keys),
            (self.value, (*keys[:3], g.value_channel)),
        ):
            dims = self.labels.resolved(operand.dims)
            made.append(arrange(env[operand.node], dims, groups, known, "1111"))
        q, k, v = made
        for m in self.multipliers:
            held = self.labels.resolved(m.operand.dims)
            groups, x = (keys, k) if m.on_keys else (queries, q)
            factor = arrange(env[m.operand.node], held, groups, known)
            x = (x / factor if m.divides else x * factor).to(x.dtype)
            q, k = (q, x) if m.on_keys else (x, k)
        q = q if self.scale > 0 else q * self.scale
        wide = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
        q, k, v = (x if x.dtype == wide else x.to(wide) for x in (q, k, v))
        # the fused kernels read channels that lie side by side
        q, k, v = (x if single(x.stride(-1)) else x.contiguous() for x in (q, k, v))
        return q, k, v

    def _bias(
        self, steps: tuple[Step, ...], env: Env, known: Mapping[int, Any], like: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        def place(operand: Operand) -> Tensor:
            dims = self.labels.resolved(operand.dims)
            return arrange(env[operand.node], dims, self.groups.scores, known)

        return bias(steps, place, like)

    def _swallowed(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        added: Tensor | None,
        rests: Tensor,
        env: Env,
        known: Mapping[int, Any],
    ) -> Tensor:
        """Queries that rest keep their gradient, and give keys theirs: eager's dtypes lost scores
        beside a low bias, its gradients did not."""
        out = self._attend(torch.where(rests, q - q.detach(), q), k, v, added)
        rows, values = torch.where(rests, q.detach(), 0.0), v.detach()
        if self.mask.weighing is None:
            return out + self._by_row(rows, k, values, added, rests)
        total, _ = self._bias(self.mask.weighing, env, known, k)
        if total is None:
            weights = k.new_full((1, 1, 1, 1), 1.0) / k.shape[2]
        else:
            weights = total.softmax(-1).to(k.dtype).transpose(-1, -2)
        return out + self._by_keys(rows, k, values, out.detach(), weights)

    def _by_keys(
        self, rows: Tensor, k: Tensor, values: Tensor, out: Tensor, weights: Tensor
    ) -> Tensor:
        """0, with the gradient of keys where all rows weigh them alike (batch, head, key, 1).

        It is ``sum_j weights_j (rows . dk_j) (values_j - out)``, ``dk`` of value 0 and the gradient
        of ``k``.
        """
        k = (k - k.detach()) * (self.scale if self.scale > 0 else 1.0)
        if self.groups.head != self.groups.key_head:
            k, values = (x.repeat_interleave(rows.shape[1] // x.shape[1], 1) for x in (k, values))
        weighted = weights * k
        pairs = weighted.transpose(-1, -2) @ values
        return rows @ pairs - (rows * weighted.sum(-2, keepdim=True)).sum(-1, keepdim=True) * out

    def _by_row(
        self, rows: Tensor, k: Tensor, values: Tensor, added: Tensor | None, rests: Tensor
    ) -> Tensor:
        """0, with the gradient of keys, by a second attention in which scores are made small."""
        tiny = TINY.get(rows.dtype, 2.0**-20)
        out = self._attend(rows * tiny, k, values, None if added is None else added.detach())
        return torch.where(rests, (out - out.detach()) / tiny, 0.0)

    def _fit(self, added: Tensor, q: Tensor) -> Tensor:
        """The bias in a dtype that the op takes, its lowest numbers kept apart from -inf."""
        device = q.device.type
        dtype, cast = q.dtype, torch.is_autocast_enabled(device)
        if cast and dtype in (torch.float32, torch.float16, torch.bfloat16):
            dtype = torch.get_autocast_dtype(device)
        if added.dtype == dtype or (torch.promote_types(added.dtype, dtype) == dtype and not cast):
            return added.to(dtype)
        if added.dtype is torch.float32 and device == "cpu" and not cast:
            return added
        if not self.mask.plain:
            what = "autocast would round a bias" if cast else "the op would round a bias"
            raise Missed(f"{what} from {added.dtype} to {dtype}", self.query.node)
        lowest = added.clamp(min=torch.finfo(dtype).min)
        return torch.where(added == -torch.inf, added, lowest).to(dtype)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, added: Tensor | None) -> Tensor:
        grouped = self.groups.head != self.groups.key_head
        scale = self.scale if self.scale > 0 else 1.0
        if self.cap is None:
            return torch.nn.functional.scaled_dot_product_attention(
                q, k, v, added, 0.0, self.mask.causal, scale=scale, enable_gqa=grouped
            )
        if grouped:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        scores = self.cap * torch.tanh(scale * q @ k.transpose(-1, -2))
        if self.mask.causal:
            later = torch.ones_like(scores, dtype=torch.bool).triu(1)
            scores = scores.masked_fill(later, -torch.inf)
        scores = scores if added is None else scores + added
        return scores.softmax(-1) @ v


def _rested(q: Tensor, added: Tensor, filled: Tensor | None) -> tuple[Tensor, Tensor]:
    """Which rows have no visible key, and a bias whose highest number is 0 in those."""
    highest = added.detach().amax(-1, keepdim=True)
    rests = highest <= lost(torch.promote_types(q.dtype, added.dtype))
    if filled is not None:
        rests = rests | (filled | (added == -torch.inf)).all(-1, keepdim=True)
    shift = highest.masked_fill(~rests | (highest == -torch.inf), 0.0)
    return rests, added - shift


def group(
    labels: Labels,
    scores: Dims,
    keys: Dim,
    vectors: Sequence[Dims],
    biases: Sequence[Dims],
    spread: bool,
) -> Groups | None:
    """Sorts the labels of scores and of q, k, v into dims; None where they are not attention's.

    ``spread``: keys and values are repeated for grouped queries, the op is not told of them.
    """
    k_axis = labels.resolve(keys)
    shown = [x for x in labels.resolve(x for dim in scores for x in dim) if x not in k_axis]
    q, k, v = (labels.resolve(x for dim in dims for x in dim) for dims in vectors)
    masks = [set(labels.resolve(x for dim in dims for x in dim)) for dims in biases]
    queries = [x for x in shown if x in q and x not in k and x not in v]
    together = [x for x in queries if any(x in m and m & set(k_axis) for m in masks)]
    query = max(together or queries, key=lambda x: (_extent(labels, x), x), default=None)
    batch = [x for x in shown if x != query]
    alone = [x for x in batch if x not in k and x not in v]
    channel = tuple(x for x in k if x in q and x not in shown)
    value_channel = tuple(x for x in v if x not in shown and x not in k_axis)
    if {*q} - {*shown, *channel} or {*k} - {*shown, *k_axis, *channel}:
        return None
    if {*k} & {*shown} - {*q, *v}:
        return None  # scores mixed over heads, say: no axis of theirs is one of queries
    if spread:
        alone = []
    shared = [x for x in batch if x not in alone]
    return Groups(
        batch=tuple(shared[:-1]),
        head=(*shared[-1:], *alone),
        key_head=tuple(shared[-1:]),
        query=() if query is None else (query,),
        key=k_axis,
        channel=channel,
        value_channel=value_channel,
    )


@dataclass(frozen=True)
class Placing:
    """Brings constants into the dims of the scores; KeyError where a size changes."""

    labels: Labels
    groups: Groups

    def __call__(self, value: Tensor, dims: Dims) -> Tensor:
        """The constant as (batch, head, query, key)."""
        held = self.labels.resolved(dims)
        return arrange(value, held, self.groups.scores, sizes(self.labels, [(value, held)]))

    def key(self, dims: Dims) -> Hashable:
        """Equal where constants of these dims are arranged in the same way."""
        return self.labels.resolved(dims), self.groups.scores, tuple(self.labels.sizes)

    def varies(self, dims: Dims) -> bool:
        """Whether what has these dims differs from query to query."""
        held = self.labels.resolve(label for dim in dims for label in dim)
        return not set(self.groups.query).isdisjoint(held)


def _extent(labels: Labels, label: int) -> float:
    size = expression(labels.sizes[label])
    return float(size) if size.is_number else float("inf")
