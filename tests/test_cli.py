"""The command ``effpass``."""

import json
from pathlib import Path

import pytest
import torch

from effpass import OnnxModel
from effpass.cli import main
from tests.tiny import small


def test_explain_prints_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "report.json"
    assert main(["explain", "tests.tiny:small", "--json", str(file)]) == 0
    assert "selective_scan" in capsys.readouterr().out
    assert len(json.loads(file.read_text())["graphs"]) == 1


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["explain", "tests.tiny"], "expected MODULE:FACTORY"),
        (["explain", "tests.no_such:small"], "cannot load 'tests.no_such:small'"),
        (["explain", "tests.tiny:no_such"], "has no attribute 'no_such'"),
        (["explain", "tests.tiny:scan_args"], "to return (model, inputs), found tuple"),
        (["explain", "tests.tiny:small", "--options", "{"], "expected --options to be JSON"),
        (["explain", "tests.tiny:small", "--options", "[]"], "to be a JSON object"),
        (["explain", "tests.tiny:small", "--options", '{"verfy": true}'], "did you mean 'verify'"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    argv: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


def test_axes_and_chains(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "tests.tiny:small", "--axes", "--why", "linear:token"]) == 0
    printed = capsys.readouterr().out
    assert "names it" in printed and "-> linear (1 token" in printed
    with pytest.raises(SystemExit):
        main(["explain", "tests.tiny:small", "--why", "no_such"])
    assert "expected the name of a value" in capsys.readouterr().err


def evaluated() -> tuple[torch.nn.Module, tuple[torch.Tensor]]:
    """A factory whose model is in evaluation mode."""
    model, inputs = small()
    return model.eval(), inputs


def test_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m.onnx"
    dims = '{"x": {"0": "rows", "1": "tokens"}}'
    assert main(["export", "tests.test_cli:evaluated", str(path), "--dynamic", dims]) == 0
    assert "largest error" in capsys.readouterr().out and path.is_file()
    row = ["export", "tests.test_cli:evaluated", str(tmp_path / "row.onnx"), "--packed"]
    assert main([*row, "--no-verify"]) == 0 and "not verified" in capsys.readouterr().out
    assert OnnxModel(tmp_path / "row.onnx").packed
    for arguments, text in (
        (["tests.tiny:small", str(path)], "call model.eval"),
        (["tests.test_cli:evaluated", str(path), "--dynamic", "[]"], "expected --dynamic to be"),
        (["tests.test_cli:evaluated", str(tmp_path)], "found the directory"),
    ):
        with pytest.raises(SystemExit):
            main(["export", *arguments])
        assert text in capsys.readouterr().err.replace("\n", " ")
