"""Pieces of a model as the operator that the table of forms names: there, and exact."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import gelu
from torch.nn.functional import scaled_dot_product_attention as sdpa

import effpass
from effpass.lowering.ort import forms
from effpass.lowering.ort.operators import CONTRIB
from tests.tolerances import close

ATTENTION = list(forms.FORMS["attention"])


class Attends(nn.Module):
    """Attention with a projection for queries, keys and values each, over what ``keep`` lets."""

    def __init__(self, causal: bool = False, masked: bool = False, shared: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 16, False), nn.Linear(16, 16)
        self.causal, self.masked, self.shared = causal, masked, shared

    def heads(self, x: Tensor) -> list[Tensor]:
        parts = (self.q(x), self.k(x), self.v(x))
        return [part.unflatten(-1, (4, 4)).transpose(1, 2) for part in parts]

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        q, k, v = (
            each(x).unflatten(-1, (4, 4)).transpose(1, 2) for each in (self.q, self.k, self.v)
        )
        if self.shared:
            k, v = (each[:, :2].repeat_interleave(2, 1) for each in (k, v))
        mask = (keep > 0)[:, None, None].expand(-1, -1, x.shape[1], -1) if self.masked else None
        y = sdpa(q, k, v, attn_mask=mask, is_causal=self.causal, scale=0.3)
        return y.transpose(1, 2).flatten(2)


def export(model: nn.Module, path: Path, *given: Tensor, **more: Any) -> Counter[str]:
    return Counter(effpass.export_onnx(model.eval(), given, path=path, **more).operators)


def agree(model: nn.Module, path: Path, *given: Tensor) -> None:
    loaded = effpass.OnnxModel(path)
    inputs = dict(zip(("x", "keep"), given, strict=False))
    made = loaded(**{name: value for name, value in inputs.items() if name in loaded.inputs})
    with torch.no_grad():
        close(next(iter(made.values())), model(*given), "model_fp32")


def rows(batch: int, length: int) -> tuple[Tensor, Tensor]:
    return torch.randn(batch, length, 16), torch.ones(batch, length, dtype=torch.long)


@pytest.mark.parametrize("form", ATTENTION)
@pytest.mark.parametrize("kind", ["plain", "causal", "masked"])
def test_attention(form: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(forms.CHOSEN, "attention", (form,))
    model, path = Attends(causal=kind == "causal", masked=kind == "masked"), tmp_path / "m.onnx"
    operators = export(model, path, *rows(2, 6))
    assert operators[form.removeprefix("ai.onnx.")] == 1
    assert not operators["Transpose"]
    if form.endswith("microsoft.Attention"):
        assert not operators["MatMul"]  # all three in one weight
    for batch, length in ((1, 1), (3, 2), (2, 13)):
        x, keep = rows(batch, length)
        keep[-1, length // 2 :] = 0
        agree(model, path, x, keep)
    x, keep = rows(2, 5)
    keep[1] = 0  # a row that sees nothing
    agree(model, path, x, keep)


def test_shared_heads_are_left_alone(tmp_path: Path) -> None:
    operators = export(Attends(shared=True), tmp_path / "m.onnx", *rows(2, 6))
    assert operators["Attention"] == 1 and operators["Transpose"]


class Added(Attends):
    """A mask that is added: minus infinity for all keys means NaN to torch, to a kernel not."""

    def forward(self, x: Tensor, keep: Tensor) -> Tensor:
        q, k, v = (
            each(x).unflatten(-1, (4, 4)).transpose(1, 2) for each in (self.q, self.k, self.v)
        )
        mask = torch.where(keep > 0, 0.0, -1e4)[:, None, None].expand(-1, -1, x.shape[1], -1)
        return sdpa(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def test_added_masks_are_left_alone(tmp_path: Path) -> None:
    model = Added()
    operators = export(model, tmp_path / "m.onnx", *rows(2, 6))
    assert operators["Attention"] == 1
    agree(model, tmp_path / "m.onnx", *rows(1, 9))


class Block(nn.Module):
    """Sums, norms and activations as blocks write them."""

    def __init__(self, norm: nn.Module, tanh: bool) -> None:
        super().__init__()
        self.up, self.down, self.norm = nn.Linear(16, 24), nn.Linear(24, 16), norm
        self.approximate = "tanh" if tanh else "none"

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        total = x + self.down(gelu(self.up(x), approximate=self.approximate))
        return self.norm(total), total * 2


@pytest.mark.parametrize(
    ("norm", "tanh", "wanted"),
    [
        (nn.LayerNorm(16), False, ("SkipLayerNormalization", "BiasGelu")),
        (nn.RMSNorm(16, eps=1e-3), True, ("SkipSimplifiedLayerNormalization", "FastGelu")),
    ],
    ids=["layer norm", "rms norm"],
)
def test_sums_norms_and_activations(
    norm: nn.Module, tanh: bool, wanted: tuple[str, str], tmp_path: Path
) -> None:
    nn.init.normal_(norm.weight)  # type: ignore[arg-type]
    model, path = Block(norm, tanh).eval(), tmp_path / "m.onnx"
    operators = export(model, path, torch.randn(2, 6, 16))
    assert [operators[f"{CONTRIB}.{name}"] for name in wanted] == [1, 1]
    for shape in ((1, 1, 16), (3, 7, 16)):
        x = torch.randn(*shape)
        for found, expected in zip(effpass.OnnxModel(path)(x).values(), model(x), strict=True):
            close(found, expected.detach(), "model_fp32")
    portable = export(model, path, torch.randn(2, 6, 16), portable=True)
    assert not [name for name in portable if "." in name]


class Beside(nn.Module):
    """A sum that is broadcast: the kernel would read past the smaller one."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.row = nn.LayerNorm(16), nn.Parameter(torch.randn(16))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.row)


