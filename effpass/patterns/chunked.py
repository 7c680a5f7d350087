"""State-space duality in chunks (Dao and Gu 2024, arXiv 2405.21060, section 6): ``ssd_scan``.

Within a chunk it is attention with a decay for a mask, between chunks a recurrence; a single chunk
is the quadratic form. However it is spelled, the result is a sum of products of x, B and C (or of
a start and C), each once, with decays ``exp`` of sums of ``dt A``; nothing else is allowed inside.
So it is multilinear in x, B, C and the start, and analytic in dt and A: the op, equal to it on a
few random inputs, is equal to it on all inputs of these sizes. Hence ``prove_always``.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor
from torch.fx import Graph, Node

from effpass.patterns.chunks import multilinear_views as views
from effpass.patterns.chunks.factors import Unreadable
from effpass.patterns.chunks.growth import MULTIPLIED, Growth, grow
from effpass.patterns.chunks.log_decay import cumulative_sum, is_layout, log_decay
from effpass.patterns.chunks.multilinear import SHAPED, Reader, Term, is_size, opname
from effpass.patterns.chunks.ssd_call import Call, in_chunks
from effpass.patterns.chunks.ssd_roles import (
    TIME,
    Axes,
    Naming,
    Roles,
    flat,
    length,
    main_term,
    roles,
)
from effpass.patterns.proposal import Idiom, Missed, Proposal

TOTAL_DECAY = 6.0  # drawn inputs decay to exp(-6) or so from the first token to the last


def find(graph: Graph) -> Iterable[Node]:
    """One ``exp`` of each log decay that is summed over tokens."""
    known: dict[Node, tuple[Node, ...]] = {}
    seen: set[tuple[Node, ...]] = set()
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.exp.default):
        total = cumulative_sum(node)
        if total is None:
            continue
        if total not in known:
            decay = log_decay(node)
            known[total] = () if decay is None else decay.tensors
        if known[total] and known[total] not in seen:
            seen.add(known[total])
            yield node


def check(node: Node) -> Proposal | None:
    """The last scan that is computed with the log decay under ``node``."""
    decay = log_decay(node)
    if decay is None:
        return None
    growth = grow(decay)
    results = [n for n, v in growth.grown.items() if main_term(growth, v) and not is_layout(n)]
    first: Missed | None = None
    for result in reversed(results):
        try:
            return _proposal(growth, result)
        except Unreadable as error:
            first = first or Missed(str(error), result)
        except Missed as miss:
            first = miss
            break
    causes = [(n, reason) for n, reason in growth.broken.values() if MULTIPLIED not in reason]
    if first is None and causes:
        node, reason = causes[0]
        first = Missed(f"to what a decay between two tokens is multiplied with, {reason}", node)
    if first is not None and growth.pairs:  # else another recurrence
        raise first
    return None


def _proposal(growth: Growth, result: Node) -> Proposal:
    _refuse_parts(growth, result)
    term = main_term(growth, growth.grown[result])
    assert term is not None
    _refuse_free_input(growth, term, result)
    chain = _moved(growth, result)
    reader = growth.reader()
    states = _states(growth, result)
    for node in _behind(growth, [*chain, *states]):
        reader.value(node)
    _refuse_rounding(reader, result)
    found = roles(growth, reader, result)
    _refuse_changing_sizes(found, result)
    naming = Naming(reader)
    axes = {node: naming.dims(reader.value(node).dims) for node in chain}
    y = _most_like_y(axes, found)
    outputs = {y: axes[y]}
    for node in states:
        each = naming.dims(reader.value(node).dims)
        if sorted(map(str, flat(each))) == sorted(map(str, _state_axes(found))):
            outputs[node] = each
            break
    call = _call(growth, reader, found, term, outputs)
    return Proposal(
        op="ssd_scan",
        inputs=tuple(found.nodes.values()),
        outputs=tuple(outputs),
        build=call,
        draw=_draws(found, call.rate),
        prove_always=True,
        reference=dataclasses.replace(call, scan=in_chunks),
    )


def _state_axes(found: Roles) -> tuple[object, ...]:
    return (*found.batch, *found.groups, *found.heads, *found.p, *found.n)


def _behind(growth: Growth, nodes: Iterable[Node]) -> list[Node]:
    """The nodes made with a decay of which these are made, and themselves, in order."""
    pending, seen = list(nodes), set()
    while pending:
        node = pending.pop()
        if node not in seen and (node in growth.grown or opname(node) in views.PIECES):
            seen.add(node)
            pending += node.all_input_nodes
    return sorted(n for n in seen if n in growth.grown)


def _refuse_parts(growth: Growth, result: Node) -> None:
    """What is added to the result must be made of the same products."""
    after = {result, *_moved(growth, result)}
    for node, (cause, reason) in growth.broken.items():
        beside = any(source in after for source in node.all_input_nodes)
        if beside and cause is not node and not _made_with(growth, cause, after):
            raise Missed(f"inside the chunked scan, {reason}", cause)


def _made_with(growth: Growth, node: Node, what: set[Node]) -> bool:
    pending, seen = [node], set()
    while pending:
        each = pending.pop()
        if each in what:
            return True
        if each not in seen:
            seen.add(each)
            pending += [n for n in each.all_input_nodes if n in growth.grown or n in growth.broken]
    return False


def _refuse_free_input(growth: Growth, term: Term, result: Node) -> None:
    """The op multiplies its input by the step that its decay is made of."""
    step, rate = growth.decay.step, growth.decay.rate
    numbers = {node: number for number, node in enumerate(growth.tensors)}
    if step is not None and numbers[step] not in term:
        raise Missed(
            f"what is written is not multiplied by the step {step.name} of the decay, "
            "as ssd_scan does it",
            result,
        )
    if rate is not None and numbers[rate] in term:
        raise Missed(f"what is written is multiplied by the rate {rate.name} of the decay", result)


def _refuse_rounding(reader: Reader, result: Node) -> None:
    """The op keeps what it sums in at least float32."""
    kept = result.meta["val"].dtype
    for node in sorted(reader.rounded):
        dtype = node.meta["val"].dtype
        if torch.promote_types(dtype, kept) != dtype:
            raise Missed(
                f"inside the chunked scan, values of a {kept} sum are rounded to {dtype}", node
            )


def _refuse_changing_sizes(found: Roles, result: Node) -> None:
    """The proof holds for sizes as they are: only the batch may change, and no mask with it."""
    for name, node in found.nodes.items():
        for size, dim in zip(node.meta["val"].shape, found.axes[name], strict=True):
            if isinstance(size, int):
                continue
            if [axis for axis, _ in dim] != list(found.batch):
                what = "length" if (TIME, size.node.hint) in dim else "size"
                raise Missed(f"the {what} of {name} changes from call to call", node)
    pending, seen = [result], set(found.nodes.values())
    while pending:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        pending += node.all_input_nodes
        changing = any(is_size(n) for n in node.all_input_nodes)
        if changing and not is_layout(node) and opname(node) not in SHAPED:
            if opname(node):
                raise Missed(f"{node.name} depends on a size that changes", node)


def _moved(growth: Growth, result: Node) -> list[Node]:
    """The result, and what only moves it: views, slices."""
    found = [result]
    while len(found[-1].users) == 1:
        user = next(iter(found[-1].users))
        same = user in growth.grown and user.meta["val"].dtype == result.meta["val"].dtype
        if not same or not (is_layout(user) or opname(user) in views.SLICES):
            break
        found.append(user)
    return found


def _most_like_y(axes: Mapping[Node, Axes], found: Roles) -> Node:
    """The node whose dims are those of the op's y, best with as many tokens as x."""
    tokens = length(found.axes["x"])
    plain = [found.batch, (TIME,), (*found.groups, *found.heads), found.p]
    best = None
    for node, each in axes.items():
        if length(each) < tokens:
            break
        own = [tuple(dict.fromkeys(axis for axis, _ in dim)) for dim in each]
        if [a for a in own if a] == [a for a in plain if a]:
            best = node
            if length(each) == tokens:
                break
    return best or next(iter(axes))


