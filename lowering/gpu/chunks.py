"""Tokens in chunks that never cross from one sequence into the next.

A chunk belongs to one sequence, so nothing inside a kernel asks where a boundary is: the places
where boundaries matter in a chunked scan (the state of a chunk, the carry between chunks, the
products inside a chunk, the carried part of its output: mamba_ssm's ``seq_idx``) all see one
sequence. The number of chunks is bounded from sizes alone (one partial chunk a sequence), so no
value is read back from the device; chunks that are left over are empty.

Each kernel reads its row of the table itself. A function shared by them would be shorter, but what
it answers leads to addresses that are written, and torch (2.11) would then take the table, and all
that stands in its place, for written to.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Chunks:
    """``count`` chunks of at most ``length`` tokens, in ``sequences`` sequences.

    ``table`` int32 (count, 4) says of each chunk its sequence, its first token, the token after its
    last, and the first token of its sequence; ``first`` int32 (sequences + 1,) where the chunks of
    each sequence begin. Without ``cu_seqlens`` rows of the batch are the sequences, of ``per_row``
    chunks each, and both are only place holders.
    """

    table: Tensor
    first: Tensor
    count: int
    sequences: int
    tokens: int
    per_row: int
    length: int
    packed: bool


def chunks(like: Tensor, cu_seqlens: Tensor | None, length: int) -> Chunks:
    """The chunks of ``like`` (batch, tokens, ...) packed as ``cu_seqlens`` (S + 1,) say."""
    batch, tokens = like.shape[:2]
    if cu_seqlens is None:
        per_row = (tokens + length - 1) // length
        return Chunks(like, like, batch * per_row, batch, tokens, per_row, length, False)
    offsets = cu_seqlens.clamp(0, tokens)  # wrong offsets never lead outside a tensor
    sequences = cu_seqlens.shape[0] - 1
    count = tokens // length + sequences
    each = (offsets.diff().clamp(min=0) + length - 1) // length
    ends = each.cumsum(0).int()
    first = torch.cat([ends.new_zeros(1), ends])
    index = torch.arange(count, device=like.device, dtype=torch.int32)
    sequence = torch.searchsorted(ends, index, right=True, out_int32=True)
    inside = sequence < sequences
    held = sequence.clamp(max=sequences - 1)
    begin = offsets[held]
    start = begin + (index - first[held]) * length
    end = torch.minimum(start + length, offsets[held + 1])
    rows = torch.stack([held, start, torch.where(inside, end, start), begin], 1)
    return Chunks(rows, first, count, sequences, tokens, 0, length, True)


def whole(like: Tensor, cu_seqlens: Tensor | None) -> Chunks:
    """The same where every sequence is one chunk, an empty one too; ``first`` is a place holder."""
    batch, tokens = like.shape[:2]
    if cu_seqlens is None:
        return Chunks(like, like, batch, batch, tokens, 1, tokens, False)
    offsets, sequences = cu_seqlens.clamp(0, tokens), cu_seqlens.shape[0] - 1
    begin, end = offsets[:-1], torch.maximum(offsets[1:], offsets[:-1])
    index = torch.arange(sequences, device=like.device, dtype=torch.int32)
    rows = torch.stack([index, begin, end, begin], 1)
    return Chunks(rows, like, sequences, sequences, tokens, 0, tokens, True)
