"""The stream of tokens: where each tensor of a graph holds rows and tokens."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from torch.fx import GraphModule, Node

from effpass.axes.labels import Dim, opname, single
from effpass.axes.relation import Kind, arguments, is_tensor, values
from effpass.axes.solve import Solution, solve
from effpass.graph.source import layer, line
from effpass.ops import OPS
from effpass.ops.nodes import called

ATTENTION = "scaled_dot_product_attention"
VARLEN = "varlen_attention"
SHOWN = 8  # operations of a chain that are named


class Irreducible(Exception):
    """This graph cannot run on fewer tokens: where, why, and what could be done."""

    def __init__(self, code: str, node: Node | None, reason: str, hint: str = "") -> None:
        super().__init__(reason)
        self.code, self.reason, self.hint = code, reason, hint
        self.chain: list[Node] = []
        self.where = "" if node is None else " ".join(filter(None, (layer(node), line(node))))

    def text(self) -> str:
        """The reason, and the chain of operations from the anchor to where it applies."""
        names = [opname(n) or effpass_op(n) or n.name for n in self.chain]
        if len(names) < 2:
            return self.reason
        shown = names if len(names) <= SHOWN else [names[0], "...", *names[1 - SHOWN :]]
        return f"{self.reason}: {' -> '.join(shown)}"


class Holds(StrEnum):
    """What a tensor has one of."""

    TOKENS = "tokens"  # every token, of every row where there are several
    PAIRS = "pairs"  # every pair of tokens
    NEITHER = "neither"


@dataclass(frozen=True)
class Place:
    """The dims that hold rows and tokens. ``alone``: neither shares its dim with anything else."""

    holds: Holds
    batch: int | None = None
    token: int | None = None
    alone: bool = True


class Stream:
    """Places of all tensors, by the axes that the first mixer names.

    ``offsets``: of a packed row, the input that tells where its sequences begin, ``cu_seqlens``.
    """

    def __init__(
        self, solution: Solution, batch: Dim, token: Dim, one_row: bool, offsets: Node | None
    ) -> None:
        self.solution, self.one_row, self.offsets = solution, one_row, offsets
        self._batch, self._token = batch, token

    @property
    def token(self) -> Dim:
        """The axis of tokens."""
        return self.solution.classes.resolve(self._token)

    @property
    def batch(self) -> Dim:
        """The axis of rows; empty for a single row."""
        return self.solution.classes.resolve(self._batch)

    def of(self, node: Node, output: int = 0) -> Place:
        """Where one tensor holds rows and tokens."""
        if (node, output) not in self.solution._dims:
            return Place(Holds.NEITHER)
        dims = self.solution.dims(node, output)
        token = [i for i, dim in enumerate(dims) for label in dim if (label,) == self.token]
        batch = [i for i, dim in enumerate(dims) for label in dim if (label,) == self.batch]
        if not token:
            return Place(Holds.NEITHER, batch[0] if len(batch) == 1 else None)
        if len(token) > 1 or len(batch) > 1:
            return Place(Holds.PAIRS)
        rows = batch[0] if batch else None
        alone = dims[token[0]] == self.token and (rows is None or dims[rows] == self.batch)
        return Place(Holds.TOKENS, rows, token[0], alone)

    def holds_tokens(self, node: Node) -> bool:
        """Whether any tensor that a node makes holds tokens."""
        return any(self.of(node, i).holds is not Holds.NEITHER for i in range(len(values(node))))

    def full(self, node: Node) -> bool:
        """Whether a tensor holds every token of every row, each in a dim of its own."""
        place = self.of(node)
        rows = place.batch is not None or self.one_row
        return place.holds is Holds.TOKENS and place.alone and rows

    def kinds(self, node: Node) -> set[Kind]:
        """What a node does along rows and tokens."""
        return self.solution.kinds(node, [*self.token, *self.batch])

    def free(self, node: Node) -> bool:
        """Whether a node treats every row and every token by itself."""
        return self.kinds(node) <= {Kind.FREE}


def effpass_op(node: Node) -> str:
    """The name of an op of effpass; empty for anything else."""
    op = called(node)
    return "" if op is None else op.name


def is_mixer(node: Node) -> bool:
    """Whether a node mixes tokens in a way that is known: attention, a scan, a convolution."""
    return attends(node) or bool(effpass_op(node))


def attends(node: Node) -> bool:
    """Whether a node is attention, of rows or of packed sequences."""
    return opname(node) == ATTENTION or effpass_op(node) == VARLEN


def first_operand(node: Node) -> Node:
    """The tensor whose tokens a mixer mixes."""
    given = arguments(node)
    attention = opname(node) == ATTENTION
    found = given["query" if attention else OPS[effpass_op(node)].tensor_names[0]]
    assert is_tensor(found)
    return found


def stream(gm: GraphModule) -> Stream:
    """The stream of tokens of a graph. Raises Irreducible where there is none."""
    mixers = [n for n in gm.graph.nodes if is_mixer(n)]
    if not mixers:
        raise Irreducible("no_mixer", None, "no attention, scan or convolution was found in it")
    solution, node = solve(gm), mixers[0]
    source = first_operand(node)
    dims, shape = solution.dims(source), values(source)[0].shape
    at = len(dims) - 2 if opname(node) == ATTENTION else int(effpass_op(node) != VARLEN)
    if single(shape[at]):
        raise Irreducible("one_token", node, "there is one token: nothing can leave")
    batch, one_row = (dims[0], single(shape[0])) if at else ((), True)
    if len(dims[at]) != 1 or len(batch) > 1:
        raise Irreducible("cut", node, "a reshape cuts rows or tokens in parts")
    return Stream(solution, batch, dims[at], one_row, _offsets(mixers))


def _offsets(mixers: list[Node]) -> Node | None:
    """The input that tells all mixers where sequences begin; None where none is packed.

    Torch's attention may stand among them: its own mask keeps sequences apart.
    """
    given = {n: OPS[effpass_op(n)].bind(*n.args, **n.kwargs) for n in mixers if effpass_op(n)}
    found = {each["cu_seqlens"] for each in given.values()}
    if found <= {None}:
        return None
    hint = "reduce rows of their own, or pack without reducing"
    first = next(n for n, each in given.items() if each["cu_seqlens"] is not None)
    offsets = given[first]["cu_seqlens"]
    if found != {offsets} or any(e.get("cu_seqlens_k") is not None for e in given.values()):
        raise Irreducible("packed", first, "not all of it is packed by the same boundaries", hint)
    if offsets.op != "placeholder":
        raise Irreducible("packed", first, "its boundaries are computed inside the graph", hint)
    return offsets