def test_a_sum_of_other_shapes_is_left_alone(tmp_path: Path) -> None:
    operators = export(Beside(), tmp_path / "m.onnx", torch.randn(2, 6, 16))
    assert operators["LayerNormalization"] == 1 and operators["Add"] == 1


class Turned(nn.Module):
    """Rotary embedding, the angles made once for all rows or for each."""

    def __init__(self, each: bool) -> None:
        super().__init__()
        self.each, self.frequencies = each, nn.Buffer(torch.rand(2))

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1], dtype=x.dtype)[None]
        places = places.expand(x.shape[0], -1) if self.each else places
        angles = places[..., None] * self.frequencies
        both = torch.cat([angles, angles], -1)
        cos, sin = both.cos()[:, None], both.sin()[:, None]
        heads = x.unflatten(-1, (4, 4)).transpose(1, 2)
        half = torch.cat([-heads[..., 2:], heads[..., :2]], -1)
        return heads * cos + half * sin


@pytest.mark.parametrize("each", [False, True], ids=["shared", "each row"])
def test_rotary(each: bool, tmp_path: Path) -> None:
    model, path = Turned(each), tmp_path / "m.onnx"
    operators = export(model, path, torch.randn(3, 6, 16))
    assert operators["RotaryEmbedding"] == 1
    for shape in ((1, 1, 16), (3, 7, 16), (1, 30, 16)):
        agree(model, path, torch.randn(*shape))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_keep_their_form(dtype: torch.dtype, tmp_path: Path) -> None:
    model = Attends().to(dtype)
    x, keep = rows(2, 6)
    operators = export(model, tmp_path / "m.onnx", x.to(dtype), keep, verify=False)
    assert not [name for name in operators if name.startswith(CONTRIB)]


def test_a_form_that_the_runtime_lacks_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forms, "missing", lambda name: f"no kernel of {name}")
    made = effpass.export_onnx(Attends().eval(), rows(2, 6), path=tmp_path / "m.onnx")
    assert not [name for name in made.operators if "." in name]
    assert any("no kernel of BiasGelu; gelu is written" in n for n in made.notes)


def test_the_table_names_forms_that_exist() -> None:
    assert forms.CHOSEN.keys() == forms.FORMS.keys()
    for piece, names in forms.CHOSEN.items():
        assert set(names) <= forms.FORMS[piece].keys() | {forms.PLAIN}
