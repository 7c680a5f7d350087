"""Unmodified models of every family: exported, run at several sizes, equal to eager."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import effpass
from tests.models.zoo import FAMILIES
from tests.tolerances import close

QUICK = ("mamba2", "bert")
ALL = (
    *("mamba", "falcon_mamba", "mamba2", "bamba", "jamba", "zamba2", "recurrent_gemma"),
    *("llama", "gpt2", "bert", "modernbert", "distilbert", "vit"),
)
STATEFUL = ("mamba", "falcon_mamba", "mamba2", "bamba", "jamba", "zamba2", "recurrent_gemma")
SIDES = {"pixel_values": {0: "batch", 2: "height", 3: "width"}}


def slow_but(quick: tuple[str, ...], families: tuple[str, ...]) -> list[Any]:
    return [f if f in quick else pytest.param(f, marks=pytest.mark.slow) for f in families]


def tensors(inputs: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value for name, value in inputs.items() if isinstance(value, Tensor)}


@pytest.mark.parametrize("family", slow_but(QUICK, ALL))
def test_equals_eager(family: str, tmp_path: Path) -> None:
    model, make_inputs = FAMILIES[family]()
    path, inputs = tmp_path / "model.onnx", make_inputs(2, 12, False)
    dynamic = SIDES if family == "vit" else None
    made = effpass.export_onnx(model, (), inputs, path=path, dynamic=dynamic)
    assert made.error is not None and made.error < 1e-5 and len(made.sizes) >= 3
    loaded = effpass.OnnxModel(path)
    for batch in (1, 3):
        for length in (1, 7, 29):
            inputs = make_inputs(batch, length, False)
            with torch.no_grad():
                expected = model(**inputs)
            found = loaded(**tensors(inputs))
            for name in loaded.outputs:
                close(found[name], expected[name], "zoo_fp32")


@pytest.mark.parametrize("family", slow_but(("mamba", "llama"), (*STATEFUL, "llama", "gpt2")))
def test_decoding_equals_generate(family: str, tmp_path: Path) -> None:
    made = FAMILIES[family]
    if family == "gpt2":  # whose table of positions ends at 64
        made = replace(made, fields=made.fields | {"n_positions": 128})  # type: ignore[type-var]
    model, make_inputs = made()
    path, inputs, new = tmp_path / "model.onnx", make_inputs(2, 6, False), 64
    effpass.export_onnx(model, (), inputs, path=path, stateful=True)
    loaded = effpass.OnnxModel(path)
    ids = inputs["input_ids"]
    with torch.no_grad():
        expected = model.generate(
            ids, max_new_tokens=new, do_sample=False, eos_token_id=None, pad_token_id=0
        )
    assert torch.equal(loaded.generate(ids, new), expected)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["mamba2", "bert", "bamba"])
def test_padding_mask_is_an_input(family: str, tmp_path: Path) -> None:
    model, make_inputs = FAMILIES[family]()
    path = tmp_path / "model.onnx"
    effpass.export_onnx(model, (), make_inputs(2, 12, True), path=path)
    loaded = effpass.OnnxModel(path)
    for batch, length in ((2, 9), (3, 17)):
        inputs = make_inputs(batch, length, True)
        with torch.no_grad():
            expected = model(**inputs)
        found = loaded(**tensors(inputs))
        real = inputs["attention_mask"].bool()
        name = loaded.outputs[0]
        close(found[name][real], expected[name][real], "zoo_fp32")


def test_nodes_do_not_grow_with_the_length(tmp_path: Path) -> None:
    model, make_inputs = FAMILIES["mamba"]()
    counts = [
        effpass.export_onnx(
            model, (), make_inputs(2, length, False), path=tmp_path / "m.onnx", verify=False
        ).operators
        for length in (5, 40)
    ]
    assert counts[0] == counts[1] and counts[0]["Scan"] == 2


def test_portable_is_ai_onnx_alone(tmp_path: Path) -> None:
    model, make_inputs = FAMILIES["mamba2"]()
    path = tmp_path / "m.onnx"
    made = effpass.export_onnx(model, (), make_inputs(2, 9, False), path=path, portable=True)
    assert made.operators["Scan"] == 2
    assert not [name for name in made.operators if "." in name]
