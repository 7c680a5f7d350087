"""What an Op is: a reference function that *is* the definition, and the implementations of it.

``@op(axes=..., backward=...)`` on a reference makes a ``torch.library`` op of it: the schema comes
from the annotations, the shape function from the axis string, the gradient from ``backward``.
``implements(op, target=...)`` adds one implementation (a *lowering*). Called in eager mode an op
takes the first implementation that does not refuse; in a compiled graph the choice is made once,
when compiling (``effpass.graph.lower``).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from effpass.axes.notation import Axes
from effpass.axes.relation import Kind
from effpass.axes.rules import ops as axes_of_ops
from effpass.ops.schema import schemas

Refusal = Callable[..., str | None]
OPS: dict[str, Op] = {}
SCAN = {"t": Kind.ORDERED}
_LIBRARIES: dict[str, torch.library.Library] = {}


@dataclass(frozen=True)
class Lowering:
    """One implementation of an op for one target.

    ``forward`` takes the op's arguments and returns its outputs (a tensor where there is one);
    ``backward`` takes one gradient an output, then the op's arguments, and returns one tensor for
    each tensor argument (an empty tensor where that argument is None or has no gradient).
    ``refuses`` takes the op's arguments (perhaps fake) and answers None, or the reason why this
    implementation cannot run them.
    ``overload`` is the registered torch op. With ``splice`` the forward is traced into the graph
    instead of being called, so that the compiler fuses it (and autograd differentiates it).
    ``prepare`` begins slow work (a build) in the background, before the first use. ``asked_for``:
    it runs only where ``targets`` name it.
    """

    target: str
    forward: Callable[..., Any]
    backward: Callable[..., Any]
    refuses: Refusal
    overload: Any
    splice: bool = False
    prepare: Callable[[], None] = lambda: None
    asked_for: bool = False


@dataclass
class Op:
    """A named piece of mathematics; calling it checks the arguments and runs it."""

    name: str
    axes: Axes
    reference: Callable[..., Any]
    backward: Callable[..., Any]
    state_dtype: Callable[[torch.dtype], torch.dtype]
    check: Callable[..., None] | None
    signature: inspect.Signature
    integers: Mapping[str, torch.dtype]
    per_head: Sequence[str]
    lowerings: list[Lowering] = field(default_factory=list)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        self.validate(**bound.arguments)
        return self.overload(*bound.arguments.values())

    @property
    def inline(self) -> Lowering:
        """The reference function as an implementation: it runs anything."""
        return self.lowerings[-1]

    @property
    def overload(self) -> Any:
        """The ``torch.ops`` overload of this op."""
        return getattr(torch.ops.effpass, self.name).default

    @functools.cached_property
    def tensor_names(self) -> tuple[str, ...]:
        """Names of the arguments that are tensors, in order."""
        return tuple(
            p.name for p in self.signature.parameters.values() if "Tensor" in str(p.annotation)
        )

    def bind(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """All arguments by name, defaults filled in."""
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return dict(bound.arguments)

    def sizes(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Size of every axis; ValueError when shapes disagree."""
        cu_seqlens = arguments.get("cu_seqlens")
        first = next(iter(arguments.values()))
        known = {"s": first.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1}
        shapes = {n: None if a is None else a.shape for n, a in arguments.items() if _maybe(a)}
        shared = {n: self.axes.inputs[n][1:] for n in self.per_head if len(shapes[n] or ()) == 1}
        axes = replace(self.axes, inputs={**self.axes.inputs, **shared}) if shared else self.axes
        return axes.bind(self.name, shapes, **known)

    def validate(self, **arguments: Any) -> None:
        """Raises TypeError or ValueError when the arguments cannot be this op's."""
        for name in self.tensor_names:
            _check_tensor(self, name, arguments[name], arguments[self.tensor_names[0]])
        sizes = self.sizes(arguments)
        if arguments.get("cu_seqlens") is not None:
            check_cu_seqlens(self.name, arguments["cu_seqlens"], sizes.get("b", 1), sizes["t"])
        if self.check is not None:
            self.check(sizes=sizes, **arguments)

    def fake(self, *args: Any) -> Tensor | tuple[Tensor, ...]:
        """Outputs with the right shapes and dtypes and no values."""
        _refuse_tangents(self)
        arguments = self.bind(*args)
        first = arguments[self.tensor_names[0]]
        shapes = self.axes.output_shapes(self.sizes(arguments))
        dtypes = [first.dtype] + [self.state_dtype(first.dtype)] * (len(shapes) - 1)
        made = tuple(
            first.new_empty(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True)
        )
        return made[0] if len(self.axes.outputs) == 1 else made

    def fake_backward(self, *args: Any) -> tuple[Tensor, ...]:
        """Gradients with the right shapes and dtypes and no values."""
        arguments = self.bind(*args[len(self.axes.outputs) :])
        return tuple(empty_gradient(args[0], arguments[n]) for n in self.tensor_names)

    def prepare(self) -> None:
        """Tells every implementation that this op will be used soon."""
        for lowering in self.lowerings:
            lowering.prepare()

    def choose(
        self, arguments: Sequence[Any], targets: Sequence[str] | None = None
    ) -> tuple[Lowering, list[tuple[str, str]]]:
        """The first lowering that accepts, and ``(target, reason)`` of those that refused."""
        refused = []
        for lowering in self.lowerings:
            if targets is not None and lowering.target not in targets:
                if lowering.target != "inline":
                    refused.append((lowering.target, "not in the configured targets"))
                    continue
            reason = lowering.refuses(*arguments)
            if reason is None and lowering.asked_for and targets is None:
                reason = "runs only where targets name it: not measured yet"
            if reason is None:
                return lowering, refused
            refused.append((lowering.target, reason))
        raise RuntimeError(f"no implementation of {self.name}: {refused}")


