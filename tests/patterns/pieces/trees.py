"""Parallel scans by doubling, halving and dividing, with right and wrong shifts and pads."""

from __future__ import annotations

from tests.patterns.pieces.loops import finished
from tests.patterns.programs import Piece, Writer


def pair(w: Writer, x: str) -> tuple[str, str]:
    """Coefficients and values of a recurrence, (b t d) or broadcast to it, or (b t d n)."""
    b, t, d = w.shape(x)
    if w.odds(4):
        n = w.sizes.n
        a = w.let(
            f"torch.exp(-{w.input(b, t, d, kind='step', batched=True)}[..., None] * "
            f"{w.input(d, n, kind='gate')})",
            "a",
        )
        return a, w.let(f"{x}[..., None] * {w.input(b, t, n, batched=True)}[:, :, None]", "u")
    a = w.input(b, t, d, kind="gate", batched=True)
    if w.odds(4):
        a = w.let(f"torch.sigmoid({x} @ {w.input(d, d)})", "a")
    u = w.pick(x, lambda: w.let(f"(1 - {a}) * {x}", "u"))
    return a, u


def _back(w: Writer, x: str, name: str) -> str:
    if len(w.shape(name)) == 4:
        w.keep(name)
        return w.let(f"{name}.{w.pick('sum', 'mean', 'amax')}(-1)")
    return name


def _rounds(w: Writer, t: int) -> list[int]:
    right = [s for s in (1, 2, 4, 8) if s < t]
    return w.near(
        right,
        [s for s in (1, 3, 9) if s < t],
        right[:-1],
        right[::-1],
        [1, *right],
        [s for s in (2, 4, 8, 1) if s < t],
        [s for s in (1, 2, 3, 4) if s < t],
        [s for s in (1, 2, 5, 8) if s < t],
    )


def doubling(w: Writer, x: str) -> str:
    """Hillis and Steele's: each round looks twice as far back."""
    a0, u0 = pair(w, x)
    t, name = w.sizes.t, w.fresh("p")
    rest = (0, 0) * (len(w.shape(u0)) - 2)
    one, zero = w.near(1.0, 0.0, 2.0), w.near(0.0, 1.0)
    lines = [f"a, u = {a0}, {u0}"]
    style = w.pick("pad", "cat", "tail", "in place", "roll")
    swapped = w.near(False, True)
    for s in _rounds(w, t):
        value, gain = _shifted(w, style, s, t, rest, one, zero)
        sum_ = w.pick(
            f"u = a * {value} + u", f"u = u + {value} * a", f"u = torch.addcmul(u, a, {value})"
        )
        sum_ = w.near(
            sum_, f"u = {gain} * u + {value}", f"u = a * {value} - u", f"u = a + {value} * u"
        )
        product = w.near(f"a = a * {gain}", f"a = a + {gain}", "a = a * a", "a = a * 1")
        if style == "tail":
            sum_ = f"v = torch.cat([u[:, :{s}], u[:, {s}:] + a[:, {s}:] * u[:, :-{s}]], 1)"
            product = f"a = torch.cat([a[:, :{s}], a[:, {s}:] * a[:, :-{s}]], 1)"
        if style == "in place":
            sum_ = f"v = u.clone()\nv[:, {s}:] += a[:, {s}:] * u[:, :-{s}]"
            product = f"c = a.clone()\nc[:, {s}:] *= a[:, :-{s}]\na = c"
        lines += [product, sum_] if swapped else [sum_, product]
        lines += ["u = v"] if style in ("tail", "in place") else []
    lines.append(f"{name} = u")
    return _back(w, x, finished(w, "\n".join(lines), name, u0))


def _shifted(
    w: Writer, style: str, s: int, t: int, rest: tuple[int, ...], one: float, zero: float
) -> tuple[str, str]:
    """What lies s steps before: of u, and of a."""
    if style == "roll":
        alive = f"(torch.arange({t}) >= {s}).view(-1, {', '.join(['1'] * (len(rest) // 2))})"
        made = w.near(f"torch.where({alive}, u.roll({s}, 1), 0)", f"u.roll({s}, 1)")
        return made, f"torch.where({alive}, a.roll({s}, 1), 1)"
    if style == "cat":
        return (
            f"torch.cat([torch.zeros_like(u[:, :{s}]), u[:, :-{s}]], 1)",
            f"torch.cat([torch.ones_like(a[:, :{s}]), a[:, :-{s}]], 1)",
        )
    front, cut = w.near(((s, 0), f"[:, :{t}]"), ((0, s), f"[:, {s}:]"))
    pad = (*rest, *front)
    return f"F.pad(u, {pad}, value={zero}){cut}", f"F.pad(a, {pad}, value={one}){cut}"


