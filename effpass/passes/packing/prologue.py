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

    ``contiguous``: no padding between real tokens. ``right``: padding at the end of rows only.
    ``columns``: positions that are real in every row that has a real token. ``longest``: greatest
    length for which its masks were looked at. ``picks``: a graph of the inputs that answers
    positions (rows, positions) that are read and must be real.
    """

    contiguous: bool = False
    right: bool = False
    columns: tuple[int, ...] = ()
    longest: int | None = None
    picks: GraphModule | None = None


@dataclass
class Packed:
    """Runs one of two forms of a graph, by the padding of each batch.

    ``mask`` is the place of the mask (b, t) among the inputs. ``counts`` says how often each form
    ran. One host synchronisation a batch.
    """

    mask: int
    needs: Needs
    plain: Run
    packed: Run
    counts: dict[str, int]

    def __call__(self, *inputs: Any) -> Any:
        """Outputs of the graph for these inputs."""
        mask: Tensor = inputs[self.mask]
        real = mask != 0
        rows, tokens = real.shape
        lengths = real.sum(1)
        found = torch.cat([lengths.sum()[None], self._checks(mask, real, lengths, inputs)])
        total, valid, fits = (int(v) for v in found.tolist())
        if not valid:
            raise ValueError(
                "pack_varlen: expected the padding mask to hold 0 (padding) and 1 (a token) only, "
                f"found values from {mask.min().item()} to {mask.max().item()}"
            )
        longest = self.needs.longest
        if total == rows * tokens or total < 2 or not fits or (longest and tokens > longest):
            self.counts["plain"] += 1
            return self.plain(*inputs)
        self.counts["packed"] += 1
        indices = real.flatten().nonzero().squeeze(1)
        ends = lengths.cumsum(0, dtype=torch.int32)
        cu_seqlens = torch.cat([ends.new_zeros(1), ends])
        extra = (indices, indices // tokens, indices % tokens, cu_seqlens)
        for each in extra[:3]:
            maybe_mark_dynamic(each, 0)
        return self.packed(*inputs, *extra)

    def _checks(self, mask: Tensor, real: Tensor, lengths: Tensor, inputs: Sequence[Any]) -> Tensor:
        """(2,): whether the mask holds 0 and 1 only; whether the packed form may run."""
        fits = torch.ones((), dtype=torch.bool, device=mask.device)
        if self.needs.right:
            fits = (
                fits
                & (
                    real == (torch.arange(real.shape[1], device=mask.device) < lengths[:, None])
                ).all()
            )
        elif self.needs.contiguous:
            starts = real[:, :1].sum(1) + (real[:, 1:] & ~real[:, :-1]).sum(1)
            fits = fits & (starts <= 1).all()
        for column in self.needs.columns:
            fits = fits & (real[:, column] | (lengths == 0)).all()
        if self.needs.picks is not None:
            for rows, positions in self.needs.picks(*inputs):
                fits = fits & (real[rows, positions] | (lengths == 0)[rows]).all()
        valid = ((mask == 0) | (mask == 1)).all()
        return torch.stack([valid, fits]).long()
