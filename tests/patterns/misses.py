"""The golden table of near misses: why each is not raised, or what is raised inside it.

``python -m tests.patterns.misses`` writes it anew.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from tests.patterns.cases import NEAR_MISSES, inputs
from tests.patterns.raising import Raiser, leaf
from tests.patterns.spellings.spelling import NearMiss

PATH = Path(__file__).parent.parent / "golden" / "misses.json"
LENGTH = 5
Row = dict[str, list[str]]


def row(raiser: Raiser) -> Row:
    """What was raised, and the reasons of what was not; how far a proof was off is left out."""
    raised = [record.op for outcome in raiser.outcomes for record in outcome.raised]
    reasons = [re.sub(r"differ by \S+", "differ by ...", reason) for reason in raiser.reasons]
    return {"raised": raised, "reasons": reasons}


def expected() -> dict[str, Row]:
    """The table as committed."""
    return json.loads(PATH.read_text())


def _measured(model: NearMiss) -> Row:
    raiser = Raiser(model.make())
    raiser(*(leaf(x) for x in inputs(model, LENGTH)))
    return row(raiser)


if __name__ == "__main__":
    table = {model.name: _measured(model) for model in NEAR_MISSES}
    PATH.write_text(json.dumps(table, indent=2) + "\n")
    print(f"wrote {PATH}")