def op(
    *,
    axes: str,
    backward: Callable[..., Any],
    state_dtype: Callable[[torch.dtype], torch.dtype] | None = None,
    check: Callable[..., None] | None = None,
    kinds: Mapping[str, Kind] = SCAN,
    integers: Mapping[str, torch.dtype] | None = None,
    per_head: Sequence[str] = (),
) -> Callable[[Callable[..., Any]], Op]:
    """Makes an Op of a reference function.

    ``axes`` names every dimension (see ``effpass.axes.notation``). ``backward(*grads, *arguments)``
    is the gradient as a formula. The first output has the first argument's dtype, later ones
    ``state_dtype`` of it (default: at least float32). ``check`` may refuse more than shapes say.
    ``kinds``: what the op does along axes that are neither free nor folded (default: ordered along
    the tokens).
    ``integers`` are tensors of the dtype they name, without gradient, as ``cu_seqlens`` always is;
    all others are floating point. Arguments ``per_head`` may lack their first dimension.
    """

    def decorate(reference: Callable[..., Any]) -> Op:
        made = Op(
            name=reference.__name__,
            axes=Axes.parse(axes),
            reference=reference,
            backward=backward,
            state_dtype=state_dtype or accumulate_dtype,
            check=check,
            signature=inspect.signature(reference),
            integers={"cu_seqlens": torch.int32, **(integers or {})},
            per_head=per_head,
        )
        functools.update_wrapper(made, reference)
        OPS[made.name] = made
        axes_of_ops.register(made.name, made.axes, kinds)
        _register(made, "effpass", _first_willing(made), _first_willing(made, backward=True))
        inline = _register(made, "effpass_inline", _contiguous(reference), _contiguous(backward))
        made.lowerings.append(Lowering("inline", reference, backward, lambda *_: None, inline))
        return made

    return decorate


