"""Builds the graph in which later blocks see fewer tokens.

Every value is computed once, in the graph's own order, at a *stage*: 0 with all tokens, ``s`` with
those that are left behind ``s`` anchors. A node runs at the highest stage of what it reads; what it
reads of an earlier stage is brought to that one: the stream by the same merges, what is bound to
positions by a gather. Outputs, and what comes behind the last block and needs all tokens, get them
back: each reads the token that it was merged into, or the nearest one that stayed.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from effpass.axes.labels import opname, single
from effpass.axes.relation import is_tensor, values
from effpass.graph.source import keep_source
from effpass.graph.writes import writes
from effpass.passes.reduction import steps
from effpass.passes.reduction.anchors import Anchor, Settings
from effpass.passes.reduction.blocks import Block, ancestors
from effpass.passes.reduction.mixers import (
    attention,
    cached_inputs,
    convolved,
    keys_and_values,
    scan,
    varlen,
)
from effpass.passes.reduction.sizes import resized
from effpass.passes.reduction.stream import (
    ATTENTION,
    VARLEN,
    Holds,
    Irreducible,
    Stream,
    effpass_op,
)

aten = torch.ops.aten
CACHE_HINT = "use_cache=False, or anchors behind the last attention"


@dataclass
class Stage:
    """What is known of the tokens at one stage, as nodes of the new graph.

    ``positions``: where they were at first (b, m). ``real``: which are no padding (b, m).
    ``reads``: which of them each of all tokens reads (b, N). ``sizes``: how many each stands for.
    ``choice``: what made this stage of the one before. ``offsets``: where sequences of a packed row
    begin among these tokens, int32 (S + 1,).
    """

    positions: Node
    real: Node
    reads: Node | None = None
    sizes: Node | None = None
    choice: Node | None = None
    offsets: Node | None = None


class Reducer:
    """One reduced graph in the making."""

    def __init__(
        self,
        gm: GraphModule,
        stream: Stream,
        blocks: list[Block],
        settings: Settings,
        content: set[Node],
        mask: Node | None,
    ) -> None:
        self.gm, self.stream, self.settings = gm, stream, settings
        self.content, self.mask = content, mask
        self.anchors = {blocks[i].add: Anchor(self, blocks[i], i) for i in settings.anchors}
        self.mixers = {a.block.mixer: a for a in self.anchors.values()}
        self.graph = Graph()
        self.env: dict[Node, Node] = {}
        self.stages: list[Stage] = []
        self.carriers: list[Node] = []
        self.offsets: list[Node] = []  # of packed rows, behind each anchor
        self.host: Node | None = None
        self._stage: dict[Node, int] = {}
        self._brought: dict[tuple[Any, ...], Node] = {}
        self._needed = self._inside_stack(blocks)
        self._caches, self._convolved = keys_and_values(gm), convolved(gm)
        self.cached = cached_inputs(gm)

    def _inside_stack(self, blocks: list[Block]) -> set[Node]:
        above = ancestors(self.gm)
        last = above[blocks[-1].add]
        return {node for i, node in enumerate(self.gm.graph.nodes) if last >> i & 1}

    def build(self) -> GraphModule:
        """The reduced graph: inputs as before, then one carrier of a size for every anchor.

        For a packed row then its offsets behind every anchor, and in front of each as one table of
        numbers on the host. Raises Irreducible.
        """
        for node in self.gm.graph.find_nodes(op="placeholder"):
            self.env[node] = self.graph.placeholder(str(node.target))
            self.env[node].meta["val"] = node.meta.get("val")
        anchors = self.settings.anchors
        self.carriers = [self.graph.placeholder(f"kept_{i}") for i in anchors]
        if self.stream.offsets is not None:
            self.offsets = [self.graph.placeholder(f"offsets_{i}") for i in anchors]
            self.host = self.graph.placeholder("offsets_of_all")
        for node in self.gm.graph.nodes:
            if node.op not in ("placeholder", "output"):
                try:
                    self._add(node)
                except Irreducible as reason:
                    reason.chain = self._chain(node)
                    raise
        output = self.gm.graph.output_node()
        self._check_caches(output)
        self.graph.output(map_arg(output.args[0], self.restored))
        made = GraphModule(self.gm, self.graph)
        self.graph.eliminate_dead_code()
        self.graph.lint()
        made.recompile()
        return made

    def _check_caches(self, output: Node) -> None:
        """Raises Irreducible where what is kept for a next call would be another than its tokens'.

        Packed tokens that were put back in their rows are all there, some twice.
        """
        kept = [n for n in pytree.tree_leaves(output.args[0]) if isinstance(n, Node)]
        kept += [n for node in self.gm.graph.nodes if writes(node) for n in node.all_input_nodes]
        for node in kept:
            if node in self._caches and self._reduced(node, self._caches):
                reason = "keys or values of a cache would have fewer tokens than it counts"
                raise Irreducible("kv_cache", node, reason, CACHE_HINT)
            if self.offsets and node in self._convolved and self._reduced(node, self._convolved):
                reason = "a convolution keeps its last inputs of rows that were put back"
                raise Irreducible("cache", node, reason, "use_cache=False, or rows without padding")

    def _reduced(self, node: Node, among: set[Node]) -> bool:
        """Whether some of the tokens that a value is moved from have left."""
        pending, seen = [node], set[Node]()
        while pending:
            each = pending.pop()
            if self.stage(each):
                return True
            found = among.intersection(each.all_input_nodes) - seen
            seen |= found
            pending += found
        return False

    def _chain(self, node: Node) -> list[Node]:
        """The nodes along which fewer tokens reach a node, from the anchor on."""
        found = [node]
        while found[-1] not in self.anchors:
            nearer = [n for n in found[-1].all_input_nodes if self.stage(n) or n in self.anchors]
            if not nearer:
                break
            found.append(nearer[-1])
        return found[::-1]

    def stage(self, node: Node) -> int:
        """At which stage a value's tokens are; 0 for what holds none."""
        return self._stage.get(node, 0)

    def _add(self, node: Node) -> None:
        if node.op != "call_function":
            self.env[node] = self.graph.node_copy(node, self.env.__getitem__)
            return
        stage = max((self.stage(source) for source in node.all_input_nodes), default=0)
        if node in self.anchors:
            self.env[node] = self.anchors[node].reduced(stage)
            self._stage[node] = stage + 1
        elif node in self.mixers:
            self.env[node] = self.mixers[node].mixed(stage)
            self._stage[node] = stage
        else:
            self.env[node], stage = self.run(node, stage)
            self._stage[node] = stage
        keep_source(node, self.env[node])
        if not isinstance(node.meta.get("val"), list | tuple) and not self.stream.holds_tokens(
            node
        ):
            self._stage[node] = 0

    def run(self, node: Node, stage: int) -> tuple[Node, int]:
        """A node at a stage, or with all tokens where it must and may; answers which it was."""
        if not stage or node.target is operator.getitem:
            return self._copied(node, self.env.__getitem__), stage
        if opname(node) == "sym_size":
            return self._size(node), 0
        if opname(node) == ATTENTION:
            return attention(self, node, stage), stage
        if effpass_op(node) == VARLEN:
            return varlen(self, node, stage), stage
        if effpass_op(node):
            return scan(self, node, stage), stage
        if node in self.cached:
            return self.cached[node](self, stage), 0
        if not any(self.stage(n) and self._tokens(n) for n in node.all_input_nodes):
            return self._copied(node, self.env.__getitem__), 0
        if writes(node):
            reason = "it writes tokens in place, of which there are fewer"
            raise Irreducible("writes", node, reason, CACHE_HINT)
        late = node not in self._needed
        mixed = late and any(
            n in self.content and self.stage(n) < stage for n in self._tensors(node)
        )
        whole = all(self.stream.of(node, i).holds is Holds.TOKENS for i in range(len(values(node))))
        if whole and self.stream.free(node) and not mixed:
            return resized(self, node, stage), stage
        if not late:
            kinds = ", ".join(sorted(self.stream.kinds(node))) or "pairs"
            name = opname(node) or str(node.target)
            reason = f"{name} is {kinds} along rows and tokens, and a later block depends on it"
            raise Irreducible("mixes_tokens", node, reason)
        return self._copied(node, self.restored), 0

    def _size(self, node: Node) -> Node:
        """A size that the graph reads: as it was."""
        source, dim = node.args
        assert isinstance(source, Node) and isinstance(dim, int)
        axis, first = self.stream.solution.dims(source)[dim], self.stages[0].positions
        if axis in (self.stream.batch, self.stream.token) and axis:
            return self.graph.call_method("size", (first, int(axis == self.stream.token)))
        return self._copied(node, self.env.__getitem__)

    def _tensors(self, node: Node) -> list[Node]:
        return [n for n in node.all_input_nodes if is_tensor(n) and self._tokens(n)]

    def _tokens(self, node: Node) -> bool:
        return isinstance(node.meta.get("val"), list | tuple) or self.stream.holds_tokens(node)

    def _copied(self, node: Node, operand: Callable[[Node], Node]) -> Node:
        args, kwargs = map_arg((node.args, node.kwargs), operand)
        return self.graph.create_node(node.op, node.target, args, kwargs)

    def call(self, target: Any, *args: Any) -> Node:
        """One more node."""
        return self.graph.call_function(target, args)

    def once(self, key: tuple[Any, ...], make: Callable[[], Node]) -> Node:
        """A node that is made when it is first asked for."""
        if key not in self._brought:
            self._brought[key] = make()
        return self._brought[key]

    # values at other stages

    def at(self, source: Node, stage: int, reader: Node) -> Node:
        """A value as a node at ``stage`` reads it."""
        here, place = self.stage(source), self.stream.of(source)
        if here == stage or place.holds is Holds.NEITHER:
            return self.env[source]
        if place.holds is Holds.PAIRS or not place.alone:
            text = self.stream.solution.text(source)
            raise Irreducible(
                "merged", reader, f"it reads {text}, which cannot be gathered by token"
            )
        if source in self.content and (place.batch is not None or self.stream.one_row):
            return self._merged(source, stage)
        return self._gathered(source, stage, reader)

    def _merged(self, source: Node, stage: int) -> Node:
        place, value = self.stream.of(source), self.env[source]
        for i in range(self.stage(source) + 1, stage + 1):

            def make(i: int = i, value: Node = value) -> Node:
                return self.leave(value, i, "residual", place.batch, place.token)

            value = self.once((source, i), make)
        return value

    def leave(
        self, value: Node, stage: int, branch: str, batch: int | None, token: int | None
    ) -> Node:
        """A value of the stream, brought from the stage before to ``stage``."""
        branch = branch if self.settings.merges else "none"
        sizes = self.stages[stage - 1].sizes if self.settings.weighted else None
        choice = self.stages[stage].choice
        return self.call(steps.left, value, choice, branch, sizes, batch, token)

    def _gathered(self, source: Node, stage: int, reader: Node) -> Node:
        place, positions = self.stream.of(source), self.stages[stage].positions
        assert place.token is not None
        if place.batch is not None or self.stream.one_row:
            return self.once(
                (source, stage),
                lambda: self.call(
                    steps.gathered, self.env[source], positions, place.batch, place.token
                ),
            )
        out, rank = self.stream.of(reader), values(reader)[0].dim()
        own = values(source)[0].shape
        shift = rank - len(own)
        fits = out.batch is not None and out.token == place.token + shift
        fits = fits and (out.batch < shift or single(own[out.batch - shift]))  # type: ignore[operator]
        pointwise = torch.Tag.pointwise in getattr(reader.target, "tags", ())
        if not fits or not out.alone or not (pointwise or opname(reader) in ("where", "expand")):
            text = self.stream.solution.text(source)
            reason = f"it reads {text}, the same for all rows, in a way that cannot differ by row"
            raise Irreducible("positions", reader, reason)
        args = (self.env[source], positions, out.batch, out.token, rank)
        return self.once(
            (source, stage, *args[2:]), lambda: self.call(steps.gathered_shared, *args)
        )

    def pairs(self, mask: Node, stage: int, attention: Node) -> Node:
        """An attention's mask for the tokens at a stage."""
        if self.stage(mask):
            raise Irreducible("mask", attention, "its mask is made of tokens of which some left")
        if not stage:
            return self.env[mask]
        sizes, tokens = values(mask)[0].shape[-2:], self.stream.token
        dims = self.stream.solution.dims(mask)[-2:]
        if any(not single(n) and dim != tokens for n, dim in zip(sizes, dims, strict=True)):
            text = self.stream.solution.text(mask)
            reason = f"its mask is not one of these tokens, but {text}"
            raise Irreducible("mask", attention, reason)
        at = self.stages[stage].positions
        return self.once((mask, stage), lambda: self.call(steps.gathered_pairs, self.env[mask], at))

    @property
    def restores(self) -> bool:
        """Whether anything is brought back to all tokens."""
        return any(key[1:] == ("full",) for key in self._brought)

    def restored(self, source: Node) -> Node:
        """A value with all tokens."""
        stage, place = self.stage(source), self.stream.of(source)
        if not stage or place.holds is Holds.NEITHER:
            return self.env[source]
        reads = self.stages[stage].reads
        if place.holds is Holds.TOKENS and self._flat(source):
            return self.once(
                (source, "full"),
                lambda: self.call(steps.gathered_flat, self.env[source], reads, place.token),
            )
        rows = place.batch is not None or self.stream.one_row
        if place.holds is Holds.PAIRS or not place.alone or not rows:
            text = self.stream.solution.text(source)
            reason = f"{text} cannot be brought back to all tokens"
            raise Irreducible("restore", source, reason)
        return self.once(
            (source, "full"),
            lambda: self.call(steps.gathered, self.env[source], reads, place.batch, place.token),
        )

    def _flat(self, source: Node) -> bool:
        """Whether rows and tokens are one dim of a value, rows first."""
        place, dims = self.stream.of(source), self.stream.solution.dims(source)
        both = self.stream.batch + self.stream.token
        return place.token is not None and place.batch == place.token and dims[place.token] == both

    def first_stage(self, like: Node) -> None:
        """Makes stage 0, whose tokens are those of a value of the stream."""
        if self.stages:
            return
        place = self.stream.of(like)
        if self.mask is None:
            real = self.call(steps.all_real, self.env[like], place.batch, place.token)
        else:
            real = self.call(steps.real_tokens, self.env[self.mask])
        offsets = None if self.stream.offsets is None else self.env[self.stream.offsets]
        self.stages.append(Stage(self.call(steps.positions, real), real, offsets=offsets))

    def next_stage(self, choice: Node) -> None:
        """Makes the stage behind one more anchor."""
        before, causal = self.stages[-1], self.settings.rule.causal
        self.stages.append(
            Stage(
                self.call(steps.kept_of, before.positions, choice),
                self.call(steps.kept_of, before.real, choice),
                self.call(steps.read_at, before.reads, choice, causal),
                self.call(steps.grown_sizes, before.sizes, choice)
                if self.settings.weighted
                else None,
                choice,
                self.offsets[len(self.stages) - 1] if self.offsets else None,
            )
        )
