"""Many random programs, raised without proof, against eager: counts, and every failure, reduced.

``python -m tests.patterns.fuzz --examples 10000 --seed 1``; ``--program <hex>`` runs one alone,
``--pieces loop,doubling`` only programs of these; ``--minutes 10`` stops then, with the counts so
far.
"""

from __future__ import annotations

import argparse
import logging
import math
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from tests.patterns.differences import (
    Differs,
    Outcome,
    check,
    check_compiled,
    check_symbolic,
)
from tests.patterns.mutants import mutant
from tests.patterns.pieces.everything import RECIPE
from tests.patterns.programs import Program, Recipe, write
from tests.patterns.reduce import reduced
from tests.patterns.runs import Invalid

Check = Callable[[Program], Outcome]
WAYS: tuple[Check, ...] = (check, check, check, check, check, check_symbolic, check_compiled)


@dataclass
class Tally:
    """What became of the programs so far."""

    counts: Counter[str] = field(default_factory=Counter)
    idioms: Counter[str] = field(default_factory=Counter)
    ops: Counter[str] = field(default_factory=Counter)
    pieces: Counter[tuple[str, bool]] = field(default_factory=Counter)  # by name, raised or not
    reasons: Counter[str] = field(default_factory=Counter)

    def add(self, program: Program, outcome: Outcome) -> None:
        """Counts one program that was right."""
        raised = bool(outcome.raised)
        self.counts["raised"] += raised
        self.counts["with mistakes"] += bool(program.twists)
        self.counts["with mistakes, raised"] += bool(program.twists) and raised
        self.counts["gradients"] += outcome.compared
        self.counts["other batches"] += outcome.batches - 1
        self.idioms += outcome.raised
        self.ops += outcome.ops
        self.pieces.update((kind, raised) for kind in program.kinds)
        self.reasons.update(outcome.reasons)
        self.counts.update(outcome.judged.keys())  # programs

    def __str__(self) -> str:
        lines = [f"{dict(self.counts)}", f"idioms {dict(self.idioms)}", f"ops {dict(self.ops)}"]
        names = sorted({name for name, _ in self.pieces})
        shares = (
            f"{n} {self.pieces[n, True]}/{self.pieces[n, True] + self.pieces[n, False]}"
            for n in names
        )
        return "\n".join([*lines, "raised of " + ", ".join(shares)])


def one(seed: str, tally: Tally, recipe: Recipe = RECIPE) -> tuple[Program, str] | None:
    """Checks the program of a seed and, for some, a mutant; answers a failure, reduced."""
    choice = random.Random(seed)
    way = choice.choice(WAYS)
    program = write(recipe, seed)
    failure = _failure(program, way, tally)
    if failure or choice.randrange(2):
        return failure
    changed = mutant(program, seed)
    if changed is None:
        return None
    tally.counts["mutants"] += 1
    return _failure(changed, check, tally, "mutant: ")


def _failure(
    program: Program, way: Check, tally: Tally, what: str = ""
) -> tuple[Program, str] | None:
    tally.counts["programs"] += 1
    try:
        outcome = way(program)
    except Invalid as error:
        tally.counts["invalid"] += 1
        tally.reasons[f"invalid: {str(error)[:100]}"] += 1
    except Differs as error:
        tally.counts["differs"] += 1
        quick = [other for other in (check, check_symbolic) if _differs(program, other)]
        test = quick[0] if quick else way
        small = reduced(program, lambda p: _differs(p, test), 250 if quick else 40)
        return small, f"{what}{error} ({way.__name__})"
    else:
        tally.add(program, outcome)
        tally.counts[f"{what}raised in {way.__name__}"] += bool(outcome.raised)
    return None


def _differs(program: Program, way: Check) -> bool:
    try:
        way(program)
    except Differs:
        return True
    except Exception:
        return False
    return False


def main() -> int:
    """Prints counts and failures; the exit status says whether there was one."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--program", default="")
    parser.add_argument("--pieces", default="")
    given = parser.parse_args()
    logging.disable()  # torch logs what it also raises
    tally, started = Tally(), time.monotonic()
    wanted = given.pieces.split(",")
    pieces = [p for p in RECIPE.pieces if not given.pieces or p.name in wanted]
    recipe, seeds = replace(RECIPE, pieces=pieces), random.Random(given.seed)
    end = started + 60 * given.minutes
    while tally.counts["programs"] < given.examples and time.monotonic() < end:
        seed = given.program or seeds.randbytes(8).hex()
        failure = one(seed, tally, recipe)
        if failure:
            program, reason = failure
            print(f"--- {seed}: {reason}\n{program}", flush=True)
        if given.program:
            break
    print(f"{tally}\n{time.monotonic() - started:.0f} s; misses:")
    for reason, count in tally.reasons.most_common(40):
        print(f"{count:6} {reason}")
    return int(tally.counts["differs"] > 0)


if __name__ == "__main__":
    sys.exit(main())
