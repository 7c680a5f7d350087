"""Packed rows that the user brings: sequences of one row are as if each were alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import effpass
from tests.models import rows
from tests.models.zoo import FAMILIES
from tests.tolerances import close

TABLE = rows.expected()
QUICK = ("bert", "llama", "mamba", "mamba2", "bamba")
HONOURED = [family for family, entry in TABLE.items() if "honoured" in entry]
# torch's own: Dynamo instantiates a model's autograd.Function, which torch deprecates
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


def slow_but_quick(families: list[str]) -> list[Any]:
    return [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in families]


def compiled(family: str, **options: Any) -> tuple[torch.nn.Module, Any]:
    model, _ = FAMILIES[family]()
    return model, torch.compile(model, backend="effpass", options=rows.OPTIONS | options)


def test_the_table_has_every_family_that_reads_ids() -> None:
    assert list(TABLE) == rows.families()


@pytest.mark.parametrize("family", slow_but_quick(HONOURED))
def test_packed_is_looped(family: str) -> None:
    """Lengths from 1, boundaries anywhere, rows of another length; outputs and gradients."""
    model, run = compiled(family)
    weights = [p for p in model.parameters() if p.requires_grad]
    for lengths in rows.LENGTHS:
        ids = rows.sequences(lengths)
        outputs = [
            rows.tokens(run(**rows.arguments(model, rows.row(family, ids)))),
            rows.alone(model, ids),
        ]
        close(*outputs, "zoo_fp32")
        direction = torch.randn(outputs[1].shape, generator=torch.Generator().manual_seed(1))
        pairs = [
            torch.autograd.grad((each * direction).sum() / 8, weights, allow_unused=True)
            for each in outputs
        ]
        for actual, expected in zip(*pairs, strict=True):
            assert (actual is None) == (expected is None)
            if actual is not None and expected is not None:
                close(actual, expected, "zoo_gradient_fp32")
    assert rows.entry(family) == TABLE[family]


@pytest.mark.slow
@pytest.mark.parametrize("family", [f for f in TABLE if f not in HONOURED])
def test_others_are_errors(family: str) -> None:
    assert rows.entry(family) == TABLE[family]


@pytest.mark.parametrize("family", ["mamba", "mamba2", "bamba", "llama"])
@pytest.mark.parametrize("told", ["position_ids", "seq_idx", "cu_seq_lens_q"])
def test_one_field_is_enough(family: str, told: str) -> None:
    """Transformers' attention is told by positions; states by any of the fields."""
    model, run = compiled(family)
    ids = rows.sequences([2, 6, 1])
    given = rows.arguments(model, rows.row(family, ids))
    kept = ("input_ids", "use_cache", told) + (
        ("position_ids",) if family in ("bamba", "llama") else ()
    )
    with torch.no_grad():
        actual = rows.tokens(run(**{name: given[name] for name in kept if name in given}))
        close(actual, rows.alone(model, ids), "zoo_fp32")


@pytest.mark.parametrize("family", ["mamba", "mamba2", "bamba", "bert"])
def test_what_is_in_one_sequence_never_reaches_another(family: str) -> None:
    """Bit-equal, even where the other sequence's numbers are NaN."""
    model, run = compiled(family)
    ids = rows.sequences([4, 7, 3])
    given = rows.arguments(model, rows.row(family, ids))
    embedded = model.get_input_embeddings()(given.pop("input_ids")).detach()
    spoiled = embedded.clone()
    spoiled[:, 4:11] = torch.nan
    with torch.no_grad():
        clean, other = (
            rows.tokens(run(inputs_embeds=each, **given)) for each in (embedded, spoiled)
        )
    assert torch.isnan(other[:, 4:11]).all()
    for part in (slice(0, 4), slice(11, 14)):
        assert torch.equal(clean[:, part], other[:, part])


@pytest.mark.parametrize("family", ["mamba2", "bamba", "llama"])
def test_training_with_labels(family: str) -> None:
    """The loss of a row, inside the graph, in training mode: that of its sequences."""
    model, run = compiled(family)
    model.train()
    ids = rows.sequences([5, 2, 6])
    made = rows.row(family, ids)
    given = rows.arguments(model, made) | {"labels": made.labels}
    loss = run(**given).loss
    each = [model(input_ids=i[None], labels=i[None], use_cache=False).loss for i in ids]
    expected = sum(part * (len(i) - 1) for part, i in zip(each, ids, strict=True))
    close(loss, torch.as_tensor(expected / made.target_count), "zoo_fp32")
    weights = [p for p in model.parameters() if p.requires_grad]
    pairs = [torch.autograd.grad(v, weights) for v in (loss, expected / made.target_count)]
    for actual, wanted in zip(*pairs, strict=True):
        close(actual, wanted, "zoo_gradient_fp32")


