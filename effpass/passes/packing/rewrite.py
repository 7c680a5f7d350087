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
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from effpass.axes.labels import opname, single
from effpass.axes.relation import Relation, arguments, is_tensor, values
from effpass.graph.region import ancestors
from effpass.passes.packing.mixers import handler
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
KEPT = ("stack_trace", "nn_module_stack")


class Rewriter:
    """One packed graph in the making."""

    def __init__(self, gm: GraphModule, places: Places, samples: Samples) -> None:
        self.gm, self.places, self.samples = gm, places, samples
        self.zeros = Zeros(places, samples)
        self.readers = Readers(places, samples)
        self.graph = Graph()
        self.contiguous = self.left = self.right = False  # what the padding must be like
        self.mixers = self.proofs = 0  # nodes that mix tokens; those that prove what the mask is
        self._plain: dict[Node, Node] = {}
        self._packed: dict[Node, Node] = {}
        self._outputs: dict[Node, tuple[Node, ...]] = {}
        self._heavy: dict[Node, bool] = {}
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
                    self.packed(node)
        output = self.gm.graph.output_node()
        self.graph.output(map_arg(output.args[0], self.plain))
        if self.left and self.right:
            reason = "final states need padding in front, and something else needs it at the end"
            raise Unpackable("states", output, reason, "prefill without a cache, or rows alone")
        made = GraphModule(self.gm, self.graph)
        self.graph.eliminate_dead_code()
        self.graph.lint()
        made.recompile()
        return made

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
            self._plain[node] = self._made_plain(node)
        return self._plain[node]

    def _made_plain(self, node: Node) -> Node:
        if opname(node) == "sym_size":
            return self._size(node)
        if not self.heavy(node) or node not in self.places.solution:
            return self._copy(node)
        if self.place(node).holds is Holds.TOKENS and self._can_pack(node):
            restored = self._restored(node)
            if not self.zeros.at_padding(node):
                self.readers.taint(node)
            return restored
        source, output = _output_of(node)
        if handler(source) is not None:
            self.left = True  # behind padding, the padded model's own state is another
            return self.outputs(source)[output]
        self.readers.read(node, self.plain)
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
        return self.from_(node, self.graph.call_function(node.target, args, kwargs))  # type: ignore[arg-type]

    def from_(self, node: Node, made: Node) -> Node:
        """Gives a new node the source of the node it stands for."""
        for key in KEPT:
            if key in node.meta:
                made.meta[key] = node.meta[key]
        return made

    def _restored(self, node: Node) -> Node:
        place, packed = self.place(node), self.packed(node)
        assert place.token is not None
        if place.batch is not None and place.batch != place.token:
            packed = self.call(aten.squeeze.dim, packed, place.batch)
        token = place.token - (place.batch is not None and place.batch < place.token)
        self._refuse_merged(node, place)
        first = self.call(aten.movedim.int, packed, token, 0)
        all_tokens = self.graph.call_function(operator.mul, (self.b, self.t))
        size = self.graph.call_method("size", (first,))
        rest = self.graph.call_function(operator.getitem, (size, slice(1, None)))
        shape = self.graph.call_function(operator.add, ((all_tokens,), rest))
        empty = self.graph.call_method("new_zeros", (first, shape))
        filled = self.call(aten.index_copy.default, empty, 0, self.index["indices"], first)
        if place.batch == place.token:
            return self.call(aten.movedim.int, filled, 0, place.token)
        shape = self.graph.call_function(operator.add, ((self.b, self.t), rest))
        rows = self.graph.call_method("reshape", (filled, shape))
        if place.batch is None:
            row = self.call(aten.squeeze.dim, rows, 0)
            return self.call(aten.movedim.int, row, 0, place.token)
        return self.call(aten.movedim.intlist, rows, [0, 1], [place.batch, place.token])

    def _refuse_merged(self, node: Node, place: Place) -> None:
        """Tokens are gathered and put back where their dims hold nothing else, rows first."""
        dims, alone = self.places.solution.dims(node), (self.places.token, self.places.batch)
        if place.token is not None and place.token == place.batch:
            alone = (self.places.batch + self.places.token,)
        if any(d is not None and dims[d] not in alone for d in (place.token, place.batch)):
            text = self.places.solution.text(node)
            raise Unpackable("merged", node, f"its tokens or rows share a dim with more: {text}")

    # packed forms

    def packed(self, node: Node) -> Node:
        """The value of real tokens alone: its dims, with one row of all tokens."""
        if node not in self._packed:
            self._packed[node] = self._made_packed(node)
        return self._packed[node]

    def _made_packed(self, node: Node) -> Node:
        if node.op == "placeholder" or not self.heavy(node):
            return self._gathered(node)
        if self.place(node).holds is not Holds.TOKENS:
            raise Unpackable("rows", node, "it mixes the rows of the batch")
        source, output = _output_of(node)
        return self.outputs(source)[output]

    def _gathered(self, node: Node) -> Node:
        """The tokens of a plain value, in one row."""
        place, plain = self.place(node), self.plain(node)
        self._refuse_merged(node, place)
        if self.readers.tainted(node):
            raise Unpackable("reads_padding", node, "it is made of padding tokens")
        token, batch = place.token, place.batch
        assert token is not None
        if place.holds is Holds.POSITIONS or batch is None:
            return self.call(aten.index_select.default, plain, token, self.index["columns"])
        if batch == token:
            return self.call(aten.index_select.default, plain, token, self.index["indices"])
        front = self.call(aten.movedim.intlist, plain, [batch, token], [0, 1])
        flat = self.call(aten.flatten.using_ints, front, 0, 1)
        chosen = self.call(aten.index_select.default, flat, 0, self.index["indices"])
        rows = self.call(aten.unsqueeze.default, chosen, 0)
        return self.call(aten.movedim.intlist, rows, [0, 1], [batch, token])

    def rows_as_tokens(self, node: Node, token: int) -> Node:
        """A value with one entry a row, as one with an entry a token in dim ``token``."""
        batch = self.place(node).batch
        assert batch is not None
        self._refuse_merged(node, self.place(node))
        chosen = self.call(aten.index_select.default, self.plain(node), batch, self.index["rows"])
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
            self._outputs[node] = self._run(node)
        return self._outputs[node]

    def _run(self, node: Node) -> tuple[Node, ...]:
        found = handler(node)
        if found is not None:
            self.mixers += 1
            return found(self, node)
        if not self._can_pack(node):
            kinds = ", ".join(sorted(self.places.kinds(node)))
            name = opname(node) or str(node.target)
            raise Unpackable("mixes_tokens", node, f"{name} is {kinds} along rows and tokens")
        made = self.from_(node, self._free(node))
        if not isinstance(node.meta["val"], list | tuple):
            return (made,)
        return tuple(self.call(operator.getitem, made, i) for i in range(len(values(node))))

    def _free(self, node: Node) -> Node:
        relation = self.places.solution.relations[node]
        operand = _operands(self, relation)
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


