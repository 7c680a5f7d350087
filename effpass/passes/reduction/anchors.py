"""One anchor: the block behind whose sum tokens leave, on both of its branches."""

from __future__ import annotations

from dataclasses import astuple, dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.fx import Node

from effpass.axes.labels import opname
from effpass.axes.relation import arguments, is_tensor, values
from effpass.ops import OPS
from effpass.passes.reduction import steps
from effpass.passes.reduction.blocks import Block
from effpass.passes.reduction.choice import ALTERNATE, MERGING, UNSCORED, Rule
from effpass.passes.reduction.mixers import attention, scan, varlen
from effpass.passes.reduction.stream import ATTENTION, VARLEN, Irreducible, attends, effpass_op

if TYPE_CHECKING:
    from effpass.passes.reduction.rewrite import Reducer

STEPPED = ("selective_scan", "ssd_scan")
FIRST = "the score cls needs attention in which the first token sees all others"


@dataclass(frozen=True)
class Settings:
    """What a reduced graph is built for: the rule, the anchors, the score, the alignment."""

    rule: Rule
    anchors: tuple[int, ...]
    score: str
    alignment: str

    @property
    def merges(self) -> bool:
        """Whether tokens are merged at all."""
        return self.rule.method in MERGING

    @property
    def weighted(self) -> bool:
        """Whether tokens count as often as those that they stand for."""
        return self.rule.method == "tome"

    @property
    def split(self) -> bool:
        """Whether the two branches of a block are treated differently."""
        return self.rule.method == "utrc" and self.rule.q > 0


