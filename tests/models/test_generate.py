"""Decoding with a cache: prefill, in-place state updates, ``generate`` with a compiled forward."""

import pytest
import torch

import effpass
from tests.models.zoo import FAMILIES

WITH_STATE = ["mamba", "falcon_mamba", "mamba2", "bamba", "jamba", "zamba2", "falcon_h1"]
SLOW = pytest.mark.slow
CASES = [
    *[(family, "eager") for family in WITH_STATE],
    *[pytest.param(family, "inductor", marks=SLOW) for family in ("mamba", "mamba2", "bamba")],
]


@pytest.mark.parametrize(("family", "compiler"), CASES)
def test_generate_with_a_compiled_forward(family: str, compiler: str) -> None:
    model, make_inputs = FAMILIES[family]()
    model.eval()
    ids = make_inputs(2, 7, False)["input_ids"]
    settings = dict(max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
    expected = model.generate(ids, **settings)
    plain = model.forward
    model.forward = torch.compile(plain, backend="effpass", options={"compiler": compiler})
    assert torch.equal(model.generate(ids, **settings), expected)
    steps = [c for c in effpass.report(model).chosen if c.implementation == "step"]
    assert {"mamba2": "ssd_scan", "mamba": "selective_scan"}.get(family, steps[0].op) in {
        c.op for c in steps
    }


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_states_after_each_step_equal_eager(family: str) -> None:
    from tests.tolerances import close

    model, make_inputs = FAMILIES[family]()
    model.eval()
    ids = make_inputs(1, 9, False)["input_ids"]
    compiled = torch.compile(model, backend="effpass", options={"compiler": "eager"})

    def run(forward: object) -> list[torch.Tensor]:
        out = forward(input_ids=ids, use_cache=True)  # type: ignore[operator]
        cache, seen = out.cache_params, [out.logits]
        for token in (3, 5, 7):
            step = torch.tensor([[token]])
            out = forward(input_ids=step, cache_params=cache, use_cache=True)  # type: ignore[operator]
            seen.append(out.logits)
        for layer in range(model.config.num_hidden_layers):
            seen += [cache.get_conv_state(layer, state_idx=0).clone()]
            seen += [cache.get_recurrent_state(layer, state_idx=0).clone()]
        return seen

    with torch.no_grad():
        for mine, theirs in zip(run(compiled), run(model), strict=True):
            close(mine, theirs, "model_fp32")
