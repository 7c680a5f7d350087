"""Stateful export: what is lifted, what is refused, and how text is generated."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as sdpa

import effpass
from tests.tiny import Mixer
from tests.tolerances import close


class Attention(nn.Module):
    """One attention over tokens whose mask is made by ``mask`` of their number."""

    def __init__(self, mask: Any, causal: bool = False) -> None:
        super().__init__()
        self.proj, self.mask, self.causal = nn.Linear(8, 24), mask, causal

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (each.unflatten(-1, (2, 4)).transpose(1, 2) for each in self.proj(x).chunk(3, -1))
        mask = None if self.mask is None else self.mask(x.shape[1])
        return sdpa(q, k, v, attn_mask=mask, is_causal=self.causal).transpose(1, 2).flatten(2)


def ahead(tokens: int) -> Tensor:
    return torch.arange(tokens) - torch.arange(tokens)[:, None]


MASKS = {
    "causal": lambda t: ahead(t) <= 0,
    "window": lambda t: (ahead(t) <= 0) & (ahead(t) > -3),
    "added": lambda t: torch.where(ahead(t) <= 0, 0.0, float("-inf")),
}
FUTURE = {
    "one token of the future": lambda t: ahead(t) <= 1,
    "everything": lambda t: ahead(t) < t,
    "every other token": lambda t: (ahead(t) <= 0) & (ahead(t) % 2 == 0),
}


class Running(nn.Module):
    """Carries a sum between tokens that no op holds."""

    def __init__(self) -> None:
        super().__init__()
        self.mixer = Mixer()

    def forward(self, x: Tensor) -> Tensor:
        return self.mixer(x) + x.cumsum(1)


def export(model: nn.Module, path: Path) -> effpass.OnnxExport:
    return effpass.export_onnx(model.eval(), (torch.randn(2, 6, 8),), path=path, stateful=True)


@pytest.mark.parametrize("name", [*MASKS, "flag"])
def test_attention_in_pieces(name: str, tmp_path: Path) -> None:
    model = Attention(MASKS.get(name), causal=name == "flag").eval()
    made = export(model, tmp_path / "m.onnx")
    assert made.inputs == ("x", "past_key_0", "past_value_0")
    loaded = effpass.OnnxModel(tmp_path / "m.onnx")
    x, states, parts = torch.randn(2, 11, 8), {}, []
    for piece in x.split([4, 1, 5, 1], 1):
        found = loaded(x=piece, **states)
        states = loaded.after(found)
        parts.append(found[loaded.outputs[0]])
    close(torch.cat(parts, 1), model(x).detach(), "model_fp32")


@pytest.mark.parametrize("name", FUTURE)
def test_attention_to_later_tokens_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(effpass.ExportError, match="found another mask"):
        export(Attention(FUTURE[name]), tmp_path / "m.onnx")


def test_attention_without_a_mask_is_refused(tmp_path: Path) -> None:
    with pytest.raises(effpass.ExportError, match="expected causal attention"):
        export(Attention(None), tmp_path / "m.onnx")


def test_what_was_not_lifted_is_found(tmp_path: Path) -> None:
    with pytest.raises(effpass.ExportError, match="some layer carries what was not lifted"):
        export(Running(), tmp_path / "m.onnx")
    assert not list(tmp_path.iterdir())


def test_other_names_of_dims_are_refused(tmp_path: Path) -> None:
    dims = {"x": {0: "rows", 1: "tokens"}}
    with pytest.raises(effpass.ExportError, match="expected open dims named batch and length"):
        effpass.export_onnx(
            Mixer().eval(),
            (torch.randn(2, 6, 8),),
            path=tmp_path / "m",
            dynamic=dims,
            stateful=True,
        )


def test_sampling_and_stopping(tmp_path: Path) -> None:
    from tests.models.zoo import FAMILIES

    model, make_inputs = FAMILIES["mamba"]()
    path, inputs = tmp_path / "m.onnx", make_inputs(2, 6, False)
    effpass.export_onnx(model, (), inputs, path=path, stateful=True)
    loaded, ids = effpass.OnnxModel(path), inputs["input_ids"]
    draws = [
        loaded.generate(ids, 8, do_sample=True, generator=torch.Generator().manual_seed(s))
        for s in (0, 0, 1)
    ]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    greedy = loaded.generate(ids, 8)
    sharp = loaded.generate(ids, 8, do_sample=True, top_k=1)
    assert torch.equal(greedy, sharp)
    stop = int(greedy[0, 8])
    stopped = loaded.generate(ids, 8, eos_token_id=stop, pad_token_id=63)
    at = int((greedy[0, 6:] == stop).nonzero()[0]) + 6
    assert torch.equal(stopped[0, : at + 1], greedy[0, : at + 1])
    assert bool((stopped[0, at + 1 :] == 63).all())
    assert [token.shape for token in loaded.stream(ids, 3)] == [(2,)] * 3
    for wrong in ({"max_new_tokens": 0}, {"temperature": 0.0}, {"top_k": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            loaded.generate(ids, **{"max_new_tokens": 2, **wrong})
