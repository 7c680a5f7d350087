"""What runs before a packed graph, on the host: which tokens are real, and whether it may run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._dynamo import maybe_mark_dynamic
from torch.fx import GraphModule

Run = Callable[..., Any]


@dataclass(frozen=True)
class Needs:
    """What a packed graph needs of a batch; where it is not so, the plain graph runs.

    ``contiguous``: no padding between real tokens. ``left``, ``right``: padding only in front of
    them, only behind them.
    ``columns``: positions that are real in every row that has a real token. ``longest``: greatest
    length for which its masks were looked at. ``picks``: a graph of the inputs that answers
    positions (rows, positions) that are read and must be real, and then targets. ``ignored``: of
    each of these targets, what it must be at padding, and the position that its rows begin at.
    ``inverted``: the mask is 1 at padding.
    """

    contiguous: bool = False
    left: bool = False
    right: bool = False
    columns: tuple[int, ...] = ()
    longest: int | None = None
    picks: GraphModule | None = None
    ignored: tuple[tuple[int, int], ...] = ()
    inverted: bool = False


@dataclass
class Packed:
    """Runs one of two forms of a graph, by the padding of each batch.

    ``mask`` is the place of the mask (b, t) among the inputs. ``counts`` says how often each form
    ran. One host synchronisation a batch: all that is asked of the mask is read at once.
    """

    mask: int
    needs: Needs
    plain: Run
    packed: Run
    counts: dict[str, int]

    def __call__(self, *inputs: Any) -> Any:
        """Outputs of the graph for these inputs."""
        mask: Tensor = inputs[self.mask]
        real = self.real(mask)
        total = self.fits(mask, real, inputs)
        if not total:
            self.counts["plain"] += 1
            return self.plain(*inputs)
        self.counts["packed"] += 1
        extra = indices(real, total)
        for each in extra[:3]:
            maybe_mark_dynamic(each, 0)
        return self.packed(*inputs, *extra)

    def real(self, mask: Tensor) -> Tensor:
        """(b, t) booleans: which tokens are real."""
        return mask == 0 if self.needs.inverted else mask != 0

    def fits(self, mask: Tensor, real: Tensor, inputs: Sequence[Any]) -> int:
        """The number of real tokens, 0 where the packed graph may not run or has nothing to save.

        Raises ValueError for what is no mask.
        """
        found = torch.cat([real.sum()[None], self._checks(mask, real, real.sum(1), inputs)])
        total, valid, fits = (int(v) for v in found.tolist())
        if not valid:
            meaning = "0 (padding) and 1 (a token)"
            if self.needs.inverted:
                meaning = "1 (padding) and 0 (a token)"
            raise ValueError(
                f"pack_varlen: expected the padding mask to hold {meaning} only, "
                f"found values from {mask.min().item()} to {mask.max().item()}"
            )
        longest = self.needs.longest
        known = longest is None or real.shape[1] <= longest
        return total if fits and known and 1 < total < real.numel() else 0

    def _checks(self, mask: Tensor, real: Tensor, lengths: Tensor, inputs: Sequence[Any]) -> Tensor:
        """(2,): whether the mask holds 0 and 1 only; whether the packed form may run."""
        fits = torch.ones((), dtype=torch.bool, device=mask.device)
        tokens, columns = real.shape[1], torch.arange(real.shape[1], device=mask.device)
        if self.needs.right:
            fits = fits & (real == (columns < lengths[:, None])).all()
        elif self.needs.left:
            fits = fits & (real == (columns >= tokens - lengths[:, None])).all()
        elif self.needs.contiguous:
            starts = real[:, :1].sum(1) + (real[:, 1:] & ~real[:, :-1]).sum(1)
            fits = fits & (starts <= 1).all()
        for column in self.needs.columns:
            fits = fits & (real[:, column] | (lengths == 0)).all()
        if self.needs.picks is not None:
            pairs, targets = self.needs.picks(*inputs)
            for rows, positions in pairs:
                fits = fits & (real[rows, positions] | (lengths == 0)[rows]).all()
            for target, (index, first) in zip(targets, self.needs.ignored, strict=True):
                each = target.reshape(len(real), -1)
                of_tokens = real[:, first : first + each.shape[1]]
                fits = fits & (of_tokens | (each == index)).all()
        valid = ((mask == 0) | (mask == 1)).all()
        return torch.stack([valid, fits]).long()


def indices(real: Tensor, total: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of the ``total`` real tokens of a mask (b, t): flat index, row, column; and ``cu_seqlens``.

    ``cu_seqlens`` is (b + 1,). The number is known, so that nothing waits for a device.
    """
    flat = torch.nonzero_static(real.flatten(), size=total).squeeze(1)
    ends = real.sum(1).cumsum(0, dtype=torch.int32)
    return flat, flat // real.shape[1], flat % real.shape[1], torch.cat([ends.new_zeros(1), ends])
