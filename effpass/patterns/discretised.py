"""A linear recurrence whose coefficients are discretised and whose states are only read out.

    h[t] = exp(dt[t] A) h[t-1] + dt[t] x[t] B[t];   y[t] = sum_n C[t, n] h[t, n]

is a selective scan (Mamba: a decay a channel and state) or an SSD scan (Mamba-2: a decay a head);
neither needs the states in memory. However the factors are written: they are read from the normal
form of products (``algebra``), their roles from the dims they share. (Gu and Dao 2023, arXiv
2312.00752, equations 2 to 4; Dao and Gu 2024, arXiv 2405.21060.)
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from effpass.graph.region import constant
from effpass.patterns.products.algebra import (
    RULES,
    VIEWS,
    Dims,
    Factor,
    Label,
    Product,
    expand,
    fresh,
    resolved,
)
from effpass.patterns.products.arranger import Arranger
from effpass.patterns.proposal import Idiom, Proposal

aten = torch.ops.aten
UNCLAMPED = torch.finfo(torch.float32).min  # ssd_scan's default takes a negative dt for 0
CONTRACTIONS = frozenset(
    (
        *(aten.sum.dim_IntList, aten.einsum.default, aten.matmul.default),
        *(aten.bmm.default, aten.mm.default, aten.mv.default),
    )
)


def find(graph: Graph) -> Iterable[Node]:
    """Every linear recurrence."""
    return graph.find_nodes(op="call_function", target=torch.ops.effpass.linear_recurrence.default)


@dataclass(frozen=True)
class _Roles:
    """The factors of the recurrence by role, and labels: n state, t time, batch, channels."""

    x: list[Factor]
    dt: list[Factor]
    A: list[Factor]
    B: list[Factor]
    C: list[Factor]
    outer: list[Factor]
    coefficients: tuple[float, float, float]  # of A, B and C
    log: bool  # A is the logarithm of its factors
    n: Label
    t: Label
    batch: list[Label]
    channels: list[Label]

    def of(self, *factors: Iterable[Factor]) -> list[Label]:
        """The channel labels that these factors have."""
        labels = frozenset().union(*(f.labels for group in factors for f in group))
        return [label for label in self.channels if label in labels]


def check(node: Node) -> Proposal | None:
    """The scan around a recurrence; None where the states are used otherwise."""
    args: Any = (*node.args, None, None)
    a, b, start, packed = args[:4]
    users = {u.args[1]: u for u in node.users if u.target is operator.getitem}
    if packed is not None or 0 not in users or not isinstance(a, Node) or not isinstance(b, Node):
        return None
    y = _readout(users[0])
    if y is None:
        return None
    y_dims = fresh(y)
    roles, h_dims = _roles(a, b, users[0], y, y_dims)
    if roles is None:
        return None
    per_head = _per_head(roles)
    if per_head is None:
        return None
    factors = [f for g in (roles.x, roles.dt, roles.A, roles.B, roles.C, roles.outer) for f in g]
    nodes = list(
        dict.fromkeys([f.node for f in factors] + ([start] if isinstance(start, Node) else []))
    )
    outputs = [y] + [u for i, u in users.items() if i == 1 and u.users]
    scan = _Scan(roles, per_head, resolved(y_dims), resolved(h_dims), start, len(outputs) > 1, b, y)

    def build(*values: Tensor) -> list[Tensor]:
        return scan.build(dict(zip(nodes, values, strict=True)))

    op = "ssd_scan" if per_head else "selective_scan"
    return Proposal(op, tuple(nodes), tuple(outputs), build)


IDIOM = Idiom("discretised recurrence", find, check)


def _readout(h: Node) -> Node | None:
    """The one contraction through which the states are read, if there is no other use of them."""
    pending, found = [h], {}
    while pending:
        node = pending.pop()
        for user in node.users:
            if user.target in CONTRACTIONS:
                found[user] = None
            elif user.target in RULES and user.target is not aten.div.Tensor:
                pending.append(user)
            else:
                return None
    return _last_view(next(iter(found))) if len(found) == 1 else None


def _last_view(node: Node) -> Node:
    """The end of the views behind a node: what lays its dims out as the model wants them."""
    user = next(iter(node.users)) if len(node.users) == 1 else None
    while user is not None and user.target in VIEWS:
        node, user = user, next(iter(user.users)) if len(user.users) == 1 else None
    return node


def _roles(a: Node, b: Node, h: Node, y: Node, y_dims: Dims) -> tuple[_Roles | None, Dims]:
    read = expand(y, y_dims, stop={h}, rounding=True)
    own = [f for f in read.factors if f.node is h]
    if len(own) != 1:
        return None, ()
    add, decay = expand(b, own[0].dims), expand(a, own[0].dims)
    if add.summed or decay.summed or len(decay.factors) != 1 or decay.coefficient != 1.0:
        return None, ()
    base = decay.factors[0]
    log = base.node.target is not aten.exp.default
    exponent: Node = base.node if log else base.node.args[0]  # type: ignore[assignment]
    power = expand(exponent, base.dims, stop={base.node})
    for product in (read, add, power):  # later expansions may have split labels
        for factor in product.factors:
            factor.dims = resolved(factor.dims)
    h_dims = resolved(own[0].dims)
    summed = [label for s in read.summed for label in s.resolved()]
    known = [label for dim in h_dims for label in dim]
    if power.summed or len(h_dims[1]) != 1 or len(summed) != 1 or summed[0] not in known:
        return None, ()
    roles = _assigned(read, add, power, h, h_dims, summed[0], log)
    return (roles if roles is not None and _closed(roles, known) else None), h_dims


def _assigned(
    read: Product, add: Product, power: Product, h: Node, h_dims: Dims, n: Label, log: bool
) -> _Roles | None:
    t = h_dims[1][0]
    dt = [f for f in power.factors if t in f.labels]
    A = [f for f in power.factors if t not in f.labels]
    rest = _without(add.factors, dt)
    if rest is None or (log and (dt or not _positive(A[0].node))):
        return None
    others = [f for f in read.factors if f.node is not h]
    fixed = frozenset().union(*(f.labels for f in A))
    batch = [label for label in h_dims[0] if label not in fixed]
    return _Roles(
        x=[f for f in rest if n not in f.labels],
        dt=dt,
        A=A,
        B=[f for f in rest if n in f.labels],
        C=[f for f in others if n in f.labels],
        outer=[f for f in others if n not in f.labels],
        coefficients=(power.coefficient, add.coefficient, read.coefficient),
        log=log,
        n=n,
        t=t,
        batch=batch,
        channels=[label for d in h_dims for label in d if label not in (t, n, *batch)],
    )


def _positive(node: Node) -> bool:
    """A constant decay that has a logarithm."""
    value = constant(node)
    return value is not None and bool((value > 0).all())


def _without(factors: Sequence[Factor], taken: Sequence[Factor]) -> list[Factor] | None:
    """``factors`` less those ``taken``; None where one is not there."""
    rest = list(factors)
    for factor in taken:
        same = [f for f in rest if f.node is factor.node and f.dims == factor.dims]
        if not same:
            return None
        rest.remove(same[0])
    return rest


def _closed(roles: _Roles, known: Sequence[Label]) -> bool:
    """Every label is one of the state's or time, and the step sizes are the same in all states."""
    factors = (*roles.x, *roles.dt, *roles.A, *roles.B, *roles.C, *roles.outer)
    steps_over_states = any(roles.n in f.labels for f in roles.dt)
    inside = all(f.labels <= set(known) for f in factors)
    return inside and bool(roles.channels) and not steps_over_states


