"""Attention that a model writes out (softmax of scores and a mask), looked at like torch's own."""

from __future__ import annotations

from torch.fx import GraphModule, Node

from effpass.axes.labels import opname
from effpass.axes.relation import is_tensor
from effpass.passes.boundaries.marks import RowError
from effpass.passes.boundaries.samples import RowSamples, seen_in_rows

SOFTMAX = ("softmax", "_softmax")
WEIGHTS = ("matmul", "bmm", "einsum")
KEEPS = ("dropout", "to", "_to_copy", "type_as", "clone", "contiguous", "expand", "view", "reshape")


def apart(gm: GraphModule, samples: RowSamples) -> set[Node]:
    """Nodes of attention whose masks keep sequences apart: softmax, and the weighted sum."""
    found: set[Node] = set()
    for node in gm.graph.nodes:
        if opname(node) in SOFTMAX and _kept_apart(node, samples):
            found |= {node, *_sums(node)}
    return found


def _kept_apart(softmax: Node, samples: RowSamples) -> bool:
    scores = softmax.args[0]
    if not isinstance(scores, Node) or opname(scores) != "add":
        return False
    masks = [n for n in scores.all_input_nodes if is_tensor(n) and samples.light(n)]
    try:
        return any(seen_in_rows(softmax, mask, False, samples)[1] for mask in masks)
    except RowError:
        return False


def _sums(weights: Node) -> list[Node]:
    """Products with the weights, and nothing else that reads them."""
    found, pending = [], [weights]
    while pending:
        for user in pending.pop().users:
            if opname(user) in WEIGHTS:
                found.append(user)
            elif opname(user) in KEEPS:
                pending.append(user)
    return found
