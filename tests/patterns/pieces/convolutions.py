"""Depthwise convolutions over time, causal and not: by the library, by shifts, by windows."""

from __future__ import annotations

from tests.patterns.pieces.loops import finished
from tests.patterns.programs import Piece, Writer


def library(w: Writer, x: str) -> str:
    """conv1d with padding and a slice, or padded by hand."""
    _, t, d = w.shape(x)
    k, name = w.pick(3, 2, 4, 1), w.fresh("y")
    dilation = w.near(1, 2)
    reach = (k - 1) * dilation
    groups = w.near(d, 1)
    weight = w.input(d, 1 if groups == d else d, k)
    bias = w.pick("None", lambda: w.input(d))
    first = w.pick(f"{x}.transpose(1, 2)", f"{x}.mT.contiguous()", f"{x}.permute(0, 2, 1)")
    rest = f"{bias}, dilation={dilation}, groups={groups}"
    style = w.pick("both", "left", "zeros", "given")
    cut = w.near(f"[..., :{t}]", f"[..., {reach}:]", f"[..., 1:{t + 1}]", f"[..., -{t}:]")
    if style == "both":
        p = w.near(reach, reach // 2, reach + 1)
        y = f"F.conv1d({first}, {weight}, {bias}, 1, {p}, {dilation}, {groups}){cut}"
    elif style == "left":
        pad = w.near((reach, 0), (0, reach), (reach - reach // 2, reach // 2))
        y = f"F.conv1d(F.pad({first}, {pad}), {weight}, {rest})"
    elif style == "zeros":
        before = f"torch.zeros_like(X[..., :1]).expand(-1, -1, {reach})"
        joined = w.near(f"torch.cat([{before}, X], -1)", f"torch.cat([X, {before}], -1)")
        w.say(f"X = {first}")
        y = f"F.conv1d({joined}, {weight}, {rest})"
    else:
        before = w.input(w.sizes.b, d, reach, batched=True) if reach else "X[..., :0]"
        w.say(f"X = {first}")
        y = f"F.conv1d(torch.cat([{before}, X], -1), {weight}, {rest})"
    return finished(w, f"{name} = {_activated(w, y)}.transpose(1, 2)", name, x)


def _activated(w: Writer, y: str) -> str:
    return w.pick(f"F.silu({y})", y, f"({y} * torch.sigmoid({y}))", f"({y}).tanh()", f"F.gelu({y})")


def shifts(w: Writer, x: str) -> str:
    """Shifted copies, each multiplied by its tap, added up."""
    _, t, d = w.shape(x)
    k, name = w.pick(3, 2, 4), w.fresh("y")
    taps = w.input(k, d)
    lags = w.near(
        list(range(k)), [0, 2, 3, 5][:k], [1, 2, 3, 4][:k], [0, 1, 1, 2][:k], [0, -1, 1, 2][:k]
    )
    style = w.pick("pad", "cat", "negative pad", "roll", "slices", "windows")
    terms = []
    for i, lag in enumerate(lags):
        tap = w.near(f"{taps}[{i}]", f"{taps}[{(i + 1) % k}]", f"{taps}[{i}].flip(0)")
        terms.append(
            w.pick(
                f"{_lagged(w, style, x, lag, t)} * {tap}", f"{tap} * {_lagged(w, style, x, lag, t)}"
            )
        )
    sign = w.near("+", "-")
    total = f" {sign} ".join(terms)
    lines = []
    if style == "slices":
        lines.append(f"y = {x} * {taps}[0]")
        for i, lag in list(enumerate(lags))[1:]:
            lines.append(f"y[:, {lag}:] += {x}[:, :{t - lag}] * {taps}[{i}]")
        total = "y"
    if style == "windows":
        ends = w.near((k - 1, 0), (0, k - 1), (1, k - 2))
        lines.append(f"y = F.pad({x}, (0, 0, *{ends})).unfold(1, {k}, 1)")
        total = w.pick(
            f"(y * {taps}.t()).sum(-1)",
            f"torch.einsum('btdk,kd->btd', y, {taps})",
            f"(y * {taps}.t().flip(-1)).sum(-1)",
        )
        total = w.near(total, f"(y * {taps}.t()).mean(-1)", f"(y * {taps}.t()).sum(2)")
    if w.odds(2):
        total = f"({total}) + {w.input(d)}"
    lines.append(f"{name} = {_activated(w, '(' + total + ')')}")
    return finished(w, "\n".join(lines), name, x)


def _lagged(w: Writer, style: str, x: str, lag: int, t: int) -> str:
    """``x`` of ``lag`` steps before, zero where there is none."""
    if style == "cat" and 0 < lag < t:
        return f"torch.cat([torch.zeros_like({x}[:, :{lag}]), {x}[:, :-{lag}]], 1)"
    if style == "negative pad":
        return f"F.pad({x}, (0, 0, {lag}, {-lag}))"
    if style == "roll":
        alive = f"(torch.arange({t}) >= {lag}).to({x}.dtype)[:, None]"
        return w.near(
            f"({x}.roll({lag}, 1) * {alive})",
            f"{x}.roll({lag}, 1)",
            f"({x}.roll({lag}, 2) * {alive})",
        )
    if lag < 0:
        return f"F.pad({x}, (0, 0, 0, {-lag}))[:, {-lag}:]"
    return f"F.pad({x}, (0, 0, {lag}, 0))[:, :{t}]"


def window(w: Writer, x: str) -> str:
    """A window of the last tokens, carried from step to step."""
    b, t, d = w.shape(x)
    k, name = w.pick(3, 2, 4), w.fresh("y")
    taps = w.input(d, k)
    start = w.pick(f"torch.zeros({w.batch(x)}, {d}, {k}, dtype={x}.dtype)", "input")
    start = w.input(b, d, k, batched=True) if start == "input" else start
    move = w.pick(
        f"s = torch.cat([s[:, :, 1:], {x}[:, t, :, None]], -1)",
        f"s = s.roll(-1, -1)\n    s[:, :, -1] = {x}[:, t]",
    )
    move = w.near(
        move,
        f"s = torch.cat([{x}[:, t, :, None], s[:, :, :-1]], -1)",
        f"s = torch.cat([s[:, :, 1:], {x}[:, {t - 1} - t, :, None]], -1)",
        f"s = torch.cat([s[:, :, 1:], {x}[:, t, :, None] + s[:, :, :1]], -1)",
    )
    loop = f"for t in range({t}):\n    {move}\n    ys.append((s * {taps}).sum(-1))"
    end = f"{name} = {_activated(w, 'torch.stack(ys, 1)')}\n{name}_last = s"
    return finished(w, f"s, ys = {start}, []\n{loop}\n{end}", name, x)


PIECES = [
    Piece("conv1d", library, 3),
    Piece("shifts", shifts, 3),
    Piece("window", window),
]
