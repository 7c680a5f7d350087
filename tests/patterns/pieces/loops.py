"""Loops over time: first-order recurrences, and loops that nearly are."""

from __future__ import annotations

from dataclasses import dataclass

from tests.patterns.programs import Piece, Writer


@dataclass
class Access:
    """How a loop reads its tensors: a line before it, and what a step reads."""

    before: str
    read: str
    kept_dim: bool = False


def access(w: Writer, v: str, kept: bool, wrong: bool) -> Access:
    """Reads ``v`` (b t ..) at step t, as a slice of length 1 where ``kept``."""
    T, name = w.sizes.t, w.fresh("s")
    at = w.near("t", "t - 1", "0", f"{T - 1} - t", f"(t + 1) % {T}", "t // 2") if wrong else "t"
    if kept:
        styles = [
            Access("", f"{v}[:, {at}][:, None]"),
            Access(f"{name} = {v}.split(1, 1)", f"{name}[{at}]"),
        ]
        if at == "t":
            styles.insert(0, Access("", f"{v}[:, t : t + 1]"))
        return w.pick(*styles)
    return w.pick(
        Access("", f"{v}[:, {at}]"),
        Access("", f"{v}.select(1, {at})"),
        Access(f"{name} = {v}.unbind(1)", f"{name}[{at}]"),
        Access(f"{name} = {v}.transpose(0, 1)", f"{name}[{at}]"),
        Access(f"{name} = {v}.transpose(0, 1).contiguous()", f"{name}[{at}]"),
        Access(f"{name} = {v}.movedim(1, -1)", f"{name}[..., {at}]"),
        Access(f"{name} = {v}.chunk({T}, 1)", f"{name}[{at}].squeeze(1)"),
    )


def decay(w: Writer, x: str) -> str:
    """A tensor (b t d), or of fewer dims, or a number: what the state is multiplied with."""
    b, t, d = w.shape(x)
    kind = w.pick(
        *("gate", "gate", "of x", "channel", "number", "time", "signed", "row", "one", "rg-lru")
    )
    if kind == "gate":
        return w.input(b, t, d, kind="gate", batched=True)
    if kind == "of x":
        return w.let(f"torch.sigmoid({x} @ {w.input(d, d)})", "a")
    if kind == "rg-lru":
        rate = w.let(f"F.softplus({w.input(d)}) * torch.sigmoid({x} @ {w.input(d, d)})")
        return w.let(f"torch.exp(-2 * {rate})", "a")
    if kind == "channel":
        return w.let(f"torch.sigmoid({w.input(d)})", "a")
    if kind == "time":
        return w.let(f"{w.input(t, d, kind='gate')}[None]", "a")
    if kind == "signed":
        return w.let(f"torch.tanh({w.input(b, t, d, batched=True)})", "a")
    if kind == "row":
        return w.input(b, t, 1, kind="gate", batched=True)
    return "0.9" if kind == "number" else "1.0"