def _states(growth: Growth, result: Node) -> list[Node]:
    """What may be the final state: products of x and B that somebody else reads, last first."""
    term = main_term(growth, growth.grown[result])
    assert term is not None
    inside = {*_behind(growth, [result]), *_moved(growth, result)}

    def is_state(node: Node) -> bool:
        terms = growth.grown[node].terms if node in growth.grown else ()
        return any(len(t) == len(term) - 1 and t < term for t in terms)

    def is_read(node: Node) -> bool:
        """By what is neither the result nor another state; dead code reads nothing."""
        others = [user for user in node.users if user not in inside]
        moved = [user for user in others if user in growth.grown and is_layout(user)]
        return any(user not in moved and not is_state(user) for user in others) or any(
            is_read(user) for user in moved
        )

    own = [node for node in growth.grown if is_state(node) and not is_layout(node)]
    return [node for node in reversed(own) if is_read(node)]


def _call(
    growth: Growth, reader: Reader, found: Roles, term: Term, outputs: Mapping[Node, Axes]
) -> Call:
    y, *state = outputs
    numbers = {name: reader.tensors.index(node) for name, node in found.nodes.items()}
    read = _finite(reader.value(y).terms[term])
    written = 1.0
    if state:
        written = _finite(reader.value(state[0]).terms[term - {numbers["C"]}])
    if "start" in numbers:
        begun = reader.value(y).terms[frozenset({numbers["start"], numbers["C"]})]
        if _finite(begun) * written != read:
            raise Unreadable("the start is scaled in another way than what is written")
    rates = reader.summed_rates if len(reader.summed_rates) == 1 else reader.rates
    rate = next(iter(rates)) if len(rates) == 1 else 1.0
    results = tuple((axes, node.meta["val"].dtype) for node, axes in outputs.items())
    return Call(found, results, _finite(rate), read / written, written)


def _finite(coefficient: float) -> float:
    return coefficient if math.isfinite(coefficient) else 1.0


def _draws(found: Roles, rate: float) -> dict[Node, Callable[[Tensor], Tensor]]:
    """Steps and rates of which the decay stays visible from the first token to the last."""
    tokens, sign = length(found.axes["x"]), math.copysign(1.0, -rate)
    draws: dict[Node, Callable[[Tensor], Tensor]] = {}
    if "A" in found.nodes:
        share = 1.0 if "dt" in found.nodes else TOTAL_DECAY / tokens
        draws[found.nodes["A"]] = lambda v: sign * share * (v.abs() + 1.0) / 2
    if "dt" in found.nodes:
        toward = 1.0 if "A" in found.nodes else sign
        draws[found.nodes["dt"]] = lambda v: toward * v.abs() * TOTAL_DECAY / tokens
    return draws


IDIOM = Idiom("chunked SSD", find, check)
