"""Learning that a library's module was loaded, whenever that happens.

A finder in front of ``sys.meta_path`` finds nothing itself: for a module of interest it asks the
other finders, and has the loader they name call back once the module's code has run. It costs a
string comparison for every other import.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

PACKAGES = ("mamba_ssm", "causal_conv1d", "mambapy", "transformers_modules")
Loaded = Callable[[ModuleType], None]


def of_interest(name: str) -> bool:
    """Whether a module of this name may define functions of the table."""
    if name.startswith("transformers.models."):
        return ".modeling_" in name
    return name.partition(".")[0] in PACKAGES


def watch(loaded: Loaded) -> None:
    """Calls ``loaded(module)`` after every module of interest has run. Idempotent."""
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder(loaded))


class _Finder:
    def __init__(self, loaded: Loaded) -> None:
        self.loaded = loaded

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not of_interest(name):
            return None
        for finder in sys.meta_path:
            find = None if finder is self else getattr(finder, "find_spec", None)
            spec = None if find is None else find(name, path, target)
            if spec is not None:
                return self._announce(spec)
        return None

    def _announce(self, spec: ModuleSpec) -> ModuleSpec:
        run = getattr(spec.loader, "exec_module", None)
        if run is None:  # a namespace package, or a legacy loader
            return spec

        def exec_module(module: ModuleType) -> None:
            run(module)
            self.loaded(module)

        # on the instance: the loader keeps its class, so that sources and resources are still found
        vars(spec.loader)["exec_module"] = exec_module
        return spec
