"""ReduceTokens: later blocks see fewer tokens. Approximate, without training (UTRC and rivals).

UTRC: arXiv 2410.14725, "Rethinking Token Reduction for State Space Models", as the paper has it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from effpass.axes.labels import opname
from effpass.axes.relation import arguments, draws, values
from effpass.graph.source import layer
from effpass.graph.verify import cannot_run, difference, run_copy
from effpass.passes.reduction.anchors import Settings
from effpass.passes.reduction.blocks import Block, content, find_blocks
from effpass.passes.reduction.choice import METHODS, UNSCORED, Rule
from effpass.passes.reduction.flops import Cost, cost
from effpass.passes.reduction.mixers import ALIGNMENTS
from effpass.passes.reduction.padding import ordered, padding_mask
from effpass.passes.reduction.rewrite import Reducer
from effpass.passes.reduction.run import (
    Compile,
    EqualRows,
    Found,
    Length,
    PackedRow,
    Reduced,
    compiled,
)
from effpass.passes.reduction.schedule import CHECKED, auto, lengths, reachable, solve
from effpass.passes.reduction.scores import SCORES
from effpass.passes.reduction.stream import (
    ATTENTION,
    VARLEN,
    Irreducible,
    Stream,
    effpass_op,
    stream,
)
from effpass.passes.reduction.token_map import token_map
from effpass.report import Applied, Declined
from effpass.token_report import Reduction

MODES = ("_enter_autocast", "_exit_autocast", "_set_grad_enabled", "_enter_inference_mode")
LOOK_AHEAD = (
    "which tokens leave, and merges, look ahead: only the rows of the protected tail are valid "
    "predictions"
)
SCANS = ("selective_scan", "ssd_scan", "linear_recurrence")
CAUSAL = "with a loss on other rows set causal=True"


@dataclass(frozen=True)
class Forms:
    """A graph with fewer tokens behind some blocks. ``run`` runs it; ``what``: the record of it."""

    plain: GraphModule
    packed: GraphModule
    run: Reduced
    what: tuple[Applied, ...]
    reducer: Reducer
    reduction: Reduction

    def verify(self, inputs: Sequence[Any]) -> str:
        """Compares both forms on copies of ``inputs`` while no token leaves; then lets them leave.

        That proves the wiring (masks, positions, restored outputs), not the approximation. Raises
        VerificationError. Answers "not run: ..." where they cannot be compared.
        """
        reason = cannot_run(self.plain, inputs)
        if reason is not None:
            return f"not run: {reason}"
        if any(map(draws, self.plain.graph.nodes)):
            return "not run: the graph draws random numbers"
        sizes, found = self.run.sizes, self.run.sizes(inputs)
        every = [(each[0],) * len(each) for each in found]
        count = len(pytree.tree_leaves(self.plain.graph.output_node().args[0]))
        expected = run_copy(self.plain, inputs)[:count]
        whole = run_copy(self.packed, [*inputs, *sizes.extra(every, inputs)])[:count]
        given = [*inputs, *sizes.extra(found, inputs)]
        fewer = run_copy(self.packed, given)[:count]
        worst = 0.0
        for i, (want, have, cut) in enumerate(zip(expected, whole, fewer, strict=True)):
            if isinstance(want, Tensor):
                worst = max(worst, difference(i, want, have))
                difference(i, cut, cut.new_empty(want.shape) if cut.shape != want.shape else cut)
        self.reduction.steps[:] = token_map(self.reducer, given, self.reduction.lengths[0])
        return f"equal within {worst:.1e} of the largest value while no token leaves"


@dataclass(frozen=True)
class ReduceTokens:
    """``options={"reduce_tokens": {"ratio": 0.3}}``: later blocks see fewer tokens. Approximate.

    ``ratio``: the share of the stack's operations to save, from which one keep ratio for all
    anchors is solved; or ``keep``: that keep ratio itself, above 0 and at most 1.
    ``method``: utrc, evit, tome, pumer, random or prefix. ``layers``: after which blocks tokens
    leave, counted from 0, or "auto". ``score``: what a token matters, one of SCORES; "auto" is
    deviation, for evit clip_y, on attention that sees everything cls. ``q``: the share of leaving
    tokens that utrc only prunes on the mixer branch; None is 0.5, and 1 in stacks of scans where
    score is "auto". UTRC as published is score="clip_y", q=0.5; "auto" mostly measures better.
    ``protect_first``, ``protect_last``: real tokens at the ends of each row that never leave.
    ``alignment``: what scans do over gaps: hold, repeat or bias_gap. ``output``: "restore", all
    rows come back to their full length. ``causal``: merge only into later tokens and restore only
    from earlier ones. ``seed``: of the method random.

    Raises ValueError and TypeError for values that cannot be, and, when a model is compiled,
    ValueError for a ratio that its anchors cannot reach or a block that it does not have.
    """

    ratio: float | None = None
    keep: float | None = None
    method: str = "utrc"
    layers: str | Sequence[int] = "auto"
    score: str = "auto"
    q: float | None = None
    protect_first: int = 0
    protect_last: int = 1
    alignment: str = "hold"
    output: str = "restore"
    causal: bool = False
    seed: int = 0

    name = "reduce_tokens"

    def __post_init__(self) -> None:
        if (self.ratio is None) == (self.keep is None):
            raise ValueError(
                "reduce_tokens: expected either ratio (the share of operations to save) or keep, "
                f"found ratio={self.ratio!r} and keep={self.keep!r}"
            )
        _number("ratio", self.ratio, 0.0, 1.0, "at least 0 and below 1", upper=False)
        _number("keep", self.keep, 0.0, 1.0, "above 0 and at most 1", lower=False)
        _number("q", self.q, 0.0, 1.0, "from 0 to 1")
        _choice("method", self.method, METHODS)
        _choice("score", self.score, ("auto", *SCORES))
        _choice("alignment", self.alignment, ALIGNMENTS)
        _choice("output", self.output, ("restore",))
        for name in ("protect_first", "protect_last", "seed"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(
                    f"reduce_tokens: expected {name} to be a whole number from 0, found {value!r}"
                )
        if self.causal and self.protect_first < 1:
            object.__setattr__(self, "protect_first", 1)  # every row needs an earlier one to read
        if self.layers != "auto":
            object.__setattr__(self, "layers", _anchors(self.layers))

    def apply(
        self,
        gm: GraphModule,
        compile: Callable[[str], Compile],
        inputs: Sequence[Any] = (),
        within: str = "",
        counts: dict[str, int] | None = None,
        padded: bool = True,
    ) -> Forms | Declined | None:
        """The reduced form of a graph, or the reason why there is none; None for a ratio of 0.

        ``compile`` of the name of a form makes a callable of its graph, when it is first run.
        ``inputs``: those that it is compiled for. ``within``: the name of the form that ``gm``
        itself is, whose calls ``counts`` counts; calls of its reduced form are counted there, too.
        ``padded``: whether a padding mask may be among the inputs.
        """
        if self.ratio == 0 or self.keep == 1:
            return None
        try:
            counts = {} if counts is None else counts
            return self._apply(gm, compile, inputs, within, counts, padded)
        except Irreducible as reason:
            code = f"{self.name}:{reason.code}"
            return Declined(code, reason.where, reason.text(), reason.hint)

    def _apply(
        self,
        gm: GraphModule,
        compile: Callable[[str], Compile],
        inputs: Sequence[Any],
        within: str,
        counts: dict[str, int],
        padded: bool,
    ) -> Forms:
        _refuse(gm)
        found = stream(gm)
        blocks = find_blocks(gm, found)
        anchors = self._anchors_of(blocks)
        length = Length.of(found.solution.classes.sizes[found.token[0]], gm)
        if length is None:
            raise Irreducible("length", None, "no input tells how many tokens there are")
        inside = content(gm, found, blocks)
        costs = cost(gm, found, blocks, inside)
        mask = None if found.offsets else padding_mask(gm, found, inside, padded)
        causal = any(_ordered(b.mixer, found, mask) for b in blocks)
        rule = self._rule(any(effpass_op(blocks[i].mixer) in SCANS for i in anchors))
        settings = Settings(rule, anchors, self._score(causal), self.alignment)
        reducer = Reducer(gm, found, blocks, settings, inside, mask)
        reduced = reducer.build()
        plan = self._plan(costs, anchors, length.hint)
        sizes = _sizes(gm, found, length, plan)
        ahead = causal and not self.causal and reducer.restores
        warning = f"effpass: reduce_tokens in training: {LOOK_AHEAD}; {CAUSAL}" if ahead else None
        names = (f"{within}_whole", f"{within}_reduced") if within else ("plain", "reduced")
        for name in names:
            counts.setdefault(name, 0)
        both = (compiled(gm, compile(names[0])), compiled(reduced, compile(names[1])))
        run = Reduced(sizes, *both, counts, names, warning)
        kept = [plan(length.hint)] if _fake(inputs) else sizes(inputs)
        record = _record(self, costs, blocks, kept, anchors, causal)
        return Forms(gm, reduced, run, _what(settings, blocks), reducer, record)

    def _anchors_of(self, blocks: list[Block]) -> tuple[int, ...]:
        if self.layers == "auto":
            made = auto(len(blocks))
            if not made:
                reason = f"it has {len(blocks)} block: nothing comes behind an anchor"
                raise Irreducible("one_block", blocks[0].add, reason)
            return made
        anchors = tuple(int(i) for i in self.layers)
        if anchors[-1] >= len(blocks):
            raise ValueError(
                f"reduce_tokens: expected layers below {len(blocks)}, the number of blocks of this "
                f"model, found {anchors[-1]}"
            )
        return anchors

    def _rule(self, scanned: bool) -> Rule:
        best = 1.0 if scanned and self.score == "auto" else 0.5
        q = best if self.q is None else float(self.q)
        ends = (self.protect_first, self.protect_last)
        return Rule(self.method, q, *ends, self.causal, self.seed)

    def _score(self, causal: bool) -> str:
        if self.score != "auto":
            return self.score
        if self.method == "evit":
            return "clip_y" if causal else "cls"
        return "deviation"

    def _plan(
        self, costs: Cost, anchors: tuple[int, ...], tokens: int
    ) -> Callable[[int], tuple[int, ...]]:
        protected = self.protect_first + self.protect_last
        if self.keep is not None:
            keep = float(self.keep)
            return functools.cache(lambda n: lengths(n, keep, len(anchors), protected))
        assert self.ratio is not None
        ratio, checked = float(self.ratio), max(tokens, CHECKED)
        best = reachable(costs, checked, anchors, protected)
        if ratio > best + 0.005:
            raise ValueError(
                f"reduce_tokens: expected a ratio of at most {best:.3f}, the largest that anchors "
                f"behind blocks {', '.join(map(str, anchors))} reach at {checked} tokens with "
                f"{protected} protected, found {ratio}; add earlier anchors, or lower it"
            )
        return functools.cache(lambda n: solve(costs, ratio, n, anchors, protected))


def _number(
    name: str, value: Any, low: float, high: float, range: str, lower: bool = True,
    upper: bool = True,
) -> None:  # fmt: skip
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"reduce_tokens: expected {name} to be a number, found {value!r}")
    if not low <= value <= high or (value == low and not lower) or (value == high and not upper):
        raise ValueError(f"reduce_tokens: expected {name} to be {range}, found {value!r}")


def _choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(
            f"reduce_tokens: expected {name} to be one of {', '.join(allowed)}, found {value!r}"
        )


def _anchors(layers: Any) -> tuple[int, ...]:
    if isinstance(layers, str) or not isinstance(layers, Sequence) or not layers:
        raise ValueError(
            f"reduce_tokens: expected layers to be 'auto' or numbers of blocks, found {layers!r}"
        )
    found = tuple(sorted(set(layers)))
    if any(not isinstance(i, int) or isinstance(i, bool) or i < 0 for i in found):
        raise ValueError(
            f"reduce_tokens: expected layers to be whole numbers from 0, found {layers!r}"
        )
    return found


def _refuse(gm: GraphModule) -> None:
    for node in gm.graph.nodes:
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            reason = f"{node.target} has a body of its own, which is not reduced yet"
            raise Irreducible("region", node, reason)
        if node.op == "call_function" and getattr(node.target, "__name__", "") in MODES:
            raise Irreducible("mode", node, "autocast or a gradient mode changes inside the graph")


def _ordered(mixer: Node, found: Stream, padding: Node | None) -> bool:
    """Whether a mixer's later tokens do not reach earlier ones."""
    if effpass_op(mixer) == VARLEN:
        return bool(arguments(mixer)["causal"])
    return ordered(mixer, found, padding) if opname(mixer) == ATTENTION else True