def update(w: Writer, a: str, u: str, number: bool) -> str:
    """Lines that set ``h`` to the next state."""
    right = [
        f"h = {a} * h + {u}",
        f"h = {u} + h * {a}",
        f"h = h - (1 - {a}) * h + {u}",
        f"h = ({u} / 2 + {a} * h / 2) * 2",
        f"h = {a} * h\nh = torch.add(h, {u})",
        f"h = {a} * h - -{u}",
        f"h = torch.sub({u}, h, alpha=-1) if t == -1 else {a} * h + {u}",
        f"h = (h + {u}) * {a}",
        f"h = (1 - {a}) * {u} + {a} * h",
    ]
    if number:
        right += [f"h = torch.add({u}, h, alpha={a})", f"h = torch.lerp({u}, h, {a})"]
    else:
        right += [f"h = torch.addcmul({u}, h, {a})", f"h = torch.lerp({u}, h, {a}.expand_as({u}))"]
        right += [f"h = torch.where({u} > 0, {a} * h, h) + {u}"]
        right += [f"h = h.clone()\nh.mul_({a}).add_({u})"]
    rule = w.pick(*right)
    return w.near(
        rule,
        f"h = torch.tanh({a} * h + {u})",
        f"h = {a} * h + {u} * h",
        f"h = {a} * h * h + {u}",
        f"h = {a} * h + {u}.mean(-1, keepdim=True)",
        f"h = {a} * h.flip(-1) + {u}",
        f"h = {a} * h.roll(1, 0) + {u}",
        f"h = {a} * h.detach() + {u}",
        f"h = {a} * h.mean(-1, keepdim=True) + {u}",
        f"h = torch.maximum({a} * h, {u})",
        f"h = torch.where(h > 0, {a} * h, h) + {u}",
        f"h = {a} * h + {u} if t % 3 else {a} * h",
        f"h = {a} * h + {u} if t != 2 else h",
        f"h = {a} * (h + {u}) if t == 3 else {a} * h + {u}",
        f"g, h = h, {a} * g + {u}",
        f"g, h = h, {a} * h + 0.5 * g + {u}",
        f"h = {a} * h.to(torch.bfloat16).to({u}.dtype) + {u}",
        f"h = ({a} * h + {u}).clamp(-1, 1)",
        f"h = torch.softmax({a} * h + {u}, -1)",
        f"h = {a} * h + {u} / (t + 1)",
        f"h = 0.5 ** t * h + {u}",
        f"with torch.no_grad():\n    h = {a} * h + {u}",
    )


@dataclass
class Collected:
    """Lines before the loop, in each step, and the expression after it."""

    before: str
    step: str
    after: str


def collect(w: Writer, y: str, kept: bool, like: str) -> Collected:
    """Ways to gather what each step gives to (b t d)."""
    T, b, d = w.sizes.t, w.batch(like), w.shape(like)[-1]
    item = w.pick(y, f"{y}.clone()", f"{y} * 1", f"2 * {y}")
    if kept:
        return w.pick(
            Collected("ys = []", f"ys.append({item})", "torch.cat(ys, 1)"),
            Collected("ys = []", f"ys.append({item})", "torch.cat(ys, dim=-2)"),
            Collected("ys = []", f"ys += [{item}[:, 0]]", "torch.stack(ys, 1)"),
        )
    listed = w.near(
        w.pick(
            "torch.stack(ys, 1)",
            "torch.stack(ys, dim=-2)",
            "torch.stack(ys).transpose(0, 1)",
            "torch.cat([v[:, None] for v in ys], 1)",
            f"torch.cat(ys, -1).view({b}, {T}, {d})",
            "torch.stack(ys, 2).mT",
        ),
        f"torch.stack(ys).reshape({b}, {T}, {d})",
        "torch.stack(ys[::-1], 1)",
        f"torch.stack(ys, 2).reshape({b}, {T}, {d})",
        "torch.stack(ys[1:] + ys[:1], 1)",
        "torch.stack(ys[:1] + ys[:-1], 1)",
        "torch.stack([v for v, _ in zip(ys, ys[1:] + ys[:1])], 1)",
        "torch.stack(ys[:2] + ys[:2] + ys[4:], 1)",
        "torch.stack(ys, 1).flip(1)",
        "torch.stack(ys)",
    )
    at = w.near("t", f"{T - 1} - t", f"(t + 1) % {T}", "0")
    zeros = f"torch.zeros({b}, {T}, {d}, dtype={like}.dtype)"
    return w.pick(
        Collected("ys = []", f"ys.append({item})", listed),
        Collected("ys = []", f"ys.append({item})", listed),
        Collected(f"out = {zeros}", f"out[:, {at}] = {item}", "out"),
        Collected(f"out = torch.empty_like({like})", f"out[:, t] = {item}", "out"),
        Collected(f"out = {zeros}", f"out[:, {at}] += {item}", "out"),
        Collected(f"out = {zeros}.transpose(0, 1)", f"out[t] = {item}", "out.transpose(0, 1)"),
        Collected(f"out = {zeros}", f"out[:, t, :].copy_({item})", "out * 1"),
        Collected(f"out = {zeros}", f"out = out.select_scatter({item}, 1, {at})", "out"),
    )


