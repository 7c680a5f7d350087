"""Clean a captured graph: one spelling for what has several. Exact, and local to a few nodes.

The rules are one table of functions; each looks at a node, and answers the value that replaces it
(or None). What a rule joins lies in one region (no change of grad mode or autocast in between); an
output of the graph keeps its own tensor; strides change only in front of ops, which read any.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable

import torch
from torch._ops import OpOverload
from torch.fx import GraphModule, Node

from effpass.graph.source import layer
from effpass.report import Applied

aten = torch.ops.aten
Rule = Callable[[Node], Node | None]


def clean(gm: GraphModule) -> list[Applied]:
    """Applies the rules once to every node in order, bodies of checkpoints included."""
    counts: Counter[str] = Counter()
    first: dict[str, str] = {}
    for body in graphs(gm):
        number_regions(body)
        for node in list(body.graph.nodes):
            for rule in RULES:
                replacement = rule(node)
                if replacement is None:
                    continue
                node.replace_all_uses_with(replacement)
                _erase(node)
                counts[rule.__name__] += 1
                first.setdefault(rule.__name__, layer(node))
                break
        body.recompile()
    return [Applied("clean", name, n, first[name]) for name, n in sorted(counts.items())]


def graphs(gm: GraphModule) -> list[GraphModule]:
    """The graph and the bodies inside it, innermost last."""
    return [m for m in gm.modules() if isinstance(m, GraphModule)]


def same_dtype_cast(node: Node) -> Node | None:
    """``x.to(x.dtype)`` is x."""
    if node.target is not aten.to.dtype or len(node.args) != 2 or node.kwargs:
        return None
    source = node.args[0]
    if not isinstance(source, Node) or not _tensor(source):
        return None
    return source if source.meta["val"].dtype == node.args[1] else None


def double_transpose(node: Node) -> Node | None:
    """Transposing twice over the same dims is the tensor itself."""
    if node.target is not aten.transpose.int:
        return None
    inner = node.args[0]
    if not isinstance(inner, Node) or inner.target is not aten.transpose.int:
        return None
    source = inner.args[0]
    if not isinstance(source, Node) or _dims(node) != _dims(inner) or _dims(node) is None:
        return None
    return source if _one_region(node, inner, *node.users) and not _is_output(node) else None


def matmul_of_transpose(node: Node) -> Node | None:
    """``(W @ x^T)^T``, read by ops alone, is ``linear(x, W)``: channels last in memory."""
    if node.target is not aten.transpose.int or _dims(node) != (1, 2):
        return None
    product = node.args[0]
    if not isinstance(product, Node) or product.target is not aten.matmul.default:
        return None
    weight, right = product.args
    if not isinstance(weight, Node) or not isinstance(right, Node) or len(product.users) != 1:
        return None
    if right.target is not aten.transpose.int or _dims(right) != (1, 2) or not _tensor(weight):
        return None
    left, values = weight.meta["val"], right.meta["val"]
    if left.dim() != 2 or values.dim() != 3 or left.dtype != values.dtype:
        return None
    if not _one_region(node, product, right, *node.users) or not all(
        _is_op(user) for user in node.users
    ):
        return None
    graph = node.graph
    with graph.inserting_before(product):  # where autocast and grad mode are those of the product
        linear = graph.call_function(aten.linear.default, (right.args[0], weight))
    linear.meta = dict(product.meta)
    linear.meta["val"] = node.meta["val"].contiguous()
    return linear


def made_by_size(node: Node) -> Node | None:
    """``x.new_zeros(2)``, and ``zeros_like(x)`` of fixed size, read nothing of x."""
    made = MADE_BY_SIZE.get(node.target)
    value = node.meta.get("val")
    if made is None or not isinstance(value, torch.Tensor):
        return None
    shape, fills = list(value.shape), () if made[1] is None else (node.args[made[1]],)
    if not all(isinstance(n, int) for n in shape):
        shape = None if node.target in LIKE else node.args[1]
    if shape is None or not value.is_contiguous():
        return None
    if any(isinstance(fill, Node) for fill in fills):
        return None
    kwargs = {"dtype": value.dtype, "device": value.device}
    with node.graph.inserting_before(node):
        fresh = node.graph.call_function(made[0], (shape, *fills), kwargs)
    fresh.meta = dict(node.meta)
    return fresh


def detached_constant(node: Node) -> Node | None:
    """``torch.tensor(1.0)`` is captured as a fresh copy that is detached: the copy is enough."""
    if node.target is not aten.detach_.default:
        return None
    copy = node.args[0]
    if not isinstance(copy, Node) or copy.target is not aten.lift_fresh_copy.default:
        return None
    return copy if _tensor(copy) and not copy.meta["val"].requires_grad else None


# what each becomes, and at which place its fill stands
MADE_BY_SIZE: dict[object, tuple[OpOverload, int | None]] = {
    aten.new_zeros.default: (aten.zeros.default, None),
    aten.zeros_like.default: (aten.zeros.default, None),
    aten.new_ones.default: (aten.ones.default, None),
    aten.ones_like.default: (aten.ones.default, None),
    aten.new_full.default: (aten.full.default, 2),
    aten.full_like.default: (aten.full.default, 1),
}
LIKE = (aten.zeros_like.default, aten.ones_like.default, aten.full_like.default)
RULES: tuple[Rule, ...] = (
    same_dtype_cast,
    double_transpose,
    matmul_of_transpose,
    made_by_size,
    detached_constant,
)


# nodes after which autograd or autocast treats the same call in another way
REGION_CHANGES = ("_set_grad_enabled", "_enter_autocast", "_exit_autocast")


def number_regions(gm: GraphModule) -> None:
    """Gives each node the number of its region, counted by changes of grad mode and autocast."""
    region = 0
    for node in gm.graph.nodes:
        region += getattr(node.target, "__name__", "") in REGION_CHANGES
        node.meta["effpass_region"] = region


def _one_region(*nodes: Node) -> bool:
    return len({node.meta.get("effpass_region") for node in nodes}) == 1


def _is_output(node: Node) -> bool:
    return any(user.op == "output" for user in node.users)


def _is_op(node: Node) -> bool:
    return getattr(node.target, "namespace", "") == "effpass"


def _tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _dims(node: Node) -> tuple[int, int] | None:
    source = node.args[0]
    if not isinstance(source, Node) or not _tensor(source):
        return None
    rank = source.meta["val"].dim()
    a, b = (int(d) % rank for d in node.args[1:3])  # type: ignore[call-overload]
    return (min(a, b), max(a, b))


def _erase(node: Node) -> None:
    """Removes a replaced node, and the views and products that only it used."""
    inputs = node.all_input_nodes
    node.graph.erase_node(node)
    for source in inputs:
        if not source.users and source.target in (aten.transpose.int, aten.matmul.default):
            _erase(source)