def implements(
    op: Op,
    *,
    target: str,
    backward: Callable[..., Any] | None = None,
    refuses: Refusal,
    splice: bool = False,
    prepare: Callable[[], None] = lambda: None,
    asked_for: bool = False,
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Adds the decorated function as an implementation of ``op``, before those already there.

    An implementation that is spliced needs no ``backward``: autograd sees through it.
    """

    def decorate(forward: Callable[..., Any]) -> Callable[..., Any]:
        gradient = backward or op.backward
        overload = None if splice else _register(op, f"effpass_{target}", forward, gradient)
        made = Lowering(target, forward, gradient, refuses, overload, splice, prepare, asked_for)
        op.lowerings.insert(0, made)
        return forward

    return decorate


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which states are kept: float32, or float64 for float64 inputs."""
    return torch.promote_types(dtype, torch.float32)


def empty_gradient(like: Tensor, argument: Tensor | None = None) -> Tensor:
    """Room for a gradient of ``argument``; an empty tensor when it takes none."""
    if argument is None or not argument.is_floating_point():
        return like.new_empty(0)
    return argument.new_empty(argument.shape)


def check_cu_seqlens(
    op: str, cu_seqlens: Tensor, batch: Any, tokens: Any, name: str = "cu_seqlens"
) -> None:
    """Raises unless ``cu_seqlens`` are int32 offsets from 0 to ``tokens``, none decreasing."""
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(
            f"{op}: expected {name} to be int32 of shape (sequences + 1,), "
            f"found {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}"
        )
    if batch != 1:
        raise ValueError(
            f"{op}: expected batch 1 with {name} (sequences lie end to end in one row), "
            f"found batch {batch}; reshape to (1, batch * tokens, ...)"
        )
    if torch.compiler.is_compiling():
        return
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0:
        raise ValueError(f"{op}: expected {name} to start at 0, found {offsets[0]}")
    for i, (start, end) in enumerate(pairwise(offsets)):
        if end < start:
            raise ValueError(
                f"{op}: expected {name} not to decrease, found {start} then {end} at entry {i + 1}"
            )
    if offsets[-1] != tokens:
        raise ValueError(
            f"{op}: expected {name} to end at the token count {tokens}, found {offsets[-1]}"
        )


def sequences(cu_seqlens: Tensor | None, rows: int, tokens: int) -> list[tuple[slice, slice]]:
    """``(rows, tokens)`` slices of each independent run; a single one without ``cu_seqlens``."""
    if cu_seqlens is None:
        return [(slice(0, rows), slice(0, tokens))]
    check_cu_seqlens("a packed op", cu_seqlens, rows, tokens)
    return [(slice(0, 1), slice(*ends)) for ends in pairwise(cu_seqlens.tolist())]


def _refuse_tangents(op: Op) -> None:
    """Forward-mode derivatives would silently be zero."""
    if forward_ad._current_level >= 0:
        raise NotImplementedError(
            f"effpass::{op.name} has no forward-mode derivative (jvp); use reverse mode, or run "
            "the model in a process that does not load effpass"
        )


def _maybe(value: Any) -> bool:
    return value is None or isinstance(value, Tensor)


def _check_tensor(op: Op, name: str, value: Any, first: Any) -> None:
    if value is None and op.signature.parameters[name].default is None:
        return
    if not isinstance(value, Tensor):
        raise TypeError(f"{op.name}: expected {name} to be a Tensor, found {type(value).__name__}")
    if value.device != first.device:
        raise ValueError(
            f"{op.name}: expected {name} on {first.device} like the first argument, "
            f"found {value.device}"
        )
    if name == "cu_seqlens":
        return  # check_cu_seqlens says more
    dtype = op.integers.get(name)
    if dtype is None and not value.is_floating_point():
        raise TypeError(f"{op.name}: expected {name} to be floating point, found {value.dtype}")
    if dtype is not None and value.dtype != dtype:
        raise TypeError(f"{op.name}: expected {name} to be {dtype}, found {value.dtype}")


def _first_willing(op: Op, backward: bool = False) -> Callable[..., Any]:
    skip = len(op.axes.outputs) if backward else 0

    def run(*args: Any) -> Any:
        usual = [w for w in op.lowerings if not w.splice and not w.asked_for]
        lowering = next(w for w in usual if w.refuses(*args[skip:]) is None)
        return (lowering.backward if backward else lowering.forward)(*args)

    return _contiguous(run)


def _contiguous(run: Callable[..., Any]) -> Callable[..., Any]:
    def contiguous(*args: Any) -> Tensor | tuple[Tensor, ...]:
        made = run(*args)
        if isinstance(made, Tensor):
            return made.contiguous()
        return tuple(out.contiguous() for out in made)

    return contiguous


def _register(
    op: Op, namespace: str, forward: Callable[..., Any], backward: Callable[..., Any]
) -> Any:
    """Registers op and gradient under ``namespace``; returns the overload of the op."""
    library = _LIBRARIES.setdefault(namespace, torch.library.Library(namespace, "FRAGMENT"))
    tags = (torch.Tag.pt2_compliant_tag,)
    for name, schema, run, fake in zip(
        (op.name, f"{op.name}_backward"),
        schemas(op.reference, op.tensor_names, tuple(op.axes.outputs)),
        (forward, backward),
        (op.fake, op.fake_backward),
        strict=True,
    ):
        library.define(f"{name}{schema}", tags=tags)
        library.impl(name, _fill_defaults(op, run, name == op.name), "CompositeExplicitAutograd")
        torch.library.register_fake(f"{namespace}::{name}", fake, lib=library)
    _differentiate(op, namespace, library)
    return getattr(getattr(torch.ops, namespace), op.name).default


def _fill_defaults(op: Op, run: Callable[..., Any], forward: bool) -> Callable[..., Any]:
    defaults = [p.default for p in op.signature.parameters.values()]
    total = len(defaults) + (0 if forward else len(op.axes.outputs))

    def filled(*args: Any) -> Any:
        _refuse_tangents(op)
        missing = total - len(args)  # the dispatcher drops trailing defaults
        filled_in = defaults[len(defaults) - missing :] if missing else ()
        with torch.autocast(args[0].device.type, enabled=False):
            return run(*args, *filled_in)

    return filled


def _differentiate(op: Op, namespace: str, library: torch.library.Library) -> None:
    gradient = getattr(getattr(torch.ops, namespace), f"{op.name}_backward").default
    is_tensor = [name in op.tensor_names for name in op.signature.parameters]

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.save_for_backward(*(a for a, t in zip(inputs, is_tensor, strict=True) if t))
        ctx.others = [a for a, t in zip(inputs, is_tensor, strict=True) if not t]

    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        tensors, others = iter(ctx.saved_tensors), iter(ctx.others)
        inputs = [next(tensors) if t else next(others) for t in is_tensor]
        out = iter(gradient(*(g.contiguous() for g in grads), *inputs))
        all_grads = [next(out) if t else None for t in is_tensor]
        return tuple(
            g if needed else None  # trailing defaults were dropped by the dispatcher
            for g, needed in zip(all_grads, ctx.needs_input_grad, strict=False)
        )

    def no_second(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError(f"effpass::{op.name} cannot be differentiated twice")

    torch.library.register_autograd(
        f"{namespace}::{op.name}", backward, setup_context=setup_context, lib=library
    )
    torch.library.register_autograd(f"{namespace}::{op.name}_backward", no_second, lib=library)
