"""Models beyond the zoo whose attention or routing has no packed form of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import effpass
from tests.models import packing
from tests.models.zoo import FAMILIES, enliven
from tests.passes.paddings import paddings, real
from tests.passes.test_pack_varlen import declined, ran
from tests.tolerances import close

SIZES: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32}
HEADS: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
T5 = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
DEBERTA = {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 16}
MPT = {"vocab_size": 64, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}

MODELS: dict[str, Callable[[], nn.Module]] = {
    "t5": lambda: transformers.T5EncoderModel(transformers.T5Config(**T5)),
    "mpt": lambda: transformers.MptModel(transformers.MptConfig(**MPT)),
    "bloom": lambda: transformers.BloomModel(
        transformers.BloomConfig(**SIZES, n_layer=2, n_head=4)
    ),
    "deberta": lambda: transformers.DebertaV2Model(
        transformers.DebertaV2Config(**SIZES, **HEADS, **DEBERTA, max_position_embeddings=64)
    ),
    "mixtral": lambda: transformers.MixtralModel(
        transformers.MixtralConfig(**SIZES, **HEADS, num_key_value_heads=2, num_local_experts=4)
    ),
}
# torch's own: Dynamo instantiates a model's autograd.Function, and looks for its inputs' gradients
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning"),
]


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_real_tokens_and_gradients(name: str) -> None:
    """Learned and linear position biases, disentangled attention, routed experts."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    enliven(model)
    run = torch.compile(model, backend="effpass", options=packing.OPTIONS)
    more = {} if name in ("t5", "deberta") else {"use_cache": False}
    for _, mask in paddings(3, 11):
        ids = torch.randint(3, 64, (3, 11))
        outputs = [f(input_ids=ids, attention_mask=mask, **more)[0] for f in (run, model)]
        outputs = [real(each, mask) for each in outputs]
        close(*outputs, "zoo_fp32")
        weights = dict(model.named_parameters())
        grads = [
            torch.autograd.grad(each.square().mean(), list(weights.values()), allow_unused=True)
            for each in outputs
        ]
        largest = max(float(g.abs().max()) for g in grads[1] if g is not None)
        for a, e in zip(*grads, strict=True):
            assert (a is None) == (e is None)
            # the gradient of a key's bias is zero but for rounding: compared at the others' size
            if a is not None and e is not None and float(e.abs().max()) > 1e-6 * largest:
                close(a, e, "zoo_gradient_fp32")
    assert ran(run) == {"plain": 0, "packed": 3}, declined(run)
    assert any("with their padding" in a.what for a in effpass.report(run).applied)


@pytest.mark.parametrize("options", [{}, {"reduce_tokens": {"keep": 0.8, "layers": [0]}}])
@pytest.mark.parametrize("name", ["bert", "llama", "mamba2"])
def test_rows_and_lengths_change_at_once(name: str, options: dict[str, Any]) -> None:
    """As they do in the last batch of an epoch: ids and mask have symbols of their own."""
    model, make_inputs = FAMILIES[name]()
    run = torch.compile(model, backend="effpass", options=packing.OPTIONS | options)
    for rows, tokens in ((4, 12), (3, 17), (2, 9), (5, 30)):
        inputs = make_inputs(rows, tokens, True)
        with torch.no_grad():
            found, wanted = (f(**inputs)[0] for f in (run, model))
        if not options:
            mask = inputs["attention_mask"]
            close(real(found, mask), real(wanted, mask), "zoo_fp32")
    graphs = effpass.report(run).graphs
    assert [graph.forms["packed"] for graph in graphs] == [1, 3]
    assert not any(graph.forms["plain"] for graph in graphs)