def _operands(rewriter: Rewriter, relation: Relation) -> Callable[[Node], Node]:
    """How a free node reads its operands."""
    places, node = rewriter.places, relation.node
    out = places.of(node)

    def operand(source: Node) -> Node:
        if not is_tensor(source):
            return rewriter.plain(source)
        holds = places.of(source).holds
        if holds in (Holds.TOKENS, Holds.POSITIONS):
            return rewriter.packed(source)
        if holds is Holds.NEITHER:
            return rewriter.plain(source)
        if holds is Holds.SQUARE:
            raise Unpackable("pairs", node, "it reads a value of every pair of tokens")
        shape, rank = values(source)[0].shape, values(node)[0].dim()
        at = -1 if out.token is None else out.token - (rank - len(shape))
        pointwise = torch.Tag.pointwise in node.target.tags or opname(node) == "expand"  # type: ignore[union-attr]
        if not pointwise or out.batch == out.token or at < 0 or not single(shape[at]):
            raise Unpackable("rows", node, "it reads a value of every row, not element by element")
        return rewriter.rows_as_tokens(source, at)

    return operand


def _output_of(node: Node) -> tuple[Node, int]:
    """The node, and which of its outputs, that makes a value."""
    if node.target is operator.getitem and isinstance(node.args[0], Node):
        return node.args[0], int(node.args[1])  # type: ignore[arg-type]
    return node, 0
