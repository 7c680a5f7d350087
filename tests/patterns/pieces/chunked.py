"""State-space duality: one chunk as attention with a decay, and several chunks."""

from __future__ import annotations

from dataclasses import dataclass

from tests.patterns.pieces.loops import finished
from tests.patterns.programs import Piece, Writer


@dataclass
class Parts:
    """Names of values (b t h p), steps (b t h), A (h), B and C (b t h n)."""

    u: str
    dt: str
    A: str
    B: str
    C: str


def parts(w: Writer, x: str) -> Parts:
    """What an SSD takes, made of ``x``."""
    s = w.sizes
    b, t, d = w.shape(x)
    u = w.let(f"({x} @ {w.input(d, s.h * s.p)}).unflatten(-1, ({s.h}, {s.p}))", "u")
    dt = w.input(b, t, s.h, kind="step", batched=True)
    A = w.let(f"-{w.input(s.h, kind='gate')}", "A")
    groups = w.pick(s.h, 1)
    B, C = (w.input(b, t, groups, s.n, batched=True) for _ in range(2))
    if groups != s.h:
        style = w.pick("{}.repeat_interleave(%d, 2)", "{}.expand(-1, -1, %d, -1)") % s.h
        B, C = (w.let(style.format(v), v[0]) for v in (B, C))
    return Parts(u, dt, A, B, C)


def segments(w: Writer, a: str, T: int, prefix: str = "L") -> list[str]:
    """Lines that set ``prefix`` to exp of the segment sums of ``a`` (.. T)."""
    diagonal, tri = w.near(0, 1, -1), w.near("tril", "triu")
    mask = f"torch.ones({T}, {T}, dtype=torch.bool).{tri}(diagonal={diagonal})"
    if w.odds(3):
        return [
            f"s = {a}.unsqueeze(-1).repeat(*([1] * {a}.dim()), {T})",
            f"s = s.masked_fill(~torch.ones({T}, {T}, dtype=torch.bool).tril({w.near(-1, 0)}), 0)",
            f"s = s.cumsum({w.near(-2, -1)}).masked_fill(~{mask}, -inf)",
            f"{prefix} = s.exp()",
        ]
    gap = w.near("s[..., :, None] - s[..., None, :]", "s[..., None, :] - s[..., :, None]")
    lines = [f"s = {a}.cumsum({w.near(-1, -2)})", f"s = {gap}"]
    last = w.pick(
        f"{prefix} = s.masked_fill(~{mask}, -inf).exp()",
        f"{prefix} = torch.where({mask}, s, -inf).exp()",
        f"{prefix} = s.exp().tril({diagonal})",
        f"{prefix} = s.tril().exp() * {mask}",
        f"{prefix} = torch.exp(s) * torch.ones({T}, {T}, dtype=s.dtype).tril({diagonal})",
    )
    return [*lines, last]


def quadratic(w: Writer, x: str) -> str:
    """One chunk: (C B^T * L) (dt u)."""
    s, v, name = w.sizes, parts(w, x), w.fresh("q")
    lines = [f"a = ({v.dt} * {v.A}).transpose(1, 2)", *segments(w, "a", s.t)]
    form = w.pick(
        f"torch.einsum('blhn,bshn,bhls,bsh,bshp->blhp', {v.C}, {v.B}, L, {v.dt}, {v.u})",
        f"((({v.C}.transpose(1, 2) @ {v.B}.permute(0, 2, 3, 1)) * L) @ "
        f"({v.u} * {v.dt}[..., None]).transpose(1, 2)).transpose(1, 2)",
        f"((torch.einsum('blhn,bshn->bhls', {v.C}, {v.B}) * L * {v.dt}.transpose(1, 2)[:, :, None])"
        f" @ {v.u}.transpose(1, 2)).transpose(1, 2)",
    )
    form = w.near(
        form,
        f"torch.einsum('blhn,bshn,bhsl,bsh,bshp->blhp', {v.C}, {v.B}, L, {v.dt}, {v.u})",
        f"torch.einsum('blhn,bshn,bhls,blh,bshp->blhp', {v.C}, {v.B}, L, {v.dt}, {v.u})",
        f"torch.einsum('bshn,blhn,bhls,bsh,bshp->blhp', {v.C}, {v.B}, L, {v.dt}, {v.u})",
        f"(torch.softmax(torch.einsum('blhn,bshn->bhls', {v.C}, {v.B}) * L, -1) @ "
        f"{v.u}.transpose(1, 2)).transpose(1, 2)",
    )
    made = finished(w, "\n".join([*lines, f"{name} = {form}", f"{name}_L = L * 1"]), name, v.u)
    w.keep(f"{name}_L")
    return w.let(f"{made}.flatten(2)")


