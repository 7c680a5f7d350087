"""``packed_row``: marks a tensor as one row of several sequences, until a backend honours that.

It is the identity. The effpass backend takes the marks out of a graph and gives the boundaries to
whatever mixes tokens (``effpass.passes.packed_rows``). Anything else that runs a mark knows nothing
of boundaries: explicit ones are an error there, as in transformers without ``mamba-ssm``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op("effpass::packed_row", mutates_args=())
def packed_row(
    x: Tensor, cu_seqlens: Tensor | None, seq_idx: Tensor | None, position_ids: Tensor | None
) -> Tensor:
    """``x`` of any shape and dtype, unchanged; the rest as in DataCollatorWithFlattening.

    Raises ValueError where ``cu_seqlens`` (sequences + 1,) or ``seq_idx`` (1, tokens) is given:
    only a graph that effpass compiled keeps packed sequences apart.
    """
    if cu_seqlens is not None or seq_idx is not None:
        raise ValueError(
            "packed_row: this code cannot keep packed sequences apart, found boundaries "
            '(seq_idx or cu_seqlens): compile with backend="effpass", or pad the sequences'
        )
    return x.clone()


@packed_row.register_fake
def _fake(x: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(x)


def _backward(_: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    return gradient, None, None, None


packed_row.register_autograd(_backward)
MARK = torch.ops.effpass.packed_row.default
