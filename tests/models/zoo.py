"""Tiny models of every supported family: random weights large enough that each part shows.

Each entry of FAMILIES makes a model in evaluation mode and a function ``make_inputs(batch, length,
padded)`` of its keyword arguments. Padded rows are shorter than the first, on the right.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Inputs = dict[str, Any]
MakeInputs = Callable[[int, int, bool], Inputs]
VOCAB = 64
TEXT = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
ENCODER = {"num_attention_heads": 4, "intermediate_size": 48, "max_position_embeddings": 64}
MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 2, "mamba_d_state": 4}


@dataclass(frozen=True)
class Family:
    """How to build one family: class names in ``transformers``, and fields of its configuration."""

    config: str
    model: str
    fields: dict[str, Any]
    cached: bool = False

    def __call__(self) -> tuple[nn.Module, MakeInputs]:
        """A model with seeded weights, and a maker of its inputs."""
        import transformers

        fields = {k: v for k, v in self.fields.items() if v is not None}
        config = getattr(transformers, self.config)(**fields)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = getattr(transformers, self.model)(config).eval()
        enliven(model)
        return model, self.make_inputs

    def make_inputs(self, batch: int, length: int, padded: bool) -> Inputs:
        """Token ids (b, t), and a mask (b, t) of which rows after the first lack their end."""
        generator = torch.Generator().manual_seed(1000 * batch + length)
        if self.model.startswith("ViT"):
            side = 8 * max(1, round(length**0.5))
            pixels = torch.randn(batch, 3, side, side, generator=generator)
            return {"pixel_values": pixels, "interpolate_pos_encoding": True}
        inputs: Inputs = {
            "input_ids": torch.randint(3, VOCAB, (batch, length), generator=generator)
        }
        if padded:
            inputs["attention_mask"] = _right_padded(batch, length)
        return inputs | ({"use_cache": False} if self.cached else {})


def _right_padded(batch: int, length: int) -> Tensor:
    lengths = torch.tensor([length - (length // 3) * (row % 2) for row in range(batch)])
    return (torch.arange(length) < lengths[:, None]).long()


def enliven(model: nn.Module) -> None:
    """Random weights of a size at which every layer, and every step of a scan, moves the output."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(_weight(name.rpartition(".")[2], name, p, noise))


def _weight(name: str, path: str, p: Tensor, noise: Tensor) -> Tensor:
    if name in ("A_log", "recurrent_param", "time_decay"):
        return p + 0.1 * noise  # decays keep their model's range
    if name in ("dt_bias", "dt_proj_bias") or path.endswith("dt_proj.bias"):
        return 0.5 * noise - 1.0
    if p.dim() < 2:
        return (1.0 if name in ("weight", "D") else 0.0) + 0.2 * noise
    fan_in = p[0].numel()
    return noise if "embed" in path and p.dim() == 2 else 1.2 * noise / fan_in**0.5


def _causal(name: str, **fields: Any) -> Family:
    model = f"{name}LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM"
    return Family(f"{name}Config", model, TEXT | SPECIAL | fields, cached=True)


def _encoder(name: str, model: str, **fields: Any) -> Family:
    return Family(f"{name}Config", f"{name}{model}", TEXT | SPECIAL | ENCODER | fields)


FAMILIES: dict[str, Callable[[], tuple[nn.Module, MakeInputs]]] = {
    "mamba": _causal("Mamba", state_size=4),
    "falcon_mamba": _causal("FalconMamba", state_size=4),
    "mamba2": _causal("Mamba2", state_size=4, num_heads=8, head_dim=8, n_groups=2, chunk_size=8),
    "bamba": _causal("Bamba", **ATTENTION, **MAMBA2, mamba_chunk_size=8, attn_layer_indices=[1]),
    "jamba": _causal(
        "Jamba",
        **ATTENTION,
        mamba_d_state=4,
        num_experts=4,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=2,
        expert_layer_offset=0,
    ),
    "zamba2": _causal(
        "Zamba2",
        **ATTENTION | {"num_key_value_heads": 4},
        layers_block_type=["mamba", "hybrid"],
        mamba_d_state=4,
        n_mamba_heads=8,
        mamba_ngroups=2,
        chunk_size=8,
        adapter_rank=4,
        max_position_embeddings=64,
    ),
    "granitemoehybrid": _causal(
        "GraniteMoeHybrid",
        **ATTENTION,
        **MAMBA2,
        mamba_chunk_size=8,
        layer_types=["mamba", "attention"],
        num_local_experts=4,
        shared_intermediate_size=24,
    ),
    "nemotron_h": _causal(
        "NemotronH",
        num_hidden_layers=None,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=48,
        layers_block_type=["mamba", "attention", "moe"],
        mamba_num_heads=8,
        mamba_head_dim=8,
        n_groups=2,
        ssm_state_size=4,
        chunk_size=8,
        n_routed_experts=4,
        moe_intermediate_size=24,
        moe_shared_expert_intermediate_size=24,
    ),
    "falcon_h1": _causal(
        "FalconH1", **ATTENTION, **MAMBA2, head_dim=8, mamba_d_ssm=64, mamba_chunk_size=8
    ),
    "recurrent_gemma": _causal(
        "RecurrentGemma",
        **ATTENTION | {"num_key_value_heads": 1},
        lru_width=32,
        block_types=["recurrent", "attention"],
        attention_window_size=16,
    ),
    "lfm2": _causal(
        "Lfm2", **ATTENTION, layer_types=["conv", "full_attention"], block_multiple_of=8
    ),
    "qwen3_next": _causal(
        "Qwen3Next",
        **ATTENTION,
        head_dim=8,
        layer_types=["linear_attention", "full_attention"],
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=24,
        shared_expert_intermediate_size=24,
    ),
    "rwkv": _causal("Rwkv", context_length=64, attention_hidden_size=32, intermediate_size=48),
    "llama": _causal("Llama", **ATTENTION),
    "qwen2": _causal("Qwen2", **ATTENTION),
    "gpt2": _causal("GPT2", n_embd=32, n_head=4, n_layer=2, n_positions=64),
    "gpt_neox": _causal("GPTNeoX", num_attention_heads=4, intermediate_size=48),
    "mistral": _causal("Mistral", **ATTENTION, sliding_window=8),
    "gemma2": _causal("Gemma2", **ATTENTION, head_dim=8, sliding_window=8),
    "bert": _encoder("Bert", "Model"),
    "roberta": _encoder("Roberta", "Model", max_position_embeddings=80),
    "distilbert": Family(
        "DistilBertConfig",
        "DistilBertModel",
        {"vocab_size": VOCAB, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48} | SPECIAL,
    ),
    "modernbert": _encoder(
        "ModernBert", "Model", local_attention=8, cls_token_id=1, sep_token_id=2
    ),
    "electra": _encoder("Electra", "Model", embedding_size=16),
    "vit": _encoder("ViT", "Model", image_size=16, patch_size=4),
}
