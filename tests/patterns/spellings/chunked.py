"""State-space duality in chunks: attention within a chunk, a recurrence between chunks.

x (b, l, h, p); dt (b, l, h); A (h); B, C (b, l, g, n) give y (b, l, h, p), perhaps with a state
(b, h, p, n).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from effpass import ops
from tests.patterns.spellings.mixers import SSD, ssd_and_state_by_op, ssd_by_op
from tests.patterns.spellings.spelling import Spelling, seeded, tokens


def segsum_difference(x: Tensor) -> Tensor:
    """The naive segment sum of the Mamba-2 paper: a difference of cumulative sums."""
    T = x.size(-1)
    x_cumsum = torch.cumsum(x, dim=-1)
    x_segsum = x_cumsum[..., :, None] - x_cumsum[..., None, :]
    mask = torch.tril(torch.ones(T, T, device=x.device, dtype=bool), diagonal=0)
    return x_segsum.masked_fill(~mask, -torch.inf)


def segsum_stable(x: Tensor) -> Tensor:
    """The stable one: repeated, masked, then summed."""
    T = x.size(-1)
    x = x.unsqueeze(-1).repeat(*([1] * x.dim()), T)
    mask = torch.tril(torch.ones(T, T, device=x.device, dtype=bool), diagonal=-1)
    x = x.masked_fill(~mask, 0)
    x_segsum = torch.cumsum(x, dim=-2)
    mask = torch.tril(torch.ones(T, T, device=x.device, dtype=bool), diagonal=0)
    return x_segsum.masked_fill(~mask, -torch.inf)


def paper_listing(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """The minimal listing of the paper, with einsum; the length a multiple of 4."""
    groups = B.shape[2]
    X, A = x * dt.unsqueeze(-1), A * dt
    B, C = (v.repeat_interleave(x.shape[2] // groups, dim=2) for v in (B, C))
    X, A, B, C = [v.unflatten(1, (-1, 4)) for v in (X, A, B, C)]
    A = A.permute(0, 3, 1, 2)
    A_cumsum = torch.cumsum(A, dim=-1)
    L = torch.exp(segsum_difference(A))
    Y_diag = torch.einsum("bclhn,bcshn,bhcls,bcshp->bclhp", C, B, L, X)
    decay_states = torch.exp(A_cumsum[:, :, :, -1:] - A_cumsum)
    states = torch.einsum("bclhn,bhcl,bclhp->bchpn", B, decay_states, X)
    states = torch.cat([torch.zeros_like(states[:, :1]), states], dim=1)
    decay_chunk = torch.exp(segsum_difference(F.pad(A_cumsum[:, :, :, -1], (1, 0))))
    new_states = torch.einsum("bhzc,bchpn->bzhpn", decay_chunk, states)
    states, final_state = new_states[:, :-1], new_states[:, -1]
    Y_off = torch.einsum("bclhn,bchpn,bhcl->bclhp", C, states, torch.exp(A_cumsum))
    return (Y_diag + Y_off).flatten(1, 2), final_state


class ContinuedSSD(SSD):
    """The listing with the stable segment sum, from a given state to the last one."""

    def forward(self, h: Tensor, initial_states: Tensor) -> Any:
        """(b, l, 9) and (b, 6, 4, 7) -> (b, l, 9) and (b, 6, 4, 7)."""
        z, x, dt, A, B, C = self.ssm_inputs(h)
        repeats = self.heads // self.groups
        B, C = B.repeat_interleave(repeats, 2), C.repeat_interleave(repeats, 2)
        b, length, heads, p = x.shape
        chunks = length // 4
        X = (x * dt[..., None]).reshape(b, chunks, 4, heads, p)
        B, C = (v.reshape(b, chunks, 4, heads, -1) for v in (B, C))
        dA = (dt * A).reshape(b, chunks, 4, heads).permute(0, 3, 1, 2)
        dA_cum = dA.cumsum(-1)
        Y = torch.einsum("bclhn,bcshn,bhcls,bcshp->bclhp", C, B, segsum_stable(dA).exp(), X)
        to_end = (dA_cum[..., -1:] - dA_cum).exp()
        states = torch.einsum("bcshn,bhcs,bcshp->bchpn", B, to_end, X)
        states = torch.cat([initial_states.unsqueeze(1), states], dim=1)
        between = segsum_stable(F.pad(dA_cum[..., -1], (1, 0))).exp()
        states = torch.einsum("bhzc,bchpn->bzhpn", between, states)
        Y = Y + torch.einsum("bclhn,bchpn,bhcl->bclhp", C, states[:, :-1], dA_cum.exp())
        return self.finish(Y.reshape(b, length, heads, p), x, z), states[:, -1]


def _continued_by_op(block: SSD, h: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    z, x, dt, A, B, C = block.ssm_inputs(h)
    y, state = ops.ssd_scan(x, dt, A, B, C, initial_state=start)
    return block.finish(y, x, z), state


def _pad(v: Tensor, size: int) -> Tensor:
    shape = (0, 0, 0, 0, 0, size, 0, 0) if v.dim() == 4 else (0, 0, 0, size, 0, 0)
    return F.pad(v, shape, mode="constant", value=0)


def _chunks(v: Tensor, size: int, chunk: int) -> Tensor:
    v = _pad(v, size)
    return v.reshape(v.shape[0], -1, chunk, *v.shape[2:])


def broadcast_sums(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """Transformers' way: padded, every contraction a broadcast product and a sum."""
    chunk, (batch, seq_len, heads, head_dim) = 8, x.shape
    x, B, C = x.float(), B.float(), C.float()
    B = B.repeat_interleave(heads // B.shape[2], dim=2)
    C = C.repeat_interleave(heads // C.shape[2], dim=2)
    pad_size = (chunk - seq_len % chunk) % chunk
    hidden = x * dt[..., None]
    A = A.to(hidden.dtype) * dt
    hidden, A, B, C = (_chunks(v, pad_size, chunk) for v in (hidden, A, B, C))
    A = A.permute(0, 3, 1, 2)
    A_cumsum = torch.cumsum(A, dim=-1)
    L = torch.exp(segsum_stable(A))
    G = (C[:, :, :, None, :, :] * B[:, :, None, :, :, :]).sum(dim=-1)
    M = (G[..., None] * L.permute(0, 2, 3, 4, 1)[..., None]).sum(dim=-1)
    Y_diag = (M[..., None] * hidden[:, :, None]).sum(dim=3)
    decay_states = torch.exp(A_cumsum[:, :, :, -1:] - A_cumsum)
    B_decay = B * decay_states.permute(0, -2, -1, 1)[..., None]
    states = (B_decay[..., None, :] * hidden[..., None]).sum(dim=2)
    states = torch.cat([torch.zeros_like(states[:, :1]), states], dim=1)
    decay_chunk = torch.exp(segsum_stable(F.pad(A_cumsum[:, :, :, -1], (1, 0)))).transpose(1, 3)
    new_states = (decay_chunk[..., None, None] * states[:, :, None, ...]).sum(dim=1)
    states, last = new_states[:, :-1], new_states[:, -1]
    C_times_states = C[..., None, :] * states[:, :, None, ...]
    Y_off = C_times_states.sum(-1) * torch.exp(A_cumsum).permute(0, 2, 3, 1)[..., None]
    y = (Y_diag + Y_off).reshape(batch, -1, heads, head_dim)
    if pad_size > 0:
        y = y[:, :seq_len, :, :]
    return y, last


def matmul_heads_first(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """(b, h, chunk, step, ...) throughout, contractions by matmul, dt multiplied into B."""
    K, length, heads = 4, x.shape[1], x.shape[2]
    rest = -length % K
    x, B, C = (F.pad(v, (0, 0, 0, 0, 0, rest)) for v in (x, B, C))
    dt = F.pad(dt, (0, 0, 0, rest))
    B, C = (torch.repeat_interleave(v, heads // v.shape[2], 2) for v in (B, C))
    B = B * dt[..., None]
    x, B, C = (v.transpose(1, 2).unflatten(2, (-1, K)) for v in (x, B, C))
    log_a = (dt * A).transpose(1, 2).unflatten(2, (-1, K))
    cum = log_a.cumsum(dim=-1)
    causal = torch.ones(K, K, dtype=torch.bool).tril()
    decay = torch.where(causal, (cum.unsqueeze(-1) - cum.unsqueeze(-2)), float("-inf")).exp()
    inside = ((C @ B.transpose(-1, -2)) * decay) @ x
    tails = (B * torch.exp(cum[..., -1:] - cum).unsqueeze(-1)).transpose(-1, -2) @ x
    total = cum[..., -1].cumsum(-1)
    n = total.shape[-1]
    earlier = torch.ones(n, n, dtype=torch.bool).tril(-1)
    before = total - cum[..., -1]
    flow = (before.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(~earlier, -torch.inf).exp()
    entering = (flow @ tails.flatten(-2)).unflatten(-1, tails.shape[-2:])
    across = (C * cum.exp().unsqueeze(-1)) @ entering
    return (inside + across).flatten(2, 3).transpose(1, 2)[:, :length]


def chunk_loop(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """A loop over chunks that carries the state; the last chunk may be shorter."""
    heads = x.shape[2]
    B, C = (v.repeat_interleave(heads // v.shape[2], dim=2) for v in (B, C))
    state = x.new_zeros(x.shape[0], heads, x.shape[3], B.shape[3])
    outputs = []
    for xc, dtc, Bc, Cc in zip(*(v.split(5, dim=1) for v in (x, dt, B, C)), strict=True):
        cum = (dtc * A).cumsum(1)
        lower = torch.tril(torch.ones(xc.shape[1], xc.shape[1]))[None, :, :, None]
        gap = cum.unsqueeze(2) - cum.unsqueeze(1)
        scores = torch.einsum("blhn,bshn->blsh", Cc, Bc) * torch.exp(gap * lower) * lower
        y = torch.einsum("blsh,bsh,bshp->blhp", scores, dtc, xc)
        y = y + torch.einsum("blhn,bhpn,blh->blhp", Cc, state, cum.exp())
        outputs.append(y)
        weight = torch.exp(cum[:, -1:] - cum) * dtc
        fresh = torch.einsum("bshn,bsh,bshp->bhpn", Bc, weight, xc)
        state = state * cum[:, -1].exp()[:, :, None, None] + fresh
    return torch.cat(outputs, dim=1), state


def states_passed(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The three steps of the paper's kernels: chunk states, passed on in a loop, chunk outputs."""
    Q, b, length, g = 4, x.shape[0], x.shape[1], B.shape[2]
    fill = (Q - length % Q) % Q
    x, dt, B, C = (F.pad(v, [0, 0] * (v.dim() - 2) + [0, fill]) for v in (x, dt, B, C))
    x, dt = (v.reshape(b, -1, Q, g, v.shape[2] // g, *v.shape[3:]) for v in (x, dt))
    B, C = (v.view(b, -1, Q, g, v.shape[-1]) for v in (B, C))
    cum = torch.cumsum(dt * A.view(g, -1), dim=2)
    chunk_states = torch.einsum(
        "bcsgn,bcsgr,bcsgrp->bcgrpn", B, (cum[:, :, -1:] - cum).exp() * dt, x
    )
    passed = [torch.zeros_like(chunk_states[:, 0])]
    for c in range(chunk_states.shape[1] - 1):
        passed.append(chunk_states[:, c] + cum[:, c, -1, :, :, None, None].exp() * passed[-1])
    CB = torch.einsum("bclgn,bcsgn->bclsg", C, B).unsqueeze(-1)
    mask = torch.arange(Q)[:, None] >= torch.arange(Q)
    gap = cum[:, :, :, None] - cum[:, :, None, :]
    attn = CB * gap.exp().masked_fill(~mask[..., None, None], 0.0) * dt[:, :, None]
    y = torch.einsum("bclsgr,bcsgrp->bclgrp", attn, x)
    y += torch.einsum("bclgn,bcgrpn->bclgrp", C, torch.stack(passed, 1)) * cum.exp()[..., None]
    return y.reshape(b, length + fill, -1, y.shape[-1])[:, :length]


def quadratic(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """One chunk: attention with a decay mask, (C Bᵀ * L) X."""
    heads = x.size(2)
    q = C.repeat_interleave(heads // C.size(2), dim=2).transpose(1, 2)
    k = B.repeat_interleave(heads // B.size(2), dim=2).transpose(1, 2)
    v = (x * dt[..., None]).transpose(1, 2)
    L = torch.exp(segsum_stable((A * dt).transpose(1, 2)))
    attn = torch.matmul(q, k.transpose(-2, -1)) * L
    return torch.matmul(attn, v).transpose(1, 2)


def quadratic_einsum(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """One chunk, groups kept apart, the upper triangle zeroed before exp and after it."""
    b, length, _, p = x.shape
    x = x.reshape(b, length, B.shape[2], -1, p)
    step = dt.reshape(*x.shape[:-1])
    s = torch.cumsum(step * A.reshape(x.shape[2], -1), dim=1)
    gap = torch.tril((s[:, :, None] - s[:, None]).permute(0, 3, 4, 1, 2))
    decay = torch.tril(torch.exp(gap))
    y = torch.einsum("bign,bjgn,bgrij,bjgr,bjgrp->bigrp", C, B, decay, step, x)
    return y.flatten(2, 3)


class Pooled(nn.Module):
    """One chunk of several heads that share B and C; the sum over time is projected."""

    def __init__(self, width: int = 9, heads: int = 5, n: int = 3) -> None:
        super().__init__()
        self.heads = heads
        self.value = nn.Linear(width, heads * 4)
        self.BC = nn.Linear(width, 2 * n)
        self.dt = nn.Linear(width, heads)
        self.A_log = nn.Parameter(torch.rand(heads))
        self.out = nn.Linear(heads * 4, width)

    def parts(self, u: Tensor) -> tuple[Tensor, ...]:
        """Values, dt, A, and B and C without a head."""
        B, C = self.BC(u).chunk(2, -1)
        dt = F.softplus(self.dt(u))
        return self.value(u).unflatten(-1, (self.heads, 4)), dt, -self.A_log.exp(), B, C

    def forward(self, u: Tensor) -> Tensor:
        """(b, l, 9) -> (b, 9)."""
        v, dt, A, B, C = self.parts(u)
        log_decay = segsum_difference((dt * A).permute(0, 2, 1))
        kernel = log_decay.exp() * (C @ B.mT).unsqueeze(1) * dt.permute(0, 2, 1).unsqueeze(2)
        y = kernel @ v.permute(0, 2, 1, 3)
        return self.out(y.permute(0, 2, 1, 3).flatten(2).mean(1))


def _pooled_by_op(block: Pooled, u: Tensor) -> Tensor:
    v, dt, A, B, C = block.parts(u)
    y, _ = ops.ssd_scan(v, dt, A, B[:, :, None], C[:, :, None])
    return block.out(y.flatten(2).mean(1))


def tokens_and_states(length: int) -> tuple[Tensor, ...]:
    """(2, length, 9) and states (2, 6, 4, 7)."""
    generator = torch.Generator().manual_seed(7)
    return (*tokens(9)(length), torch.randn(2, 6, 4, 7, generator=generator))


def _spelling(name: str, make: Any, reference: Any, multiple: int = 1) -> Spelling:
    return Spelling(name, make, tokens(9), "ssd_scan", multiple=multiple, reference=reference)


SPELLINGS = [
    _spelling("paper_listing", seeded(SSD, paper_listing), ssd_and_state_by_op, 4),
    Spelling(
        "initial_states",
        seeded(ContinuedSSD, None),
        tokens_and_states,
        "ssd_scan",
        multiple=4,
        reference=_continued_by_op,
    ),
    _spelling("broadcast_sums", seeded(SSD, broadcast_sums), ssd_and_state_by_op),
    _spelling("matmul_heads_first", seeded(SSD, matmul_heads_first), ssd_by_op),
    _spelling("chunk_loop", seeded(SSD, chunk_loop), ssd_and_state_by_op),
    _spelling("states_passed", seeded(SSD, states_passed), ssd_by_op),
    _spelling("quadratic", seeded(SSD, quadratic), ssd_by_op),
    _spelling("quadratic_einsum", seeded(SSD, quadratic_einsum), ssd_by_op),
    _spelling("quadratic_pooled", seeded(Pooled), _pooled_by_op),
]
