"""Attention written out, with scales, masks and softmaxes in right and wrong places."""

from __future__ import annotations

import torch

from tests.patterns.pieces.loops import finished
from tests.patterns.programs import Piece, Writer


def _heads(w: Writer, x: str) -> tuple[str, str, str]:
    """Queries, keys and values (b h t p)."""
    s, d = w.sizes, w.shape(x)[-1]
    made = []
    few = w.odds(4)
    for i in range(3):
        h = 1 if few and i else s.h
        flat = f"({x} @ {w.input(d, h * s.p)})"
        split = w.pick(
            f"{flat}.view({w.batch(x)}, {s.t}, {h}, {s.p}).transpose(1, 2)",
            f"{flat}.unflatten(-1, ({h}, {s.p})).permute(0, 2, 1, 3)",
        )
        split = w.near(split, f"{flat}.view({w.batch(x)}, {h}, {s.t}, {s.p})")
        if h != s.h:
            split += w.pick(f".repeat_interleave({s.h}, 1)", f".expand(-1, {s.h}, -1, -1)")
        made.append(w.let(split, "qkv"[i]))
    return made[0], made[1], made[2]


def _mask(w: Writer, b: int, h: int, t: int) -> tuple[str, str]:
    """A boolean mask, True where a key is hidden, and whether a query may see nothing."""
    causal = f"torch.ones({t}, {t}, dtype=torch.bool).triu(1)"
    return w.pick(
        ("", "none"),
        (causal, "constant"),
        (f"(torch.arange({t})[:, None] < torch.arange({t}))", "constant"),
        (f"torch.ones({t}, {t}, dtype=torch.bool).triu({w.pick(2, 0, -1)})", "some"),
        (f"(({causal}) | ~torch.ones({t}, {t}, dtype=torch.bool).triu(-1))", "constant"),
        lambda: (w.input(b, 1, 1, t, kind="mask", batched=True), "some"),
        lambda: (w.input(b, 1, t, t, kind="mask", batched=True), "some"),
        lambda: (f"({causal} & {w.input(t, t, kind='mask')})", "constant"),
    )


def attention(w: Writer, x: str) -> str:
    """softmax(q k^T scale + mask) v."""
    s, name = w.sizes, w.fresh("o")
    q, k, v = _heads(w, x)
    scale = w.pick("0.5", str(round(s.p**-0.5, 6)), "1.0", "-0.7", "2")
    place = w.pick("scores", "q", "k", "both", "none", "later")
    q = f"({q} * {scale})" if place in ("q", "both") else q
    k = f"({k} / 2)" if place in ("k", "both") else k
    scores = w.pick(
        f"{q} @ {k}.transpose(-1, -2)",
        f"torch.einsum('bhqd,bhkd->bhqk', {q}, {k})",
        f"torch.matmul({q}, {k}.mT)",
        f"torch.bmm({q}.flatten(0, 1), {k}.flatten(0, 1).mT)"
        f".view({w.batch(x)}, {s.h}, {s.t}, {s.t})",
        f"({k} @ {q}.mT).mT",
    )
    scores = w.near(scores, f"{k} @ {q}.mT", f"({q} @ {q}.mT)", f"({q} - {k}) @ {k}.mT")
    lines = [f"S = ({scores})"]
    if place == "scores":
        lines.append(w.pick(f"S = S * {scale}", f"S = S / {scale}", f"S.mul_({scale})"))
    lines += _between(w, x)
    lines += _masked(w)
    if place == "later":
        lines.append(
            w.near(
                f"S = S * {scale}",
                lambda: f"S = S * {w.input(s.t, 1)}",
                lambda: f"S = S * {w.input(1, s.t)}",
            )
        )
    lines += _weights(w)
    lines.append(f"{name}_p = W")
    out = w.pick(f"W @ {v}", f"torch.einsum('bhqk,bhkd->bhqd', W, {v})", f"torch.matmul(W, {v})")
    out = w.near(
        out, f"W.mT @ {v}", f"W @ {v} + W @ {q}", f"torch.einsum('bhqk,bhqd->bhqd', W, {v})"
    )
    lines.append(f"{name} = ({out})" + w.near("", " * 2", ".tanh()"))
    back = w.near(
        ".transpose(1, 2).flatten(2)",
        f".reshape({w.batch(x)}, {s.t}, {s.h * s.p})",
        f".permute(0, 2, 3, 1).reshape({w.batch(x)}, {s.t}, {s.h * s.p})",
    )
    lines.append(f"{name} = {name}{back}")
    made = finished(w, "\n".join(lines), name, w.let(f"{v}.transpose(1, 2).flatten(2)"))
    if name in w.values and w.odds(2):
        w.keep(f"{name}_p")
    return made


