"""The front door: library functions that are known by name and signature, and become ops.

``install`` makes Dynamo trace an adapter (``effpass.capture.adapters``) in place of each function
of the table, by ``torch.compiler.substitute_in_graph``: neither library nor model is edited.
A function is substituted only after a proof (``effpass.capture.proof``) that the op computes the
same; one that is missing, changed or disproved is a record in ``declined()``, never an error.

Substitution is process-global: every Dynamo backend then traces the op, with equal results. Frames
compiled before a function was substituted keep what they have.
"""

from __future__ import annotations

import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch._dynamo.callback import callback_handler

from effpass.capture import caller, imports, unraised
from effpass.capture.proof import prove
from effpass.capture.table import TABLE, Row
from effpass.ops import OPS


@dataclass(frozen=True)
class Known:
    """A library function that Dynamo now traces as an op."""

    module: str
    function: str
    op: str


@dataclass(frozen=True)
class DeclinedFunction:
    """A library function that looks like an op and stays as it is, and why."""

    module: str
    function: str
    op: str
    reason: str


_lock = threading.RLock()
_registered: list[Known] = []
_declined: list[DeclinedFunction] = []
_seen: dict[Any, Any] = {}  # holds the functions, so that an id is never another function's
_proofs: dict[Any, str | None] = {}


def install() -> None:
    """Substitutes what is loaded now and whatever loads later. Cheap to call again."""
    imports.watch(consider)
    if _sweep not in callback_handler.start_callbacks:  # torch._dynamo.reset() forgets it
        callback_handler.register_start_callback(_sweep)
    _sweep()


def registered() -> list[Known]:
    """What has been substituted so far in this process."""
    with _lock:
        return list(_registered)


def declined() -> list[DeclinedFunction]:
    """What was found and not substituted so far, with reasons."""
    with _lock:
        return list(_declined)


def find_unraised(graph: torch.fx.Graph) -> list[tuple[torch.fx.Node, str, str]]:
    """``(first node, function, reason)`` a layer, of functions traced as they are."""
    reasons = {row.name: f"its arguments here are beyond what {row.op} expresses" for row in TABLE}
    reasons |= {d.function.rpartition(".")[2]: d.reason for d in declined()}
    return unraised.find(graph, reasons)


def consider(module: ModuleType) -> None:
    """Substitutes every function of the table that ``module`` defines, once each."""
    undisturbed: Any = torch.compiler.disable(_consider)  # an import may run in compiled code
    undisturbed(module)


def _consider(module: ModuleType) -> None:
    for row in TABLE:
        if not module.__name__.startswith(row.within):
            continue
        for owner, function in _candidates(module, row):
            if _claim(function):
                _decide(module.__name__, owner, function, row)
        _miss_companion(module, row)


def _sweep(_: Any = None) -> None:
    """Modules that no finder saw: loaded before, from a file by hand, or reloaded."""
    for name in [name for name in sys.modules if imports.of_interest(name)]:
        module = sys.modules.get(name)
        if isinstance(module, ModuleType) and not _initializing(module):
            consider(module)


def _initializing(module: ModuleType) -> bool:
    return getattr(getattr(module, "__spec__", None), "_initializing", False)


def _candidates(module: ModuleType, row: Row) -> Iterator[tuple[type | None, Any]]:
    """Functions named as the row says that ``module`` defines itself, with their class if any."""
    here = vars(module)
    owners = [v for v in here.values() if isinstance(v, type)] if row.method else [None]
    for owner in owners:
        function = (here if owner is None else vars(owner)).get(row.name)
        if callable(function) and getattr(function, "__module__", None) == module.__name__:
            yield owner, function


def _claim(function: Any) -> bool:
    with _lock:
        if function in _seen:
            return False
        _seen[function] = None
        return True


def _decide(module: str, owner: type | None, function: Any, row: Row) -> None:
    where = row.name if owner is None else f"{owner.__name__}.{row.name}"
    reason = _refusal(function, row) or _disproof(function, row)
    if reason is None:
        reason = _substitute(owner, function, row)
    if reason is None:
        for op in row.op.split(" or "):
            OPS[op].prepare()
    with _lock:
        if reason is None:
            _registered.append(Known(module, where, row.op))
        else:
            _declined.append(DeclinedFunction(module, where, row.op, reason))


def _has_signature(function: Any, row: Row) -> bool:
    found = _parameters(function)
    return found is not None and found in row.signatures


def _parameters(function: Any) -> tuple[str, ...] | None:
    try:
        parameters = inspect.signature(inspect.unwrap(function)).parameters.values()
    except (TypeError, ValueError):
        return None
    return tuple(p.name for p in parameters if p.kind is not p.VAR_KEYWORD)


