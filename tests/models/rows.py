"""The golden table of packed rows: which families keep sequences apart, or say why not.

``python -m tests.models.rows`` writes it anew.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import effpass
from effpass.rows import Row
from tests.models.zoo import FAMILIES, VOCAB

PATH = Path(__file__).parent.parent / "golden" / "packed_rows.json"
OPTIONS: dict[str, Any] = {"compiler": "eager"}
LENGTHS = ([5, 3, 4], [1, 2, 7, 1], [3, 1, 1, 9, 20])


def expected() -> dict[str, dict[str, Any]]:
    """The table as committed."""
    return json.loads(PATH.read_text())


def families() -> list[str]:
    """Those that read token ids."""
    return [f for f in FAMILIES if "input_ids" in FAMILIES[f]()[1](2, 9, False)]


def sequences(lengths: list[int]) -> list[Tensor]:
    """Token ids of sequences of these lengths."""
    generator = torch.Generator().manual_seed(sum(lengths))
    return [torch.randint(3, VOCAB, (n,), generator=generator) for n in lengths]


def row(family: str, ids: list[Tensor]) -> Row:
    """The sequences in one row, its positions numbered as the family numbers them."""
    start = 1 if family == "roberta" else 0  # its padding token is 0
    (made,) = effpass.pack(ids, max_tokens=sum(map(len, ids)), position_start=start)
    return made


def arguments(model: nn.Module, made: Row) -> dict[str, Any]:
    """What the model is called with: no labels, no cache."""
    given = {name: value for name, value in made.kwargs().items() if name != "labels"}
    takes = "use_cache" in inspect.signature(model.forward).parameters
    return given | ({"use_cache": False} if takes or cached(model) else {})


def cached(model: nn.Module) -> bool:
    """Whether a model keeps a cache unless it is told not to."""
    names = [f for f in FAMILIES if FAMILIES[f].cached]
    return type(model).__name__ in {FAMILIES[f].model for f in names}


def alone(model: nn.Module, ids: list[Tensor]) -> Tensor:
    """Outputs of every sequence by itself, one after the other."""
    extra = arguments(model, row("", ids))
    off = {name: value for name, value in extra.items() if name == "use_cache"}
    return torch.cat([tokens(model(input_ids=each[None], **off)) for each in ids], 1)


def tokens(output: Any) -> Tensor:
    """The output with one entry a token."""
    return output.logits if hasattr(output, "logits") else output[0]


def entry(family: str) -> dict[str, Any]:
    """What the table says of a family."""
    model, _ = FAMILIES[family]()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="effpass", options=OPTIONS)
    try:
        with torch.no_grad():
            compiled(**arguments(model, row(family, sequences(LENGTHS[0]))))
    except Exception as error:  # of any kind: Dynamo wraps what a backend raises
        return {"error": str(error).split("\n\n")[0].rpartition("RowError: ")[2]}
    graphs = effpass.report(compiled).graphs
    counts = [a.count for g in graphs for a in g.applied if a.rewrite == "packed_rows"]
    return {"honoured": sum(counts)}


if __name__ == "__main__":
    table = {family: entry(family) for family in families()}
    PATH.write_text(json.dumps(table, indent=2) + "\n")
    print(f"wrote {PATH}")
