"""Random programs: plain functions of tensors, as text, written piece by piece.

A writer makes random choices and runs every line as it is written, so that shapes are known and
what cannot run is never kept: the same mathematics written otherwise (``pick``), or a small mistake
(``near``). Hypothesis draws a seed, ``reduced`` (``tests.patterns.reduce``) makes failures small.
"""

from __future__ import annotations

import linecache
import math
import random
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor

NAMES = {"torch": torch, "F": F, "math": math, "inf": math.inf, "nan": math.nan}
NAMES["device"] = torch.device
LARGEST = 1e4  # of any value: beyond, rounding hides what is wrong


@dataclass(frozen=True)
class Input:
    """One argument: ``kind`` says how its values are drawn, ``layout`` how it lies in memory."""

    shape: tuple[int, ...]
    kind: str = (
        "normal"  # normal, gate (0.2 .. 1), step (0 .. 1), mask (bool), buffer (no gradient)
    )
    layout: str = "plain"  # plain, transposed, strided
    batched: bool = False  # its first dim is the batch

    def make(self, number: int, dtype: torch.dtype, batch: int | None = None) -> Tensor:
        """A tensor of this input, the same every time; with ``batch`` rows where it is batched."""
        shape = (batch, *self.shape[1:]) if batch and self.batched else self.shape
        generator = torch.Generator().manual_seed(number)
        if self.kind == "mask":
            return torch.rand(shape, generator=generator) < 0.7
        value = torch.randn(shape, generator=generator, dtype=torch.float64)
        if self.kind in ("gate", "step"):
            low = 0.2 if self.kind == "gate" else 0.05
            value = torch.rand(shape, generator=generator, dtype=torch.float64) * (1 - low) + low
        value = _laid_out(value, self.layout).to(dtype)
        return value.requires_grad_(self.kind != "buffer")


def _laid_out(value: Tensor, layout: str) -> Tensor:
    if layout == "transposed" and value.dim() > 1:
        return value.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "strided" and value.dim():
        return value.repeat_interleave(2, -1)[..., ::2]
    return value


@dataclass(frozen=True)
class Program:
    """The text of a function ``program`` of ``x0``, ``x1`` .., and its arguments.

    ``kinds``: the pieces it was made of; ``twists``: how many of their choices are mistakes.
    """

    text: str
    inputs: tuple[Input, ...]
    dtype: torch.dtype = torch.float64
    kinds: tuple[str, ...] = ()
    twists: int = 0

    def function(self) -> Callable[..., tuple[Tensor, ...]]:
        """The function; its lines are in the line cache, for reports."""
        return _compiled(self.text)

    def arguments(self, batch: int | None = None) -> list[Tensor]:
        """Its inputs."""
        return [x.make(i, self.dtype, batch) for i, x in enumerate(self.inputs)]

    def __str__(self) -> str:
        lines = (f"# x{i}: {x} {self.dtype}" for i, x in enumerate(self.inputs))
        return "\n".join([*lines, self.text])


@cache
def _compiled(text: str) -> Callable[..., tuple[Tensor, ...]]:
    file = f"<program {abs(hash(text)):x}>"
    linecache.cache[file] = (len(text), None, text.splitlines(True), file)
    names: dict[str, Any] = dict(NAMES)
    _execute(text, names, file)
    return names["program"]


@dataclass
class Sizes:
    """Batch, time, width, states, heads and head width: small, and often equal on purpose."""

    b: int
    t: int
    d: int
    n: int
    h: int
    p: int


