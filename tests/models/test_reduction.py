"""Every family of the zoo reduces, or declines with the reason that the golden table holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import effpass
from tests.models import reduction
from tests.models.zoo import FAMILIES
from tests.passes.paddings import real
from tests.tolerances import close

TABLE = reduction.expected()
REDUCED = [family for family, row in TABLE.items() if "tokens" in row]
QUICK = ("mamba2", "llama")
# torch's own: Dynamo instantiates a model's autograd.Function, which torch deprecates
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


def marked(families: list[str]) -> list[Any]:
    return [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in families]


def compiled(model: Any, **fields: Any) -> Any:
    options = {"reduce_tokens": {"keep": 0.75, "layers": [0], **fields}, "compiler": "eager"}
    return torch.compile(model, backend="effpass", options=options)


def tokens(result: Any) -> Tensor:
    return result[0]


def test_the_table_has_every_family() -> None:
    assert list(TABLE) == list(FAMILIES)
    assert {"mamba", "mamba2", "falcon_mamba", "bamba", "bert", "llama", "vit"} <= set(REDUCED)


@pytest.mark.parametrize("family", marked([f for f in TABLE if f not in REDUCED]) or ["none"])
def test_others_decline_as_the_table_says(family: str) -> None:
    assert reduction.measure(family) == TABLE[family]


@pytest.mark.parametrize("family", marked([f for f in REDUCED if f != "vit"]))
def test_dropping_only_padding_changes_nothing(family: str) -> None:
    """Each row loses other tokens: masks, rotary tables and states follow its own positions."""
    model, make_inputs = FAMILIES[family]()
    run = compiled(model, method="evit", score="l2")
    for length, sides in ((16, (1, 2)), (21, (2,))):
        for side in sides:
            inputs = make_inputs(3, length, True)
            lost = torch.tensor([[5], [8], [6]])
            at = torch.arange(length)
            mask = (at < length - lost) if side == 1 else (at >= lost)
            inputs = inputs | {"attention_mask": mask.long()}
            with torch.no_grad():
                mine, theirs = tokens(run(**inputs)), tokens(model(**inputs))
            close(real(mine, mask), real(theirs, mask), "zoo_fp32")
    first = effpass.report(run).graphs[0]
    assert reduction.row(first)["tokens"] == TABLE[family]["tokens"]
    assert first.forms == {"plain": 0, "reduced": 2}


@pytest.mark.parametrize(
    "family", [f if f == "mamba2" else pytest.param(f, marks=pytest.mark.slow) for f in REDUCED]
)
def test_while_no_token_leaves_nothing_changes(family: str) -> None:
    """All methods, verified as ``explain`` does it; and rows of outputs are all there."""
    model, make_inputs = FAMILIES[family]()
    inputs = make_inputs(2, 16, False)
    for method in ("utrc", "tome"):
        options = {"reduce_tokens": {"keep": 0.75, "layers": [0], "method": method}}
        with torch.no_grad():
            found = effpass.explain(model, options=options, **inputs)
            torch._dynamo.reset()
            fewer = tokens(compiled(model, method=method)(**inputs))
            assert fewer.shape == tokens(model(**inputs)).shape and fewer.isfinite().all()
        assert found.graphs[0].verified.startswith("equal within")
        (step,) = found.graphs[0].reductions[0].steps
        assert step.before == len(step.kept) + len(step.merged) + len(step.dropped)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mamba2", "llama", "bert"])
def test_training_through_reduction(family: str) -> None:
    """Inductor's gradients are eager's, over lengths that change."""
    model, make_inputs = FAMILIES[family]()
    options = {"keep": 0.75, "layers": [0], "causal": True}
    batches = [make_inputs(3, length, True) for length in (16, 25)]
    reduction.compilers_agree(model, options, batches, tokens)


@pytest.mark.parametrize("family", marked(["mamba2", "mamba", "falcon_mamba"]))
def test_states_after_a_reduced_prefill_generate(family: str) -> None:
    """SSM families go on from the states of the reduced stream.

    While only padding leaves they are those of the whole stream, and what is generated is the same.
    """
    model, make_inputs = FAMILIES[family]()
    ids = make_inputs(3, 16, False)["input_ids"]
    mask = (torch.arange(16) >= torch.tensor([[5], [8], [6]])).long()
    settings = dict(max_new_tokens=4, do_sample=False, pad_token_id=0, eos_token_id=None)
    expected = model.generate(ids, attention_mask=mask, **settings)
    model.forward = compiled(model.forward, method="evit", score="l2")
    assert torch.equal(model.generate(ids, attention_mask=mask, **settings), expected)
    torch._dynamo.reset()
    model.forward = compiled(type(model).forward.__get__(model))
    assert model.generate(ids, **settings).shape == (3, 20)
    prefills = [g.forms for g in effpass.report(model).graphs if g.forms]
    assert prefills == [{"plain": 0, "reduced": 1}] * 2


def test_a_cache_of_keys_is_declined() -> None:
    model, make_inputs = FAMILIES["llama"]()
    run = compiled(model)
    inputs = make_inputs(2, 20, False) | {"use_cache": True}
    with torch.no_grad():
        close(run(**inputs).logits, model(**inputs).logits, "zoo_fp32")
    assert [d.code for d in effpass.report(run).declined] == ["reduce_tokens:kv_cache"]


def test_one_logit_is_that_of_the_last_token() -> None:
    model, make_inputs = FAMILIES["mamba2"]()
    run, inputs = compiled(model), make_inputs(2, 24, False)
    with torch.no_grad():
        every, one = run(**inputs).logits, run(**inputs, logits_to_keep=1).logits
    assert one.shape[1] == 1
    close(one, every[:, -1:], "zoo_fp32")