def order(w: Writer, first: bool) -> str:
    """The steps that are run."""
    T = w.sizes.t
    start = 1 if first else 0
    return w.near(
        f"range({start}, {T})",
        f"reversed(range({start}, {T}))",
        f"range({start}, {T}, 2)",
        f"range({start}, {T - 1})",
        f"range({start + 1}, {T})",
        f"(t % {T} for t in range({start}, {T + 2}))",
        f"[t ^ 1 if (t ^ 1) < {T} else t for t in range({start}, {T})]",
        f"[t for t in range({start}, {T}) for _ in range(2)]",
    )


def recurrence(w: Writer, x: str) -> str:
    """h = a h + x over time, state (b d)."""
    b, t, d = w.shape(x)
    kept = w.odds(4)
    a, name = decay(w, x), w.fresh("r")
    reads = [access(w, x, kept, wrong=True)]
    whole = a not in ("0.9", "1.0") and len(w.shape(a)) == 3 and w.shape(a)[1] == t
    if whole:
        reads.append(access(w, a, kept, wrong=True))
    a_t = reads[1].read if whole else a
    zeros = f"torch.zeros({w.batch(x)}, {'1, ' if kept else ''}{d}, dtype={x}.dtype)"
    middle = "[:, None]" if kept else ""
    start = w.pick(zeros, "first", zeros, "input", zeros, "scalar", "ones", "self")
    first = start == "first"
    initial = {
        "first": f"{x}[:, :1]" if kept else f"{x}[:, 0]",
        "input": f"{w.input(b, d, batched=True)}{middle}" if start == "input" else "",
        "scalar": f"torch.zeros((), dtype={x}.dtype)",
        "ones": f"torch.ones_like({x}[:, 0]){middle}",
        "self": f"{x}[:, 0]{middle}",
    }.get(start, start)
    lines = [r.before for r in reads if r.before] + [f"h = {initial}", "g = h * 0.5"]
    number = a in ("0.9", "1.0")
    made = collect(w, w.near("h", f"(h + {reads[0].read})", "g", "(h - h.detach())"), kept, x)
    body = update(w, a_t, reads[0].read, number)
    before = w.near(False, True)
    step = f"{made.step}\n{body}" if before else f"{body}\n{made.step}"
    loop = f"for t in {order(w, first)}:\n" + "\n".join(f"    {s}" for s in step.splitlines())
    head = [made.before]
    if first and "ys = []" in made.before:
        head += ["t = 0", made.step]
    text = "\n".join([*lines, *head, loop, f"{name} = {made.after}", f"{name}_last = h"])
    return finished(w, text, name, x)


def finished(w: Writer, text: str, name: str, x: str) -> str:
    """What a loop has made, like ``x``; ``x`` itself where a mistake does not fit the shapes."""
    shape = w.shape(x)
    if not w.attempt(text, name) or len(w.shape(name)) != len(shape):
        return x
    w.keep(name, f"{name}_last")
    here = w.shape(name)
    if here == shape:
        return name
    if here[1] < shape[1] and here[:1] + here[2:] == shape[:1] + shape[2:]:  # steps were left out
        ends = w.pick((shape[1] - here[1], 0), (0, shape[1] - here[1]))
        pad = (0, 0) * (len(shape) - 2) + ends
        return w.let(f"F.pad({name}, {pad})")
    return (
        x if w.values[name].numel() != w.values[x].numel() else w.let(f"{name}.reshape({x}.shape)")
    )


PIECES = [Piece("loop", recurrence, 3)]
