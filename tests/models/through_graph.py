"""Families of the zoo through the graph: no known functions, attention written out.

A function that was substituted once stays so: use ``rows`` and ``check``, which run this module in
a process of its own.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import effpass
from effpass.capture import known
from effpass.ops import OPS
from effpass.report import Report
from tests.models.test_zoo import check as compare
from tests.models.test_zoo import check_gradients
from tests.models.zoo import FAMILIES, Family, MakeInputs

LENGTH, LONGER = 11, 18
KNOWN, CALLED = "known function", "torch's own"
Row = dict[str, dict[str, int]]


def rows(families: Sequence[str]) -> dict[str, Row]:
    """What is found in each family, and what is missed."""
    return json.loads(_own_process(families, "--rows").splitlines()[-1])


def check(families: Sequence[str]) -> None:
    """Raises AssertionError unless outputs and gradients equal eager's."""
    _own_process(families, "--check")


def with_eager_attention(family: str) -> tuple[nn.Module, MakeInputs]:
    """The family's model, its attention written out."""
    make = FAMILIES[family]
    assert isinstance(make, Family)
    fields = make.fields | {"attn_implementation": "eager"}
    return dataclasses.replace(make, fields=fields)()


def explained(model: nn.Module, make_inputs: MakeInputs) -> Row:
    """Counts by idiom, and misses with theirs."""
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return row(effpass.explain(model, **make_inputs(2, LENGTH, False)))


def row(report: Report) -> Row:
    """Counts by idiom, and misses with theirs, of one report."""
    counts: Counter[str] = Counter()
    for layer in report.coverage:
        for found in layer.found:
            by = found.idioms or ((KNOWN if found.op in OPS else CALLED),)
            counts.update({idiom: found.count * layer.layers for idiom in by})
    misses = Counter(f"{miss.idiom}: {miss.reason}" for miss in report.misses)
    return {"counts": dict(counts), "misses": dict(misses)}


def checked(model: nn.Module, make_inputs: MakeInputs, tolerance: str) -> Report:
    """Outputs and gradients are eager's; outputs of padded inputs too, and at another length."""
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="effpass", options={"compiler": "eager"})
    check_gradients(model, *compare(compiled, model, make_inputs(2, LENGTH, False), tolerance))
    with torch.no_grad():
        compare(compiled, model, make_inputs(2, LENGTH, True), tolerance)
        compare(compiled, model, make_inputs(2, LONGER, True), tolerance)
    return effpass.report(compiled)


def _own_process(families: Sequence[str], what: str) -> str:
    command = [sys.executable, "-m", "tests.models.through_graph", what, *families]
    root = Path(__file__).parent.parent.parent
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def _main(arguments: argparse.Namespace) -> None:
    known.TABLE = ()
    found: dict[str, Any] = {}
    for family in arguments.families:
        made = with_eager_attention(family)
        if arguments.check:
            checked(*made, "zoo_delta_rule_fp32" if family == "qwen3_next" else "zoo_fp32")
        else:
            found[family] = explained(*made)
        assert not known.registered(), "a function was substituted"
    print(json.dumps(found))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="+")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--rows", action="store_true", help="print what is found, as JSON")
    what.add_argument("--check", action="store_true", help="compare with eager")
    _main(parser.parse_args())
