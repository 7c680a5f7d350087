"""Token-reduced exports: what torch's reduced form gives, at every length."""

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from onnx_ir import tape
from torch import Tensor, nn

import effpass
from effpass.export import reduced
from effpass.lowering.ort import plan
from effpass.passes.reduction.schedule import lengths
from tests.models.zoo import FAMILIES
from tests.tiny import Stack
from tests.tolerances import close

KEEP = {"reduce_tokens": {"keep": 0.7, "layers": [0]}}
FEWER: dict[str, dict[str, Any]] = {
    "mamba": KEEP,
    "mamba2": {"reduce_tokens": {"ratio": 0.1, "layers": [0]}},
    "bert": KEEP,
    "vit": KEEP,
    "llama": KEEP,
    "bamba": {"reduce_tokens": {"keep": 0.6, "layers": [0], "alignment": "repeat"}},
}


def in_torch(model: nn.Module, options: dict[str, Any]) -> Any:
    """Torch's own reduced form."""
    return torch.compile(model, backend="effpass", options=options | {"compiler": "eager"})


def agree(model: nn.Module, options: dict[str, Any], path: Path, inputs: dict[str, Any]) -> None:
    loaded = effpass.OnnxModel(path)
    given = {name: value for name, value in inputs.items() if name in loaded.inputs}
    found = loaded(**given)
    torch._dynamo.reset()
    with torch.no_grad():
        made = in_torch(model, options)(**inputs)
    expected = made if isinstance(made, Tensor) else made[loaded.outputs[0]]
    close(found[loaded.outputs[0]], expected, "zoo_fp32")


@pytest.mark.parametrize(
    "family", [f if f == "mamba" else pytest.param(f, marks=pytest.mark.slow) for f in FEWER]
)
def test_families(family: str, tmp_path: Path) -> None:
    model, make_inputs = FAMILIES[family]()
    options, path = FEWER[family], tmp_path / "m.onnx"
    made = effpass.export_onnx(model, (), make_inputs(2, 16, False), path=path, options=options)
    assert made.error is not None and made.error < 1e-5
    assert all(reduced.BESIDE in text for text in made.sizes)
    assert made.report.graphs[0].reductions and any("reduce_tokens" in n for n in made.notes)
    fixed = family == "vit"
    for batch, length in ((1, 16), (3, 16), (2, 2), (2, 29)):
        if not fixed or length == 16:
            agree(model, options, path, make_inputs(batch, length, False))


RIVALS = ("evit", "tome", "pumer", "prefix", "random")


@pytest.mark.parametrize(
    "method", ["utrc", *(pytest.param(rival, marks=pytest.mark.slow) for rival in RIVALS)]
)
def test_methods(method: str, tmp_path: Path) -> None:
    model, path = Stack(layers=3).eval(), tmp_path / "m.onnx"
    options = {"reduce_tokens": {"keep": 0.6, "layers": [0, 1], "method": method}}
    if method == "utrc":
        options["reduce_tokens"] |= {"causal": True, "protect_last": 2}
    effpass.export_onnx(model, (torch.randn(2, 9, 8),), path=path, options=options)
    for shape in ((1, 1, 8), (1, 2, 8), (2, 17, 8)):
        agree(model, options, path, {"x": torch.randn(*shape)})


@pytest.mark.slow
def test_padding_is_read(tmp_path: Path) -> None:
    model, make_inputs = FAMILIES["bert"]()
    path = tmp_path / "m.onnx"
    effpass.export_onnx(model, (), make_inputs(2, 16, True), path=path, options=KEEP)
    agree(model, KEEP, path, make_inputs(3, 21, True))


def test_lengths_are_those_of_torch() -> None:
    """Made in the file by integers alone, or read from a table."""
    for share, anchors, protected in ((0.7, 3, 1), (0.55, 2, 4), (1.0, 1, 0), (1 / 3, 2, 1)):
        rule = plan.by_share(Fraction(str(share)), anchors, protected)
        run = planned(rule, anchors)
        for n in (1, 2, 3, 5, 16, 97, 1000):
            assert run(n) == lengths(n, share, anchors, protected)[1:]
    table = [(0, 0), (1, 1), (2, 1), (2, 1)]
    run = planned(plan.by_table(table), 2)
    assert [run(n) for n in range(1, 4)] == table[1:]
    with pytest.raises(Exception, match="out of"):
        run(4)


