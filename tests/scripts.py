"""Loads scripts of ``examples/`` as modules, as if their folder were the current one."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(script: str) -> ModuleType:
    """The module of a script, given as a path under ``examples/``."""
    path = EXAMPLES / script
    sys.path.insert(0, str(path.parent))
    try:
        return importlib.import_module(path.stem)
    finally:
        sys.path.remove(str(path.parent))
