"""Feed-forward blocks, and what is none of the mathematics that is looked for."""

from __future__ import annotations

from tests.patterns.pieces.loops import finished
from tests.patterns.programs import Piece, Writer


def feed_forward(w: Writer, x: str) -> str:
    """Up, activation, down; perhaps gated."""
    d, name = w.shape(x)[-1], w.fresh("f")
    wide = w.pick(7, 4, w.sizes.t)
    up, down = w.input(wide, d), w.input(d, wide)
    act = w.pick(
        "F.gelu", "F.silu", "torch.relu", "torch.tanh", "lambda v: v * torch.sigmoid(1.702 * v)"
    )
    act = w.near(act, "lambda v: v.softmax(-1)", "lambda v: v + v.mean(1, keepdim=True)")
    lines = [f"act = {act}", f"u = act(F.linear({x}, {up}))"]
    if w.odds(2):
        lines.append(f"u = u * F.linear({x}, {w.input(wide, d)})")
    lines.append(f"{name} = F.linear(u, {down})")
    w.keep("u")
    return finished(w, "\n".join(lines), name, x)


def normalised(w: Writer, x: str) -> str:
    """A normalisation over channels, or over something else."""
    d, name = w.shape(x)[-1], w.fresh("f")
    form = w.pick(
        f"F.layer_norm({x}, ({d},))",
        lambda: f"{x} * torch.rsqrt({x}.pow(2).mean(-1, keepdim=True) + 1e-3) * {w.input(d)}",
        f"{x} - {x}.mean(1, keepdim=True)",
        f"torch.softmax({x}, 1)",
        f"torch.cumsum({x}, 1) / torch.arange(1, {w.sizes.t + 1}, dtype={x}.dtype)[:, None]",
        f"{x}.cumsum(0).cumsum(1)",
        f"{x} + {x}.flip(1)",
    )
    return finished(w, f"{name} = {form}", name, x)


PIECES = [Piece("feed-forward", feed_forward), Piece("normalised", normalised)]
