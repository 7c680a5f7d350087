"""Look inside: ``with effpass.dump(directory)`` writes every stage of every graph as text."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

from torch.fx import GraphModule

from effpass.graph.printer import text

_DIRECTORY: ContextVar[Path | None] = ContextVar("effpass_dump_directory", default=None)


@contextlib.contextmanager
def dump(directory: str | Path) -> Iterator[Path]:
    """Writes every stage of every graph compiled inside: ``<directory>/<graph>/<stage>.txt``.

    Stages are numbered: the Dynamo graph, captured, cleaned, lowered; and ``report.txt``,
    ``report.json``. Raises OSError when the directory cannot be made.
    """
    path = Path(directory)
    path.mkdir(parents=True, exist_ok=True)
    token = _DIRECTORY.set(path)
    try:
        yield path
    finally:
        _DIRECTORY.reset(token)


class Stages:
    """Writes the stages of one graph; does nothing outside ``dump``."""

    def __init__(self, name: str) -> None:
        directory = _DIRECTORY.get()
        self._folder = None if directory is None else directory / name
        self._count = 0

    def graph(self, stage: str, gm: GraphModule) -> None:
        """Writes one stage of the graph."""
        if self._folder is not None:
            self.write(f"{self._count:02d}_{stage}.txt", text(gm))
            self._count += 1

    def write(self, file: str, content: str) -> None:
        """Writes one file beside the stages."""
        if self._folder is not None:
            self._folder.mkdir(parents=True, exist_ok=True)
            (self._folder / file).write_text(content)