HALVING = """
def {f}(a, u):
    T = u.shape[1]
    if T == 1:
        return u
    e, o = slice(0, T - T % 2, 2), slice(1, None, 2)
    odd = {f}({product}, {sum})
    tail = u[:, 2::2] + a[:, {from_}::2] * odd[:, :u[:, 2::2].shape[1]]
    even = torch.cat([{head}, tail], 1)
    if even.shape[1] == odd.shape[1]:
        return torch.stack([even, odd], 2).flatten(1, 2)
    return torch.cat([torch.stack([even[:, :-1], odd], 2).flatten(1, 2), even[:, -1:]], 1)
"""


def halving(w: Writer, x: str) -> str:
    """Pairs are combined, the rest is filled in."""
    a, u = pair(w, x)
    f, name = w.fresh("scan"), w.fresh("p")
    text = HALVING.format(
        f=f,
        product=w.near("a[:, e] * a[:, o]", "a[:, e] + a[:, o]", "a[:, o] * a[:, o]"),
        sum=w.near(
            "a[:, o] * u[:, e] + u[:, o]",
            "a[:, e] * u[:, e] + u[:, o]",
            "a[:, o] * u[:, o] + u[:, e]",
        ),
        from_=w.near(2, 1, 0) if w.sizes.t % 2 else 2,
        head=w.near("u[:, :1]", "u[:, 1:2] if u.shape[1] > 1 else u", "u[:, :1] * a[:, :1]"),
    )
    return _back(w, x, finished(w, f"{text}{name} = {f}({a}, {u})", name, u))


DIVIDING = """
def {f}(a, u):
    T = u.shape[1]
    if T == 1:
        return a, u
    m = {middle}
    p1, h1 = {f}(a[:, :m], u[:, :m])
    p2, h2 = {f}(a[:, m:], u[:, m:])
    return torch.cat([p1, {product}], 1), torch.cat([h1, {sum}], 1)
"""


def dividing(w: Writer, x: str) -> str:
    """The last state of the first half flows into the second."""
    a, u = pair(w, x)
    f, name = w.fresh("scan"), w.fresh("p")
    text = DIVIDING.format(
        f=f,
        middle=w.pick("T // 2", "(T + 1) // 2", "1", "T - 1"),
        product=w.near("p2 * p1[:, -1:]", "p2 * p1[:, :1]", "p2"),
        sum=w.near(
            "h2 + p2 * h1[:, -1:]",
            "h2 + p2 * h1[:, :1]",
            "h2 + p2 * h1.mean(1, True)",
            "h2 + p1[:, -1:] * h1[:, -1:]",
        ),
    )
    return _back(w, x, finished(w, f"{text}{name} = {f}({a}, {u})[1]", name, u))


SWEEPS = """
a, u = (F.pad(v, {pad}).clone() for v in ({a}, {u}))
for k in range({rounds}):
    s = 2 << k
    l, r = slice(s // 2 - 1, None, s), slice(s - 1, None, s)
    u[:, r] += a[:, r].clone() * u[:, l].clone()
    a[:, r] *= {gain}
for k in reversed(range({rounds} - 1)):
    s = 2 << k
    l, r = slice(s - 1, {end}, s), slice(s + s // 2 - 1, None, s)
    n = slice(0, u[:, r].shape[1])
    u[:, r] += a[:, r].clone() * u[:, l][:, n].clone()
    a[:, r] *= a[:, l][:, n].clone()
{name} = u[:, :{t}]"""


def sweeps(w: Writer, x: str) -> str:
    """Up and down sweep in place, padded to a power of two."""
    a, u = pair(w, x)
    t, name = w.sizes.t, w.fresh("p")
    rounds = (t - 1).bit_length()
    pad = (*(0, 0) * (len(w.shape(u)) - 2), *w.near((0, 2**rounds - t), (2**rounds - t, 0)))
    gain = w.near("a[:, l].clone()", "a[:, r].clone()", "u[:, l].clone()")
    text = SWEEPS.format(
        a=a, u=u, pad=pad, rounds=rounds, gain=gain, t=t, name=name, end=w.near(-1, None, -2)
    )
    return _back(w, x, finished(w, text.strip(), name, u))


PIECES = [
    Piece("doubling", doubling, 3),
    Piece("halving", halving),
    Piece("dividing", dividing),
    Piece("sweeps", sweeps),
]
