"""What stands around the mathematics: views, casts, in-place writes, values read twice."""

from __future__ import annotations

from tests.patterns.programs import Writer


def viewed(w: Writer, x: str) -> str:
    """The same tensor through views and copies."""
    b, (_, t, d) = w.batch(x), w.shape(x)
    return w.let(
        w.pick(
            f"{x}.transpose(1, 2).contiguous().transpose(1, 2)",
            f"{x}.reshape({b}, {t * d}).view({b}, {t}, {d})",
            f"{x}.permute(2, 0, 1).permute(1, 2, 0)",
            f"{x}.flatten(0, 1).unflatten(0, ({b}, {t}))",
            f"{x}[:, :, None].expand(-1, -1, 2, -1)[:, :, 1]",
            f"torch.cat([{x}[:, :1], {x}[:, 1:]], 1)",
            f"torch.stack({x}.unbind(1), 1)",
            f"{x}.unsqueeze(1).squeeze(1).clone()",
            f"torch.cat({x}.chunk(2, -1), -1)",
            f"torch.cat({x}.split(1, 0), 0)",
        )
    )


def moved(w: Writer, x: str) -> str:
    """Another tensor, made of the same numbers."""
    b, (_, t, d) = w.batch(x), w.shape(x)
    return w.let(
        w.pick(
            f"{x}.flip(1)",
            f"{x}.roll(1, 1)",
            f"{x}.transpose(1, 2).reshape({b}, {t}, {d})",
            f"{x}.transpose(0, 1).reshape({b}, {t}, {d})",
            f"F.pad({x}, (0, 0, 1, -1))",
            f"{x}[:, torch.arange({t - 1}, -1, -1)]",
            f"{x} * torch.arange({d}, dtype={x}.dtype)",
        )
    )


def written(w: Writer, x: str) -> str:
    """In-place writes: into copies, and into views of them."""
    name = w.fresh("w")
    line = w.pick(
        "{0}[:, ::2] *= 0.5",
        "{0}.transpose(0, 1)[0] += 1",
        "{0}.view(-1)[0] = 0",
        "{0}[..., 0].fill_(0.5)",
        "{0}[:, -1].copy_({0}[:, 0])",
        "{0}.mul_({1}).add_(0.1)",
        "{0}.relu_()",
        "{0}[:, 1:] += {0}[:, :-1].clone() * 0.5",
        "{0}.masked_fill_({1} > 1, 0)",
        "{0}.permute(2, 1, 0).sub_(0.25)",
    ).format(name, x)
    made = f"{name} = {x} * 1\n{line}"
    return name if w.attempt(made, name, shape=w.shape(x)) else x


def cast(w: Writer, x: str) -> str:
    """Through another dtype."""
    dtype = w.pick("torch.float64", "torch.float32", "torch.bfloat16")
    if str(w.dtype) == "torch.float32" and dtype != "torch.float64":
        dtype = "torch.float64"  # in float32, where others round is not what is looked for
    return w.let(w.pick(f"{x}.to({dtype}).to({x}.dtype)", f"{x}.to({dtype}).mul(2).to({x}.dtype)"))


def read_twice(w: Writer, x: str) -> str:
    """A value of the middle comes back."""
    kept = w.kept
    if not kept:
        return w.let(f"{x} + {x}.detach() * 0.5")
    return w.let(f"{x} + {w.pick(*kept)}.sum() * 0.01")


def written_later(w: Writer, x: str) -> str:
    """A value of the middle is overwritten after it was read."""
    kept = w.kept
    if kept:
        name = w.pick(*kept)
        w.attempt(w.pick(f"{name}.mul_(2)", f"{name}[..., 0] = 0", f"{name}.add_(1)"), name)
    return x


def without_gradient(w: Writer, x: str) -> str:
    """A part that takes no gradient."""
    name = w.fresh("g")
    w.say(f"with torch.no_grad():\n    {name} = {x} * 0.5\n    {name} = {name} + 1")
    return w.let(f"{x} + {name}")


def buffered(w: Writer, x: str) -> str:
    """An argument that is written to."""
    d = w.shape(x)[-1]
    name = w.input(d, kind="buffer")
    w.say(f"{name}.add_({x}.detach().mean((0, 1)))")
    return w.let(f"{x} - {name} * 0.1")


def gated(w: Writer, x: str) -> str:
    """Elementwise, with another tensor."""
    shape = w.shape(x)
    gate = w.pick(
        lambda: f"{x} * torch.sigmoid({w.input(*shape, batched=True)})", f"torch.tanh({x})"
    )
    return w.let(gate)


NOISES = [
    viewed,
    gated,
    moved,
    written,
    read_twice,
    cast,
    written_later,
    without_gradient,
    buffered,
]