class Anchor:
    """Emits one block's mixer and sum, with the reduction between."""

    def __init__(self, reducer: Reducer, block: Block, index: int) -> None:
        self.reducer, self.block, self.index = reducer, block, index
        self._output: Node | None = None  # the mixer's output, before its gate

    def mixed(self, stage: int) -> Node:
        """The mixer itself; a scan's gate is taken out of it, for what is judged comes before."""
        mixer, made = self.block.mixer, None
        if attends(mixer):
            run = attention if opname(mixer) == ATTENTION else varlen
            self._output = run(self.reducer, mixer, stage)
            return self._output
        name = effpass_op(mixer)
        gate = OPS[name].bind(*mixer.args, **mixer.kwargs).get("z")
        made = scan(self.reducer, mixer, stage, gate=False)
        y = self.reducer.graph.call_function(_getitem, (made, 0))
        self._output = y
        if not is_tensor(gate):
            return made
        z = self.reducer.at(gate, stage, mixer)
        gated = self.reducer.call(steps.gated, y, z)
        state = self.reducer.graph.call_function(_getitem, (made, 1))
        return self.reducer.call(steps.pair, gated, state)

    def reduced(self, stage: int) -> Node:
        """The block's sum, with the tokens that stay."""
        r, add = self.reducer, self.block.add
        both = [r.at(n, stage, add) for n in add.args[:2]]  # type: ignore[arg-type]
        r.first_stage(add if not r.stages and add in r.env else self.block.residual)
        place = r.stream.of(add)
        whole = r.graph.create_node("call_function", add.target, tuple(both), dict(add.kwargs))
        choice = self._choice(stage, whole)
        r.next_stage(choice)
        now = len(r.stages) - 1
        if not r.settings.split:
            return r.leave(whole, now, "residual", place.batch, place.token)
        parts = []
        for source, value in zip(add.args[:2], both, strict=True):
            assert isinstance(source, Node)
            if not r.stream.full(source):
                raise Irreducible("layout", add, "one side of its sum is not one value a token")
            own = r.stream.of(source)
            pruned = "none" if r.settings.rule.q == 1 else "mixer"
            branch = "residual" if source is self.block.residual else pruned
            parts.append(r.leave(value, now, branch, own.batch, own.token))
        return r.graph.create_node("call_function", add.target, tuple(parts), dict(add.kwargs))

    def _choice(self, stage: int, whole: Node) -> Node:
        r, rule = self.reducer, self.reducer.settings.rule
        score = None if rule.method in UNSCORED else self._score(stage, whole)
        metric = self._metric(stage) if r.settings.merges else None
        number = r.settings.anchors.index(self.index)
        real, extra = r.stages[-1].real, ()
        if r.offsets:
            extra = ((r.stages[-1].offsets, r.offsets[number], r.host), number)
        return r.call(
            steps.chosen_packed if extra else steps.chosen,
            *(score, metric, real, r.carriers[number], *extra),
            astuple(replace(rule, seed=rule.seed + self.index)),
        )

    def _score(self, stage: int, whole: Node) -> Node:
        name, mixer = self.reducer.settings.score, self.block.mixer
        if name == "hidden_norm":
            place = self.reducer.stream.of(self.block.add)
            return self.reducer.call(steps.score_output, name, whole, place.batch, place.token)
        if name == "dt_norm":
            return self._step_score(stage)
        if name == "cls":
            return self._first_score(stage)
        place = self.reducer.stream.of(mixer)
        if name == "deviation":
            now = self.reducer.stages[-1]
            args = (self._output, place.batch, place.token, now.real, now.offsets)
            return self.reducer.call(steps.score_deviation, *args)
        return self.reducer.call(steps.score_output, name, self._output, place.batch, place.token)

    def _step_score(self, stage: int) -> Node:
        mixer = self.block.mixer
        name = effpass_op(mixer)
        if name not in STEPPED:
            reason = f"its {name or opname(mixer)} has no step sizes for the score dt_norm"
            raise Irreducible("score", mixer, reason, "score='clip_y'")
        given = OPS[name].bind(*mixer.args, **mixer.kwargs)
        dt = self.reducer.at(given["dt"], stage, mixer)
        bias = given["dt_bias"]
        bias = self.reducer.env[bias] if is_tensor(bias) else None
        clamped = given.get("dt_min"), given.get("dt_max")
        return self.reducer.call(steps.score_steps, dt, bias, bool(given["dt_softplus"]), *clamped)

    def _first_score(self, stage: int) -> Node:
        mixer, r = self.block.mixer, self.reducer
        if effpass_op(mixer) == VARLEN:
            return self._first_packed(stage)
        given: dict[str, Any] = arguments(mixer) if opname(mixer) == ATTENTION else {}
        if not given or given["is_causal"]:
            raise Irreducible("score", mixer, FIRST, "score='clip_y'")
        if r.offsets:
            reason = "its row is packed by its own mask, where the score cls is not known"
            raise Irreducible("score", mixer, reason, "score='clip_y'")
        scale = given["scale"]
        if scale is None:
            scale = float(values(given["query"])[0].shape[-1]) ** -0.5
        q, k = (r.at(given[n], stage, mixer) for n in ("query", "key"))
        mask = r.pairs(given["attn_mask"], stage, mixer) if is_tensor(given["attn_mask"]) else None
        return r.call(steps.score_first, q, k, scale, mask)

    def _first_packed(self, stage: int) -> Node:
        mixer, r = self.block.mixer, self.reducer
        given = OPS[VARLEN].bind(*mixer.args, **mixer.kwargs)
        if given["causal"]:
            raise Irreducible("score", mixer, FIRST, "score='clip_y'")
        scale = given["scale"]
        if scale is None:
            scale = float(values(given["q"])[0].shape[-1]) ** -0.5
        q, k = (r.at(given[n], stage, mixer) for n in ("q", "k"))
        args = (r.stages[stage].offsets, r.stages[stage].positions, given["window"][1])
        return r.call(steps.score_first_packed, q, k, scale, *args)

    def _metric(self, stage: int) -> Node:
        r, mixer = self.reducer, self.block.mixer
        if attends(mixer) and r.settings.rule.method in ALTERNATE:
            if effpass_op(mixer) == VARLEN:
                return r.call(
                    steps.metric_of_packed_keys, r.at(arguments(mixer)["k"], stage, mixer)
                )
            return r.call(steps.metric_of_keys, r.at(arguments(mixer)["key"], stage, mixer))
        place = r.stream.of(mixer)
        return r.call(steps.metric_of, self._output, place.batch, place.token)


def _getitem(pair: tuple[torch.Tensor, ...], i: int) -> torch.Tensor:
    return pair[i]