class Writer:
    """Writes one program, and runs it meanwhile."""

    def __init__(self, seed: str, dtypes: Sequence[torch.dtype]) -> None:
        self.random = random.Random(seed)
        self.dtype = self.random.choice(dtypes)
        self.sizes = self._sizes()
        self.lines: list[str] = []
        self.values: dict[str, Any] = dict(NAMES)
        self.inputs: list[Input] = []
        self.kept: list[str] = []
        self.twists = 0
        self.count = 0

    def _sizes(self) -> Sizes:
        t = self.pick(5, 4, 6, 7, 8, 3, 9, 2, 1)
        free = (2, 3, 4, 5, 1, t, t)
        b, d, n, h, p = (self.pick(*free) for _ in range(5))
        if self.odds(6):
            b = d = n = h = p = t
        return Sizes(b, t, d, n, h, p)

    def pick(self, *options: Any) -> Any:
        """One of several equals; those that need more inputs are functions."""
        choice = self.random.choice(options)
        return choice() if callable(choice) else choice

    def odds(self, n: int) -> bool:
        """True in one of ``n`` cases."""
        return self.random.randrange(n) == 0

    def near(self, right: Any, *wrong: Any) -> Any:
        """``right``, and in one of sixteen cases one of the mistakes."""
        if not self.odds(16):
            return right() if callable(right) else right
        self.twists += 1
        return self.pick(*wrong)

    def fresh(self, prefix: str = "v") -> str:
        """A new name."""
        self.count += 1
        return f"{prefix}{self.count}"

    def input(self, *shape: int, kind: str = "normal", batched: bool = False) -> str:
        """A new argument; sometimes one that was there already."""
        wanted = [f"x{i}" for i, x in enumerate(self.inputs) if x.shape == shape and x.kind == kind]
        if wanted and self.odds(5):
            return wanted[0]
        layout = self.pick("plain", "plain", "plain", "transposed", "strided")
        name = f"x{len(self.inputs)}"
        self.inputs.append(Input(shape, kind, layout, batched))
        self.values[name] = self.inputs[-1].make(len(self.inputs) - 1, self.dtype)
        return name

    def say(self, text: str) -> None:
        """Writes lines, and runs them."""
        _execute(text, self.values)
        self.lines += text.splitlines()

    def let(self, expression: str, prefix: str = "v") -> str:
        """A new name for an expression."""
        name = self.fresh(prefix)
        self.say(f"{name} = {expression}")
        return name

    def attempt(self, text: str, *results: str, shape: Sequence[int] | None = None) -> bool:
        """Writes lines if they run and all results are tame tensors (of a shape)."""
        trial = dict(self.values)
        try:
            _execute(text, trial)
        except (RuntimeError, IndexError, ValueError, TypeError):
            return False
        values = [trial[name] for name in results]
        if not all(_tame(value) and shape in (None, tuple(value.shape)) for value in values):
            return False
        self.values = trial
        self.lines += text.splitlines()
        return True

    def shape(self, name: str) -> tuple[int, ...]:
        """The sizes of a tensor."""
        return tuple(self.values[name].shape)

    def keep(self, *names: str) -> None:
        """Intermediate values that something else may read, or the program return."""
        self.kept += [n for n in names if isinstance(self.values.get(n), Tensor)]

    def batch(self, name: str) -> str:
        """The batch size as the program says it."""
        return f"{name}.shape[0]"

    def program(self, results: Sequence[str], kinds: Sequence[str]) -> Program:
        """What has been written, returning ``results``."""
        arguments = ", ".join(f"x{i}" for i in range(len(self.inputs)))
        body = "\n".join(f"    {line}" for line in self.lines)
        text = f"def program({arguments}):\n{body}\n    return ({', '.join(results)},)\n"
        return Program(text, tuple(self.inputs), self.dtype, tuple(kinds), self.twists)


def _tame(value: Any) -> bool:
    if not isinstance(value, Tensor) or value.numel() == 0:
        return False
    finite = value.detach().double()
    return bool(finite.isfinite().all()) and finite.abs().max().item() < LARGEST


@dataclass
class Piece:
    """One kind of mathematics: ``write(writer, x)`` takes a name (b t d) and answers another."""

    name: str
    write: Callable[[Writer, str], str]
    weight: int = 1


@dataclass
class Recipe:
    """Which pieces, and what stands around them."""

    pieces: Sequence[Piece]
    noises: Sequence[Callable[[Writer, str], str]] = ()
    dtypes: Sequence[torch.dtype] = field(default=(torch.float64,))


def programs(recipe: Recipe) -> st.SearchStrategy[Program]:
    """Random programs."""
    return st.binary(min_size=8, max_size=8).map(lambda seed: write(recipe, seed.hex()))


def write(recipe: Recipe, seed: str) -> Program:
    """The program of a seed: one or two pieces, with noise around them."""
    writer = Writer(seed, recipe.dtypes)
    sizes = writer.sizes
    value = writer.input(sizes.b, sizes.t, sizes.d, batched=True)
    kinds = []
    for _ in range(writer.pick(1, 1, 2)):
        piece = writer.pick(*(p for p in recipe.pieces for _ in range(p.weight)))
        value = _noisy(writer, recipe, value)
        lines = len(writer.lines)
        made = piece.write(writer, value)
        if made != value and len(writer.lines) > lines:
            kinds.append(piece.name)
        value = _narrowed(writer, made)
    value = _noisy(writer, recipe, value)
    return writer.program(_results(writer, value), kinds)


def _noisy(writer: Writer, recipe: Recipe, value: str) -> str:
    if recipe.noises and writer.odds(2):
        return writer.random.choice(recipe.noises)(writer, value)
    return value


def _narrowed(writer: Writer, value: str) -> str:
    """Back to (b t d), for the next piece; widths are cut or repeated."""
    sizes, (*_, width) = writer.sizes, writer.shape(value)
    if width == sizes.d:
        return value
    if width > sizes.d:
        return writer.let(f"{value}[..., :{sizes.d}]")
    weight = writer.input(width, sizes.d)
    return writer.let(f"{value} @ {weight}")


def _results(writer: Writer, value: str) -> list[str]:
    """What is returned: the value, perhaps as a view, and values of the middle."""
    results = [value]
    if writer.odds(4):
        results = [f"{value}.transpose(0, 1)"]
    kept = list(dict.fromkeys(writer.kept))
    if kept and writer.odds(3):
        results.append(writer.pick(*kept))
    if kept and writer.odds(6):
        results.append(f"{writer.pick(*kept)}.sum()")
    if writer.odds(8):
        results.append(f"{value}.detach().mean()")
    return results


def _execute(text: str, names: dict[str, Any], file: str = "<string>") -> None:
    """Runs lines; Python warns of what a branch that is not taken could not do."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        code = compile(text, file, "exec")
    exec(code, names)