def test_no_recompile_after_the_second_length() -> None:
    model, run = compiled("mamba2")
    with torch.no_grad():
        for lengths in ([5, 4], [3, 9, 1], [7, 7]):
            run(**rows.arguments(model, rows.row("mamba2", rows.sequences(lengths))))
        with torch.compiler.set_stance("fail_on_recompile"):
            for lengths in ([2, 2, 2, 9], [30, 1], [4] * 9):
                ids = rows.sequences(lengths)
                actual = rows.tokens(run(**rows.arguments(model, rows.row("mamba2", ids))))
                close(actual, rows.alone(model, ids), "zoo_fp32")


def test_a_row_of_one_sequence_runs_as_it_was() -> None:
    model, run = compiled("bamba")
    ids = rows.sequences([9])
    with torch.no_grad():
        actual = rows.tokens(run(**rows.arguments(model, rows.row("bamba", ids))))
        close(actual, rows.alone(model, ids), "zoo_fp32")
    assert effpass.report(run).graphs[0].forms == {"plain": 1, "packed_rows": 0}


def test_padded_rows_with_positions_are_no_packed_rows() -> None:
    """Left-padded rows have positions that restart, and a mask that says why."""
    model, run = compiled("bamba")
    ids = torch.stack(rows.sequences([6, 6]))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    given = {"attention_mask": mask, "position_ids": positions, "use_cache": False}
    with torch.no_grad():
        actual, expected = (rows.tokens(f(input_ids=ids, **given)) for f in (run, model))
        close(actual[mask.bool()], expected[mask.bool()], "zoo_fp32")


def test_a_cache_is_refused() -> None:
    model, run = compiled("mamba2")
    given = rows.arguments(model, rows.row("mamba2", rows.sequences([3, 4]))) | {"use_cache": True}
    with torch.no_grad(), pytest.raises(ValueError, match="Pass use_cache=False"):
        run(**given)


def test_a_cache_of_keys_does_not_hide_boundaries() -> None:
    """Transformers makes no packed mask where there is a cache, even an empty one."""
    model, run = compiled("llama")
    ids = rows.sequences([3, 4])
    given = rows.arguments(model, rows.row("llama", ids)) | {"use_cache": True}
    with torch.no_grad():
        close(rows.tokens(run(**given)), rows.alone(model, ids), "zoo_fp32")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"cu_seq_lens_q": torch.tensor([0, 4, 9], dtype=torch.int32)}, "to agree"),
        ({"cu_seq_lens_q": torch.tensor([0, 3, 8], dtype=torch.int32)}, "from 0 to 9"),
        ({"cu_seq_lens_q": torch.tensor([0, 9], dtype=torch.int32)}, "to agree"),
        ({"seq_idx": torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1]], dtype=torch.int32)}, "to agree"),
        ({"position_ids": torch.arange(9)[None]}, "to agree"),
    ],
)
def test_boundaries_that_disagree(wrong: dict[str, Any], message: str) -> None:
    model, run = compiled("mamba2")
    given = rows.arguments(model, rows.row("mamba2", rows.sequences([3, 6])))
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        run(**(given | wrong))


def test_several_packed_rows() -> None:
    _, run = compiled("mamba2")
    ids = torch.stack(rows.sequences([5, 5]))
    positions = torch.tensor([[0, 1, 2, 3, 4], [0, 1, 0, 1, 2]])
    with torch.no_grad(), pytest.raises(ValueError, match="one packed row"):
        run(input_ids=ids, position_ids=positions, use_cache=False)


def test_boundaries_that_the_model_drops_are_an_error() -> None:
    model, run = compiled("gpt2")
    given = rows.arguments(model, rows.row("gpt2", rows.sequences([3, 6])))
    del given["position_ids"]
    with torch.no_grad(), pytest.raises(Exception, match="its code never reads it"):
        run(**given)


def test_other_backends_do_not_leak() -> None:
    """A substituted function marks the row, and nothing there honours the mark."""
    model, _ = FAMILIES["mamba2"]()
    given = rows.arguments(model, rows.row("mamba2", rows.sequences([3, 6])))
    with torch.no_grad(), pytest.raises(ValueError, match="keep packed sequences apart"):
        torch.compile(model, backend="eager")(**given)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mamba", "bamba"])
def test_under_inductor_and_autocast(family: str) -> None:
    model, run = compiled(family, compiler="inductor")
    for lengths in rows.LENGTHS:
        ids = rows.sequences(lengths)
        given = rows.arguments(model, rows.row(family, ids))
        with torch.no_grad():
            close(rows.tokens(run(**given)), rows.alone(model, ids), "zoo_fp32")
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            actual = rows.tokens(run(**given)).float()
            close(actual, rows.alone(model, ids).float(), "model_bf16")
