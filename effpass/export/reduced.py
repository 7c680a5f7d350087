"""Token-reduced export: later blocks see fewer tokens, as many as the length of the input tells.

The graph is that of torch.compile (``passes.reduce_tokens``); how many tokens stay is worked out
inside the file, so that any runtime can run it. Verification compares with torch's reduced form.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from effpass.export.again import exported_again
from effpass.export.check import (
    VerificationError,
    Verified,
    difference,
    eager,
    first_difference,
    samples,
    tolerance,
)
from effpass.export.program import ExportError, Program, inputs_of, name_dims, resized
from effpass.graph.verify import VerificationError as WiringError
from effpass.lowering.ort import plan
from effpass.lowering.ort.session import Session
from effpass.passes.reduce_tokens import Forms, ReduceTokens
from effpass.passes.reduction.choice import Rule
from effpass.passes.reduction.run import carriers
from effpass.report import Declined

LONGEST = 4096  # tokens up to which a ratio's lengths are written into a file
BESIDE = "beside torch's reduced form"


@dataclass(frozen=True)
class Shorter:
    """A reduced program. ``plain``: the one that it was made of; ``sizes``: names of the inputs
    that the file makes of size ``dim`` of input ``source``; none where the length is fixed."""

    settings: ReduceTokens
    plain: Program
    forms: Forms
    sizes: tuple[str, ...]
    source: str = ""
    dim: int = 0

    def lengths(self, kwargs: dict[str, Any]) -> tuple[int, ...]:
        """Tokens in front of the first anchor and behind each, for these inputs."""
        return self.forms.run.lengths(self.forms.run.length(self._flat(kwargs)))

    def _flat(self, kwargs: dict[str, Any]) -> list[Any]:
        return list(self.plain.program._graph_module_flat_inputs((), dict(kwargs)))

    def expected(self, kwargs: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
        """Outputs of the reduced graph in torch, and of the plain one."""
        flat, sizes = self._flat(kwargs), carriers(self.lengths(kwargs))
        with torch.no_grad():
            made = self.forms.packed(*flat, *sizes), self.forms.plain(*flat)
        found = [[v for v in pytree.tree_leaves(m) if isinstance(v, Tensor)] for m in made]
        return found[0], found[1]

    def finish(self, model: ir.Model) -> None:
        """Makes the sizes inside the file."""
        if not self.sizes:
            return
        rule = plan.by_table(self._table())
        if self.settings.keep is not None:
            share = Fraction(str(float(self.settings.keep)))
            protected = self.settings.protect_first + self.settings.protect_last
            rule = plan.by_share(share, len(self.sizes), protected)
        plan.fill_in(model, self.sizes, self.source, self.dim, rule)

    def _table(self) -> list[tuple[int, ...]]:
        none = (0,) * len(self.sizes)
        return [none, *(self.forms.run.lengths(n)[1:] for n in range(1, LONGEST + 1))]

    @property
    def longest(self) -> dict[str, Any]:
        """The input, its dim, and the tokens up to which lengths are known; empty for any."""
        if not self.sizes or self.settings.keep is not None:
            return {}
        return {"input": self.source, "dim": self.dim, "tokens": LONGEST}


def reduce(plain: Program, settings: ReduceTokens) -> tuple[Program, Shorter | None]:
    """The reduced form of a program; itself, and None, where nothing is asked to leave.

    Raises ExportError, with the reason, for a model that has none.
    """
    try:
        found = settings.apply(plain.program.graph_module, _never)
    except ValueError as error:
        raise ExportError(str(error)) from error
    if found is None:
        return plain, None
    if isinstance(found, Declined):
        where = f" at {found.where}" if found.where else ""
        raise ExportError(f"{found.code}: {found.reason}{where}. {found.hint}".strip())
    _check_wiring(plain, found)
    given = {n: v for n, v in plain.kwargs.items() if isinstance(v, Tensor)}
    dims: dict[str, dict[int, str]] = {n: dict(plain.open.get(n, {})) for n in given}
    others = {n: v for n, v in plain.kwargs.items() if n not in given}
    lengths = found.run.lengths(found.run.length.hint)
    sizes, source, dim = _names(found, len(lengths) - 1), "", 0
    if found.run.length.fixed:
        fixed = dict(zip(sizes, carriers(lengths), strict=True))
        inputs, derive, sizes = _grown(given, dims), lambda each: each | fixed, ()
    else:
        source, dim = _source(plain, found)
        lengths = _traced_with(plain, found.reducer.settings.rule, source, dim, len(sizes))
        called = dims[source][dim]
        inputs = _grown(given, dims, {called: lengths[0]})
        inputs |= dict(zip(sizes, carriers(lengths), strict=True))
        derive = dict
        dims |= {name: {0: name} for name in sizes}
    program = exported_again(plain.program, found.packed, inputs, dims, derive)
    made = Program(program, others | given, inputs_of(program), plain.outputs, plain.report)
    name_dims(made, dims, strict=False)
    _check_open(made, [(source, dim), *((name, 0) for name in sizes)] if sizes else [])
    for name in sizes:
        made.open.pop(name, None)
    made.inputs = [name for name in made.inputs if name not in sizes]
    made.report.applied += found.what
    made.report.reductions.append(found.reduction)
    made.report.nodes_after = len(program.graph.nodes)
    return made, Shorter(settings, plain, found, sizes, source, dim)


def _never(form: str) -> Callable[..., Any]:
    def compile(*_: Any) -> Any:
        raise AssertionError(f"the form {form} is exported, not compiled")

    return compile


def _grown(
    given: dict[str, Tensor], dims: dict[str, dict[int, str]], wanted: dict[str, int] | None = None
) -> dict[str, Tensor]:
    """Examples with at least 2 entries along open dims, or as many as are wanted by name."""
    made = dict(given)
    for name, each in dims.items():
        for dim, called in each.items():
            size = (wanted or {}).get(called, max(2, made[name].shape[dim]))
            made[name] = resized(made[name], dim, size)
    return made


def _traced_with(plain: Program, rule: Rule, source: str, dim: int, anchors: int) -> list[int]:
    """Lengths to export with, at which no part of a choice has 0 tokens or 1: the exporter would
    fix such a size. Raises ExportError where the model takes too few tokens for them."""
    fewest = Fraction(2) / Fraction(str(rule.q)) if rule.q else 2
    leaving = [max(4, -(-fewest // 1)) + i for i in range(anchors)]
    protected = rule.protected
    node = next(n for n in plain.program.graph.find_nodes(op="placeholder") if n.target == source)
    size = node.meta["val"].shape[dim]
    tokens = max(plain.kwargs[source].shape[dim], sum(leaving) + 2 * leaving[-1] + protected + 4)
    most = plain.program.range_constraints[size.node.expr].upper
    if tokens > most:
        raise ExportError(
            f"reduce_tokens: expected a model of at least {tokens} tokens, of which some can leave "
            f"at {anchors} anchors, found one of at most {most}: name fewer layers, or a larger q"
        )
    return [tokens - sum(leaving[:i]) for i in range(anchors + 1)]


def _check_open(made: Program, dims: list[tuple[str, int]]) -> None:
    """Every size is a symbol of its own. Raises ExportError."""
    values = {n.name: n.meta["val"] for n in made.program.graph.find_nodes(op="placeholder")}
    found = [str(values[name].shape[dim]) for name, dim in dims]
    if len(set(found)) < len(found) or not all(text.isidentifier() for text in found):
        raise ExportError(
            "reduce_tokens: expected the lengths behind anchors to be open, found "
            f"{', '.join(found)}: the model's own code ties them to one another"
        )


def _names(found: Forms, anchors: int) -> tuple[str, ...]:
    names = [str(n.target) for n in found.packed.graph.find_nodes(op="placeholder")]
    return tuple(names[-anchors:])


def _source(plain: Program, found: Forms) -> tuple[str, int]:
    """The input, and its dim, whose size is the number of tokens."""
    length = found.run.length
    if not length.size.is_Symbol:
        raise ExportError(
            f"reduce_tokens: expected the number of tokens to be the size of an input, found "
            f"{length.size}: leave those dims fixed, with dynamic="
        )
    place, dim = length.sources[length.size]
    node = list(plain.program.graph.find_nodes(op="placeholder"))[place]
    assert dim is not None
    return str(node.target), dim


def _check_wiring(plain: Program, found: Forms) -> None:
    """The reduced graph is the plain one while no token leaves. Raises ExportError."""
    try:
        found.verify(list(plain.program._graph_module_flat_inputs((), dict(plain.kwargs))))
    except WiringError as error:
        raise ExportError(f"reduce_tokens: the reduced graph is wrong: {error}") from error


def verify(
    path: Path, model: nn.Module, made: Program, shorter: Shorter, portable: bool
) -> Verified:
    """Compares the file with torch's reduced form, and the graph of that with the model.

    Raises VerificationError.
    """
    session, worst, compared = Session(path), 0.0, []
    for name, kwargs in samples(made):
        lengths = shorter.lengths(kwargs)
        text = f"{name}, {' -> '.join(map(str, lengths))} tokens, {BESIDE}"
        expected, plain = shorter.expected(kwargs)
        allowed = tolerance(model, expected)
        for output, want, have in zip(made.outputs, eager(model, kwargs), plain, strict=True):
            if not difference(want, have) <= allowed:
                raise VerificationError(
                    f"expected output {output} at {name} of the graph in torch, before tokens "
                    f"leave, to be the model's, found it off by {difference(want, have):.1e}"
                )
        found = session.run({n: v for n, v in kwargs.items() if n in session.inputs})
        for output, want in zip(made.outputs, expected, strict=True):
            error = difference(want, found[output])
            if not error <= allowed:
                sizes = dict(zip(shorter.sizes, carriers(lengths), strict=True))
                where = first_difference(made, kwargs | sizes, allowed, portable)
                raise VerificationError(
                    f"expected output {output} at {text} within {allowed:.0e} of its largest "
                    f"value, found {error:.1e}; {where}. Other tokens leave where scores are equal "
                    "but for rounding"
                )
            worst = max(worst, error)
        compared.append(text)
    return Verified(worst, tuple(compared), ())
