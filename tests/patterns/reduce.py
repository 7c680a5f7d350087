"""Makes a failing program small: drops lines and results while it still fails."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace

from tests.patterns.mutants import sound
from tests.patterns.programs import Program


def reduced(program: Program, fails: Callable[[Program], bool], attempts: int = 400) -> Program:
    """A smaller program of which ``fails`` is still true; at most ``attempts`` are tried."""
    again = True
    while again and attempts > 0:
        again = False
        for candidate in _smaller(program):
            attempts -= 1
            if attempts < 0:
                break
            if sound(candidate) and fails(candidate):
                program, again = candidate, True
                break
    return program


def _smaller(program: Program) -> Iterator[Program]:
    lines = program.text.splitlines()
    *body, last = lines[1:]
    yield from _fewer_inputs(program)
    for results in _fewer(last):
        yield _with(program, [lines[0], *body, results])
    for size in (8, 4, 2, 1):  # lines, from the end
        for end in range(len(body), size - 1, -1):
            yield _with(program, [lines[0], *body[: end - size], *body[end:], last])
    for i, line in enumerate(body):
        for shorter in _simpler(line):
            yield _with(program, [lines[0], *body[:i], shorter, *body[i + 1 :], last])


def _fewer_inputs(program: Program) -> Iterator[Program]:
    """Without the arguments that are not read; the values of those behind change."""
    head, _, body = program.text.partition("\n")
    names = head[head.index("(") + 1 : head.index(")")].split(", ")
    read = [bool(re.search(rf"\b{name}\b", body)) for name in names]
    if not all(read):
        kept = ", ".join(n for n, r in zip(names, read, strict=True) if r)
        inputs = tuple(x for x, r in zip(program.inputs, read, strict=True) if r)
        yield replace(program, text=f"def program({kept}):\n{body}", inputs=inputs)


def _fewer(last: str) -> Iterator[str]:
    """The ``return`` with one result left out, or one of the names before."""
    results = _split(last.strip().removeprefix("return (").removesuffix(")").rstrip(","))
    for i in range(len(results)):
        if len(results) > 1:
            kept = [*results[:i], *results[i + 1 :]]
            yield f"    return ({', '.join(kept)},)"
    for result in results:
        name = re.match(r"\w+", result)
        if len(results) == 1 and name and name[0] != result:
            yield f"    return ({name[0]},)"


def _split(text: str) -> list[str]:
    """Cuts at commas outside of brackets."""
    parts, depth = [""], 0
    for char in text:
        depth += (char in "([{") - (char in ")]}")
        if char == "," and not depth:
            parts.append("")
        else:
            parts[-1] += char
    return [part.strip() for part in parts]


def _simpler(line: str) -> Iterator[str]:
    """An assignment of one of the names on its right, or with a call at the end left out."""
    match = re.match(r"(\s*)(\w+) = (.*)", line)
    if not match:
        return
    indent, name, value = match.groups()
    for source in dict.fromkeys(re.findall(r"\b[a-zA-Z]\w*\b", value)):
        if source != value and source not in ("torch", "F"):
            yield f"{indent}{name} = {source}"
    cut = re.match(r"(.+)\.\w+\([^()]*\)$", value)
    if cut and cut[1].count("(") == cut[1].count(")"):
        yield f"{indent}{name} = {cut[1]}"


def _with(program: Program, lines: list[str]) -> Program:
    return replace(program, text="\n".join(lines) + "\n")
