"""A loop: one recurrence among the rows of straight-line code, and everything around it.

Reads which rows carry the state, checks that all steps are alike, finds the initial state (and
takes a first step that started from it into the loop), and what is used of the steps afterwards.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch.fx import Node
from torch.utils import _pytree as pytree

from effpass.patterns.loops.channels import made_by_weights
from effpass.patterns.loops.steps import FEWEST, GATHERS, Row, Steps
from effpass.patterns.proposal import Missed


@dataclass
class Gather:
    """``node`` stacks or cats ``before``, steps ``first`` to ``last`` of ``row``, and ``after``."""

    node: Node
    row: Row
    first: int
    last: int
    before: tuple[Node, ...]
    after: tuple[Node, ...]


@dataclass
class Loop:
    """The recurrence of ``carry`` over the steps ``first`` to ``last``."""

    steps: Steps
    cycle: frozenset[int]
    carry: Row
    first: int
    last: int
    initial: Any  # a node, or a number
    behind: frozenset[int] = frozenset()  # rows that depend on the state, the cycle among them
    gathers: list[Gather] = field(default_factory=list)
    singles: list[tuple[Row, int, Node]] = field(default_factory=list)  # single steps used outside

    def reads(self, row: Row) -> list[tuple[Node, Row | None, int]]:
        """``(argument, row, steps back)`` of the row's last member."""
        return list(self.steps.arguments(row.members[self.last]))


def loop_of(steps: Steps, cycle: frozenset[int]) -> Loop:
    """The loop around a cycle of rows. Raises Missed where it is not a plain recurrence."""
    rows = [steps.rows[n] for n in sorted(cycle)]
    anchor = max(row.last for row in rows)
    carry = _carry(steps, cycle, rows, anchor)
    steps.refresh()
    leaves = [r for r in steps.rows if r.source is not None and _together(steps, r.last, anchor)]
    if any(leaf.backwards for leaf in leaves):
        raise Missed("the loop runs from the last step to the first", anchor)
    if any(made_by_weights(leaf.source, leaf.dim) for leaf in leaves):  # type: ignore[arg-type]
        raise Missed("the loop runs over the channels of a projection, not over time", anchor)
    first, last = _range(steps, rows, anchor)
    loop = Loop(steps, cycle, carry, first, last, None)
    for row in rows:
        _alike(loop, row)
    loop.initial = _initial(loop, rows)
    while _absorb(loop):
        pass
    if loop.first > 1:
        raise Missed(f"its steps are not alike: those before step {loop.first} differ", anchor)
    loop.behind = _behind(loop)
    _uses(loop)
    return loop


def _together(steps: Steps, a: Node, b: Node) -> bool:
    return steps.groups.find(a) == steps.groups.find(b)


def _carry(steps: Steps, cycle: frozenset[int], rows: Sequence[Row], anchor: Node) -> Row:
    carried = set()
    for row in rows:
        for _, source, back in steps.arguments(row.last):
            if source is None or source.number not in cycle:
                continue
            if back > 1:
                raise Missed(f"the state of {back} steps before is read", row.last)
            if back < 0:
                raise Missed("the loop runs from the last step to the first", row.last)
            if back:
                carried.add(source.number)
    if len(carried) != 1:
        raise Missed(f"{len(carried)} states depend on each other", anchor)
    return steps.rows[carried.pop()]


def _range(steps: Steps, rows: Sequence[Row], anchor: Node) -> tuple[int, int]:
    first = max(min(row.members) for row in rows)
    last = min(max(row.members) for row in rows)
    for row in rows:
        gap = next((t for t in range(first, last + 1) if t not in row.members), None)
        if gap is not None:
            raise Missed(f"its steps are not alike: step {gap} differs", row.last)
    if last - first + 1 < FEWEST:
        raise Missed(f"its steps are not alike: only {last - first + 1} are", anchor)
    members = [row.members for row in rows]
    order = [max(m[t] for m in members) for t in range(first, last + 1)]
    if order != sorted(order):
        raise Missed("the loop runs from the last step to the first", anchor)
    return first, last


def _alike(loop: Loop, row: Row) -> None:
    """Every step reads the same rows as the last one does."""
    for time in range(loop.first, loop.last + 1):
        if time not in row.members or not same_reads(loop, row, time):
            at = row.members.get(time, row.last)
            raise Missed(f"its steps are not alike: step {time} differs from step {loop.last}", at)


