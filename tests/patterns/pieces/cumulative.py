"""First-order recurrences by cumulative products, sums and log-sum-exps, right and wrong."""

from __future__ import annotations

from tests.patterns.pieces.loops import finished
from tests.patterns.programs import Piece, Writer


def _moved(w: Writer, x: str) -> tuple[str, str, int]:
    """Time moved elsewhere and back, and where it is meanwhile."""
    return w.pick(
        ("{}", "{}", 1),
        ("{}.transpose(1, 2)", "{}.transpose(1, 2)", 2),
        ("{}.transpose(0, 1)", "{}.transpose(0, 1)", 0),
        ("{}.mT.contiguous()", "{}.mT", -1),
        ("{}[:, :, None]", "{}.squeeze(2)", 1),
    )


def products(w: Writer, x: str) -> str:
    """h = P cumsum(u / P), P the running product."""
    b, t, d = w.shape(x)
    there, back, dim = _moved(w, x)
    a = there.format(w.input(b, t, d, kind="gate", batched=True))
    u, name = there.format(x), w.fresh("c")
    other = w.near(dim, 0, 2, 1)
    log = w.odds(2)
    P = f"torch.log({a}).cumsum({dim})" if log else f"torch.cumprod({a}, dim={dim})"
    lines = [f"P = {P}"]
    if log:
        lines.append("P = " + w.near("P.exp()", "P.exp() + 1e-6", "(P / 2).exp()", "P.exp2()"))
    lines.append(
        w.near(
            "Q = P",
            "Q = P + 1e-9",
            "Q = P.clamp(min=0.05)",
            "Q = P.roll(1, 1)",
            "Q = P.detach()",
            "Q = P * P",
            "Q = P.flip(0)",
        )
    )
    form = w.pick(
        f"P * torch.cumsum({u} / Q, {other})",
        f"({u} / Q).cumsum(dim={other}) * P",
        f"({u} * Q.reciprocal()).cumsum({other}) / P.reciprocal()",
        f"P * torch.cumsum({u} * Q ** -1, {other})",
        f"({u} / Q * 2).cumsum({other}) * P * 0.5",
        f"torch.cumsum({u} / (Q / 3), {other}) * (P / 3)",
    )
    form = w.near(
        form,
        f"P * torch.cumsum({u} * Q, {other})",
        f"torch.cumsum({u} / Q, {other})",
        f"P * torch.cumsum({u} / Q, {other}).tanh()",
        f"P.sum(-1, keepdim=True) * torch.cumsum({u} / Q, {other})",
        f"P * torch.cumsum({u} / Q, {other}).flip({other}).flip(0)",
        f"P * (torch.cumsum({u} / Q, {other}) - {u})",
        f"P * torch.cumsum({u} / Q, {other}) + {u}",
    )
    lines += [f"{name} = {back.format('(' + form + ')')}", f"{name}_P = P * 1"]
    made = finished(w, "\n".join(lines), name, x)
    w.keep(f"{name}_P")
    return made


def heinsen(w: Writer, x: str) -> str:
    """exp(A + logcumsumexp(log u - A)), A the running sum of log a; the values positive."""
    b, t, d = w.shape(x)
    there, back, dim = _moved(w, x)
    name = w.fresh("c")
    logs = w.pick(f"-F.softplus({x})", f"F.logsigmoid({x})", f"torch.log(torch.sigmoid({x}))")
    g = w.input(b, t, d, kind="gate", batched=True)
    values = w.pick(f"torch.log({g})", f"-F.softplus(-{g})", f"{g}")
    start = w.odds(3) and there == "{}"
    lines = [f"L = {there.format('(' + logs + ')')}", f"V = {there.format('(' + values + ')')}"]
    A = f"torch.cumsum(L, {dim})"
    if start:
        A = f"F.pad({A}, (0, 0, 1, 0))"
        first = w.pick(
            lambda: f"torch.log({w.input(b, 1, d, kind='gate', batched=True)})",
            "torch.zeros_like(V[:, :1])",
        )
        lines.append(f"V = torch.cat([{first}, V], 1)")
    lines.append(f"A = {A}")
    over = w.near(dim, 0, 2, 1)
    form = w.pick(
        f"torch.exp(A + torch.logcumsumexp(V - A, {over}))",
        f"(torch.logcumsumexp(V - A, {over}) + A).exp()",
        f"torch.logcumsumexp(V - A, dim={over}).exp() * A.exp()",
    )
    form = w.near(
        form,
        f"torch.exp(A - torch.logcumsumexp(V - A, {over}))",
        f"torch.exp(A + torch.logcumsumexp(V + A, {over}))",
        f"torch.exp(A + torch.logcumsumexp(V - A / 2, {over}))",
        f"torch.exp(A + torch.logcumsumexp(V - A, {over}) / 2)",
        f"(A + torch.logcumsumexp(V - A, {over})).exp2()",
        f"A + torch.logcumsumexp(V - A, {over})",
    )
    cut = w.near("[:, 1:]", "[:, :-1]") if start else ""
    lines.append(f"{name} = {back.format('(' + form + ')')}{cut}")
    return finished(w, "\n".join(lines), name, x)


def powers(w: Writer, x: str) -> str:
    """A decay that is fixed: powers in place of running products."""
    _, t, d = w.shape(x)
    name = w.fresh("c")
    rate = w.pick(lambda: w.input(d, kind="gate"), "0.8", lambda: f"torch.sigmoid({w.input(d)})")
    at = f"torch.arange({t}, dtype={x}.dtype)"
    at = w.near(
        at,
        f"(torch.arange({t}, dtype={x}.dtype) - 1)",
        f"torch.arange({t}, 0, -1, dtype={x}.dtype)",
        f"torch.arange(0, {2 * t}, 2, dtype={x}.dtype)",
        f"torch.arange({t}, dtype={x}.dtype).flip(0)",
    )
    P = w.pick(f"{rate} ** {at}[:, None]", f"torch.pow({rate}, {at}.view(1, -1, 1))")
    P = w.near(P, f"{at}[:, None] ** {rate}", f"({rate} + {at}[:, None])")
    form = w.pick(f"P * torch.cumsum({x} / P, dim=1)", f"({x} / P).cumsum(1) * P")
    form = w.near(form, f"P * torch.cumsum({x} * P, dim=1)", f"P * torch.cumsum({x} / P, dim=0)")
    return finished(w, f"P = {P}\n{name} = {form}", name, x)


PIECES = [Piece("products", products, 3), Piece("heinsen", heinsen, 2), Piece("powers", powers)]
