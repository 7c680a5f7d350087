"""First-order recurrences written with cumulative products, sums and log-sum-exps.

    h[t] = P[t] sum_{k <= t} b[k] / P[k],  P[t] = a[1] ... a[t]

is h[t] = a[t] h[t-1] + b[t], since P[t] / P[k] is the product of a between them. P may be a
cumulative product, the exponential of a cumulative sum, or powers of a fixed decay; the whole may
be written with logarithms (Heinsen 2023, arXiv 2311.06281; minGRU: Feng et al. 2024, arXiv
2410.01201). The recurrence stays finite where P under- or overflows and these forms give
infinities or NaN, or take the logarithm of a negative number: there, and only there, it differs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace

from torch import Tensor
from torch.fx import Graph, Node

from effpass.axes.labels import opname
from effpass.axes.relation import arguments
from effpass.patterns.products.algebra import RULES, Dims, Label, fresh, resolved, shape
from effpass.patterns.products.cumulative_build import Match, call
from effpass.patterns.products.monomials import (
    Key,
    Monomial,
    Reader,
    Unreadable,
    floating,
    padded,
    rooted,
)
from effpass.patterns.proposal import Idiom, Missed, Proposal

SUMS = ("cumsum", "logcumsumexp")
STEPS = ("mul", "div", "add", "sub", "exp", "to", "_to_copy")
MOST_CANDIDATES = 24
# random values for a proof: decays near 1, whose products neither vanish nor explode
DRAWN: dict[str, Callable[[Tensor], Tensor]] = {
    "prod": lambda v: (v.tanh() / 10).exp(),
    "expsum": lambda v: v.tanh() / 10,
    "pow": lambda v: (v.tanh() / 10).exp(),
    "exppow": lambda v: v.tanh() / 10,
}


def find(graph: Graph) -> Iterable[Node]:
    """Running sums of what holds a running product."""
    reader = Reader(None)
    for node in graph.nodes:
        if opname(node) in SUMS and floating(node) and reader.holds(node.args[0]):
            yield node


def check(node: Node) -> Proposal | None:
    """The recurrence that a running sum is part of."""
    reason: Missed | None = None
    for candidate in _candidates(node):
        try:
            return _proposal(_matched(node, candidate), candidate)
        except Unreadable:
            continue
        except Missed as miss:
            reason = miss
    if reason is not None:
        raise reason
    return None


IDIOM = Idiom("cumulative recurrence", find, check)
IDIOMS = (IDIOM,)


def _candidates(node: Node) -> Iterator[Node]:
    """What is made of the sum by products and views, nearest first."""
    pending, seen = [node], {node}
    while pending and len(seen) < MOST_CANDIDATES:
        each = pending.pop(0)
        for user in sorted(each.users):
            if user not in seen and (opname(user) in STEPS or user.target in RULES):
                seen.add(user)
                pending.append(user)
                if floating(user):
                    yield user


def _matched(node: Node, candidate: Node) -> Match:
    """Raises Unreadable where the candidate is not the recurrence, Missed where it nearly is."""
    reader, dims = Reader(node), fresh(candidate)
    outer = reader.read(candidate, dims)
    own = [key for key in outer.powers if key.kind == "sum"]
    if len(own) != 1 or outer.powers.pop(own[0]) != 1 or not own[0].dims:
        raise Unreadable
    inner = _inner(reader, node, own[0].dims)
    outer, summed, dims = outer.settled(), resolved(own[0].dims), resolved(dims)
    along = summed[arguments(node)["dim"] % len(summed)]
    if len(along) != 1 or {r for d in dims for r in d} != {r for d in summed for r in d}:
        raise Unreadable
    time = along[0]
    decays = _decays(inner, outer, time)
    constants = {k: p for k, p in outer.powers.items() if not k.runs}
    if any(time in key.labels for key in constants):
        raise Unreadable
    inputs = {k: p for k, p in inner.powers.items() if not k.runs}
    start = None
    if outer.start is not None:
        if any(k.front or k.kind not in ("prod", "expsum") for k in decays):
            raise Unreadable
        before = Key("tensor", outer.start[0], resolved(outer.start[1]))
        if time in before.labels:
            raise Unreadable
        start = {before: 1.0} | constants
    inputs |= {k: p + inputs.get(k, 0.0) for k, p in constants.items()}
    inputs = {k: p for k, p in inputs.items() if p}
    scale = inner.coefficient * outer.coefficient
    return Match(dims, time, decays, inputs, scale, start, outer.coefficient)


def _inner(reader: Reader, node: Node, dims: Dims) -> Monomial:
    """What is summed."""
    summed: Node = node.args[0]  # type: ignore[assignment]
    reader.target = None
    exponent = opname(node) == "logcumsumexp"
    return reader.read_exp(summed, dims) if exponent else reader.read(summed, dims)


def _decays(inner: Monomial, outer: Monomial, time: Label) -> dict[Key, float]:
    """The running products by which the sum is divided inside and multiplied outside."""
    multiplied = {k: p for k, p in outer.powers.items() if k.runs}
    divided = {k: -p for k, p in inner.powers.items() if k.runs}
    if not multiplied:
        raise Unreadable
    if divided != multiplied:
        for key in inner.powers:
            _check_spoiled(key)
        raise Unreadable
    for key in multiplied:
        _check_running(key, time)
    return multiplied


def _check_running(key: Key, time: Label) -> None:
    """Raises unless the product runs along the time of the sum; a power, of something fixed."""
    if key.inside is not None and (key.inside,) not in key.dims:
        raise Unreadable
    fixed = key.kind in ("pow", "exppow")
    if key.time is time and not (fixed and time in key.labels):
        return
    if key.time is not time and time in key.labels and key.node is not None:
        raise Missed("the product runs over another dimension than the sum", key.node)
    raise Unreadable


def _check_spoiled(key: Key) -> None:
    """Raises Missed for a running product that was changed before it divides."""
    node = key.node
    if key.runs or node is None or node.op != "call_function" or not _running_above(node):
        return
    name = opname(node)
    if name in ("add", "sub") and isinstance(node.args[1], int | float):
        raise Missed(f"{node.args[1]} is added to the product that divides", node)
    if name.startswith("clamp") or name in ("maximum", "minimum"):
        raise Missed("the product that divides is clamped", node)
    if name in ("slice", "narrow"):
        raise Missed("the product that divides is that of another token", node)


def _running_above(node: Node, depth: int = 4) -> bool:
    if opname(node) in ("cumprod", "cumsum"):
        return True
    return depth > 0 and any(_running_above(n, depth - 1) for n in node.all_input_nodes)


def _proposal(match: Match, candidate: Node) -> Proposal:
    match, output = _without_padding(match, candidate)
    match.decays = {_unpadded(k, match): p for k, p in match.decays.items()}
    labels = {r for dim in match.dims for r in dim}
    nodes = match.nodes
    if not labels <= match.labels or not nodes or not all(map(floating, nodes)):
        raise Unreadable
    dtype = candidate.meta["val"].dtype

    def build(*values: Tensor) -> list[Tensor]:
        return [call(match, dict(zip(nodes, values, strict=True)), dtype)]

    tokens = {}
    for key in (*match.decays, *match.inputs):
        if key.node is not None and (match.time,) in key.dims:
            tokens[key.node] = key.dims.index((match.time,))
    time = match.dims.index((match.time,)) if (match.time,) in match.dims else None
    return Proposal(
        op="linear_recurrence",
        inputs=nodes,
        outputs=(output,),
        build=build,
        draw={k.node: DRAWN[k.kind] for k in match.decays if k.node is not None},
        tokens=tokens if time is not None else {},
        output_tokens=() if time is None else (time,),
    )


def _unpadded(key: Key, match: Match) -> Key:
    """With nothing before the first token its decay does not matter: drop what stands for it."""
    if match.start is not None or key.front or key.kind not in ("prod", "expsum"):
        return key
    found = padded(key.node, 1.0 if key.kind == "prod" else 0.0) if key.node is not None else None
    if found is None or opname(found[0]) != "slice":
        return key
    given = arguments(found[0])
    whole, dim = given["self"], found[1]
    cut = (given["dim"] % len(shape(whole)), given["start"], given["step"])
    same = shape(whole) == shape(key.node)
    if found[2] != 1 or cut != (dim, 1, 1) or not same or key.dims[dim] != (match.time,):
        return key
    return rooted(replace(key, node=whole))


def _without_padding(match: Match, candidate: Node) -> tuple[Match, Node]:
    """A first token that only holds the start, and is cut off behind, becomes an initial state."""
    times = [key for key in match.inputs if match.time in key.labels]
    user = next(iter(candidate.users), None)
    if match.start is not None or len(times) != 1 or len(candidate.users) != 1:
        return match, candidate
    key, inside = times[0], {k.inside for k in match.decays}
    if match.inputs[key] != 1 or len(inside) != 1 or any(k.front != 1 for k in match.decays):
        return match, candidate
    parts = _first_and_rest(key, match.time)
    if user is None or parts is None or not _drops_first(user, match):
        return match, candidate
    (time,) = inside
    assert time is not None
    first, rest = parts
    dim = key.dims.index((match.time,))
    others = {k: p for k, p in match.inputs.items() if k is not key}
    before = replace(key, node=first, dims=(*key.dims[:dim], (), *key.dims[dim + 1 :]))
    after = replace(key, node=rest, dims=(*key.dims[:dim], (time,), *key.dims[dim + 1 :]))
    cut = Match(
        tuple((time,) if d == (match.time,) else d for d in match.dims),
        time,
        {replace(k, front=0, inside=None, time=time): p for k, p in match.decays.items()},
        {after: 1.0} | others,
        match.scale,
        {before: 1.0} | others,
        match.scale,
    )
    return cut, user


def _first_and_rest(key: Key, time: Label) -> tuple[Node, Node] | None:
    """The first token and the others, where they were joined."""
    if key.node is None or opname(key.node) != "cat" or (time,) not in key.dims:
        return None
    given = arguments(key.node)
    dim = given["dim"] % len(key.dims)
    parts = given["tensors"]
    if len(parts) != 2 or key.dims[dim] != (time,) or shape(parts[0])[dim] != 1:
        return None
    return parts[0], parts[1]


def _drops_first(user: Node, match: Match) -> bool:
    if opname(user) != "slice" or (match.time,) not in match.dims:
        return False
    given = arguments(user)
    dim = given["dim"] % len(match.dims)
    whole = given["end"] is None or (isinstance(given["end"], int) and given["end"] > 1 << 40)
    return match.dims[dim] == (match.time,) and (given["start"], given["step"]) == (1, 1) and whole
