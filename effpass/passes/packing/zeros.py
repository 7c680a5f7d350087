"""Which tensors are zero at every padding token, whatever the weights and the other tokens are."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from effpass.axes.labels import EXPANDS, KEEPS, PERMUTES, RESHAPES, opname
from effpass.axes.relation import arguments, is_tensor
from effpass.passes.packing.places import Holds, Places
from effpass.passes.packing.samples import Samples

# 0 -> 0, element by element or along dims that are not tokens
KEEP_ZERO = frozenset(
    (
        *(*KEEPS, *PERMUTES, *RESHAPES, *EXPANDS, "to", "_to_copy", "detach", "dropout"),
        *("slice", "split", "split_with_sizes", "chunk", "narrow", "unbind", "select"),
        *("neg", "relu", "silu", "gelu", "tanh", "abs", "sqrt", "square", "sin", "sum", "mean"),
    )
)


class Zeros:
    """Answers for one graph, remembered."""

    def __init__(self, places: Places, samples: Samples) -> None:
        self.places, self.samples = places, samples
        self._known: dict[Node, bool] = {}

    def at_padding(self, node: Node) -> bool:
        """Whether every element of a padding token is zero (or was zero times what is finite)."""
        if node not in self._known:
            self._known[node] = False  # of a cycle nothing is known
            self._known[node] = self._is_zero(node)
        return self._known[node]

    def _is_zero(self, node: Node) -> bool:
        if node.op != "call_function":
            return False
        if not opname(node):  # getitem of split
            return bool(node.all_input_nodes) and self.at_padding(node.all_input_nodes[0])
        name, given = opname(node), arguments(node)
        if name == "mul":
            return any(self._closes(given[k]) or self._zero(given[k]) for k in ("self", "other"))
        if name in ("div", "true_divide"):
            return self._zero(given["self"])
        if name in ("add", "sub"):
            return self._zero(given["self"]) and self._zero(given["other"])
        if name == "where":
            return self._selects(given["condition"], given["self"], given["other"])
        if name == "masked_fill":
            return self._selects(given["mask"], given["value"], given["self"])
        if name in ("linear", "matmul", "mm"):
            first = given.get("input", given.get("self"))
            return not is_tensor(given.get("bias")) and self._zero(first)
        return name in KEEP_ZERO and self.places.free(node) and self._zero(node.args[0])

    def _zero(self, value: Any) -> bool:
        return is_tensor(value) and self.at_padding(value)

    def _closes(self, value: Any) -> bool:
        """Whether a light value is 0 at padding tokens, in all samples."""
        return is_tensor(value) and self._always(value, lambda v: v == 0)

    def _selects(self, condition: Any, chosen: Any, otherwise: Any) -> bool:
        """``where(condition, chosen, otherwise)``: zero at padding, by what is selected there."""
        if not is_tensor(condition):
            return False
        for value, at in ((chosen, True), (otherwise, False)):
            zero = self._zero(value) or _number_zero(value)
            if zero and self._always(condition, lambda v, at=at: v == at):
                return True
        return False

    def _always(self, node: Node, test: Any) -> bool:
        """Whether a light value passes ``test`` at padding tokens of every sample."""
        if not self.samples.light(node) or node not in self.places.solution:
            return False
        place = self.places.of(node)
        if place.holds is not Holds.TOKENS or place.token is None:
            return False
        for i, mask in enumerate(self.samples.masks):
            value: Tensor = self.samples.value(node, i)
            dims = [place.token] if place.batch is None else [place.batch, place.token]
            if place.batch == place.token:
                found = test(value).movedim(place.token, 0).reshape(mask.numel(), -1)
            else:
                found = test(value).movedim(dims, list(range(len(dims)))).reshape(mask.numel(), -1)
            if not bool(torch.where(mask.bool().reshape(-1, 1), True, found).all()):
                return False
        return True


def _number_zero(value: Any) -> bool:
    """A constant 0: a number, or the node of a zero tensor without dims."""
    if isinstance(value, int | float):
        return value == 0
    return is_tensor(value) and opname(value) in ("zeros", "zeros_like", "new_zeros")