def _per_head(roles: _Roles) -> bool | None:
    """True for an SSD scan, False for a selective scan, None where neither fits."""
    a_has_n = any(roles.n in f.labels for f in roles.A)
    if not roles.of(roles.B, roles.C) and (a_has_n or not _head_dims(roles)[1]):
        return False
    return None if a_has_n or not _head_dims(roles)[1] else True


def _head_dims(roles: _Roles) -> tuple[list[Label], list[Label], list[Label]]:
    """Head labels (those of groups first), labels inside a head, group labels."""
    groups = roles.of(roles.B, roles.C)
    heads = roles.of(roles.dt, roles.A, roles.B, roles.C)
    heads = groups + [label for label in heads if label not in groups]
    return heads, [label for label in roles.channels if label not in heads], groups


@dataclass(frozen=True)
class _Scan:
    """The scan as a function of the values of its factors."""

    roles: _Roles
    per_head: bool
    y_dims: Dims
    h_dims: Dims
    start: Node | None
    final: bool
    add: Node
    y: Node

    def build(self, values: dict[Node, Tensor]) -> list[Tensor]:
        """y, and the last state where it is used."""
        roles, lay = self.roles, Arranger()
        wide = self.add.meta["val"].dtype  # the recurrence's own dtype, not that of its inputs
        values = {n: v.to(torch.promote_types(v.dtype, wide)) for n, v in values.items()}
        heads, inner, groups = _head_dims(roles) if self.per_head else (roles.channels, [], [])
        for factor in (*roles.x, *roles.dt, *roles.A, *roles.B, *roles.C):
            lay.atoms(values[factor.node], factor.dims)
        for label in (*roles.batch, roles.t, *roles.channels, roles.n):
            lay.sizes.setdefault(label, label.size)
        state = [roles.batch, heads, *([inner] if self.per_head else []), [roles.n]]
        order = [label for group in state for label in group]
        start = None
        if self.start is not None:
            dims = (self.h_dims[0], self.h_dims[2])
            start = _flat(lay.full(lay.lay(values[self.start], dims, order), order), state)
        given = self._operands(values, lay, heads, inner, groups)
        if self.per_head:
            clamps = (UNCLAMPED, None)
            y, last = torch.ops.effpass.ssd_scan(*given, None, None, None, False, *clamps, start)
        else:
            y, last = torch.ops.effpass.selective_scan(*given, None, None, None, False, start)
        y = self._read(y, lay, [*roles.batch, roles.t, *heads, *inner], values)
        if not self.final:
            return [y]
        last = last.reshape([lay.sizes[label] for label in order])
        return [y, lay.merged(last, order, (self.h_dims[0], self.h_dims[2]))]

    def _operands(
        self,
        values: dict[Node, Tensor],
        lay: Arranger,
        heads: list[Label],
        inner: list[Label],
        groups: list[Label],
    ) -> list[Tensor]:
        """x, dt, A, B, C as the op wants them."""
        roles = self.roles
        batch, t, n = roles.batch, [roles.t], [roles.n]
        like = next(values[f.node] for f in (*roles.x, *roles.B, *roles.dt))

        def role(factors: list[Factor], *split: list[Label], scale: float = 1.0) -> Tensor:
            order = [label for group in split for label in group]
            pairs = [(values[f.node], f.dims) for f in factors]
            made = lay.product(pairs, order, scale)
            if made is None:
                made = like.new_full([1] * len(order), scale)
            return _flat(lay.full(made, order), split)

        scale_A, scale_B, scale_C = roles.coefficients
        inside = [inner] if self.per_head else []
        x = role(roles.x, batch, t, heads, *inside)
        dt = role(roles.dt, batch, t, heads)
        A = role(roles.A, heads, *([] if self.per_head else [n]), scale=scale_A)
        grouped = [groups] if self.per_head else []
        B = role(roles.B, batch, t, *grouped, n, scale=scale_B)
        C = role(roles.C, batch, t, *grouped, n, scale=scale_C)
        return [x, dt, A.log() if roles.log else A, B, C]

    def _read(
        self, y: Tensor, lay: Arranger, order: list[Label], values: dict[Node, Tensor]
    ) -> Tensor:
        y = y.reshape([lay.sizes[label] for label in order])
        for factor in self.roles.outer:
            y = y * lay.lay(values[factor.node], factor.dims, order)
        wanted = self.y.meta["val"].dtype
        y = y if y.dtype is torch.float64 else y.to(wanted)
        return lay.merged(y, order, self.y_dims)


def _flat(value: Tensor, groups: Sequence[Sequence[Label]]) -> Tensor:
    """Merges each group of dims into one; an empty group is a dim of size 1."""
    for i, group in enumerate(groups):
        if not group:
            value = value.unsqueeze(i)
        elif len(group) > 1:
            value = value.flatten(i, i + len(group) - 1)
    return value
