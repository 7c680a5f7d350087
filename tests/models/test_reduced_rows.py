"""Every family of the zoo, packed: each sequence is reduced as alone, or the table says why not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import effpass
from tests.models import reduced_rows, reduction, rows
from tests.models.zoo import FAMILIES
from tests.tolerances import close

TABLE = reduced_rows.expected()
QUICK = ("mamba2", "bert")
REDUCED = [(f, kind) for f, row in TABLE.items() for kind in row if "tokens" in row[kind]]
OTHERS = [(f, kind) for f, row in TABLE.items() for kind in row if "tokens" not in row[kind]]
ONCE = "ignore:.*only the rows of the protected tail"
# torch's own: Dynamo instantiates a model's autograd.Function, which torch deprecates
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


def marked(pairs: list[tuple[str, str]], quick: tuple[str, ...]) -> list[Any]:
    return [p if p[0] in quick else pytest.param(*p, marks=pytest.mark.slow) for p in pairs]


def packed(model: Any, family: str, ids: list[Tensor]) -> dict[str, Any]:
    return rows.arguments(model, rows.row(family, ids))


def test_the_table_has_every_family_that_reads_ids() -> None:
    assert list(TABLE) == rows.families()
    assert {"mamba", "mamba2", "falcon_mamba", "bamba", "bert", "llama"} <= {f for f, _ in REDUCED}


@pytest.mark.parametrize(("family", "kind"), marked(REDUCED, QUICK))
def test_every_sequence_is_reduced_as_alone(family: str, kind: str) -> None:
    model, _ = FAMILIES[family]()
    with torch.no_grad():
        actual, graph = reduced_rows.ran(family, kind, model)
        assert reduced_rows.entry(graph) == TABLE[family][kind]
        close(actual, reduced_rows.alone(model), "zoo_fp32")


@pytest.mark.slow
@pytest.mark.parametrize(("family", "kind"), OTHERS)
def test_others_say_why(family: str, kind: str) -> None:
    """What is declined runs exactly, packed or with its padding."""
    assert reduced_rows.measure(family)[kind] == TABLE[family][kind]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["evit", "tome", "pumer", "random", "prefix"])
@pytest.mark.parametrize("family", ["bamba", "modernbert"])
def test_every_method_on_given_rows(family: str, method: str) -> None:
    """A hybrid, and local attention; evit by the first token where attention sees all."""
    model, _ = FAMILIES[family]()
    ids = rows.sequences(reduced_rows.LENGTHS)
    with torch.no_grad():
        expected = reduced_rows.alone(model, method=method)
        run = reduced_rows.compiled(model, method=method)
        close(rows.tokens(run(**packed(model, family, ids))), expected, "zoo_fp32")


def test_a_row_of_one_sequence_is_reduced_as_any_row() -> None:
    """The second form of the graph: its positions do not restart."""
    model, _ = FAMILIES["mamba2"]()
    ids = rows.sequences([21])
    with torch.no_grad():
        run = reduced_rows.compiled(model)
        actual = rows.tokens(run(**packed(model, "mamba2", ids)))
        assert effpass.report(run).graphs[-1].forms["plain_reduced"] == 1
        expected = rows.tokens(
            reduced_rows.compiled(model)(input_ids=ids[0][None], use_cache=False)
        )
    close(actual, expected, "zoo_fp32")


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mamba2", "bert"])
@pytest.mark.filterwarnings(ONCE)
def test_inductor_computes_what_eager_does(family: str) -> None:
    """Outputs and gradients over rows that change; three compilations at most a form."""
    model, _ = FAMILIES[family]()
    lengths = ([9, 5, 13], [7, 1, 20, 11])
    batches = [packed(model, family, rows.sequences(each)) for each in lengths]
    reduction.compilers_agree(model, reduced_rows.FIELDS, batches, rows.tokens)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model, _ = FAMILIES["mamba"]()
    model = model.to(dtype)
    with torch.no_grad():
        actual, _ = reduced_rows.ran("mamba", "packed_rows", model)
        row = "model_bf16" if dtype is torch.bfloat16 else "raised_fp64"
        close(actual, reduced_rows.alone(model), row)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "code"), [("mamba", "cache"), ("llama", "kv_cache")])
def test_caches_of_packed_rows_are_declined(family: str, code: str) -> None:
    """What a cache would hold of padded rows is not what the sequences alone would leave."""
    model, _ = FAMILIES[family]()
    ids = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    with torch.no_grad():
        run = reduced_rows.compiled(model, pack=True)
        actual = run(input_ids=ids, attention_mask=mask, use_cache=True).logits
        expected = model(input_ids=ids, attention_mask=mask, use_cache=True).logits
    close(actual[mask.bool()], expected[mask.bool()], "zoo_fp32")
    (declined,) = effpass.report(run).graphs[-1].declined
    assert declined.code == f"reduce_tokens:{code}"
