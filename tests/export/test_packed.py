"""Packed exports: sequences end to end in one row give what each gives by itself."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import effpass
from effpass.export import packed
from tests.models.rows import sequences
from tests.models.zoo import FAMILIES
from tests.tiny import Stack
from tests.tolerances import close

QUICK = ("mamba2", "bert")
ALL = (
    *("mamba", "mamba2", "bamba", "llama", "bert", "falcon_mamba", "zamba2", "gpt2"),
    *("mistral", "gemma2", "distilbert", "modernbert", "roberta", "recurrent_gemma"),
)
LENGTHS = ([1], [1, 2, 3], [8, 16, 8], [5, 3, 17, 1], [9, 7])  # chunks of the zoo hold 8 tokens


def slow_but(quick: tuple[str, ...], families: tuple[str, ...]) -> list[Any]:
    return [f if f in quick else pytest.param(f, marks=pytest.mark.slow) for f in families]


def alone(model: nn.Module, ids: Tensor, cached: bool) -> Any:
    with torch.no_grad():
        return model(input_ids=ids[None], **({"use_cache": False} if cached else {}))


def made(family: str, path: Path) -> tuple[nn.Module, effpass.OnnxExport, bool]:
    model, make_inputs = FAMILIES[family]()
    given = make_inputs(2, 12, False)
    if family == "roberta":  # counts positions from its padding token, which is 0
        given["position_ids"] = 1 + torch.arange(12).expand(2, 12)
    found = effpass.export_onnx(model, (), given, path=path, packed=True)
    return model, found, "use_cache" in given


@pytest.mark.parametrize("family", slow_but(QUICK, ALL))
def test_packed_is_every_sequence_alone(family: str, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    model, found, cached = made(family, path)
    assert found.inputs == ("input_ids", "cu_seqlens") and len(found.sizes) == len(packed.ROWS)
    assert found.error is not None and found.error < 1e-5
    loaded = effpass.OnnxModel(path)
    assert loaded.packed and not loaded.stateful
    for lengths in LENGTHS:
        ids = sequences(lengths)
        for max_tokens in (None, 17):
            for one, each in zip(ids, loaded.each(ids, max_tokens), strict=True):
                expected = alone(model, one, cached)
                for name in loaded.outputs:
                    close(each[name], expected[name][0], "zoo_fp32")


def test_first_tokens_are_of_every_sequence(tmp_path: Path) -> None:
    """BERT pools its first token: in a row, that of each sequence."""
    model, found, _ = made("bert", tmp_path / "m.onnx")
    assert found.outputs == ("last_hidden_state", "pooler_output")
    ids = sequences([4, 1, 7])
    row = {"input_ids": torch.cat(ids)[None], "cu_seqlens": torch.tensor([0, 4, 5, 12]).int()}
    pooled = effpass.OnnxModel(tmp_path / "m.onnx")(**row)["pooler_output"]
    expected = torch.cat([alone(model, one, False).pooler_output for one in ids])
    close(pooled, expected, "zoo_fp32")


class Attention(nn.Module):
    """Attention among the tokens of a sequence, a convolution and a scan before it."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        self.mixer, self.proj, self.causal = Stack(layers=1), nn.Linear(8, 24), causal

    def forward(self, x: Tensor) -> Tensor:
        x = self.mixer(x)
        q, k, v = (each.unflatten(-1, (2, 4)).transpose(1, 2) for each in self.proj(x).chunk(3, -1))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return x + y.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("causal", [True, False])
def test_bad_numbers_stay_in_their_sequence(causal: bool, tmp_path: Path) -> None:
    model, path = Attention(causal).eval(), tmp_path / "m.onnx"
    effpass.export_onnx(model, (torch.randn(2, 5, 8),), path=path, packed=True)
    loaded = effpass.OnnxModel(path)
    x, offsets = torch.randn(1, 13, 8), torch.tensor([0, 3, 4, 11, 13]).int()
    (clean,) = loaded(x, cu_seqlens=offsets).values()
    parts = zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
    close(clean, torch.cat([model(x[:, a:b]) for a, b in parts], 1).detach(), "model_fp32")
    for bad in (torch.nan, torch.inf):
        spoilt = x.clone()
        spoilt[0, 5] = bad
        (found,) = loaded(spoilt, cu_seqlens=offsets).values()
        assert found[0, 5:11].isnan().any()
        others = torch.cat([torch.arange(0, 4), torch.arange(11, 13)])
        assert torch.equal(found[:, others], clean[:, others])


