"""The golden table of near misses: why each is not raised, or what is raised inside it.

``python -m tests.patterns.misses`` writes it anew.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

from tests.patterns.cases import NEAR_MISSES, inputs
from tests.patterns.raising import Raiser
from tests.patterns.spellings.spelling import NearMiss

PATH = Path(__file__).parent.parent / "golden" / "misses.json"
LENGTH = 5
Row = dict[str, list[str]]


def row(raiser: Raiser) -> Row:
    """What was raised, and the reasons of what was not."""
    raised = [record.op for outcome in raiser.outcomes for record in outcome.raised]
    return {"raised": raised, "reasons": raiser.reasons}


def expected() -> dict[str, Row]:
    """The table as committed."""
    return json.loads(PATH.read_text())


def _measured(model: NearMiss) -> Row:
    raiser = Raiser(model.make())
    with torch.no_grad():
        raiser(*inputs(model, LENGTH))
    return row(raiser)


if __name__ == "__main__":
    table = {model.name: _measured(model) for model in NEAR_MISSES}
    PATH.write_text(json.dumps(table, indent=2) + "\n")
    print(f"wrote {PATH}")