def planned(rule: plan.Plan, anchors: int) -> Any:
    """Sizes of tensors that a rule makes, as a function of a length."""
    kind = ir.TensorType(ir.DataType.FLOAT)
    names = [f"kept_{i}" for i in range(anchors)]
    x = ir.Value(name="x", type=kind, shape=ir.Shape(["rows", "n"]))
    sizes = [ir.Value(name=n, type=kind, shape=ir.Shape([n])) for n in names]
    recorder = tape.Tape()
    outputs = [recorder.op("Shape", [size]) for size in sizes]
    for i, value in enumerate(outputs):
        value.name, value.type = f"size_{i}", ir.TensorType(ir.DataType.INT64)
    graph = ir.Graph([x, *sizes], outputs, nodes=recorder.nodes, opset_imports={"": 23})
    model = ir.Model(graph, ir_version=10)
    plan.fill_in(model, names, "x", 1, rule)
    assert [value.name for value in model.graph.inputs] == ["x"]
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())

    def run(n: int) -> tuple[int, ...]:
        made = session.run(None, {"x": np.zeros((2, n), np.float32)})
        return tuple(int(v[0]) for v in made)

    return run


def test_a_ratio_knows_its_longest_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reduced, "LONGEST", 40)
    path, options = tmp_path / "m.onnx", {"reduce_tokens": {"ratio": 0.1, "layers": [0]}}
    model = Stack(layers=3).eval()
    made = effpass.export_onnx(model, (torch.randn(2, 9, 8),), path=path, options=options)
    assert any("inputs of up to 40 tokens" in note for note in made.notes)
    agree(model, options, path, {"x": torch.randn(1, 40, 8)})
    with pytest.raises(ValueError, match="expected x of at most 40 tokens"):
        effpass.OnnxModel(path)(torch.randn(1, 41, 8))


def test_nothing_asked_for_is_the_whole_model(tmp_path: Path) -> None:
    model, path = Stack(layers=2).eval(), tmp_path / "m.onnx"
    made = effpass.export_onnx(
        model, (torch.randn(2, 5, 8),), path=path, options={"reduce_tokens": {"ratio": 0.0}}
    )
    assert not made.report.graphs[0].reductions
    x = torch.randn(2, 7, 8)
    (found,) = effpass.OnnxModel(path)(x).values()
    close(found, model(x).detach(), "model_fp32")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"keep": 0.7, "layers": [7]}, "expected layers below 2"),
        ({"ratio": 0.9}, "expected a ratio of at most"),
    ],
)
def test_what_cannot_be_reduced(options: dict[str, Any], text: str, tmp_path: Path) -> None:
    with pytest.raises(effpass.ExportError, match=text):
        effpass.export_onnx(
            Stack(layers=2).eval(),
            (torch.randn(2, 9, 8),),
            path=tmp_path / "m.onnx",
            options={"reduce_tokens": options},
        )
    assert not list(tmp_path.iterdir())


def test_reasons_of_a_decline_are_told(tmp_path: Path) -> None:
    model = nn.Linear(8, 8).eval()
    with pytest.raises(effpass.ExportError, match="reduce_tokens:"):
        effpass.export_onnx(model, (torch.randn(2, 9, 8),), path=tmp_path / "m.onnx", options=KEEP)
    with pytest.raises(effpass.ExportError, match="found both"):
        effpass.export_onnx(
            Stack(layers=2).eval(),
            (torch.randn(2, 9, 8),),
            path=tmp_path / "m.onnx",
            options=KEEP,
            stateful=True,
        )


def test_a_wrong_translation_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from effpass.lowering.ort import table

    right = table.token_matching.token_matching

    def wrong(a: Any, b: Any, open: Any, a_at: Any, b_at: Any, later: bool) -> Any:
        return right(b, b, open, b_at, b_at, later)

    monkeypatch.setattr(table.token_matching, "token_matching", wrong)
    with pytest.raises(effpass.ExportError, match=r"beside torch's reduced form|fails|Error"):
        effpass.export_onnx(
            Stack(layers=2).eval(),
            (torch.randn(2, 8, 8),),
            path=tmp_path / "m.onnx",
            options={"reduce_tokens": {"keep": 0.7, "layers": [0]}},
        )
    assert not list(tmp_path.iterdir())
