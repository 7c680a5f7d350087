"""What the user asked for: a frozen Config, made of torch.compile's ``options`` and ``mode``."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from effpass.passes.pack_varlen import PackVarlen
from effpass.passes.reduce_tokens import ReduceTokens

# in the order in which they run
PASSES: dict[str, type] = {PackVarlen.name: PackVarlen, ReduceTokens.name: ReduceTokens}
COMPILERS = ("inductor", "eager", "onnxruntime")
TARGETS = ("step", "cpu", "gpu", "inline")
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


@dataclass(frozen=True)
class Config:
    """How one model is compiled. With no field set only exact rewrites run.

    ``passes``: passes that change layout or numbers, in their fixed order; as an option, each by
    its name: ``{"pack_varlen": True}``.
    ``compiler``: what compiles the rewritten graph: ``"inductor"``, ``"eager"`` (run as it is) or
    ``"onnxruntime"`` (inference; what it cannot run is declined, and compiled by Inductor).
    ``targets``: implementations allowed for ops besides ``inline``, of TARGETS; None for all
    but ``gpu``, whose kernels are not measured yet.
    ``mode``: a mode of ``torch.compile`` for Inductor. ``inductor``: Inductor's own options.
    ``verify``: run the rewritten graph beside the captured one before using it. ``strict``: raise
    when that fails, instead of warning and running the captured graph.
    """

    passes: tuple[Any, ...] = ()
    compiler: str = "inductor"
    targets: tuple[str, ...] | None = None
    mode: str | None = None
    inductor: Mapping[str, Any] | None = None
    strict: bool = False
    verify: bool = False

    def __post_init__(self) -> None:
        _one_of("compiler", self.compiler, COMPILERS)
        if self.mode is not None:
            _one_of("mode", self.mode, MODES)
        if isinstance(self.targets, str):
            raise TypeError(f"expected targets to be a tuple of names, found {self.targets!r}")
        for target in self.targets or ():
            _one_of("targets", target, TARGETS)
        for flag in ("strict", "verify"):
            if not isinstance(getattr(self, flag), bool):
                raise TypeError(
                    f"expected {flag} to be True or False, found {getattr(self, flag)!r}"
                )
        for each in self.passes:
            if not isinstance(each, tuple(PASSES.values())):
                raise TypeError(
                    f"expected passes to be of {', '.join(p.__name__ for p in PASSES.values())}, "
                    f"found {each!r}"
                )
        kinds = [type(each) for each in self.passes]
        if kinds != [kind for kind in PASSES.values() if kind in kinds]:
            raise ValueError(
                "expected each pass once, in the order "
                f"{', '.join(p.__name__ for p in PASSES.values())}, found {self.passes!r}"
            )

    @staticmethod
    def from_options(options: Mapping[str, Any] | None, mode: str | None = None) -> Config:
        """Reads the ``options`` and ``mode`` of ``torch.compile``.

        Raises ValueError for an unknown key (naming the nearest) or value, TypeError for a type.
        """
        options = dict(options or {})
        given = options.pop("config", None)
        if given is not None:
            if not isinstance(given, Config) or options:
                raise TypeError(
                    "expected {'config': effpass.Config(...)} alone in options, found "
                    f"{type(given).__name__} and {sorted(options)}"
                )
            return given
        chosen = {name: options.pop(name) for name in PASSES if name in options}
        known = [f.name for f in fields(Config)]
        for key in options:
            if key not in known:
                raise ValueError(_unknown_option(key, [*PASSES, *known]))
        passes = tuple(_pass(name, value) for name, value in chosen.items() if value is not False)
        if passes:
            options["passes"] = (*options.get("passes", ()), *passes)
        if isinstance(options.get("targets"), list):
            options["targets"] = tuple(options["targets"])
        return Config(**{"mode": mode, **options})

    def inductor_patches(self) -> dict[str, Any]:
        """Config patches for Inductor: those of ``mode``, then the user's own."""
        from torch._inductor import list_mode_options

        mode = {} if self.mode in (None, "default") else list_mode_options(self.mode)
        return {**mode, **(self.inductor or {})}


def _pass(name: str, value: Any) -> Any:
    """A pass from its option: True, or its fields."""
    kind = PASSES[name]
    if value is True:
        return kind()
    if not isinstance(value, Mapping):
        raise TypeError(
            f"expected {name} to be True, False or a dict of its fields, found {value!r}"
        )
    allowed = tuple(f.name for f in fields(kind))
    for key in value:
        if not allowed:
            raise ValueError(f"unknown field {key!r} of {name}: it has none; pass True")
        _one_of(f"a field of {name}", key, allowed)
    return kind(**value)


def _unknown_option(key: str, known: list[str]) -> str:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else "options of Inductor go under 'inductor'."
    return f"unknown option {key!r} for backend 'effpass': {hint} Known: {', '.join(known)}, config"


def _one_of(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value in allowed:
        return
    near = difflib.get_close_matches(str(value), allowed, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"expected {name} to be one of {', '.join(allowed)}, found {value!r}{hint}")
