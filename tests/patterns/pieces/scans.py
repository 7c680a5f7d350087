"""Discretised scans as loops: a decay a channel and state, or a head; read out by C."""

from __future__ import annotations

from tests.patterns.pieces.loops import finished
from tests.patterns.programs import Piece, Writer


def selective(w: Writer, x: str) -> str:
    """Mamba's: state (b d n), decay exp(dt A)."""
    b, t, d = w.shape(x)
    n, name = w.sizes.n, w.fresh("m")
    dt = w.pick(
        lambda: w.input(b, t, d, kind="step", batched=True),
        lambda: w.let(f"F.softplus({w.input(b, t, d, batched=True)} + {w.input(d)})", "dt"),
        lambda: w.let(f"F.softplus({x} @ {w.input(d, d)})", "dt"),
    )
    A = w.let(f"-torch.exp({w.input(d, n)})", "A")
    B, C = (w.input(b, t, n, batched=True) for _ in range(2))
    da, db, head = (_inside if w.odds(2) else _outside)(w, x, dt, A, B)
    update = w.pick(
        f"h = {da} * h + {db}", f"h = {db} + h * {da}", f"h = torch.addcmul({db}, {da}, h)"
    )
    update = w.near(
        update,
        f"h = {da} * (h + {db})",
        f"h = {da} * h.tanh() + {db}",
        f"h = {da}.transpose(1, 2).reshape(h.shape) * h + {db}",
        f"h = {da} * h.transpose(1, 2).reshape(h.shape) + {db}",
        f"h = {da} + h * {db}",
        f"h = torch.softmax({da}, -1) * h + {db}",
        f"h = {da} * h + {db} + h.mean(2, keepdim=True)",
    )
    start = _start(w, x, (b, d, n), f"torch.zeros({w.batch(x)}, {d}, {n}, dtype={x}.dtype)")
    made = _loop(w, x, name, [*head, f"h = {start}"], update, _ended(w, x, _read(w, x, C)))
    return w.pick(made, lambda: w.let(f"{made} + {x} * {w.input(d)}"))


def _ended(w: Writer, x: str, y: str) -> str:
    """What a block does to ``y`` in each step: the skip, the gate."""
    d = w.shape(x)[-1]
    return w.pick(
        y,
        y,
        lambda: f"({y} + {x}[:, t] * {w.input(d)})",
        lambda: f"({y}) * F.silu({x}[:, t])",
        lambda: f"({y} + {w.input(d)} * {x}[:, t]) * torch.sigmoid({x}[:, t])",
    )


def _read(w: Writer, x: str, C: str) -> str:
    """What a step gives: a sum over states, weighted by C."""
    T = w.sizes.t
    at = w.near("t", f"{T - 1} - t", f"(t + 1) % {T}", "0")
    weighted = f"h * {C}[:, {at}, None, :]"
    read = w.pick(
        f"({weighted}).sum(-1)",
        f"torch.einsum('bdn,bn->bd', h, {C}[:, {at}])",
        f"(h @ {C}[:, {at}, :, None])[..., 0]",
        f"torch.bmm(h, {C}[:, {at}].unsqueeze(-1)).squeeze(-1)",
        f"torch.matmul({C}[:, {at}].unsqueeze(1), h.mT).squeeze(1)",
    )
    return w.near(
        read,
        f"({weighted}).sum(1).mean(-1, keepdim=True).expand({x}[:, 0].shape)",
        f"({weighted}).mean(-1)",
        f"({weighted}).amax(-1)",
        f"(h.abs() * {C}[:, {at}, None, :]).sum(-1)",
        f"torch.softmax({weighted}, -1).sum(-1)",
        f"({weighted}).sum(-1) + h[..., 0]",
        f"({weighted}).sum(1) @ torch.ones({w.sizes.n}, {w.shape(x)[-1]}, dtype={x}.dtype)",
    )


def _inside(w: Writer, x: str, dt: str, A: str, B: str) -> tuple[str, str, list[str]]:
    """Discretised in each step."""
    T = w.sizes.t
    at = w.near("t", f"{T - 1} - t", f"(t + 1) % {T}", "0")
    da = w.pick(f"torch.exp({dt}[:, t, :, None] * {A})", f"({dt}[:, t].unsqueeze(-1) * {A}).exp()")
    db = w.pick(
        f"({dt}[:, t] * {x}[:, t])[..., None] * {B}[:, {at}, None, :]",
        f"{dt}[:, t, :, None] * {B}[:, {at}].unsqueeze(1) * {x}[:, t][..., None]",
        f"torch.einsum('bd,bn->bdn', {x}[:, t] * {dt}[:, t], {B}[:, {at}])",
        f"torch.bmm(({x}[:, t] * {dt}[:, t]).unsqueeze(2), {B}[:, {at}].unsqueeze(1))",
    )
    return da, db, []


