"""``export_onnx`` and ``OnnxModel``: what they take, write and refuse."""

import errno
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import effpass
from effpass.export import check, files
from effpass.lowering.ort import operators, table
from effpass.lowering.ort.session import SessionError
from tests.tiny import Stack
from tests.tolerances import close

DIMS = {"x": {0: "batch", 1: "length"}}


class Head(nn.Module):
    """A projection with a large weight."""

    def __init__(self) -> None:
        super().__init__()
        self.proj = nn.Linear(8, 512)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class Sorted(nn.Module):
    """An operator that ONNX does not have."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.special.modified_bessel_i0(x)


def stack() -> Stack:
    return Stack(layers=1).eval()


def export(model: nn.Module, path: Path, **options: Any) -> effpass.OnnxExport:
    return effpass.export_onnx(model, (torch.randn(1, 5, 8),), path=path, **options)


def test_what_is_written(tmp_path: Path) -> None:
    model, path = stack(), tmp_path / "model.onnx"
    made = export(model, path, options={"strict": True})
    assert made.path == path and list(tmp_path.iterdir()) == [path]
    assert made.inputs == ("x",) and made.error is not None and made.error < 1e-5
    assert made.operators["Scan"] == 1 and made.report.count("selective_scan") == 1
    loaded = effpass.OnnxModel(path)
    assert loaded.metadata["effpass.version"] == effpass.__version__
    assert json.loads(loaded.metadata["effpass.options"]) == {"strict": True, "portable": False}
    assert "Stack" in loaded.metadata["effpass.model"]
    graph = onnx.load(path).graph
    dims = [d.dim_param or d.dim_value for d in graph.input[0].type.tensor_type.shape.dim]
    assert dims == ["batch", "length", 8]


def test_runs_torch_and_numpy(tmp_path: Path) -> None:
    model, path = stack(), tmp_path / "model.onnx"
    export(model, path)
    loaded = effpass.OnnxModel(path)
    (name,) = loaded.outputs
    for shape in ((1, 1, 8), (2, 7, 8), (3, 31, 8)):
        x = torch.randn(*shape)
        with torch.no_grad():
            expected = model(x)
        close(loaded(x)[name], expected, "model_fp32")
        found = loaded(x=x.numpy())[name]
        assert isinstance(found, np.ndarray)
        close(torch.from_numpy(found), expected, "model_fp32")
        apart = torch.stack([x, x], -1)[..., 0]
        assert not apart.is_contiguous()
        close(loaded(apart)[name], expected, "model_fp32")


@pytest.mark.parametrize(
    ("given", "error", "text"),
    [
        (torch.zeros(1, 3, 9), ValueError, "expected input x of shape"),
        (torch.zeros(1, 3), ValueError, "expected input x of shape"),
        (torch.zeros(1, 0, 8), ValueError, "no answer for no tokens"),
        (torch.zeros(1, 3, 8).double(), TypeError, "expected input x to be torch.float32"),
        ([1.0], TypeError, "a torch tensor or a NumPy array, found list"),
    ],
)
def test_wrong_inputs(given: Any, error: type[Exception], text: str, tmp_path: Path) -> None:
    export(stack(), tmp_path / "m.onnx")
    loaded = effpass.OnnxModel(tmp_path / "m.onnx")
    with pytest.raises(error, match=text):
        loaded(given)
    with pytest.raises(TypeError, match="found no x"):
        loaded()
    with pytest.raises(TypeError, match="unknown input y"):
        loaded(y=given)
    with pytest.raises(ValueError, match="exported with stateful=True"):
        loaded.generate(torch.zeros(1, 3, 8))


def test_refused_models(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    for model, text, more in (
        (Stack(), "call model.eval", {}),
        (Sorted().eval(), "no ONNX translation of the operator .*modified_bessel_i0", {}),
        (stack(), "packed=True exports a file", {"options": {"pack_varlen": True}}),
        (stack(), "expected names of tensors", {"dynamic": {"y": {0: "batch"}}}),
        (stack(), "expected dims of x from 0 to 2", {"dynamic": {"x": {3: "batch"}}}),
        (stack(), "is fixed at 8", {"dynamic": {"x": {2: "channels"}}}),
        (Head().eval(), "found none; export it with stateful=False", {"stateful": True}),
    ):
        with pytest.raises(effpass.ExportError, match=text):
            export(model, path, **more)
        assert not list(tmp_path.iterdir())


class OfTwo(nn.Module):
    """A model whose code fixes its batch."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.tensor([[[1.0]], [[2.0]]])


def test_a_dim_that_the_model_fixes_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    made = effpass.export_onnx(OfTwo().eval(), (torch.randn(2, 5, 8),), path=path)
    assert any("(batch) of x is fixed at 2" in note for note in made.notes)
    with pytest.raises(ValueError, match=r"expected input x of shape \[2, 'length', 8\]"):
        effpass.OnnxModel(path)(torch.randn(3, 5, 8))


