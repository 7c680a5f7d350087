"""The ops section of ``gpu.py``: each kernel's time beside what the machine can do, and peers.

What the machine can do is measured in the process of each case, minutes apart at most.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl
from gpu_timing import DEVICE, Case, WrongNumber, seconds
from torch import Tensor

import effpass.lowering  # noqa: F401  registers the implementations
from effpass.lowering.gpu import launch
from effpass.ops import OPS

ALLOWED = {torch.bfloat16: 2e-2, torch.float32: 1e-4}  # of the largest value


@triton.jit
def _exponentials(out, ROUNDS: tl.constexpr, BLOCK: tl.constexpr):
    """ROUNDS times exp2 of BLOCK numbers in registers, eight chains a thread."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = at.to(tl.float32) * -1e-9
    for _ in range(ROUNDS):
        value = tl.exp2(-value)
    tl.store(out + at, value)


@functools.cache
def rates(tiny: bool) -> dict[str, float]:
    """Bytes/s of a copy (read and written), flop/s of a bf16 product, exponentials/s."""
    size = 1 << (12 if tiny else 29)
    source = torch.zeros(size, dtype=torch.bfloat16, device=DEVICE)
    target = torch.empty_like(source)
    n = 64 if tiny else 8192
    a, b = (torch.randn(n, n, device=DEVICE).bfloat16() for _ in range(2))
    programs, rounds, block = (2, 4, 1024) if tiny else (132 * 64, 4096, 1024)
    room = torch.empty(programs * block, device=DEVICE)
    launch_it = lambda: _exponentials[(programs,)](room, ROUNDS=rounds, BLOCK=block)  # noqa: E731
    return {
        "copy_bytes": 4 * size / seconds(lambda: target.copy_(source)),
        "product_flops": 2 * n**3 / seconds(lambda: a @ b),
        "exponentials": programs * rounds * block / seconds(launch_it),
    }


def _big(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE).bfloat16()


def _small(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE)


def selective(t: int, d: int, n: int = 16) -> dict[str, Any]:
    """A Mamba-1 layer's scan, one row."""
    given = {name: _big(1, t, d) for name in ("x", "z")} | {"dt": _big(1, t, d) - 2}
    given |= {"A": -_small(d, n).exp(), "B": _big(1, t, n), "C": _big(1, t, n)}
    return {**given, "D": _small(d), "dt_bias": _small(d), "dt_softplus": True}


def ssd(t: int, h: int, p: int = 64, n: int = 128) -> dict[str, Any]:
    """A Mamba-2 layer's scan, one row, one group."""
    given = {"x": _big(1, t, h, p), "dt": _big(1, t, h) - 2, "A": -_small(h).exp()}
    given |= {"B": _big(1, t, 1, n), "C": _big(1, t, 1, n), "D": _small(h)}
    return {**given, "dt_bias": _small(h), "dt_softplus": True}


def conv(t: int, c: int, first: bool = False) -> dict[str, Any]:
    """The convolution before the scan, channel-last or channel-first."""
    x = _big(1, c, t).transpose(1, 2) if first else _big(1, t, c)
    return {"x": x, "weight": _big(c, 4), "bias": _big(c), "activation": "silu"}


def recurrence(t: int, d: int) -> dict[str, Any]:
    """An RG-LRU layer's recurrence, one row."""
    return {"a": _big(1, t, d).sigmoid(), "b": _big(1, t, d)}


