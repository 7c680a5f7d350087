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

import torch
from torch import Tensor
from torch.fx import Graph, Node

from effpass.graph.region import constant
from effpass.patterns.algebra import RULES, VIEWS, Dims, Factor, Label, expand, fresh, resolved
from effpass.patterns.arranger import Arranger
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
    a, b, start, packed = (*node.args, None, None)[:4]
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
    nodes = list(dict.fromkeys([f.node for f in factors] + ([start] if isinstance(start, Node) else [])))
    outputs = [y] + [u for i, u in users.items() if i == 1 and u.users]
    scan = _Scan(roles, per_head, resolved(y_dims), resolved(h_dims), start, len(outputs) > 1)

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


def _roles(
    a: Node, b: Node, h: Node, y: Node, y_dims: Dims
) -> tuple[_Roles | None, Dims]:
    read = expand(y, y_dims, stop={h})
    own = [f for f in read.factors if f.node is h]
    if len(own) != 1:
        return None, ()
    h_dims = own[0].dims
    add = expand(b, h_dims)
    decay = expand(a, h_dims)
    if add.summed or decay.summed or len(decay.factors) != 1 or decay.coefficient != 1.0:
        return None, ()
    base = decay.factors[0]
    log = base.node.target is not aten.exp.default
    power = expand(base.node if log else base.node.args[0], base.dims, stop={base.node} if log else ())  # type: ignore[arg-type]
    if power.summed:
        return None, ()
    for product in (read, add, power):
        for factor in product.factors:
            factor.dims = resolved(factor.dims)
    h_dims = resolved(h_dims)
    summed = [label for s in read.summed for label in s.resolved()]
    h_labels = [label for dim in h_dims for label in dim]
    if len(h_dims[1]) != 1 or len(summed) != 1 or summed[0] not in h_labels:
        return None, ()
    t, n = h_dims[1][0], summed[0]
    dt = [f for f in power.factors if t in f.labels]
    A = [f for f in power.factors if t not in f.labels]
    if log and (dt or not _positive(base.node)):
        return None, ()
    rest = _without(add.factors, dt)
    if rest is None:
        return None, ()
    read_rest = [f for f in read.factors if f.node is not h]
    a_labels = frozenset().union(*(f.labels for f in A))
    batch = [label for label in h_dims[0] if label not in a_labels]
    roles = _Roles(
        x=[f for f in rest if n not in f.labels],
        dt=dt,
        A=A,
        B=[f for f in rest if n in f.labels],
        C=[f for f in read_rest if n in f.labels],
        outer=[f for f in read_rest if n not in f.labels],
        coefficients=(power.coefficient, add.coefficient, read.coefficient),
        log=log,
        n=n,
        t=t,
        batch=batch,
        channels=[label for label in h_labels if label not in (t, n, *batch)],
    )
    return (roles if _closed(roles, h_labels) else None), h_dims


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
    """Every label is one of the state's or time; B, C and A exist or are constant."""
    factors = (*roles.x, *roles.dt, *roles.A, *roles.B, *roles.C, *roles.outer)
    return all(f.labels <= set(known) for f in factors) and bool(roles.channels)


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
    roles: _Roles
    per_head: bool
    y_dims: Dims
    h_dims: Dims
    start: Node | None
    final: bool

    def build(self, values: dict[Node, Tensor]) -> list[Tensor]:
        roles, lay = self.roles, Arranger()
        batch, channels = [*roles.batch], roles.channels
        heads, inner, groups = _head_dims(roles) if self.per_head else (channels, [], [])
        order = [*batch, roles.t, *heads, *inner]
        for factor in (*roles.x, *roles.dt, *roles.A, *roles.B, *roles.C):
            lay.atoms(values[factor.node], factor.dims)
        start = None
        if self.start is not None:
            dims = (self.h_dims[0], self.h_dims[2])
            start = lay.lay(values[self.start], dims, [*batch, *heads, *inner, roles.n])
        like = next(values[f.node] for f in (*roles.x, *roles.B, *roles.dt))
        for label in (*order, roles.n):
            lay.sizes.setdefault(label, label.size)
        given = self._operands(values, lay, like, heads, inner, groups)
        if start is not None:
            start = lay.full(start, [*batch, *heads, *inner, roles.n])
            start = self._flat(start, [batch, heads, inner, [roles.n]] if self.per_head else [batch, heads, [roles.n]])
        op = torch.ops.effpass.ssd_scan if self.per_head else torch.ops.effpass.selective_scan
        if self.per_head:
            y, state = op(*given, None, None, None, False, UNCLAMPED, None, start)
        else:
            y, state = op(*given, None, None, None, False, start)
        y = self._read(y, lay, order, values)
        if not self.final:
            return [y]
        order = [*batch, *heads, *inner, roles.n]
        state = state.reshape([lay.sizes[label] for label in order])
        return [y, lay.merged(state, order, (self.h_dims[0], self.h_dims[2]))]

    def _operands(
        self,
        values: dict[Node, Tensor],
        lay: Arranger,
        like: Tensor,
        heads: list[Label],
        inner: list[Label],
        groups: list[Label],
    ) -> list[Tensor]:
        """x, dt, A, B, C as the op wants them."""
        roles, batch = self.roles, [*self.roles.batch]
        time = [*batch, roles.t]

        def role(factors: Sequence[Factor], order: list[Label], scale: float = 1.0) -> Tensor:
            pairs = [(values[f.node], f.dims) for f in factors]
            made = lay.product(pairs, order, scale)
            if made is None:
                made = like.new_full([1] * len(order), scale)
            return lay.full(made, order)

        scale_A, scale_B, scale_C = roles.coefficients
        x = role(roles.x, [*time, *heads, *inner])
        dt = role(roles.dt, [*time, *heads])
        if self.per_head:
            A = role(roles.A, heads, scale_A)
            B, C = (role(f, [*time, *groups, roles.n], s) for f, s in ((roles.B, scale_B), (roles.C, scale_C)))
            split = [[batch, [roles.t], heads, inner], [batch, [roles.t], heads], [heads]]
            split += [[batch, [roles.t], groups, [roles.n]]] * 2
        else:
            A = role(roles.A, [*heads, roles.n], scale_A)
            B, C = (role(f, [*time, roles.n], s) for f, s in ((roles.B, scale_B), (roles.C, scale_C)))
            split = [[batch, [roles.t], heads]] * 2 + [[heads, [roles.n]]]
            split += [[batch, [roles.t], [roles.n]]] * 2
        A = A.log() if roles.log else A
        return [self._flat(v, s) for v, s in zip((x, dt, A, B, C), split, strict=True)]

    @staticmethod
    def _flat(value: Tensor, groups: Sequence[Sequence[Label]]) -> Tensor:
        """Merges each group of dims into one; an empty group is a dim of size 1."""
        for i, group in enumerate(groups):
            if not group:
                value = value.unsqueeze(i)
            elif len(group) > 1:
                value = value.flatten(i, i + len(group) - 1)
        return value

    def _read(self, y: Tensor, lay: Arranger, order: list[Label], values: dict[Node, Tensor]) -> Tensor:
        y = y.reshape([lay.sizes[label] for label in order])
        for factor in self.roles.outer:
            y = y * lay.lay(values[factor.node], factor.dims, order)
        return lay.merged(y, order, self.y_dims)
