"""Feed-forward blocks, ``down(act(up(x)))`` and ``down(act(gate(x)) * up(x))``, recorded.

Found from the second projection, whose input is followed back through elementwise operations to
projections of one and the same tensor. What they compute, as a function of one number, names the
activation, whether it is one operation or written out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node

from effpass.axes.labels import RESHAPES, argument, opname
from effpass.graph.emit import same_sizes
from effpass.patterns.blocks.activations import activate, recognise
from effpass.patterns.blocks.projections import Projection, part, projection, through
from effpass.patterns.proposal import Idiom, Missed, Proposal
from effpass.patterns.softmax.scores import number

ELEMENTWISE = frozenset(
    (
        *("add", "sub", "rsub", "mul", "div", "neg", "pow", "square", "sqrt", "abs", "exp", "log"),
        *("erf", "tanh", "sigmoid", "relu", "relu6", "silu", "gelu", "mish", "softplus", "elu"),
        *("selu", "celu", "leaky_relu", "hardswish", "hardsigmoid", "hardtanh", "clamp", "log1p"),
        *("clamp_min", "clamp_max", "maximum", "minimum", "where", "gt", "ge", "lt", "le"),
        *("reciprocal", "rsqrt", "expm1", "special_expit", "special_erf", "softsign", "sign"),
        *("log_sigmoid", "threshold", "hardshrink", "softshrink", "logaddexp", "erfc"),
        *("zeros_like", "ones_like"),
    )
)
NORMS = ("layer_norm", "rms_norm", "group_norm", "batch_norm", "native_layer_norm")
FARTHEST = 40


@dataclass(frozen=True)
class Leaf:
    """The columns ``start`` to ``end`` of a projection."""

    projection: Projection
    start: int
    end: int


@dataclass(frozen=True)
class Branch:
    """An elementwise function of one leaf: ``factor * activation(leaf)``."""

    leaf: Leaf
    activation: str
    factor: float

    def compute(self, env: Mapping[Node, Tensor], x: Tensor) -> Tensor:
        """The branch from the block's input and the weights."""
        y = _project(self.leaf.projection, env, x)
        return activate(self.activation, self.factor, y[..., self.leaf.start : self.leaf.end])


def find(graph: Graph) -> Iterable[Node]:
    """Every projection."""
    return [node for node in graph.nodes if projection(node) is not None]


def check(node: Node) -> Proposal | None:
    """The block that ends in a projection."""
    down = projection(node)
    if down is None or _bias_follows(node):
        return None
    root, path = _unviewed(down.x)
    norm = root if opname(root) in NORMS else None
    hidden = Hidden()
    if not hidden.read(root if norm is None else argument(norm, 0)):
        return None
    branches = _branches(hidden, root if norm is None else argument(norm, 0))
    if branches is None:
        return None
    if norm is not None:
        name = opname(norm)
        raise Missed(f"between the activation and the second projection is {name}", norm)
    hidden.check_users({*path, *_products(node)})
    ends = _ends([b.leaf.projection.x for b in branches], node)
    return None if ends is None else _proposal(*ends, branches, down)


