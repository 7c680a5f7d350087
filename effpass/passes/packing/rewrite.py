"""Builds the graph that runs on real tokens alone, from the graph that runs on all.

Every tensor has up to two forms: *plain*, as it was, and *packed*: the same dims in the same order,
with one row (b = 1) of all real tokens (t = N). What a node needs is asked for and built once:

- free nodes run on packed operands: same op, same dims, other sizes;
- attention, scans and convolutions get the boundaries of sequences;
- what depends on integers or positions alone is computed as it was, and its tokens gathered;
- what is read in plain form, graph outputs above all, is scattered back, zero at padding.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

from effpass.axes.labels import opname, single
from effpass.axes.relation import arguments, is_tensor, values
from effpass.graph.region import ancestors
from effpass.graph.source import keep_source
from effpass.passes.packing.dry_run import check_shapes
from effpass.passes.packing.islands import Islands
from effpass.passes.packing.losses import is_loss, packed_loss
from effpass.passes.packing.mixers import handler
from effpass.passes.packing.modes import ModedGraph, modes, switch_modes
from effpass.passes.packing.moves import gather, put_back
from effpass.passes.packing.operands import operands
from effpass.passes.packing.places import Holds, Place, Places, Unpackable
from effpass.passes.packing.readers import Readers
from effpass.passes.packing.samples import Samples
from effpass.passes.packing.zeros import Zeros

aten = torch.ops.aten
INDEX_INPUTS = ("indices", "rows", "columns", "cu_seqlens")
SIZED = ("view", "reshape", "_unsafe_view", "expand", "unflatten", "view_as", "reshape_as")
CUTS = ("slice", "narrow", "split", "split_with_sizes", "chunk", "tensor_split")
FILLED = ("zeros", "ones", "full", "empty", "rand", "randn")
FILLED_BESIDE = ("new_zeros", "new_ones", "new_full", "new_empty")


class Rewriter:
    """One packed graph in the making."""

    def __init__(self, gm: GraphModule, places: Places, samples: Samples) -> None:
        self.gm, self.places, self.samples = gm, places, samples
        self.zeros = Zeros(places, samples)
        self.readers = Readers(places, samples)
        self.islands = Islands(places, samples)
        self.graph = ModedGraph()
        self.modes = modes(gm)
        self.contiguous = self.left = self.right = False  # what the padding must be like
        self.mixers = self.proofs = 0  # nodes that mix tokens; those that prove what the mask is
        self._plain: dict[Node, Node] = {}
        self._packed: dict[Node, Node] = {}
        self._outputs: dict[Node, tuple[Node, ...]] = {}
        self._heavy: dict[Node, bool] = {}
        self._stuck: dict[Node, Unpackable] = {}  # why nodes have no packed form, though they might
        self.proven: list[Node] = []  # values of islands that are right at real tokens
        for node in gm.graph.find_nodes(op="placeholder"):
            self._plain[node] = self.graph.placeholder(str(node.target))
            self._plain[node].meta["val"] = node.meta.get("val")
        self.index = {name: self.graph.placeholder(f"packed_{name}") for name in INDEX_INPUTS}
        self.tokens = self.graph.call_method("size", (self.index["indices"], 0))
        mask = self._plain[places.mask]
        self.b = self.graph.call_method("size", (mask, 0))
        self.t = self.graph.call_method("size", (mask, 1))

    def build(self) -> GraphModule:
        """The packed graph: inputs as before, then INDEX_INPUTS. Raises Unpackable."""
        for node in self.gm.graph.nodes:  # in order, so that nothing recurses deeply
            if node in self.places.solution and self.heavy(node):
                self.zeros.at_padding(node)
                if self.place(node).holds is Holds.TOKENS and self._can_pack(node):
                    self._try(node)
                elif handler(_output_of(node)[0]) is None:
                    self.plain(node)
        output = self.gm.graph.output_node()
        self.graph.output(map_arg(output.args[0], self._result))
        length: Any = values(self.places.mask)[0].shape[1]
        last = any(column in (-1, length - 1) for column in self.readers.columns)
        if self.right and (self.left or last):
            reason = "final states need padding in front, and something else needs it at the end"
            raise Unpackable("states", output, reason, "prefill without a cache, or rows alone")
        made = GraphModule(self.gm, self.graph)
        self.graph.eliminate_dead_code()
        switch_modes(self.graph)
        self.graph.lint()
        made.recompile()
        check_shapes(made, self.places.mask)
        return made

    def _try(self, node: Node) -> bool:
        """Whether a node that may have a packed form does; remembers why not, changes nothing."""
        source, _ = _output_of(node)
        if source not in self._stuck and node not in self._packed:
            try:
                self.packed(node)
            except Unpackable as reason:
                self._stuck[source] = reason
        return source not in self._stuck

    def _result(self, node: Node) -> Node:
        """An output of the graph."""
        if node not in self.places.solution or not self.heavy(node):
            return self.plain(node)
        tokens = self.place(node).holds is Holds.TOKENS
        plain = self.plain(node)
        moved = node in self.readers.mixed or node in self.readers.picked
        if not moved and not (tokens and self._selects(node) and node in self._packed):
            return plain
        if not tokens:
            return self.whole(node)
        with self.graph.within(self.modes[node]):
            return self._put_back(node)

    def whole(self, node: Node) -> Node:
        """The plain value, which no padding has changed. Raises Unpackable where it may have."""
        plain = self.plain(node)
        if self.readers.tainted(node):
            self._prove(node)
        return plain

    def _prove(self, node: Node) -> None:
        """Raises Unpackable unless real tokens of an island's value are as they were."""
        if node in self.proven:
            return
        tokens = self.place(node).holds is Holds.TOKENS
        if node in self.readers.picked and not tokens:
            self.readers.demand(node)
            return
        verdict = self.islands.verdict(node)
        if verdict is None or not (verdict.right or verdict.left):
            source, _ = _output_of(node)
            reason = self._stuck.get(source) or self.readers.mixed.get(node)
            raise reason or Unpackable("reads_padding", node, "it is made of padding tokens")
        self.right |= not verdict.left
        self.left |= not verdict.right
        self.contiguous |= not verdict.scattered
        self.proofs += verdict.masked
        self.proven.append(node)

    @property
    def reached(self) -> int:
        """How many values have a packed form."""
        return len(self._packed)

    def heavy(self, node: Node) -> bool:
        """Whether a value is made of tokens by weights: what is worth packing."""
        if node not in self._heavy:
            self._heavy[node] = not self.samples.light(node) and self._of_tokens(node)
        return self._heavy[node]

    def _of_tokens(self, node: Node) -> bool:
        if node.op == "placeholder":
            holds = self.place(node).holds if node in self.places.solution else Holds.NEITHER
            return holds is Holds.TOKENS and not node.meta.get("effpass_parameter")
        return any(
            self.heavy(source) or (self.samples.light(source) and self._reads_tokens(source))
            for source in node.all_input_nodes
        )

    def _reads_tokens(self, node: Node) -> bool:
        return any(
            self.place(each).holds is Holds.TOKENS
            for each in ancestors([node])
            if each.op == "placeholder" and each in self.places.solution
        )

    def place(self, node: Node) -> Place:
        """Where a tensor holds batch and tokens."""
        return self.places.of(node)

    # plain forms

    def plain(self, node: Node) -> Node:
        """The value as it was; zero at padding where it had to be scattered back."""
        if node not in self._plain:
            with self.graph.within(self.modes[node]):
                self._plain[node] = self._made_plain(node)
        return self._plain[node]

    def _made_plain(self, node: Node) -> Node:
        if opname(node) == "sym_size":
            return self._size(node)
        if not self.heavy(node) or node not in self.places.solution:
            return self._copy(node)
        source, output = _output_of(node)
        tokens = self.place(node).holds is Holds.TOKENS
        wanted = tokens and not self._selects(node) and not self._shares(node)
        if wanted and self._can_pack(node) and self._try(node):
            restored = self._put_back(node)
            self.islands.shores.add(node)
            if self.zeros.at_padding(node):
                self.islands.zeros.add(node)
            else:
                self.readers.taint(node)
            return restored
        if is_loss(node):
            try:
                return packed_loss(self, node)
            except Unpackable as reason:
                self._stuck[node] = reason
        if handler(source) is not None and not tokens and source not in self._stuck:
            self.left = True  # behind padding, the padded model's own state is another
            return self.outputs(source)[output]
        self.readers.read(node, self.plain, self._stuck.get(source))
        return self._copy(node)

    def _size(self, node: Node) -> Node:
        source, dim = node.args
        assert isinstance(source, Node) and isinstance(dim, int)
        axis = self.places.solution.dims(source)[dim]
        if axis == self.places.token:
            return self.t
        return self.b if axis == self.places.batch else self._copy(node)

    def _copy(self, node: Node) -> Node:
        if node.op == "get_attr":
            return self.graph.get_attr(str(node.target))
        if node.op != "call_function":
            raise Unpackable("node", node, f"{node.op} {node.target} is no operation of a graph")
        args, kwargs = map_arg((node.args, node.kwargs), self.plain)
        # what was put back may lie otherwise in memory than what it stands for
        target: Any = aten.reshape.default if node.target is aten.view.default else node.target
        return keep_source(node, self.graph.call_function(target, args, kwargs))

    def _put_back(self, node: Node) -> Node:
        """The packed tokens where they were, zeros at padding."""
        self._refuse_merged(node)
        return put_back(self, node)

    def _selects(self, node: Node) -> bool:
        """Whether the model itself chooses what padding holds, by a mask: no zeros, perhaps."""
        given = node.args[0] if opname(node) == "where" else node.args[1:2]
        given = given if isinstance(given, tuple) else (given,)
        selects = opname(node) in ("where", "masked_fill")
        return selects and all(is_tensor(n) and self.samples.light(n) for n in given)

    def _shares(self, node: Node) -> bool:
        """Whether rows or tokens share a dim with something else, or lie in it tokens first."""
        place = self.place(node)
        dims, alone = self.places.solution.dims(node), (self.places.token, self.places.batch)
        if place.token is not None and place.token == place.batch:
            alone = (self.places.batch + self.places.token,)
        return any(d is not None and dims[d] not in alone for d in (place.token, place.batch))

    def _refuse_merged(self, node: Node) -> None:
        """Tokens are gathered and put back where their dims hold nothing else, rows first."""
        if self._shares(node):
            text = self.places.solution.text(node)
            raise Unpackable("merged", node, f"its tokens or rows share a dim with more: {text}")

    # packed forms

    def packed(self, node: Node) -> Node:
        """The value of real tokens alone: its dims, with one row of all tokens."""
        if node not in self._packed:
            with self.graph.within(self.modes[node]):
                self._packed[node] = self._made_packed(node)
        return self._packed[node]

    def _made_packed(self, node: Node) -> Node:
        if node.op == "placeholder" or not self.heavy(node):
            return self._gathered(node)
        if self.place(node).holds is not Holds.TOKENS:
            raise Unpackable("rows", node, "it mixes the rows of the batch")
        source, output = _output_of(node)
        if source not in self._stuck and self._can_pack(node):
            return self.outputs(source)[output]
        return self._gathered(node)

    def _gathered(self, node: Node) -> Node:
        """The tokens of a plain value, in one row."""
        self.plain(node)
        self._refuse_merged(node)
        if self.readers.tainted(node):
            self._prove(node)
        return gather(self, node)

    def rows_as_tokens(self, node: Node, token: int) -> Node:
        """A value with one entry a row, as one with an entry a token in dim ``token``."""
        batch = self.place(node).batch
        assert batch is not None
        self._refuse_merged(node)
        chosen = self.call(aten.index_select.default, self.whole(node), batch, self.index["rows"])
        return self.call(aten.transpose.int, chosen, batch, token)

    def call(self, target: Any, *args: Any) -> Node:
        """One more node."""
        return self.graph.call_function(target, args)

    def _can_pack(self, node: Node) -> bool:
        node, _ = _output_of(node)
        if handler(node) is not None:
            return True
        outputs = range(len(values(node)))
        tokens = all(self.places.of(node, i).holds is Holds.TOKENS for i in outputs)
        return tokens and node.op == "call_function" and self.places.free(node)

    def outputs(self, node: Node) -> tuple[Node, ...]:
        """Packed forms of all outputs of a node."""
        if node not in self._outputs:
            with self.graph.within(self.modes[node]):
                self._outputs[node] = self._run(node)
        return self._outputs[node]

    def _run(self, node: Node) -> tuple[Node, ...]:
        found = handler(node)
        if found is not None:
            made = found(self, node)
            self.mixers += 1
            return made
        if not self._can_pack(node):
            kinds = ", ".join(sorted(self.places.kinds(node)))
            name = opname(node) or str(node.target)
            raise Unpackable("mixes_tokens", node, f"{name} is {kinds} along rows and tokens")
        made = keep_source(node, self._free(node))
        if not isinstance(node.meta["val"], list | tuple):
            return (made,)
        return tuple(self.call(operator.getitem, made, i) for i in range(len(values(node))))

    def _free(self, node: Node) -> Node:
        relation = self.places.solution.relations[node]
        operand = operands(self, relation)
        name, given = opname(node), arguments(node)
        if name in CUTS and given["dim"] % values(given["self"])[0].dim() == self.place(node).token:
            if name != "slice":
                raise Unpackable("cut", node, "it cuts the tokens, in one piece")
            return self.call(aten.alias.default, operand(given["self"]))
        if name == "squeeze":
            return self._squeezed(node, operand)
        if name in SIZED or name in FILLED or name in FILLED_BESIDE:
            return self._resized(node, name, operand)
        args, kwargs = map_arg((node.args, node.kwargs), operand)
        return self.graph.create_node(node.op, node.target, args, kwargs)

    def _squeezed(self, node: Node, operand: Callable[[Node], Node]) -> Node:
        """Only dims that had size 1 go; that of the rows now has, too."""
        given = arguments(node)
        shape = values(given["self"])[0].shape
        dims = given.get("dim", list(range(len(shape))))
        dims = [d % len(shape) for d in (dims if isinstance(dims, list | tuple) else [dims])]
        gone = [d for d in dims if single(shape[d])]
        return self.call(aten.squeeze.dims, operand(given["self"]), gone)

    def _resized(self, node: Node, name: str, operand: Callable[[Node], Node]) -> Node:
        """A reshape, an expansion or a new tensor, of the packed size."""
        sizes = self.places.sizes(node, 0, self.tokens)
        if sizes is None:
            raise Unpackable("sizes", node, "its other sizes change, too")
        shape = [
            self.graph.call_function(operator.mul, size) if isinstance(size, tuple) else size
            for size in sizes
        ]
        given = arguments(node)
        if name in FILLED or name in FILLED_BESIDE:
            args, kwargs = map_arg((node.args, node.kwargs), operand)
            at = 0 if name in FILLED else 1
            return self.graph.create_node(
                node.op, node.target, (*args[:at], shape, *args[at + 1 :]), kwargs
            )
        target = aten.expand.default if name == "expand" else aten.reshape.default
        return self.call(target, operand(given["self"]), shape)


def _output_of(node: Node) -> tuple[Node, int]:
    """The node, and which of its outputs, that makes a value."""
    if node.target is operator.getitem and isinstance(node.args[0], Node):
        return node.args[0], int(node.args[1])  # type: ignore[arg-type]
    return node, 0
