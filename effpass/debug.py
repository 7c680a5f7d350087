"""Look inside: ``with effpass.dump(directory)`` writes every stage of every graph as text."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

from torch.fx import GraphModule

from effpass.graph.printer import text
from effpass.report import GraphReport, Report

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
            self._write(self._folder, f"{self._count:02d}_{stage}.txt", text(gm))
            self._count += 1

    def report(self, report: GraphReport) -> None:
        """Writes the report of the graph, as text and as JSON."""
        if self._folder is not None:
            one = Report([report])
            self._write(self._folder, "report.txt", str(one))
            self._write(self._folder, "report.json", one.to_json())

    def _write(self, folder: Path, file: str, content: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(content)
