"""Which input is the padding mask, and what of a graph forbids packing altogether."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.fx import GraphModule, Node

from effpass.axes.labels import expression, opname, single
from effpass.axes.relation import arguments, is_tensor, values
from effpass.axes.rules.views import MADE, MADE_BESIDE
from effpass.axes.solve import Solution, solve
from effpass.graph.region import ancestors
from effpass.graph.writes import writes
from effpass.passes.packing.mixers import attentions
from effpass.passes.packing.places import Places, Unpackable
from effpass.passes.packing.rewrite import Rewriter
from effpass.passes.packing.samples import Samples

NO_MASK = "a padding mask is an input (batch, tokens) of integers, booleans or 0.0 and 1.0"


def packed_form(gm: GraphModule) -> tuple[Rewriter, GraphModule]:
    """The graph on real tokens alone, for the first input that proves to be its padding mask.

    Raises Unpackable with what stopped the most promising one.
    """
    _refuse(gm)
    stopped: list[tuple[int, Unpackable]] = []
    for mask in _candidates(gm):
        rewriter = None
        try:
            rewriter = Rewriter(gm, Places(_solved(gm, mask), mask), Samples(mask))
            made = rewriter.build()
            if rewriter.proofs:
                return rewriter, made
            reason = "no attention, scan or convolution of this graph depends on it"
            stopped.append((0, Unpackable("no_mask", mask, reason, NO_MASK)))
        except Unpackable as reason:
            stopped.append((rewriter.reached if rewriter else 0, reason))
    if not stopped:
        raise Unpackable("no_mask", None, "no input of the graph is a padding mask", NO_MASK)
    raise max(stopped, key=lambda each: each[0])[1]


def _candidates(gm: GraphModule) -> Iterator[Node]:
    """Inputs (b, t) that nobody looks up in a table."""
    for node in gm.graph.find_nodes(op="placeholder"):
        looked_up = any(opname(user) == "embedding" for user in node.users)
        if _shaped_like_a_mask(node) and not looked_up:
            yield node


def _solved(gm: GraphModule, mask: Node) -> Solution:
    """Axes of the graph, if ``mask`` is the padding mask: its rows and tokens are those of keys.

    An index leads from a mask (b, t) to keys in many models, which says nothing of axes; that they
    are the same is proven later, by what the mask of every attention is on sample paddings.
    """
    solution = solve(gm)
    b, t = solution.dims(mask)
    for node in attentions(gm):
        given = arguments(node)
        if is_tensor(given["attn_mask"]) and mask in ancestors([given["attn_mask"]]):
            source = given["key"]
            dims, shape = solution.dims(source), values(source)[0].shape
            for axis, d, size in ((b, 0, 0), (t, len(dims) - 2, 1)):
                if expression(shape[d]) == expression(values(mask)[0].shape[size]):
                    solution.classes.join(axis, dims[d])
    return solution


def _shaped_like_a_mask(node: Node) -> bool:
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.dim() != 2 or not node.users:
        return False
    given = node.meta.get("effpass_parameter") or value.requires_grad
    return not given and not single(value.shape[1])


def _refuse(gm: GraphModule) -> None:
    for node in gm.graph.nodes:
        if isinstance(node.target, HigherOrderOperator):
            raise Unpackable(
                "region", node, f"{node.target} has a body of its own, which is not packed yet"
            )
        if node.op == "call_function" and not all(map(_own_memory, writes(node))):
            raise Unpackable("writes", node, "it writes to memory in place")
        if node.op == "call_function" and getattr(node.target, "__name__", "") in MODES:
            raise Unpackable("mode", node, "autocast or a gradient mode changes inside the graph")


def _own_memory(node: Node) -> bool:
    """Whether a tensor is new, and nothing but one write ever reads it: a cache's buffer."""
    return len(node.users) == 1 and (opname(node) in MADE or opname(node) in MADE_BESIDE)


MODES = (
    *("_enter_autocast", "_exit_autocast", "_set_grad_enabled", "set_grad_enabled"),
    *("_enter_inference_mode", "_exit_inference_mode"),
)