def _between(w: Writer, x: str) -> list[str]:
    """Biases, and what should not be there."""
    s = w.sizes
    bias = w.pick(
        "",
        "",
        lambda: f"S = S + {w.input(s.h, s.t, s.t)}",
        lambda: f"S = S + {w.input(s.h, 1, 1)} * (torch.arange({s.t}) - {s.t})",
    )
    odd = w.near(
        "",
        "S = 5 * torch.tanh(S / 5)",
        "S = S.clamp(min=-1)",
        "S = S.roll(1, 1)",
        "S = F.relu(S)",
        "S = S - S.detach() + S * 0.5",
        "S = S.to(torch.bfloat16)",
        "S = S ** 2",
        "S = S / S.norm(dim=-1, keepdim=True).clamp(min=0.1)",
    )
    return [line for line in (bias, odd) if line]


def _masked(w: Writer) -> list[str]:
    s = w.sizes
    mask, kind = _mask(w, s.b, s.h, s.t)
    if kind == "none":
        return []
    low = w.pick("-inf", "-1e9", "-10000.0", "torch.finfo(S.dtype).min")
    low = w.near(low, "-3.0", "0.0")
    low = "-1e9" if kind == "some" and low == "-inf" and not w.odds(6) else low
    eaten = "-3000.0" if w.dtype == torch.float64 else "-200.0"  # larger ones eat digits of S
    added = low if low in ("-inf", "-3.0") else eaten
    return [
        w.pick(
            f"S = S.masked_fill({mask}, {low})",
            f"S = torch.where({mask}, {low}, S)",
            f"S = S + torch.zeros({mask}.shape, dtype=S.dtype).masked_fill({mask}, {added})",
            f"S = S + {mask}.to(S.dtype) * {eaten}",
            f"S = torch.where(~{mask}, S, torch.full((), {low}, dtype=S.dtype))",
        )
    ]


def _weights(w: Writer) -> list[str]:
    soft = w.pick(
        "W = torch.softmax(S, -1)",
        "W = S.softmax(3)",
        "E = (S - S.amax(-1, keepdim=True)).exp()\nW = E / E.sum(-1, keepdim=True)",
        "E = S.exp()\nW = E / E.sum(-1, keepdim=True)",
        "W = torch.log_softmax(S, -1).exp()",
    )
    soft = w.near(
        soft,
        "W = torch.softmax(S, -2)",
        "W = torch.softmax(S, 1)",
        "W = torch.softmax(S, 0)",
        "W = torch.sigmoid(S)",
        "E = S.exp()\nW = E / (E.sum(-1, keepdim=True) + 1)",
        "E = S.exp()\nW = E / E.sum(-2, keepdim=True)",
        "E = (S - 1).exp()\nW = E / S.exp().sum(-1, keepdim=True)",
        "W = torch.softmax(S.flatten(2), -1).view(S.shape)",
    )
    lines = soft.splitlines()
    lines += w.pick(
        [], [], ["W = F.dropout(W, 0.5, training=False)"], ["W = W * 0.5"], ["W = W.to(S.dtype)"]
    )
    s = w.sizes
    odd = w.near(
        "",
        lambda: f"W = W * {w.input(s.t, 1, kind='gate')}",
        lambda: f"W = W * {w.input(1, s.t, kind='gate')}",
        "W = W.tril()",
        "W = W + 0.1",
        "W = W.mT",
        "W = W.flip(-1)",
        "W = W.detach()",
        "W = W / W.amax(-1, keepdim=True)",
        "W = W.to(torch.bfloat16).to(S.dtype)",
    )
    return [*lines, odd] if odd else lines


def sums(w: Writer, x: str) -> str:
    """Attention of one head as broadcast products and sums."""
    s, name = w.sizes, w.fresh("o")
    b, t, d = w.shape(x)
    k = w.input(b, t, d, batched=True)
    dim = w.near(2, 1)
    lines = [
        f"S = ({x}[:, :, None] * {k}[:, None]).sum({w.near(-1, 1)}) * 0.5",
        *[line for line in _masked(w) if s.b == 1 or "x" not in line],
        f"W = torch.softmax(S, {dim})",
        f"{name} = (W[..., None] * {k}[:, None]).sum({w.near(2, 1)})",
    ]
    return finished(w, "\n".join(lines), name, x)


PIECES = [Piece("attention", attention, 7), Piece("attention of sums", sums)]
