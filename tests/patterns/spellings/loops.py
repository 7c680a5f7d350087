"""Selective scans as loops over time: the scan is a function of a block that is always the same.

Whole blocks written in one piece are in ``loop_blocks``, states per head in ``head_loops``;
``SPELLINGS`` holds all of them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from tests.patterns.spellings import head_loops, loop_blocks
from tests.patterns.spellings.mixers import S6, s6_by_op
from tests.patterns.spellings.spelling import Spelling, seeded, tokens


def einsum_minimal(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The loop of mamba-minimal."""
    (b, length, d_in) = u.shape
    n = A.shape[1]
    deltaA = torch.exp(torch.einsum("bld,dn->bldn", delta, A))
    deltaB_u = torch.einsum("bld,bln,bld->bldn", delta, B, u)
    x = torch.zeros((b, d_in, n), device=deltaA.device)
    ys = []
    for i in range(length):
        x = deltaA[:, i] * x + deltaB_u[:, i]
        y = torch.einsum("bdn,bn->bd", x, C[:, i, :])
        ys.append(y)
    return torch.stack(ys, dim=1)


def discretise_each_step(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """exp inside the loop; outputs written into a buffer."""
    batch, seq_len, d = u.shape
    h = u.new_zeros(batch, d, A.size(-1))
    out = torch.empty_like(u)
    for t in range(seq_len):
        dt_t = dt[:, t].unsqueeze(-1)
        dA = torch.exp(dt_t * A)
        dB = dt_t * B[:, t].unsqueeze(1)
        h = dA * h + dB * u[:, t].unsqueeze(-1)
        out[:, t] = (h * C[:, t].unsqueeze(1)).sum(-1)
    return out


def unbind_zip(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Iterates over unbound tensors; there is no state before the first step."""
    decay = (dt[..., None] * A).exp()
    drive = (dt * x)[..., None] * B[..., None, :]
    state, outputs = None, []
    for a, b, c in zip(decay.unbind(1), drive.unbind(1), C.unbind(1), strict=True):
        state = b if state is None else a * state + b
        outputs.append((state @ c[..., None])[..., 0])
    return torch.stack(outputs, 1)


def in_place_state(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """One state tensor, updated in place; a copy of it is kept for every token."""
    dA = torch.exp(dt.unsqueeze(3) * A[None, None])
    dBx = dt.unsqueeze(3) * B.unsqueeze(2) * x.unsqueeze(3)
    state = torch.zeros_like(dA[:, 0])
    hs = []
    for step in range(x.shape[1]):
        state.mul_(dA[:, step]).add_(dBx[:, step])
        hs.append(state.clone())
    return torch.einsum("bldn,bln->bld", torch.stack(hs, dim=1), C)


def addcmul(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The update as one fused multiply-add."""
    a = torch.exp(torch.mul(A, dt[:, :, :, None]))
    bx = torch.mul(torch.mul(x, dt)[:, :, :, None], B[:, :, None, :])
    h = torch.zeros(x.shape[0], *A.shape, dtype=x.dtype)
    y = []
    for i in range(x.shape[1]):
        h = torch.addcmul(bx[:, i], a[:, i], h)
        y += [torch.sum(h * C[:, i, None, :], dim=2)]
    return torch.stack(y, dim=1)


def growing_cat(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Steps kept as slices of length 1; the output grows by cat."""
    h = torch.zeros(x.size(0), 1, x.size(2), A.size(1))
    y = torch.empty(x.size(0), 0, x.size(2))
    for t in range(x.size(1)):
        delta = dt[:, t : t + 1, :, None]
        h = h * torch.exp(A * delta) + (x[:, t : t + 1, :, None] * B[:, t : t + 1, None, :]) * delta
        y = torch.cat([y, (h * C[:, t : t + 1, None, :]).sum(dim=-1)], dim=1)
    return y


def first_step_special(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The first state is the first input; read out by bmm."""
    dA = torch.exp(torch.einsum("blk,kn->blkn", dt, A))
    dBx = torch.einsum("blk,bln->blkn", dt * x, B)
    h, ys = dBx[:, 0], []
    for t in range(x.shape[1]):
        if t > 0:
            h = dBx[:, t] + dA[:, t] * h
        ys.append(torch.bmm(h, C[:, t].unsqueeze(-1)).squeeze(-1))
    return torch.stack(ys, dim=-2)


def time_first(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Time moved to the front, then iterated over."""
    x, dt, B, C = (v.transpose(0, 1).contiguous() for v in (x, dt, B, C))
    h = torch.zeros(x.shape[1], x.shape[2], A.shape[1])
    ys = torch.zeros_like(x)
    for t, x_t in enumerate(x):
        h = torch.exp(dt[t, :, :, None] * A) * h
        h = h + torch.einsum("bd,bn->bdn", dt[t] * x_t, B[t])
        ys[t] = torch.einsum("bdn,bn->bd", h, C[t])
    return ys.permute(1, 0, 2)


def state_before_channel(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """A state of (b, n, d), read out by a row vector; the product in another order."""
    At = A.t().contiguous()
    h = x.new_zeros((x.shape[0], At.shape[0], At.shape[1]))
    rows = []
    for t in range(x.shape[1]):
        decay = torch.exp(At.unsqueeze(0) * dt[:, t : t + 1])
        h = torch.bmm(B[:, t].unsqueeze(2), (x[:, t] * dt[:, t]).unsqueeze(1)) + h * decay
        rows.append(torch.matmul(C[:, t].unsqueeze(1), h))
    return torch.cat(rows, dim=1)


def upcast(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Everything cast to float32 inside, and back; a position written by index."""
    dtype = x.dtype
    x, dt, A, B, C = x.float(), dt.float(), A.float(), B.float(), C.float()
    discrete_A = torch.exp(A[None, None, :, :] * dt[:, :, :, None]).to(torch.float32)
    discrete_B = dt[:, :, :, None] * B[:, :, None, :].float()
    discrete_Bx = discrete_B * x[:, :, :, None].float()
    ssm_state = torch.zeros((x.shape[0], x.shape[2], A.shape[1]), dtype=torch.float32)
    result = torch.zeros(x.shape[0], x.shape[1], x.shape[2], dtype=dtype)
    for i in range(x.shape[1]):
        ssm_state = discrete_A[:, i, :, :] * ssm_state + discrete_Bx[:, i, :, :]
        result[:, i, :] = torch.matmul(ssm_state.to(dtype), C[:, i, :].unsqueeze(-1))[:, :, 0]
    return result


def split_update(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """States collected first, inputs by bmm, a number multiplied in and divided out."""
    scale = 0.5
    states = [torch.zeros(x.shape[0], x.shape[2], A.shape[1])]
    for dt_t, x_t, B_t in zip(dt.split(1, 1), x.split(1, 1), B.split(1, 1), strict=True):
        keep = torch.exp(dt_t.transpose(1, 2) * A)
        update = torch.bmm((dt_t * x_t).transpose(1, 2), B_t) * scale
        states.append(torch.add(torch.mul(keep, states[-1]), update))
    hidden = torch.stack(states[1:], dim=1)
    return torch.matmul(hidden, C.unsqueeze(-1)).squeeze(-1) / scale


def in_place_history(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The inputs of the states are overwritten by the states."""
    dA = torch.exp(dt.unsqueeze(-1) * A)
    hs = torch.einsum("bld,bln->bldn", x * dt, B)
    for t in range(1, x.shape[1]):
        hs[:, t] += dA[:, t] * hs[:, t - 1].clone()
    return (hs * C.unsqueeze(2)).sum(3)


SCANS: list[Callable[..., Tensor]] = [
    einsum_minimal,
    discretise_each_step,
    unbind_zip,
    in_place_state,
    addcmul,
    growing_cat,
    first_step_special,
    time_first,
    state_before_channel,
    upcast,
    split_update,
    in_place_history,
]

SPELLINGS = [
    Spelling(scan.__name__, seeded(S6, scan), tokens(6), "selective_scan", reference=s6_by_op)
    for scan in SCANS
]
SPELLINGS += [*loop_blocks.SPELLINGS, *head_loops.SPELLINGS]
