"""Two plays as passages of very different lengths, byte by byte."""

from __future__ import annotations

import re
from pathlib import Path

PLAYS = Path(__file__).parent.parent / "data" / "plays.txt"
VOCABULARY = 256
START = 0  # a byte that no text holds begins every passage
HELD_OUT = 20  # every so many passages one is kept for validation


def passages(text: str, longest: int) -> list[str]:
    """What is spoken between two stage directions, in pieces of whole speeches.

    A piece is at most ``longest`` bytes; a single speech beyond that is cut at its line ends.
    """
    found: list[str] = []
    open_piece = False
    for block in re.split(r"\n\s*\n", text):
        block = block.strip()
        if block.startswith("[") or re.match(r"(ACT|SCENE) ", block):
            open_piece = False
            continue
        for part in _cut(block, longest):
            if open_piece and len(found[-1]) + 2 + len(part) <= longest:
                found[-1] += "\n\n" + part
            else:
                found.append(part)
            open_piece = True
    return [piece for piece in found if piece]


def sequences(longest: int = 2048, path: Path = PLAYS) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of the passages to learn from, and of those held out; ``longest`` tokens at most.

    Every passage begins with START, so that its first byte is predicted too.
    """
    if longest < 100:
        raise ValueError(f"expected passages of at least 100 tokens, found a limit of {longest}")
    texts = passages(path.read_text(encoding="ascii"), longest - 1)
    ids = [[START, *text.encode()] for text in texts]
    learn = [each for i, each in enumerate(ids) if i % HELD_OUT]
    return learn, ids[::HELD_OUT]


def _cut(block: str, longest: int) -> list[str]:
    """A block in parts of whole lines, none longer than ``longest``."""
    parts = [""]
    for line in block.splitlines():
        if len(line) > longest:
            raise ValueError(f"expected lines of at most {longest} bytes, found {len(line)}")
        if parts[-1] and len(parts[-1]) + 1 + len(line) > longest:
            parts.append("")
        parts[-1] += "\n" * bool(parts[-1]) + line
    return parts
