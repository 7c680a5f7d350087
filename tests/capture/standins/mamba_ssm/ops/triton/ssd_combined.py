"""From state-spaces/mamba e9594ce, mamba_ssm/ops/triton/ssd_combined.py and its neighbours
ssd_chunk_state.py, ssd_state_passing.py and ssd_chunk_scan.py (Apache-2.0).

The reference functions are upstream's for whole chunks, without einops and shape assertions.
"""

import torch
import torch.nn.functional as F


def mamba_chunk_scan_combined(
    x,
    dt,
    A,
    B,
    C,
    chunk_size,
    D=None,
    z=None,
    dt_bias=None,
    initial_states=None,
    seq_idx=None,
    cu_seqlens=None,
    dt_softplus=False,
    dt_limit=(0.0, float("inf")),
    return_final_states=False,
    return_varlen_states=False,
    state_dtype=None,
):
    raise RuntimeError("this kernel needs a GPU")


def ssd_chunk_scan_combined_ref(
    x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, dt_softplus=False
):
    dt = dt.unflatten(1, (-1, chunk_size)).permute(0, 3, 1, 2)
    dt = dt.float()
    if dt_bias is not None:
        dt = dt + dt_bias[:, None, None]
    if dt_softplus:
        dt = F.softplus(dt)
    dA = dt * A[:, None, None]
    dA_cumsum = torch.cumsum(dA, dim=-1)
    states = chunk_state_ref(B, x, dt, dA_cumsum)
    states_dtype = states.dtype
    if states.dtype not in [torch.float32, torch.float64]:
        states = states.to(torch.float32)
    passed = state_passing_ref(states.flatten(-2), dA_cumsum[:, :, :, -1])[0]
    states = passed.unflatten(-1, states.shape[-2:]).to(states_dtype)
    return chunk_scan_ref(B, C, x, dt, dA_cumsum, states, D=D, z=z)


def chunk_state_ref(B, x, dt, dA_cumsum):
    chunk_size = dt.shape[-1]
    B = B.repeat_interleave(x.shape[2] // B.shape[2], dim=2)
    x = x.unflatten(1, (-1, chunk_size))
    B = B.unflatten(1, (-1, chunk_size))
    decay_states = torch.exp(dA_cumsum[:, :, :, -1:] - dA_cumsum)
    return torch.einsum(
        "bclhn,bhcl,bhcl,bclhp->bchpn", B.to(x.dtype), decay_states.to(x.dtype), dt.to(x.dtype), x
    )


def state_passing_ref(states, dA_chunk_cumsum, initial_states=None):
    if initial_states is None:
        initial_states = torch.zeros_like(states[:, 0])
    states = torch.cat([initial_states[:, None], states], dim=1)
    dA_chunk_cumsum = F.pad(dA_chunk_cumsum, (1, 0))
    dA_chunk_cumsum = torch.cumsum(dA_chunk_cumsum, dim=-1)
    nchunks = dA_chunk_cumsum.shape[-1]
    segment_sum = dA_chunk_cumsum[:, :, :, None] - dA_chunk_cumsum[:, :, None, :]
    decay_chunk = torch.exp(segment_sum)
    causal_mask = torch.tril(torch.ones(nchunks, nchunks, device=states.device, dtype=bool))
    decay_chunk = decay_chunk.masked_fill(~causal_mask, 0)
    out = torch.einsum("bhzc,bchd->bzhd", decay_chunk.to(dtype=states.dtype), states)
    return out[:, :-1], out[:, -1]


def chunk_scan_ref(B, C, x, dt, dA_cumsum, prev_states, D=None, z=None):
    chunk_size = dt.shape[-1]
    repeats = x.shape[2] // B.shape[2]
    B = B.repeat_interleave(repeats, dim=2).unflatten(1, (-1, chunk_size))
    C = C.repeat_interleave(repeats, dim=2).unflatten(1, (-1, chunk_size))
    CB = torch.einsum("bclhn,bcshn->bchls", C, B)
    dt_segment_sum = dA_cumsum[:, :, :, :, None] - dA_cumsum[:, :, :, None, :]
    decay = torch.exp(dt_segment_sum)
    scores_decay = CB * decay.permute(0, 2, 1, 3, 4)
    causal_mask = torch.tril(torch.ones(chunk_size, chunk_size, device=x.device, dtype=bool))
    scores_decay = scores_decay.masked_fill(~causal_mask, 0)
    out = torch.einsum(
        "bchls,bhcs,bcshp->bclhp",
        scores_decay.to(x.dtype),
        dt.to(x.dtype),
        x.unflatten(1, (-1, chunk_size)),
    )
    state_decay_out = torch.exp(dA_cumsum.permute(0, 2, 3, 1)[..., None])
    out_prev = torch.einsum("bclhn,bchpn->bclhp", C, prev_states.to(C.dtype)) * state_decay_out
    out = (out + out_prev).flatten(1, 2)
    if D is not None:
        if D.dim() == 1:
            D = D[:, None]
        out = out + x * D
    return out if z is None else out * F.silu(z)