def same_reads(loop: Loop, row: Row, time: int) -> bool:
    """The member of ``row`` at ``time`` reads what the last member reads, steps apart."""
    if row.source is not None:
        return True
    if loop.last not in row.members:
        return False
    here, there = list(loop.steps.arguments(row.members[time])), loop.reads(row)
    if len(here) != len(there):
        return False
    for (argument, source, back), (other, wanted, lag) in zip(here, there, strict=True):
        if wanted is None:
            if source is not None or argument is not other:
                return False
        elif lag and time == loop.first and wanted.source is None:
            continue  # the initial state, or a value of before the loop
        elif source is not wanted or back != lag:
            return False
    return True


def _initial(loop: Loop, rows: Sequence[Row]) -> Any:
    found = set()
    for row in rows:
        here = loop.steps.arguments(row.members[loop.first])
        for (argument, _, _), (_, wanted, lag) in zip(here, loop.reads(row), strict=True):
            if wanted is loop.carry and lag:
                found.add(argument)
    if len(found) != 1:
        raise Missed("the first step starts from more than one state", rows[0].last)
    return found.pop()


def _absorb(loop: Loop) -> bool:
    """A step before the first, which started from zeros or a given state, belongs to the loop."""
    if loop.first == 0 or not isinstance(loop.initial, Node):
        return False
    time = loop.first - 1
    match = _Match(loop, time)
    if not match.step(loop.initial):
        match = _from_zero(loop, time)
        if match is None:
            return False
    for gather in _gather_nodes(loop):
        # outputs of that step: taken in where they are alike, left outside where not
        for item, following in pairwise(gather.args[0]):  # type: ignore[arg-type]
            place = loop.steps.where.get(following)
            if place is not None and place[1] == loop.first:
                match.same(loop.steps.rows[place[0]], item)
                break
    loop.initial, loop.first = match.bound[loop.carry.number], time
    for number, node in match.members.items():
        loop.steps.rows[number].members[time] = node
        loop.steps.where[node] = (number, time)
        loop.steps.groups.of[node] = loop.steps.groups.of[loop.carry.last]
    return True


def _from_zero(loop: Loop, time: int) -> _Match | None:
    """The first state is only what a step adds (``h = b[0]``): it started from zero."""
    pattern, match = loop.carry.members[loop.last], _Match(loop, time)
    state = loop.initial
    if pattern.target is not torch.ops.aten.add.Tensor or pattern.kwargs:
        return None
    added = [r for _, r, lag in loop.reads(loop.carry) if r is not None and not lag]
    added = [r for r in added if r.number not in loop.cycle]
    if len(added) != 1 or not match.same(added[0], state):
        return None
    if added[0].source is not None or state in loop.steps.where:
        # the addend itself goes on as the state: a node that is only the state tells them apart
        loop.initial = _only_state(loop, state)
    match.members[loop.carry.number] = loop.initial
    match.bound[loop.carry.number] = 0.0
    return match


def _only_state(loop: Loop, addend: Node) -> Node:
    graph = addend.graph
    with graph.inserting_after(addend):
        state = graph.call_function(torch.ops.aten.alias.default, (addend,))
    state.meta = dict(addend.meta)
    addend.replace_all_uses_with(state, delete_user_cb=lambda user: user is not state)
    return state


def _gather_nodes(loop: Loop) -> list[Node]:
    """Gathers of rows, wherever in the graph: those of this loop are among them."""
    found = {}
    for row in loop.steps.rows:
        if loop.last in row.members and row.source is None:
            users = (u for u in row.members[loop.last].users if u.target in GATHERS)
            found |= {user: None for user in users if user not in loop.steps.where}
    return list(found)