class Hidden:
    """What lies between the projections: nodes, and the leaves that they are computed from."""

    def __init__(self) -> None:
        self.nodes: set[Node] = set()
        self.leaves: dict[Node, Leaf] = {}

    def read(self, node: Any, depth: int = 0) -> bool:
        """Whether ``node`` is an elementwise function of projections; collects them."""
        if not isinstance(node, Node) or depth > FARTHEST:
            return False
        if node in self.nodes or node in self.leaves:
            return True
        if (leaf := self._leaf(node)) is not None:
            self.leaves[node] = leaf
            return True
        if (source := through(node)) is not None:
            found = self.read(source, depth + 1)
        elif opname(node) == "dropout" and self.read(argument(node, 0), depth + 1):
            raise Missed(f"dropout is active (p = {argument(node, 1)})", node)
        elif opname(node) == "glu" and depth == 0:
            found = self.read(argument(node, 0), depth + 1)
        elif opname(node) in ELEMENTWISE:
            operands = [n for n in node.all_input_nodes if number(n) is None]
            found = bool(operands) and all(self.read(n, depth + 1) for n in operands)
        else:
            return False
        self.nodes.add(node)
        return found

    def used(self, node: Node) -> set[Node]:
        """The leaves that a node is computed from."""
        if node in self.leaves:
            return {node}
        return {n for source in node.all_input_nodes for n in self._used(source)}

    def _used(self, node: Node) -> set[Node]:
        return self.used(node) if node in self.nodes or node in self.leaves else set()

    def factors(self, node: Node) -> list[Node]:
        """What is multiplied to make a node."""
        source = through(node) if node not in self.leaves else None
        if source is not None:
            return self.factors(source)
        pair = [argument(node, i) for i in range(2)]
        if node in self.leaves or opname(node) != "mul" or not all(map(self._inside, pair)):
            return [node]
        return [factor for each in pair for factor in self.factors(each)]

    def _inside(self, node: Any) -> bool:
        return isinstance(node, Node) and (node in self.nodes or node in self.leaves)

    def value(self, node: Any, x: Tensor, known: dict[Node, Tensor]) -> Any:
        """What a node computes where every leaf is ``x``."""
        if not isinstance(node, Node):
            return node
        if node in self.leaves:
            return x
        if node not in self.nodes:
            return number(node)
        if node not in known:
            source = through(node)
            if source is not None:
                known[node] = self.value(source, x, known)
            else:
                args = [self.value(arg, x, known) for arg in node.args]
                known[node] = node.target(*args, **node.kwargs)  # type: ignore[operator]
        return known[node]

    def check_users(self, behind: set[Node]) -> None:
        """Hidden values are used inside only: else no later pass could change them."""
        inside = behind.union(self.nodes, self.leaves)
        for node in sorted(inside - {max(behind)}):
            for user in node.users:
                if user not in inside:
                    what = "returned" if user.op == "output" else f"used by {user.name}"
                    raise Missed(f"the hidden values are also {what}", node)

    def _leaf(self, node: Node) -> Leaf | None:
        found, path = projection(node), [node]
        if found is not None:
            return Leaf(found, 0, int(found.weight.outputs))
        piece = part(node)
        if piece is None:
            return None
        whole, start, end = piece
        path += [n for n in node.all_input_nodes if n is not whole]
        while projection(whole) is None:
            path.append(whole)
            source = through(whole)
            if source is None:
                return None
            whole = source
        found = projection(whole)
        assert found is not None
        self.nodes.update(path[1:], (whole,))
        return Leaf(found, start, end)


def _bias_follows(node: Node) -> bool:
    """Whether a bias is added behind a product: the sum is then the projection."""
    users = list(node.users)
    return len(users) == 1 and opname(users[0]) == "add" and projection(users[0]) is not None


def _unviewed(node: Node) -> tuple[Node, list[Node]]:
    """What is behind views and casts, and those."""
    path = []
    while (source := through(node)) is not None:
        path.append(node)
        node = source
    return node, path


def _products(node: Node) -> list[Node]:
    """A projection, and the product in front of its bias where that is a node of its own."""
    pair = [argument(node, 0), argument(node, 1)] if opname(node) == "add" else []
    return [node, *(n for n in pair if isinstance(n, Node) and projection(n) is not None)]


def _branches(hidden: Hidden, root: Node) -> tuple[Branch, ...] | None:
    """(up) or (gate, up); None where nothing happens between the projections."""
    groups: dict[Leaf, list[Node]] = {}
    if opname(root) == "glu":
        return _glu(root)
    for factor in hidden.factors(root):
        leaves = {hidden.leaves[n] for n in hidden.used(factor)}
        if len(leaves) != 1:
            return None
        groups.setdefault(leaves.pop(), []).append(factor)
    if len(groups) > 2:
        return None
    made = [_branch(hidden, leaf, factors, root) for leaf, factors in groups.items()]
    if len(made) == 1:
        alone = made[0].leaf
        whole = alone.end - alone.start == alone.projection.weight.outputs
        return (made[0],) if whole and made[0].activation != "identity" else None
    plain = [branch for branch in made if branch.activation == "identity"]
    if not plain:
        raise Missed("both factors of the gated product pass an activation", root)
    up = plain[-1]
    return (made[0] if up is made[1] else made[1], up)


