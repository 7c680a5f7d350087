"""Small models that two processes train, each above DDP's smallest bucket so that it is cut."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import effpass.ops  # noqa: F401  registers the ops called below

VOCABULARY = 256


class Mixer(nn.Module):
    """A Mamba mixer that is handed its boundaries."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.proj, self.dt, self.BC = nn.Linear(d, 2 * d), nn.Linear(d, d), nn.Linear(d, 8)
        self.conv = nn.Parameter(torch.randn(d, 4) / 2)
        self.A_log = nn.Parameter(torch.rand(d, 4))

    def forward(self, x: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        u, z = self.proj(x).chunk(2, -1)
        u, _ = torch.ops.effpass.causal_conv1d(u, self.conv, None, "silu", None, cu_seqlens)
        B, C = self.BC(u).chunk(2, -1)
        A = -torch.exp(self.A_log)
        scanned = (u, self.dt(u), A, B, C, None, z, None, True, None, cu_seqlens)
        y, _ = torch.ops.effpass.selective_scan(*scanned)
        return x + y


class Stack(nn.Module):
    """Mixers over an embedding; a model in which ops are called by name."""

    def __init__(self, d: int, layers: int) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(VOCABULARY, d)
        self.layers = nn.ModuleList(Mixer(d) for _ in range(layers))

    def forward(self, input_ids: Tensor, cu_seq_lens_q: Tensor | None = None, **_: Any) -> Any:
        x = self.embeddings(input_ids)
        for layer in self.layers:
            x = layer(x, cu_seq_lens_q)
        return (x,)


class Reader(nn.Module):
    """A backbone and a head: logits (b, t, 256) of whatever the backbone takes."""

    def __init__(self, backbone: nn.Module, d: int, layers: str = "layers") -> None:
        super().__init__()
        self.backbone, self.head = backbone, nn.Linear(d, VOCABULARY)
        self.layers = layers

    def blocks(self) -> list[nn.Module]:
        """What FSDP2 shards one by one."""
        return list(self.backbone.get_submodule(self.layers))  # type: ignore[call-overload]

    def forward(self, **kwargs: Any) -> Tensor:
        return self.head(self.backbone(**kwargs)[0])


def stack() -> Reader:
    return Reader(Stack(256, 2), 256)


def mamba1() -> Reader:
    from transformers import MambaConfig, MambaModel

    config = MambaConfig(
        vocab_size=VOCABULARY, hidden_size=256, num_hidden_layers=2, state_size=4, use_cache=False
    )
    return Reader(MambaModel(config), 256)


def mamba2() -> Reader:
    from transformers import Mamba2Config, Mamba2Model

    config = Mamba2Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        num_hidden_layers=2,
        state_size=8,
        num_heads=8,
        head_dim=64,
        n_groups=1,
        chunk_size=4,
        use_cache=False,
    )
    return Reader(Mamba2Model(config), 256)


def bert() -> Reader:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        num_attention_heads=4,
        intermediate_size=512,
        num_hidden_layers=2,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return Reader(BertModel(config, add_pooling_layer=False), 128, "encoder.layer")


def llama() -> Reader:
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=192,
        num_attention_heads=4,
        intermediate_size=512,
        num_hidden_layers=2,
        use_cache=False,
    )
    return Reader(LlamaModel(config), 192)


BUILD = {"stack": stack, "mamba1": mamba1, "mamba2": mamba2, "bert": bert, "llama": llama}