def test_offsets_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    effpass.export_onnx(Stack(layers=1).eval(), (torch.randn(1, 4, 8),), path=path, packed=True)
    loaded = effpass.OnnxModel(path)
    for offsets in ([0, 3], [1, 5], [0, 3, 3, 5], [0, 4, 2, 5]):
        with pytest.raises(ValueError, match="expected cu_seqlens to increase from 0 to 5"):
            loaded(torch.randn(1, 5, 8), cu_seqlens=torch.tensor(offsets).int())
    with pytest.raises(TypeError, match=r"expected input cu_seqlens to be torch\.int32"):
        loaded(torch.randn(1, 5, 8), cu_seqlens=torch.tensor([0, 5]))
    with pytest.raises(ValueError, match="expected a model of input_ids"):
        loaded.each([[1, 2]])
    found = loaded(x=np.zeros((1, 2, 8), np.float32), cu_seqlens=np.array([0, 1, 2], np.int32))
    assert {type(value) for value in found.values()} == {np.ndarray}


class Counted(nn.Module):
    """A table of positions, which it counts itself unless it is given them."""

    def __init__(self, start: int) -> None:
        super().__init__()
        self.ids, self.table = nn.Embedding(16, 8), nn.Embedding(32, 8)
        self.mixer, self.start = Stack(layers=1), start

    def forward(self, input_ids: Tensor, position_ids: Tensor | None = None) -> Tensor:
        if position_ids is None:
            position_ids = self.start + torch.arange(input_ids.shape[1])[None]
        return self.mixer(self.ids(input_ids) + self.table(position_ids))


class Uncounted(Counted):
    """The same, which cannot be given positions."""

    def forward(self, input_ids: Tensor) -> Tensor:  # type: ignore[override]
        return super().forward(input_ids)


class Mean(nn.Module):
    """One number a row."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((1, 2))


IDS = torch.arange(12).reshape(2, 6)


def test_positions_that_do_not_begin_at_0(tmp_path: Path) -> None:
    model, path = Counted(3).eval(), tmp_path / "m.onnx"
    with pytest.raises(effpass.ExportError, match="give position_ids with the example"):
        effpass.export_onnx(model, (IDS,), path=path, packed=True)
    assert not list(tmp_path.iterdir())
    positions = 3 + torch.arange(6).expand(2, 6)
    effpass.export_onnx(model, (IDS, positions), path=path, packed=True)
    ids = [IDS[0, :4], IDS[1, 1:2]]
    for one, each in zip(ids, effpass.OnnxModel(path).each(ids), strict=True):
        (found,) = each.values()
        close(found, model(one[None])[0].detach(), "model_fp32")


@pytest.mark.parametrize(
    ("model", "given", "text", "more"),
    [
        (Uncounted(0), {"input_ids": IDS}, "positions|along the tokens", {}),
        (Mean(), {"x": torch.randn(2, 5, 8)}, "folded|found none", {}),
        (Stack(1), {"x": torch.randn(8)}, "expected inputs of shape", {}),
        (Stack(1), {"x": torch.randn(2, 5, 8)}, "found stateful=True", {"stateful": True}),
        (Stack(1), {"x": torch.randn(2, 5, 8)}, "found dynamic", {"dynamic": {"x": {1: "t"}}}),
    ],
)
def test_what_cannot_be_packed(
    model: nn.Module, given: dict[str, Tensor], text: str, more: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(effpass.ExportError, match=text):
        effpass.export_onnx(model.eval(), (), given, path=tmp_path / "m.onnx", packed=True, **more)
    assert not list(tmp_path.iterdir())


def test_padding_is_refused(tmp_path: Path) -> None:
    model, make_inputs = FAMILIES["bert"]()
    with pytest.raises(effpass.ExportError, match="without padding, found attention_mask"):
        effpass.export_onnx(
            model, (), make_inputs(2, 6, True), path=tmp_path / "m.onnx", packed=True
        )


class Keeps(nn.Module):
    """Answers the last state of its scan."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        a = x.sigmoid()
        return torch.ops.effpass.linear_recurrence(a, x)


def test_a_state_that_is_kept_is_refused(tmp_path: Path) -> None:
    with pytest.raises(effpass.ExportError, match="linear_recurrence reads or keeps a state"):
        effpass.export_onnx(
            Keeps().eval(), (torch.randn(2, 5, 8),), path=tmp_path / "m.onnx", packed=True
        )