def _glu(node: Node) -> tuple[Branch, Branch] | None:
    """torch's gate: the first half times the sigmoid of the second."""
    whole, dim = projection(argument(node, 0)), argument(node, 1)
    rank, width = node.meta["val"].dim(), node.meta["val"].shape[-1]
    if whole is None or dim not in (None, -1, rank - 1):
        return None
    up, gate = Leaf(whole, 0, width), Leaf(whole, width, 2 * width)
    return Branch(gate, "sigmoid", 1.0), Branch(up, "identity", 1.0)


def _branch(hidden: Hidden, leaf: Leaf, factors: list[Node], root: Node) -> Branch:
    def function(x: Tensor) -> Tensor:
        known: dict[Node, Tensor] = {}
        values = [hidden.value(factor, x, known) for factor in factors]
        return torch.stack([torch.as_tensor(v).expand(x.shape) for v in values]).prod(0)

    found = recognise(function)
    if found is None:
        raise Missed("the function between the projections is no activation known by name", root)
    return Branch(leaf, *found)


def _ends(sources: list[Node], node: Node) -> tuple[Node, Node] | None:
    """Input and output of the block, of the same leading sizes."""
    if any(source is not sources[0] for source in sources):
        raise Missed("the two factors are projections of different tensors", node)
    source: Any = sources[0]
    last = node
    while (user := _only_view(last)) is not None:
        last = user
    while not _alike(source, last) and opname(source) in RESHAPES:
        source = argument(source, 0)
    if not _alike(source, last):
        source, last = sources[0], node
    return (source, last) if _alike(source, last) else None


def _only_view(node: Node) -> Node | None:
    """The one user of a node, if that is a view which keeps the channels."""
    user = next(iter(node.users), None)
    view = user is not None and len(node.users) == 1 and opname(user) in RESHAPES
    return user if view and through(user) is node else None  # type: ignore[arg-type]


def _alike(source: Node, last: Node) -> bool:
    shapes = [n.meta["val"].shape[:-1] for n in (source, last)]
    return same_sizes(*shapes)


def _proposal(source: Node, last: Node, branches: tuple[Branch, ...], down: Projection) -> Proposal:
    projections = (*(b.leaf.projection for b in branches), down)
    vectors = [n for p in projections for n in (p.weight.node, p.bias) if n is not None]
    inputs = tuple(dict.fromkeys((source, *vectors)))

    def build(*tensors: Tensor) -> list[Tensor]:
        env = dict(zip(inputs, tensors, strict=True))
        x = env[source]
        hidden = [branch.compute(env, x) for branch in branches]
        return [_project(down, env, hidden[0] * hidden[1] if len(hidden) > 1 else hidden[0])]

    attributes = _attributes(branches, down) | {"input": source, "output": last}
    return Proposal("ffn", inputs, (last,), build, attributes=attributes)


def _attributes(branches: tuple[Branch, ...], down: Projection) -> dict[str, Any]:
    """What later passes need to know; ``transposed``: columns of the weight are its outputs."""
    gate, up = branches if len(branches) == 2 else (None, branches[0])
    named = {"up": up.leaf.projection, "down": down}
    named |= {} if gate is None else {"gate": gate.leaf.projection}
    fused = None
    if gate is not None and gate.leaf.projection == up.leaf.projection:
        fused = "gate_up" if gate.leaf.start < up.leaf.start else "up_gate"
    return {
        "kind": "plain" if gate is None else "gated",
        "activation": (gate or up).activation,
        "factor": up.factor * (1.0 if gate is None else gate.factor),
        "hidden": up.leaf.end - up.leaf.start,
        "fused": fused,
        "weights": {name: p.weight.node for name, p in named.items()},
        "transposed": {name: p.weight.flipped for name, p in named.items()},
        "biases": {name: p.bias for name, p in named.items() if p.bias is not None},
    }


def _project(p: Projection, env: Mapping[Node, Tensor], x: Tensor) -> Tensor:
    weight = env[p.weight.node]
    bias = None if p.bias is None else env[p.bias]
    return torch.nn.functional.linear(x, weight.t() if p.weight.flipped else weight, bias)


IDIOM = Idiom("feed-forward block", find, check, records=True)