class _Match:
    """Compares one step with the rows, by structure; binds what stands for the state before it."""

    def __init__(self, loop: Loop, time: int) -> None:
        self.loop, self.time = loop, time
        self.bound: dict[int, Any] = {}
        self.members: dict[int, Node] = {}

    def step(self, state: Node) -> bool:
        """``state`` was computed like the state of every step, from one bound now."""
        number = self.loop.carry.number
        return self._alike(self.loop.carry, state) and number in self.bound

    def same(self, row: Row, node: Node) -> bool:
        """``node`` is, or could be, the member of ``row`` at this time."""
        if row.source is not None:
            return row.members.get(self.time) is node
        if row.number in self.members:
            return self.members[row.number] is node
        if row.members.get(self.time, node) is not node or self.loop.last not in row.members:
            return False
        return self._alike(row, node)

    def _alike(self, row: Row, node: Node) -> bool:
        pattern = row.members[self.loop.last]
        if node.op != "call_function" or node.target is not pattern.target:
            return False
        wanted, spec = pytree.tree_flatten((pattern.args, dict(pattern.kwargs)))
        given, other = pytree.tree_flatten((node.args, dict(node.kwargs)))
        if spec != other or not all(map(self._argument, wanted, given, [pattern] * len(given))):
            return False
        self.members[row.number] = node
        return True

    def _argument(self, wanted: Any, given: Any, pattern: Node) -> bool:
        if not isinstance(wanted, Node):
            return type(wanted) is type(given) and wanted == given
        place = next(p for p in self.loop.steps.arguments(pattern) if p[0] is wanted)
        _, row, lag = place
        if row is None:
            return given is wanted
        if not lag:
            return isinstance(given, Node) and self.same(row, given)
        if row is not self.loop.carry:
            return False
        return self.bound.setdefault(row.number, given) is given


def _behind(loop: Loop) -> frozenset[int]:
    """Rows computed from the state alike in all steps; the cycle first."""
    found = set(loop.cycle)
    for row in loop.steps.rows:
        if row.number in found or row.source is not None or loop.last not in row.members:
            continue
        reads = loop.reads(row)
        from_state = [r for _, r, _ in reads if r is not None and r.number in found]
        if from_state and _vectorisable(loop, row, found):
            found.add(row.number)
    return frozenset(found)


def _vectorisable(loop: Loop, row: Row, found: Iterable[int]) -> bool:
    for _, source, lag in loop.reads(row):
        if source is None:
            continue
        if lag not in (0, 1) or (lag and source is not loop.carry and source.source is None):
            return False
        if source.number not in found and not free(loop, source):
            return False
    first = loop.first
    return all(
        time in row.members and same_reads(loop, row, time) and _state_at_first(loop, row, time)
        for time in range(first, loop.last + 1)
    )


def _state_at_first(loop: Loop, row: Row, time: int) -> bool:
    """What the first step reads of the step before is the initial state."""
    if time != loop.first:
        return True
    here = loop.steps.arguments(row.members[time])
    pairs = zip(here, loop.reads(row), strict=True)
    return all(
        argument is loop.initial
        for (argument, _, _), (_, wanted, lag) in pairs
        if wanted is loop.carry and lag
    )


def free(loop: Loop, row: Row) -> bool:
    """The row is computed from slices and invariants alone, alike in all steps of the loop."""
    pending, seen = [row], set()
    while pending:
        each = pending.pop()
        if each.number in seen:
            continue
        seen.add(each.number)
        span = range(loop.first, loop.last + 1)
        if each.source is not None:
            continue  # whatever steps were sliced: the whole is there
        if each.number in loop.cycle or loop.last not in each.members:
            return False
        if not all(t in each.members and same_reads(loop, each, t) for t in span):
            return False
        for _, source, lag in loop.reads(each):
            if lag and (source is None or source.source is None):
                return False
            if source is not None and lag in (0, 1):
                pending.append(source)
            elif source is not None:
                return False
    return True


def _uses(loop: Loop) -> None:
    """What is used outside of the rows that will be computed for all steps at once."""
    inside = {
        loop.steps.rows[n].members[t]: (loop.steps.rows[n], t)
        for n in loop.behind
        for t in range(loop.first, loop.last + 1)
        if t in loop.steps.rows[n].members  # a first step from zero multiplies nothing
    }
    gathered: set[Node] = set()
    for node in dict.fromkeys(user for member in inside for user in member.users):
        if node in inside or node.target not in GATHERS:
            continue
        gather = _gather(node, inside)
        if gather is not None:
            loop.gathers.append(gather)
            gathered.add(node)
    for member, (row, time) in inside.items():
        if any(user not in inside and user not in gathered for user in member.users):
            loop.singles.append((row, time, member))


def _gather(node: Node, inside: dict[Node, tuple[Row, int]]) -> Gather | None:
    items: list[Node] = list(node.args[0])  # type: ignore[arg-type]
    places = [inside.get(item) for item in items]
    start = next(i for i, place in enumerate(places) if place is not None)
    row, first = places[start]  # type: ignore[misc]
    end = start
    while end < len(items) and places[end] == (row, first + end - start):
        end += 1
    rest = (*items[:start], *items[end:])
    if end - start < FEWEST or any(item in inside for item in rest):
        return None
    return Gather(
        node, row, first, first + end - start - 1, tuple(items[:start]), tuple(items[end:])
    )