def _outside(w: Writer, x: str, dt: str, A: str, B: str) -> tuple[str, str, list[str]]:
    """Discretised for all steps at once."""
    da, db = w.fresh("da"), w.fresh("db")
    head = [
        w.pick(
            f"{da} = torch.exp({dt}[..., None] * {A})",
            f"{da} = torch.einsum('btd,dn->btdn', {dt}, {A}).exp()",
        ),
        w.pick(
            f"{db} = {dt}[..., None] * {B}[:, :, None] * {x}[..., None]",
            f"{db} = torch.einsum('btd,btn,btd->btdn', {dt}, {B}, {x})",
            f"{db} = ({dt} * {x}).unsqueeze(-1) * {B}.unsqueeze(-2)",
        ),
    ]
    at = w.near("t", "t - 1", "0")
    return f"{da}[:, t]", f"{db}[:, {at}]", head


def _start(w: Writer, x: str, shape: tuple[int, ...], zeros: str) -> str:
    kind = w.pick("zeros", "zeros", "input", "scalar", "ones")
    if kind == "input":
        return w.input(*shape, batched=True)
    if kind == "scalar":
        return f"torch.zeros((), dtype={x}.dtype)"
    return zeros if kind == "zeros" else zeros.replace("zeros", "ones")


def _loop(w: Writer, x: str, name: str, head: list[str], update: str, read: str) -> str:
    T = w.sizes.t
    steps = w.near(
        f"range({T})",
        f"reversed(range({T}))",
        f"range(1, {T})",
        f"range(0, {T}, 2)",
        f"range({T - 1})",
    )
    skip = w.near(
        "", f"{name}_s = {x}[:, t] * 0.5\n", "if t == 2: continue\n", "h = h * (t != 1)\n"
    )
    gather, after = w.pick(
        ("ys.append({})", "torch.stack(ys, 1)"),
        ("out[:, t] = {}", "out"),
        ("ys.append({}.unsqueeze(1))", "torch.cat(ys, dim=1)"),
        ("ys.append({})", "torch.stack(ys, -1).transpose(1, -1)"),
    )
    if "-1" in after and len(w.shape(x)) != 3:
        after = "torch.stack(ys, 1)"
    late = w.near(False, True)
    body = [skip + gather.format(read), update] if late else [skip + update, gather.format(read)]
    lines = [line for part in body for line in part.splitlines()]
    text = [*head, "ys, out = [], torch.zeros_like(" + x + ")", f"for t in {steps}:"]
    text += [f"    {line}" for line in lines]
    return finished(w, "\n".join([*text, f"{name} = {after}", f"{name}_last = h"]), name, x)


def heads(w: Writer, x: str) -> str:
    """Mamba-2's: state (b h p n), a decay a head, B and C shared or a head."""
    s, name = w.sizes, w.fresh("m")
    b, t, _ = w.shape(x)
    h, p, n = s.h, s.p, s.n
    wide = w.let(f"({x} @ {w.input(s.d, h * p)}).view({w.batch(x)}, {t}, {h}, {p})", "u")
    dt = w.input(b, t, h, kind="step", batched=True)
    A = w.let(f"-torch.exp({w.input(h)})", "A")
    shared = w.odds(2)
    shape = (b, t, n) if shared else (b, t, h, n)
    B, C = (w.input(*shape, batched=True) for _ in range(2))
    g = "" if shared else "h"
    at = w.near("t", f"{t - 1} - t", "t - 1", "0")
    da = w.pick(
        f"torch.exp({dt}[:, t] * {A})[..., None, None]",
        f"({dt} * {A}).exp()[:, t, :, None, None]",
    )
    da = w.near(da, f"torch.exp({dt}[:, t] * {A}).view({w.batch(x)}, 1, -1, 1)")
    mid = "[:, t, None, None, :]" if shared else "[:, t, :, None, :]"
    db = w.pick(
        f"torch.einsum('bh,bhp,b{g}n->bhpn', {dt}[:, t], {wide}[:, {at}], {B}[:, t])",
        f"({dt}[:, t, :, None] * {wide}[:, {at}])[..., None] * {B}{mid}",
    )
    update = w.pick(f"h = {da} * h + {db}", f"h = {db} + h * {da}")
    update = w.near(
        update,
        f"h = {da} * h.transpose(2, 3).reshape(h.shape) + {db}",
        f"h = {da} * h.flip(1) + {db}",
        f"h = {da} * h + {db} * h.mean()",
        f"h = {da} * h.transpose(0, 1).reshape(h.shape) + {db}",
    )
    read = w.pick(
        f"torch.einsum('bhpn,b{g}n->bhp', h, {C}[:, {at}])",
        f"(h * {C}{mid}).sum(-1)",
    )
    read = w.near(
        read,
        f"torch.einsum('bhpn,b{g}n->bhp', h, {C}[:, t]).transpose(1, 2)"
        f".reshape({w.batch(x)}, {h}, {p})",
    )
    zeros = f"torch.zeros({w.batch(x)}, {h}, {p}, {n}, dtype={x}.dtype)"
    start = _start(w, x, (b, h, p, n), zeros)
    made = _loop(w, wide, name, [f"h = {start}"], update, read)
    return w.let(f"{made}.flatten(2)") if len(w.shape(made)) == 4 else x


PIECES = [Piece("selective loop", selective, 3), Piece("heads loop", heads, 2)]
