"""Which dims are batch and token, told for every value, with the chain that leads there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import effpass
from effpass.report import Report
from tests.passes import small


class Looks(nn.Module):
    """Ids, a table, rows and tokens merged and split again, a part of a split, a pooled head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.proj = nn.Linear(8, 12)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        b, t = ids.shape
        x = self.proj(self.embed(ids).reshape(b * t, 8)).view(b, t, 12)
        _, gate = x.split([5, 7], -1)
        y = gate.transpose(0, 1).sigmoid()
        return y, y.sum(0)


@pytest.fixture(scope="module")
def looks() -> Report:
    return effpass.explain(Looks(), torch.zeros(2, 5, dtype=torch.long))


def test_every_value_has_its_dims(looks: Report) -> None:
    texts = {each.value: each.axes for each in looks.axes}
    assert texts["embedding"] == "batch token 8"
    assert texts["linear"] == "batch·token 12"
    assert texts["sigmoid"] == "token batch 7"
    assert texts["sum_1"] == "batch 7"


def test_a_chain_leads_from_the_ids_to_the_value(looks: Report) -> None:
    for name in ("batch", "token"):
        chain = looks.why("sigmoid", name).splitlines()
        assert "ids that are looked up in a table" in chain[0]
        steps = [line.split()[1] for line in chain[1:]]
        assert steps == [
            *("embedding", "reshape", "linear", "view", "getitem_1", "transpose", "sigmoid")
        ]
    assert looks.why("sum_1") == "no dim of sum_1 (batch 7) is known to be the token"
    assert looks.why("sum_1", "batch").splitlines()[-1].startswith("-> sum_1 (batch 7)")


def test_what_is_asked_wrongly(looks: Report) -> None:
    with pytest.raises(KeyError, match="found 'sigmoidd'; the nearest: sigmoid"):
        looks.why("sigmoidd")
    with pytest.raises(ValueError, match="'batch' or 'token', found 'rows'"):
        looks.why("sigmoid", "rows")
    with pytest.raises(IndexError):
        looks.why("sigmoid", graph=3)


def test_attention_names_where_nothing_else_does() -> None:
    model = small.Block().eval()
    found = effpass.explain(model, torch.randn(2, 5, small.WIDTH), torch.zeros(2, 1, 1, 5))
    (attention,) = (a for a in found.axes if a.value.startswith("scaled_dot"))
    assert attention.axes == "batch 2 token 4"
    first = found.why(attention.value).splitlines()[0]
    assert "queries (batch, heads, tokens, channels)" in first


def test_ops_name_what_they_take() -> None:
    found = effpass.explain(small.Mixer(8), torch.randn(2, 5, 8))
    linear = next(a for a in found.axes if a.value == "linear")
    assert linear.axes == "batch token 16", linear
    assert "names it" in found.why("linear").splitlines()[0]


def test_the_table_is_compact(looks: Report) -> None:
    text = str(looks)
    table = text[text.index("axes ") :]
    assert "batch token 8" in table and "neither batch nor token" in table
    assert len(table.splitlines()) < len(looks.axes) + 6