def chunked(w: Writer, x: str) -> str:
    """The minimal listing: within chunks, states of chunks, between chunks, and out."""
    s, v, name = w.sizes, parts(w, x), w.fresh("q")
    K = w.pick(*[k for k in (2, 3, 4, 1, 5) if s.t % k == 0] or [s.t])
    c = s.t // K
    cut = f"lambda v: v.unflatten(1, ({c}, {K}))"
    if w.odds(5) and c > 1:
        cut = w.near(cut, f"lambda v: v.unflatten(1, ({K}, {c})).transpose(1, 2)")
    lines = [
        f"cut = {cut}",
        f"X, B, C = cut({v.u} * {v.dt}[..., None]), cut({v.B}), cut({v.C})",
        f"a = cut({v.dt} * {v.A}).permute(0, 3, 1, 2)",
        "A = a.cumsum(-1)",
        *segments(w, "a", K),
        "Y = torch.einsum('bclhn,bcshn,bhcls,bcshp->bclhp', C, B, L, X)",
        "end = "
        + w.near("(A[..., -1:] - A).exp()", "(A[..., -1:] - a).exp()", "(A - A[..., :1]).exp()"),
        "S = torch.einsum('bclhn,bhcl,bclhp->bchpn', B, end, X)",
        "S = torch.cat([torch.zeros_like(S[:, :1]), S], 1)",
        f"e = F.pad({w.near('A[..., -1]', 'A[..., 0]', 'a[..., -1]')}, {w.near((1, 0), (0, 1))})",
        *segments(w, "e", c + 1, "D"),
        "S = torch.einsum('bhzc,bchpn->bzhpn', D, S)",
        f"{name}_last = S[:, -1]",
        "S = " + w.near("S[:, :-1]", "S[:, 1:]"),
        "O = torch.einsum('bclhn,bchpn,bhcl->bclhp', C, S, "
        + w.near("A.exp()", "a.exp()", "(A - a).exp()", "torch.ones_like(A)")
        + ")",
        f"{name} = {w.near('(Y + O)', 'Y', '(Y - O)')}.flatten(1, 2)",
    ]
    made = finished(w, "\n".join(lines), name, v.u)
    w.keep(f"{name}_last")
    return w.let(f"{made}.flatten(2)")


def passed(w: Writer, x: str) -> str:
    """A loop over chunks that carries the state; the last chunk may be shorter."""
    v, name = parts(w, x), w.fresh("q")
    K = w.pick(2, 3, 4, 5)
    tri = w.near("tril()", "triu()", "tril(-1)", "tril(1)")
    lines = [
        f"h, ys = torch.zeros_like({v.u}[:, 0, :, :, None] * {v.B}[:, 0, :, None]), []",
        f"for X, d, B, C in zip(*(v.split({K}, 1) for v in ({v.u}, {v.dt}, {v.B}, {v.C}))):",
        f"    A = (d * {v.A}).cumsum(1)",
        f"    M = torch.ones(X.shape[1], X.shape[1], dtype=X.dtype).{tri}[None, :, :, None]",
        "    G = torch.exp((A[:, :, None] - A[:, None]) * M) * M",
        "    y = torch.einsum('blhn,bshn,blsh,bsh,bshp->blhp', C, B, G, d, X)",
        "    y = y + torch.einsum('blhn,bhpn,blh->blhp', C, h, "
        + w.near("A.exp()", "d.exp()")
        + ")",
        "    ys.append(y)",
        "    k = torch.exp(A[:, -1:] - A) * d",
        "    h = h * A[:, " + w.near("-1", "0") + "].exp()[:, :, None, None]"
        " + torch.einsum('bshn,bsh,bshp->bhpn', B, k, X)",
        f"{name} = torch.cat(ys, 1)",
        f"{name}_last = h",
    ]
    made = finished(w, "\n".join(lines), name, v.u)
    w.keep(f"{name}_last")
    return w.let(f"{made}.flatten(2)")


PIECES = [Piece("quadratic", quadratic, 2), Piece("chunked", chunked, 2), Piece("passed", passed)]