def test_unwritable_paths(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no directory")
    for path, text in (
        (tmp_path, "found the directory"),
        (tmp_path / "no" / "m", "cannot write"),
        (tmp_path / "file" / "m", "cannot write"),
    ):
        with pytest.raises(effpass.ExportError, match=text):
            export(stack(), path)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("external", [False, True], ids=["one file", "external data"])
def test_a_full_disk_leaves_what_was_there(
    external: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if external:
        monkeypatch.setattr(files, "EXTERNAL_BYTES", 4096)
    model, path = Head().eval(), tmp_path / "m.onnx"
    export(model, path, verify=False)
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    save = files.ir.save

    def full(model: Any, target: Path) -> None:
        save(model, target)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.ir, "save", full)
    nn.init.normal_(model.proj.weight)
    with pytest.raises(effpass.ExportError, match="No space left on device"):
        export(model, path, verify=False)
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before


def test_a_failed_export_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong translation is found, its node named, and the old file stays."""
    path = tmp_path / "m.onnx"
    export(stack(), path)
    before = path.read_bytes()
    right = table.selective_scan.selective_scan

    def wrong(**given: Any) -> Any:
        return right(**{**given, "dt_softplus": False})

    monkeypatch.setattr(table.selective_scan, "selective_scan", wrong)
    with pytest.raises(effpass.ExportError, match=r"first node that differs is selective_scan "):
        export(stack(), path)
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == before


def test_large_weights_lie_beside_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "EXTERNAL_BYTES", 4096)
    model, path = Head().eval(), tmp_path / "m.onnx"
    for _ in range(2):  # the second replaces the first, data and all
        nn.init.normal_(model.proj.weight)
        export(model, path)
        data = [p for p in tmp_path.iterdir() if p.suffix == ".data"]
        assert len(data) == 1 and len(list(tmp_path.iterdir())) == 2
        assert path.stat().st_size < 8192
        x = torch.randn(2, 3, 8)
        (found,) = effpass.OnnxModel(path)(x).values()
        close(found, model(x).detach(), "model_fp32")
    content = bytearray(data[0].read_bytes())
    content[100] ^= 1
    data[0].write_bytes(content)
    with pytest.raises(files.FileError, match="is not the file that"):
        effpass.OnnxModel(path)
    data[0].write_bytes(content[:50])
    with pytest.raises(files.FileError, match="is not the file that"):
        effpass.OnnxModel(path)
    data[0].unlink()
    with pytest.raises(files.FileError, match="is missing; copy both files"):
        effpass.OnnxModel(path)


def test_files_that_are_no_models(tmp_path: Path) -> None:
    with pytest.raises(files.FileError, match="there is no model at"):
        effpass.OnnxModel(tmp_path / "none.onnx")
    export(stack(), tmp_path / "whole.onnx", verify=False)
    content = (tmp_path / "whole.onnx").read_bytes()
    for length in (len(content) // 2, len(content) - 1, 0):
        (tmp_path / "cut.onnx").write_bytes(content[:length])
        with pytest.raises((files.FileError, SessionError)):
            effpass.OnnxModel(tmp_path / "cut.onnx")
    (tmp_path / "text.onnx").write_text("not a model")
    with pytest.raises(files.FileError, match="is not an ONNX model"):
        effpass.OnnxModel(tmp_path / "text.onnx")


def test_what_the_runtime_lacks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "missing", lambda name, attributes=(): f"no kernel of {name}")
    made = export(stack(), tmp_path / "m.onnx")
    assert any("no kernel of CausalConvWithState" in note for note in made.notes)
    assert not [name for name in made.operators if "." in name]


def test_operators_are_asked_for() -> None:
    assert operators.missing("LinearAttention") is None
    assert "has no CPU kernel" in str(operators.missing("NoSuchOperator"))
    assert "has no attribute color" in str(operators.missing("LinearAttention", ("color",)))


class Kinds(nn.Module):
    """Outputs of several dtypes."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"above": x > 0, "order": x.argsort(-1), "half": x.half(), "brain": x.bfloat16()}


def test_dtypes_of_outputs(tmp_path: Path) -> None:
    export(Kinds().eval(), tmp_path / "m.onnx", dynamic={"x": {0: "rows", 1: "tokens"}})
    x = torch.randn(3, 4, 8)
    found, expected = effpass.OnnxModel(tmp_path / "m.onnx")(x), Kinds()(x)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value)


def test_other_names_are_verified_at_other_sizes(tmp_path: Path) -> None:
    made = export(stack(), tmp_path / "m.onnx", dynamic={"x": {0: "rows", 1: "tokens"}})
    assert made.sizes[2] == "rows 2, tokens 11" and made.sizes[3] == "rows 2, tokens 1"


def test_differences() -> None:
    nan, inf = float("nan"), float("inf")
    cases = [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([1.0, 2.0], [1.0, 2.5], 0.25),
        ([1.0, nan], [1.0, nan], 0.0),
        ([1.0, nan], [1.0, 2.0], inf),
        ([1.0, inf], [1.0, nan], inf),
        ([0.0], [0.0], 0.0),
    ]
    for want, have, expected in cases:
        assert check.difference(torch.tensor(want), torch.tensor(have)) == expected
    assert check.difference(torch.zeros(2), torch.zeros(3)) == inf
    assert check.difference(torch.zeros(2), torch.zeros(2).double()) == inf
