"""Where there is no kernel, a known function keeps the library's own code."""

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

from effpass.capture import known
from tests.capture.traced import Traced

CONFIG = MambaConfig(
    hidden_size=32, num_hidden_layers=1, vocab_size=64, state_size=4, use_cache=False
)


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
def test_only_tensors_on_a_cpu_reach_the_ops() -> None:
    known.install()
    ids = torch.zeros(1, 8, dtype=torch.long)
    here = Traced(MambaForCausalLM(CONFIG))
    here(ids)
    assert here.ops() == {"causal_conv1d": 1, "selective_scan": 1}
    with torch.device("meta"):  # stands for any other device
        elsewhere = Traced(MambaForCausalLM(CONFIG))
        assert elsewhere(ids.to("meta")).logits.shape == (1, 8, 64)
    assert elsewhere.ops() == {}
