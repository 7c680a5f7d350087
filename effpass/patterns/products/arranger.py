"""Lays out tensors by label: the way back from a normal form of products to operations."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from effpass.patterns.products.algebra import Dims, Label


class Arranger:
    """Lays out values of factors by label, in builds: reshapes, permutes and broadcasts."""

    def __init__(self) -> None:
        self.sizes: dict[Label, Any] = {}

    def atoms(self, value: Tensor, dims: Dims) -> tuple[Tensor, list[Label]]:
        """``value`` with one dim a label, and the labels; remembers their sizes."""
        labels: list[Label] = []
        for i in reversed(range(len(dims))):
            if not dims[i]:
                value = value.squeeze(i)
            elif len(dims[i]) > 1:
                sizes = [a.size if isinstance(a.size, int) else -1 for a in dims[i]]
                value = value.unflatten(i, sizes)
            labels[:0] = dims[i]
        self.sizes |= dict(zip(labels, value.shape, strict=True))
        return value, labels

    def lay(self, value: Tensor, dims: Dims, order: Sequence[Label]) -> Tensor:
        """``value`` with its labels in the given order, dims of size 1 for those it lacks."""
        value, labels = self.atoms(value, dims)
        value = value.permute([labels.index(a) for a in order if a in labels])
        for i, label in enumerate(order):
            if label not in labels:
                value = value.unsqueeze(i)
        return value

    def product(
        self, pairs: Iterable[tuple[Tensor, Dims]], order: Sequence[Label], coefficient: float = 1.0
    ) -> Tensor | None:
        """The product of several values laid out in one order; None of no values."""
        result = None
        for value, dims in pairs:
            laid = self.lay(value, dims, order)
            result = laid if result is None else result * laid
        return result if result is None or coefficient == 1.0 else result * coefficient

    def full(self, value: Tensor, order: Sequence[Label]) -> Tensor:
        """``value``, laid out in ``order``, expanded over the labels it lacks."""
        return value.expand([self.sizes[label] for label in order])

    def merged(self, value: Tensor, order: Sequence[Label], dims: Dims) -> Tensor:
        """``value`` laid out in ``order``, as a tensor of these dims."""
        flat = [label for dim in dims for label in dim]
        value = value.permute([order.index(label) for label in flat])
        for i, dim in enumerate(dims):
            if not dim:
                value = value.unsqueeze(i)
            elif len(dim) > 1:
                value = value.flatten(i, i + len(dim) - 1)
        return value