def attention(t: int, h: int, hk: int, d: int = 128) -> dict[str, Any]:
    """Causal attention over three packed sequences."""
    ends = torch.tensor([0, t // 8, t // 2, t], dtype=torch.int32, device=DEVICE)
    given = {"q": _big(t, h, d), "k": _big(t, hk, d), "v": _big(t, hk, d)}
    return {**given, "cu_seqlens": ends, "max_seqlen": t - t // 2, "causal": True}


def cases(tiny: bool) -> Iterator[Case]:
    """Correctness of every op first, then its time, forward and backward."""
    t, wide = (40, 32) if tiny else (8192, 4096)
    heads = 2 if tiny else 80
    calls: dict[str, tuple[str, Callable[[int], dict[str, Any]]]] = {
        "selective_scan": ("selective_scan", lambda t: selective(t, wide)),
        "causal_conv1d": ("causal_conv1d", lambda t: conv(t, wide)),
        "causal_conv1d, channel-first": ("causal_conv1d", lambda t: conv(t, wide, True)),
        "ssd_scan": ("ssd_scan", lambda t: ssd(t, heads)),
        "linear_recurrence": ("linear_recurrence", lambda t: recurrence(t, wide)),
        "varlen_attention": ("varlen_attention", lambda t: attention(t, heads // 2, heads // 2)),
        "varlen_attention, grouped": (
            "varlen_attention",
            lambda t: attention(t, heads, heads // 2),
        ),
    }
    yield "correct", lambda: _all_checked(calls)
    yield "rates", lambda: rates(tiny)
    for name, (op, make) in calls.items():
        yield name, functools.partial(_measured, op, make, t, tiny)
    for op in ("selective_scan", "ssd_scan", "causal_conv1d"):
        yield f"{op}, one token", functools.partial(_decoding, op, calls[op][1], tiny)
    yield from _peers(t, wide, heads)


def _all_checked(calls: dict[str, tuple[str, Callable[[int], dict[str, Any]]]]) -> dict[str, Any]:
    """Errors of 40 tokens, and of 300: more than a chunk of any op."""
    found = {
        f"{name}, {tokens} tokens": _checked(op, make(tokens))
        for name, (op, make) in calls.items()
        for tokens in (40, 300 if DEVICE == "cuda" else 41)
    }
    return {"checked": True, **found}


def _leaves(op: str, call: dict[str, Any]) -> list[Any]:
    values = [*OPS[op].bind(**call).values()]
    return [
        a.detach().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a
        for a in values
    ]


def _both(overload: Any, values: list[Any]) -> list[Tensor]:
    """Outputs, then gradients of every leaf, for a gradient of ones."""
    made = overload(*values)
    outputs = made if isinstance(made, tuple) else (made,)
    wanted = [a for a in values if isinstance(a, Tensor) and a.requires_grad]
    return [*outputs, *torch.autograd.grad(outputs, wanted, [torch.ones_like(o) for o in outputs])]


def _checked(op: str, call: dict[str, Any]) -> float:
    """The largest error against the definition in float64, over the largest value."""
    gpu = next(w for w in OPS[op].lowerings if w.target == "gpu")
    exact = {
        n: a.double() if isinstance(a, Tensor) and a.is_floating_point() else a
        for n, a in call.items()
    }
    with launch.interpreted() if DEVICE == "cpu" else nullcontext():
        found = _both(gpu.overload, _leaves(op, call))
    worst = 0.0
    for one, other in zip(found, _both(OPS[op].inline.overload, _leaves(op, exact)), strict=True):
        largest = other.abs().max().item() if other.numel() else 0.0
        error = (one.double() - other).abs().max().item() / largest if largest else 0.0
        if not error <= ALLOWED[torch.bfloat16]:
            raise WrongNumber(f"{op}: off by {error:.1e} of the largest value")
        worst = max(worst, error)
    return worst


def _size(values: Any) -> int:
    return sum(v.numel() * v.element_size() for v in values if isinstance(v, Tensor))


def _flops(op: str, call: dict[str, Any]) -> float:
    """Multiplications and additions of the matrix products, where an op has any."""
    if op == "ssd_scan":
        (_, t, h, p), n = call["x"].shape, call["B"].shape[3]
        return 2.0 * t * h * (64 * n / h + 64 * p + 2 * p * n)
    if op == "varlen_attention":
        lengths = call["cu_seqlens"].diff().double()
        return float((lengths * lengths).sum()) * 2 * call["q"].shape[1] * call["q"].shape[2]
    return 0.0


def _limit(op: str, call: dict[str, Any], moved: float, flops: float, tiny: bool) -> float:
    """Seconds that no kernel can beat: bytes, exponentials or products, whichever binds."""
    machine = rates(tiny)
    count = call["x"].numel() * call["A"].shape[1] if op == "selective_scan" else 0
    found = (moved / machine["copy_bytes"], count / machine["exponentials"])
    return max(*found, flops / machine["product_flops"])


def _measured(
    op: str, make: Callable[[int], dict[str, Any]], t: int, tiny: bool
) -> dict[str, float]:
    call = make(t)
    gpu = next(w for w in OPS[op].lowerings if w.target == "gpu")
    values = [*OPS[op].bind(**call).values()]
    made = gpu.forward(*values)
    outputs = made if isinstance(made, tuple) else (made,)
    grads = [torch.ones_like(o) for o in outputs]
    first = seconds(lambda: gpu.forward(*values))
    second = seconds(lambda: gpu.backward(*grads, *values))
    moved, flops = float(_size(values) + _size(outputs)), _flops(op, call)
    back = float(2 * _size(values) + _size(outputs))
    return {
        "forward_s": first,
        "backward_s": second,
        "forward_bytes_s": moved / first,
        "backward_bytes_s": back / second,
        "forward_flop_s": flops / first,
        "forward_of_limit": _limit(op, call, moved, flops, tiny) / first,
        "backward_of_limit": _limit(op, call, back, 2.5 * flops, tiny) / second,
    }


def _decoding(op: str, make: Callable[[int], dict[str, Any]], tiny: bool) -> dict[str, float]:
    """One token of a row; as a CUDA graph, which is how a decoder would run it."""
    gpu = next(w for w in OPS[op].lowerings if w.target == "gpu")
    values = [*OPS[op].bind(**make(1)).values()]
    state = gpu.forward(*values)[1]
    values[[*OPS[op].signature.parameters].index("initial_state")] = state
    found = {"launched_s": seconds(lambda: gpu.forward(*values))}
    if DEVICE == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            gpu.forward(*values)
        found["graph_s"] = seconds(graph.replay)
    return found


def _peers(t: int, wide: int, heads: int) -> Iterator[Case]:
    """Others' kernels on the same arguments, where they are installed."""

    def mamba_ssd() -> dict[str, float]:
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined as theirs

        call = ssd(t, heads)
        names = ("x", "dt", "A", "B", "C")
        leaves = [call[n].detach().requires_grad_() for n in names]
        more = {"D": call["D"], "dt_bias": call["dt_bias"], "dt_softplus": True}
        return _timed(lambda: theirs(*leaves, chunk_size=256, **more), leaves)

    def fla_ssd() -> dict[str, float]:
        from fla.ops.simple_gla import chunk_simple_gla as theirs

        call = ssd(t, heads)
        q, k = (call[n].expand(-1, -1, heads, -1).contiguous() for n in ("C", "B"))
        gate = call["dt"].float() * call["A"]
        leaves = [a.detach().requires_grad_() for a in (q, k, call["x"], gate)]
        return _timed(lambda: theirs(*leaves)[0], leaves)

    def mamba_conv() -> dict[str, float]:
        from causal_conv1d import causal_conv1d_fn as theirs

        call = conv(t, wide)
        leaves = [call[n].detach().requires_grad_() for n in ("x", "weight", "bias")]
        return _timed(
            lambda: theirs(leaves[0].transpose(1, 2), *leaves[1:], activation="silu"), leaves
        )

    yield "mamba_ssm: ssd", mamba_ssd
    yield "fla: simple_gla (without dt on x, D)", fla_ssd
    yield "causal_conv1d: conv", mamba_conv


def _timed(run: Callable[[], Tensor], leaves: list[Tensor]) -> dict[str, float]:
    made = run()
    grad = torch.ones_like(made)
    back = seconds(lambda: torch.autograd.grad(made, leaves, grad, retain_graph=True))
    with torch.no_grad():
        return {"forward_s": seconds(run), "backward_s": back}
