"""The same from a shell: ``effpass explain module:factory``, ``effpass export module:factory``."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from effpass import Config, Report, __version__, explain
from effpass.chains import axes_table


class UsageError(Exception):
    """What the user typed cannot be used; the text says what was expected."""


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the ``effpass`` command; answers the exit code."""
    parser = argparse.ArgumentParser(prog="effpass", description=__doc__)
    parser.add_argument("--version", action="version", version=f"effpass {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser(
        "explain",
        help="what effpass finds in each layer of a model, what it nearly finds, and why not",
        description="FACTORY is a function without arguments that returns (model, inputs); inputs "
        "is a tuple of positional arguments or a dict of keyword arguments.",
    )
    show.add_argument("factory", metavar="MODULE:FACTORY")
    show.add_argument("--options", default="{}", help="options as for torch.compile, in JSON")
    show.add_argument("--json", metavar="FILE", help="also write the report there as JSON")
    show.add_argument("--axes", action="store_true", help="the dims of every single value, too")
    show.add_argument(
        "--why",
        metavar="VALUE[:NAME]",
        help="how a value got its token dim (VALUE:batch: its batch dim)",
    )
    write = commands.add_parser(
        "export",
        help="write a model as ONNX, verified against eager",
        description="FACTORY as for explain; the model must be in evaluation mode.",
    )
    write.add_argument("factory", metavar="MODULE:FACTORY")
    write.add_argument("path", metavar="FILE", help="where to write the model")
    write.add_argument("--options", default="{}", help="options as for torch.compile, in JSON")
    write.add_argument("--dynamic", default="null", help="open dims, {input: {dim: name}}, in JSON")
    write.add_argument("--stateful", action="store_true", help="states as inputs and outputs")
    write.add_argument("--packed", action="store_true", help="sequences end to end, and offsets")
    write.add_argument("--portable", action="store_true", help="operators of ai.onnx alone")
    write.add_argument("--no-verify", action="store_true", help="do not compare with eager")
    arguments = parser.parse_args(argv)
    try:
        return {"explain": _explain, "export": _export}[arguments.command](arguments)
    except UsageError as error:
        parser.exit(2, f"effpass: {error}\n")


def _explain(arguments: argparse.Namespace) -> int:
    model, args, kwargs = _made(arguments.factory)
    report = explain(model, *args, options=_options(arguments.options), **kwargs)
    Console().print(report)
    if arguments.axes:
        Console().print(*(axes_table(graph.axes, every=True) for graph in report.graphs))
    if arguments.why:
        Console().print(_why(report, arguments.why))
    if arguments.json:
        Path(arguments.json).write_text(report.to_json())
    return 0


def _why(report: Report, asked: str) -> str:
    value, _, name = asked.partition(":")
    try:
        found = [
            report.why(value, name or "token", i)
            for i, graph in enumerate(report.graphs)
            if len(report.graphs) == 1 or value in {each.value for each in graph.axes}
        ]
    except (KeyError, ValueError) as error:
        raise UsageError(str(error.args[0])) from error
    if not found:
        raise UsageError(f"expected --why of a value of one of the graphs, found {value!r}")
    return "\n".join(found)


def _export(arguments: argparse.Namespace) -> int:
    try:
        from effpass import ExportError, export_onnx
    except ImportError as error:
        raise UsageError(str(error)) from error
    options, dynamic = _options(arguments.options), _dims(arguments.dynamic)
    model, args, kwargs = _made(arguments.factory)
    try:
        made = export_onnx(
            model,
            args,
            kwargs,
            path=arguments.path,
            options=options,
            dynamic=dynamic,
            stateful=arguments.stateful,
            packed=arguments.packed,
            portable=arguments.portable,
            verify=not arguments.no_verify,
        )
    except ExportError as error:
        raise UsageError(str(error)) from error
    Console().print(str(made))
    return 0


def _dims(text: str) -> dict[str, dict[int, str]] | None:
    try:
        given = json.loads(text)
        if given is None:
            return None
        return {name: {int(d): str(n) for d, n in dims.items()} for name, dims in given.items()}
    except (ValueError, AttributeError) as error:
        raise UsageError(
            f'expected --dynamic to be JSON like {{"input_ids": {{"1": "length"}}}}, '
            f"found {text!r}: {error}"
        ) from error


def _options(text: str) -> dict[str, Any]:
    try:
        options = json.loads(text)
    except json.JSONDecodeError as error:
        raise UsageError(f"expected --options to be JSON, found {text!r}: {error}") from error
    if not isinstance(options, dict):
        raise UsageError(f"expected --options to be a JSON object, found {text!r}")
    try:
        Config.from_options(options)
    except (ValueError, TypeError) as error:
        raise UsageError(str(error)) from error
    return options


def _made(name: str) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    module, colon, factory = name.partition(":")
    if not colon or not factory:
        raise UsageError(f"expected MODULE:FACTORY, found {name!r}")
    sys.path.insert(0, "")  # modules of the working directory, as with python -m
    try:
        function = getattr(importlib.import_module(module), factory)
    except (ImportError, AttributeError) as error:
        raise UsageError(f"cannot load {name!r}: {error}") from error
    made = function()
    if not isinstance(made, tuple) or len(made) != 2:
        raise UsageError(f"expected {name} to return (model, inputs), found {type(made).__name__}")
    model, inputs = made
    if isinstance(inputs, dict):
        return model, (), inputs
    return model, tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,), {}
