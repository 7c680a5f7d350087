"""Transformers' models with eager attention: every layer's attention and feed-forward block."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from effpass.patterns import attention, feed_forward
from tests.models.zoo import FAMILIES, SPECIAL, TEXT, Family
from tests.patterns.raising import Raiser, tensors, total
from tests.tolerances import close

IDIOMS = [*attention.IDIOMS, feed_forward.IDIOM]
SMALL = {"vocab_size": 64, "num_layers": 2, "num_heads": 4}


def family(name: str, **fields: Any) -> Family:
    """A model that the zoo has not."""
    return Family(f"{name}Config", f"{name}ForCausalLM", TEXT | SPECIAL | fields, cached=True)


ZOO: dict[str, Any] = FAMILIES
MODELS: dict[str, Family] = {
    **{name: ZOO[name] for name in ("bert", "gpt2", "llama", "mistral", "vit", "gpt_neox")},
    "t5": Family(
        "T5Config", "T5EncoderModel", SMALL | SPECIAL | {"d_model": 32, "d_kv": 8, "d_ff": 48}
    ),
    "bloom": family("Bloom", n_head=4),
    "falcon": family("Falcon", num_attention_heads=4, alibi=True, multi_query=False),
    "falcon, one key head": family("Falcon", num_attention_heads=4, multi_query=True),
    "opt": family("OPT", num_attention_heads=4, ffn_dim=48, word_embed_proj_dim=32),
    "gptj": family("GPTJ", n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=64),
    "phi": family("Phi", num_attention_heads=4, intermediate_size=48),
}


def eager(made: Family) -> tuple[nn.Module, dict[str, Any]]:
    """The model and inputs with a row that is padded on the left."""
    fields = made.fields | {"attn_implementation": "eager"}
    model, make_inputs = Family(made.config, made.model, fields, made.cached)()
    inputs = make_inputs(2, 9, True)
    if "attention_mask" in inputs:
        inputs["attention_mask"] = inputs["attention_mask"].flip(-1)
    return model, inputs


@pytest.mark.parametrize("name", MODELS)
def test_every_layer(name: str) -> None:
    model, inputs = eager(MODELS[name])
    raiser = Raiser(model, IDIOMS)
    with torch.no_grad():
        for a, e in zip(tensors(raiser.run(**inputs)), tensors(model(**inputs)), strict=True):
            close(a, e, "zoo_fp32")
    assert raiser.count("sdpa") == 2 and raiser.count("ffn") == 2
    assert not raiser.reasons


def test_soft_caps() -> None:
    model, inputs = eager(ZOO["gemma2"])
    raiser = Raiser(model, IDIOMS)
    with torch.no_grad():
        raiser.run(**inputs)
    assert raiser.count("attention_softcap") == 2 and raiser.count("ffn") == 2
    assert set(raiser.reasons) == {
        "the scores are capped by tanh (soft cap 50), which scaled_dot_product_attention cannot"
    }


@pytest.mark.parametrize("name", ["bert", "llama", "t5"])
def test_training(name: str) -> None:
    """Queries in front of a row's first token see nothing: they have gradients all the same."""
    model, inputs = eager(MODELS[name])
    theirs = copy.deepcopy(model)
    raiser = Raiser(model, IDIOMS)
    total(tensors(raiser.run(**inputs))).backward()
    total(tensors(theirs(**inputs))).backward()
    for a, e in zip(model.parameters(), theirs.parameters(), strict=True):
        assert (a.grad is None) == (e.grad is None)
        if a.grad is not None and e.grad is not None:
            close(a.grad, e.grad, "zoo_gradient_fp32")
    assert raiser.count("sdpa") == 2


@pytest.mark.parametrize("name", ["bert", "llama", "bloom"])
def test_bfloat16(name: str) -> None:
    model, inputs = eager(MODELS[name])
    model = model.to(torch.bfloat16)
    raiser = Raiser(model, IDIOMS)
    with torch.no_grad():
        for a, e in zip(tensors(raiser.run(**inputs)), tensors(model(**inputs)), strict=True):
            close(a, e, "model_bf16")
    assert raiser.count("sdpa") == 2