def _refusal(function: Any, row: Row) -> str | None:
    """Why this function cannot be substituted, before any proof."""
    if not isinstance(function, FunctionType):
        return f"it is a {type(function).__name__}, not a plain function (a kernel of the hub?)"
    if not _has_signature(function, row):
        return (
            f"its parameters changed: expected {', '.join(row.signatures[-1])}; "
            f"found {', '.join(_parameters(function) or ('none',))}"
        )
    if torch.cuda.is_available() and (row.reference or _captured(function, KERNEL)):
        return "it runs a GPU kernel here, and effpass has none for it yet"
    return None


KERNEL = "is_new_implementation"  # transformers' wrapper: an installed package's kernel is called


def _captured(function: FunctionType, name: str) -> Any:
    """The value of a closure variable of ``function``, or None."""
    cells = dict(zip(function.__code__.co_freevars, function.__closure__ or (), strict=True))
    return cells[name].cell_contents if name in cells else None


def _disproof(function: FunctionType, row: Row) -> str | None:
    original: Any = inspect.unwrap(function)
    if row.reference:
        original = original.__globals__.get(row.reference)
        if not isinstance(original, FunctionType):
            return f"there is no {row.reference} beside it to prove the op against"
    key = (row, _fingerprint(original))
    if key not in _proofs:
        adapter = row.adapter(original)
        _proofs[key] = prove(original, adapter, row.cases, row.bfloat16)
    reason = _proofs[key]
    return None if reason is None else f"the op disagrees with it: {reason}"


def _fingerprint(function: FunctionType) -> Any:
    """Equal for functions of the same code that call helpers (of their module) of the same code."""
    found: dict[str, Any] = {}

    def visit(name: str, f: Any) -> None:
        f = inspect.unwrap(f)
        if name in found or not isinstance(f, FunctionType):
            return
        found[name] = _code_key(f.__code__), repr(f.__defaults__)
        for used in _names(f.__code__):
            helper = f.__globals__.get(used)
            if getattr(helper, "__module__", None) == function.__module__:
                visit(used, helper)

    visit("", function)
    return tuple(sorted(found.items()))


def _code_key(code: Any) -> tuple[Any, ...]:
    consts = tuple(
        _code_key(c) if inspect.iscode(c) else (type(c).__name__, repr(c)) for c in code.co_consts
    )
    return code.co_code, code.co_names, code.co_varnames, consts


def _names(code: Any) -> set[str]:
    nested = (_names(c) for c in code.co_consts if inspect.iscode(c))
    return set(code.co_names).union(*nested)


def _substitute(owner: type | None, function: FunctionType, row: Row) -> str | None:
    original = _traceable(function)
    adapter = _on_cpu(row.adapter(original), original)
    if row.marks:
        adapter = caller.marked(adapter, row.parameters.split()[0])
    try:
        torch.compiler.substitute_in_graph(function, skip_signature_check=True)(adapter)
    except ValueError as error:
        return f"Dynamo refused it: {error}"
    if owner is not None:
        method = _by_name(function)
        _claim(method)  # it is no other function to substitute
        setattr(owner, row.name, method)
    return None


def _on_cpu(adapter: Callable[..., Any], original: FunctionType) -> FunctionType:
    """``adapter`` for tensors on a CPU; other devices have no kernels yet and take the original."""

    def traced(*args: Any, **kwargs: Any) -> Any:
        for value in (*args, *kwargs.values()):
            if isinstance(value, torch.Tensor) and value.device.type != "cpu":
                return original(*args, **kwargs)
        return adapter(*args, **kwargs)

    return traced


def _traceable(function: FunctionType) -> FunctionType:
    """The torch function behind ``function``, for an adapter to call without meeting itself."""
    inner: Any = inspect.unwrap(function)
    if inner is not function:
        return inner
    twin = FunctionType(
        inner.__code__, inner.__globals__, inner.__name__, inner.__defaults__, inner.__closure__
    )
    twin.__kwdefaults__ = inner.__kwdefaults__
    return twin


def _by_name(function: Callable[..., Any]) -> Callable[..., Any]:
    """Calls ``function``. Dynamo substitutes functions that are called, not methods it looks up."""

    @functools.wraps(function)
    def method(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return method


def _miss_companion(module: ModuleType, row: Row) -> None:
    """Records a function that should stand beside the one of this row and does not."""
    if not row.companion or row.name not in vars(module) or row.companion in vars(module):
        return
    other = next(r for r in TABLE if r.name == row.companion)
    reason = f"{row.name} is there, {row.companion} is not: this version spells it differently"
    record = DeclinedFunction(module.__name__, row.companion, other.op, reason)
    with _lock:
        if record not in _declined:
            _declined.append(record)
