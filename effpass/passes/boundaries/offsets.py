"""Boundaries of one batch, read on the host: where each sequence of a packed row begins."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from effpass.rows import check_row


def offsets(given: Mapping[str, Tensor], tokens: int | None) -> Tensor | None:
    """``cu_seqlens``, int32 (S + 1,) on the CPU; None where every row is one sequence.

    ``given``: ``cu_seqlens`` (S + 1,), ``seq_idx`` (b, T), ``position_ids`` (b, T) of integers, any
    of them. Sequences begin where ``cu_seqlens`` says, else where ``seq_idx`` changes, else where a
    position is not the one before plus 1 (as in transformers). Raises ValueError where they
    disagree among themselves or with ``tokens``, the length of the row where it is known, and for
    several rows of which one is packed. One host synchronisation.
    """
    flat = torch.cat([value.detach().reshape(-1).long() for value in given.values()]).cpu()
    parts = flat.split([value.numel() for value in given.values()])
    host = {n: p.view(v.shape) for (n, v), p in zip(given.items(), parts, strict=True)}
    if "cu_seqlens" in host:
        found = host["cu_seqlens"].int()
        _check(found, host, tokens)
        return found if len(found) > 2 else None
    name = "seq_idx" if "seq_idx" in host else "position_ids"
    rows = host[name]
    begins = rows[:, 1:] - rows[:, :-1] != (0 if name == "seq_idx" else 1)
    if not bool(begins.any()):
        return None
    if len(rows) > 1:
        raise ValueError(
            f"packed_rows: expected one packed row, {name} of shape (1, tokens), found "
            f"{tuple(rows.shape)} of which a row holds several sequences: put all in one row "
            "(effpass.pack), or pass the padding mask of padded rows"
        )
    inner = begins[0].nonzero().squeeze(1) + 1
    found = torch.cat([inner.new_zeros(1), inner, inner.new_tensor([rows.shape[1]])]).int()
    if name == "seq_idx":
        _check(found, host, tokens)
    return found


def _check(found: Tensor, host: Mapping[str, Tensor], tokens: int | None) -> None:
    """Raises ValueError unless all that was given says the same as ``found``."""
    positions, numbers = host.get("position_ids"), host.get("seq_idx")
    known = [v.numel() for v in (positions, numbers) if v is not None]
    total = tokens if tokens is not None else next(iter(known), int(found[-1]))
    if positions is None:
        at = torch.arange(total)
        ends = found[1:].long().clamp(0, total)
        starts = torch.cat([ends.new_zeros(1), ends[:-1]])
        positions = (at - starts[torch.bucketize(at, ends[:-1], right=True)])[None]
    if numbers is not None:
        numbers = numbers - numbers.reshape(-1)[:1]
    check_row(positions.reshape(1, -1), found, seq_idx=numbers)
