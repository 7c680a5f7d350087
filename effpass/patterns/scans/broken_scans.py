"""Why what begins like a parallel scan is none: the first step that leaves the rules, in words."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.fx import Node

from effpass.axes.relation import arguments
from effpass.patterns.proposal import Missed
from effpass.patterns.scans.combines import Leaves, combines, followed, known, readings, widest
from effpass.patterns.scans.interval_rules import Sight
from effpass.patterns.scans.intervals import (
    ONE,
    PRODUCT,
    SUM,
    UNKNOWN,
    Value,
    combined,
    fields,
    product,
    total,
)

PAIRS = {
    "mul": ("self", "other"),
    "multiply": ("self", "other"),
    "add": ("self", "other"),
    "addcmul": ("tensor1", "tensor2"),
}


def explain(node: Node, begun: Sequence[tuple[Leaves, Sight]]) -> None:
    """Raises Missed where the combine ``node`` begins a tree that is no scan.

    ``begun`` are its readings that came to nothing. What is followed by no second combine is some
    other code, and no miss.
    """
    mirrored = [
        followed(leaves)
        for combine in combines(node)
        for leaves in readings(combine, backwards=True)
    ]
    for _, state in mirrored:
        if state is not None:
            raise Missed("the scan runs from the last token to the first", state)
    if not begun and any(_is_tree(sight) for sight, _ in mirrored):
        raise Missed(
            "it multiplies the later value by the earlier coefficient, where a scan multiplies "
            "the earlier value by the later coefficient",
            node,
        )
    for leaves, sight in begun:
        _clash(sight)
        if _is_tree(sight):
            _window(leaves, sight)
            _left_off(sight)


def _is_tree(sight: Sight) -> bool:
    """Whether both coefficients and values of several tokens were joined."""
    values = [value for value in sight.values.values() if isinstance(value, Value)]
    return all(max(widest(v, kind) for v in values) > 1 for kind in (PRODUCT, SUM))


def _clash(sight: Sight) -> None:
    """Raises Missed at the first product or sum of elements that do not fit."""
    for node in sorted(sight.values):
        name = getattr(node.target, "_opname", "")
        if name not in PAIRS:
            continue
        given = arguments(node)
        left, right = (sight.of(given[key], node) for key in PAIRS[name])
        found = None if left is None or right is None else _first(left, right, name == "add")
        if found is not None:
            verb = "adds" if name == "add" else "multiplies"
            raise Missed(f"it {verb} {found[0]} and {found[1]}, which no scan does", node)


def _first(left: Value, right: Value, adds: bool) -> tuple[str, str] | None:
    """The first two known elements, beyond single tokens, whose sum or product is unknown."""
    rule = total if adds else product

    def clashes(x: Tensor, y: Tensor) -> Tensor:
        (kx, ix, _, jx), (ky, iy, _, jy) = fields(x), fields(y)
        joined = (ix < jx) | (iy < jy) | ((kx == PRODUCT) & (ky == PRODUCT))
        return (x > ONE) & (y > ONE) & joined & (rule(x, y) < 0)

    pairs = []
    for side in (0, 1):
        picked = combined(lambda *xy: torch.where(clashes(*xy), xy[side], UNKNOWN), left, right)  # noqa: B023
        codes = [] if picked is None else picked.codes[picked.codes >= 0].flatten().tolist()
        if not codes:
            return None
        pairs.append(_described(codes[0]))
    return pairs[0], pairs[1]


def _described(code: int) -> str:
    kind, first, last, upto = (int(field) for field in fields(torch.tensor(code)))
    if kind == PRODUCT:
        return f"a{_tokens(first, upto)}"
    carried = f" carried on to token {upto}" if upto != last else ""
    return f"b{_tokens(first, last)}{carried}"


def _tokens(first: int, last: int) -> str:
    return f"[{first}]" if first == last else f"[{first}..{last}]"


def _window(leaves: Leaves, sight: Sight) -> None:
    """Raises Missed where every token has some of its past, and some token not all of it."""
    length = leaves.b.meta["val"].shape[leaves.time]
    for node in sorted(sight.values, reverse=True):
        value = sight.values[node]
        if not isinstance(value, Value) or list(value.codes.shape) != [length]:
            continue
        kinds, first, last, upto = fields(value.codes)
        times = torch.arange(length)
        if not bool(((kinds == SUM) & (last == times) & (upto == times)).all()):
            continue
        short = int((first > 0).nonzero()[0])
        seen = _tokens(int(first[short]), short)
        raise Missed(f"token {short} is made of tokens {seen} only, not of its whole past", node)


def _left_off(sight: Sight) -> None:
    """Raises Missed at the first operation that reads joined values and is no step of a scan."""
    for node in sorted(sight.values):
        value = sight.values[node]
        if isinstance(value, list) or (isinstance(value, Value) and known(value)):
            continue
        sources = [sight.values.get(source) for source in node.all_input_nodes]
        if any(widest(source, SUM) > 1 for source in sources):
            raise Missed(f"{node.target} reads values that are not yet those of a scan", node)