def _what(settings: Settings, blocks: list[Block]) -> tuple[Applied]:
    rule, anchors = settings.rule, settings.anchors
    how = rule.method if rule.method in UNSCORED else f"{rule.method} by {settings.score}"
    how = f"{how}, q={rule.q:g}" if rule.method == "utrc" else how
    text = f"{how}: fewer tokens behind blocks {', '.join(map(str, anchors))} of {len(blocks)}"
    return (Applied(ReduceTokens.name, text, len(anchors), layer(blocks[anchors[0]].add)),)


def _record(
    options: ReduceTokens,
    costs: Cost,
    blocks: list[Block],
    found: Found,
    anchors: tuple[int, ...],
    causal: bool,
) -> Reduction:
    whole = [(each[0],) * len(each) for each in found]
    done = [sum(costs.total(each, anchors) for each in one) for one in (whole, found)]
    held = [sum(costs.activations(each, anchors) for each in one) for one in (whole, found)]
    item = values(blocks[0].add)[0].element_size()
    valid = (
        LOOK_AHEAD if causal and not options.causal else "rows do not read merges of later tokens"
    )
    if not causal:
        valid = "attention sees all tokens: every row is as valid as any"
    return Reduction(
        options.method,
        options.ratio,
        1 - done[1] / done[0],
        (done[0], done[1]),
        (held[0] * item, held[1] * item),
        tuple(map(sum, zip(*found, strict=True))),
        valid,
        tuple(each[0] for each in found),
    )


def _sizes(
    gm: GraphModule, stream: Stream, length: Length, plan: Callable[[int], tuple[int, ...]]
) -> EqualRows | PackedRow:
    if stream.offsets is None:
        return EqualRows(length, plan)
    return PackedRow(list(gm.graph.find_nodes(op="placeholder")).index(stream.offsets), plan)


def _fake(inputs: Sequence[Any]) -> bool:
    """Whether inputs have no values, or are not there."""
    return not inputs or any(isinstance(v, FakeTensor) for v in inputs)
