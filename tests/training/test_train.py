"""The training example: three layouts learn alike; a run that stopped goes on as if it had not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.progress import Progress
from safetensors.torch import load_file

from tests.scripts import EXAMPLES, load
from tests.tolerances import close

script = load("train_packed_mamba.py")
checkpoint, curve = script.checkpoint, script.curve
text = vars(sys.modules["training.text"])
TINY = ["--hidden=32", "--layers=1", "--states=4", "--max-tokens=300", "--longest=100"]
TINY += ["--compiler=eager", "--warmup=2", "--lr=0.01"]
# torch's own: Dynamo instantiates a model's autograd.Function, which torch deprecates
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


def run(folder: Path, mode: str, *more: str) -> Any:
    """A run of this process, trained as the script does."""
    play = folder / "play.txt"
    if not play.exists():
        folder.mkdir(parents=True, exist_ok=True)
        play.write_text(text["PLAYS"].read_text()[2000:6000])
    args = script.arguments([*TINY, f"--out={folder}", f"--text={play}", *more])
    made = script.build(args, mode, script.start("cpu"))
    with Progress(disable=True) as progress:
        script.train(made, args, folder / mode, progress)
    return made


def parameters(made: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in made.model.named_parameters()}


def test_passages_lose_nothing_and_stay_short() -> None:
    play = text["PLAYS"].read_text()
    words = ["".join("".join(text["passages"](play, n)).split()) for n in (100, 2047)]
    assert words[0] == words[1] and len(words[0]) > 100_000
    learn, held_out = script.sequences(2048)
    lengths = [len(ids) for ids in learn]
    assert min(lengths) < 100 and max(lengths) <= 2048 and 600 < sum(lengths) / len(lengths) < 1400
    for ids in learn + held_out:
        assert ids[0] == text["START"] and text["START"] not in ids[1:]
    assert not {tuple(ids) for ids in learn} & {tuple(ids) for ids in held_out}
    with pytest.raises(ValueError, match="at least 100 tokens, found a limit of 7"):
        script.sequences(7)


def test_three_layouts_learn_alike(tmp_path: Path) -> None:
    runs = {mode: run(tmp_path, mode, "--steps=3") for mode in script.LAYOUTS}
    assert runs["padded"].history["computed"] > runs["padded"].history["tokens"]
    for mode in ("packed", "padded"):
        history = runs[mode].history
        assert history["tokens"] == runs["single"].history["tokens"]
        close(*(torch.tensor(runs[m].history["losses"]) for m in (mode, "single")), "model_fp32")
        for name, value in parameters(runs["single"]).items():
            close(parameters(runs[mode])[name], value, "trained_fp32")
    assert runs["packed"].history["losses"][0] > runs["packed"].history["losses"][-1]


def test_a_row_holds_several_sequences() -> None:
    """The test above would say little of rows with one."""
    args = script.arguments(TINY)
    rows = script.rows(script.build(args, "packed", script.start("cpu")).dataset)
    assert all(len(next(rows).indices) > 2 for _ in range(3))


@pytest.mark.parametrize("mode", ["packed", "single"])
def test_a_resumed_run_is_the_uninterrupted_one(mode: str, tmp_path: Path) -> None:
    """Bit for bit, over the end of an epoch; random numbers, too."""
    whole = ["--steps=5", "--every=2", "--max-tokens=2000"]  # two rows an epoch or three
    expected = run(tmp_path / "whole", mode, *whole)
    numbers = torch.rand(3)
    torch._dynamo.reset()
    run(tmp_path / "parts", mode, *whole[1:], "--steps=3")
    torch.manual_seed(5)  # whatever happened in between
    torch._dynamo.reset()
    actual = run(tmp_path / "parts", mode, *whole, "--resume")
    assert torch.equal(torch.rand(3), numbers)
    assert actual.history["losses"] == expected.history["losses"]
    assert actual.history["tokens"] == expected.history["tokens"]
    assert actual.dataset.epoch >= 1
    for name, value in parameters(expected).items():
        assert torch.equal(parameters(actual)[name], value), name
    files = [sorted((tmp_path / part / mode).glob("*")) for part in ("whole", "parts")]
    assert [[path.name for path in each] for each in files] == [["step-000004", "step-000005"]] * 2
    optimizers = [load_file(each[-1] / "optimizer.safetensors") for each in files]
    assert optimizers[0].keys() == optimizers[1].keys() and optimizers[0]
    assert all(torch.equal(optimizers[0][key], optimizers[1][key]) for key in optimizers[0])


def test_what_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, "single", "--steps=1")
    with pytest.raises(ValueError, match=r"expected no run in .*: pass --resume to go on"):
        run(tmp_path, "single", "--steps=2")
    with pytest.raises(ValueError, match=r"found lr 0.01 \(here 0.5\)"):
        run(tmp_path, "single", "--steps=2", "--resume", "--lr=0.5")
    with pytest.raises(SystemExit):
        script.arguments(["--modes", "packed", "--backend", "eager"])
    assert "expected --backend effpass for packed rows" in capsys.readouterr().err


def test_half_a_checkpoint_is_none(tmp_path: Path) -> None:
    (tmp_path / "step-000009.partial").mkdir()
    assert checkpoint.latest(tmp_path) is None
    (tmp_path / "step-000003").mkdir()
    (tmp_path / "step-000010").mkdir()
    assert checkpoint.latest(tmp_path) == tmp_path / "step-000010"


def test_no_pickle(tmp_path: Path) -> None:
    run(tmp_path, "single", "--steps=1")
    names = {path.name for path in (tmp_path / "single" / "step-000001").iterdir()}
    assert names == {f"{n}.safetensors" for n in ("model", "optimizer", "random")} | {"state.json"}


def test_curve(tmp_path: Path) -> None:
    assert curve.smoothed([8.0, 4.0], weight=0.75) == [8.0, 7.0]
    history = {"losses": [8.0, 4.0, 3.0], "seconds": [1.0, 0.5, 0.5]}
    curve.draw({"packed": history, "padded": history}, tmp_path / "made" / "loss.png")
    assert (tmp_path / "made" / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_learning_rate() -> None:
    args = script.arguments(["--lr=1", "--warmup=4"])
    assert [script.rate_at(step, args) for step in (1, 4, 16)] == [0.25, 1.0, 0.5]


def torchrun(folder: Path, *more: str) -> dict[str, Any]:
    """Two ranks; the state of the last checkpoint of each mode."""
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", str(EXAMPLES / "train_packed_mamba.py"), *TINY]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--max-tokens=600", "--out", str(folder), *more],
        capture_output=True,
        text=True,
        timeout=500,
        env=environment,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = {}
    for path in folder.iterdir():
        if path.is_dir():
            last = checkpoint.latest(path)
            found[path.name] = checkpoint.read(last) | {
                "model": load_file(last / "model.safetensors")
            }
    return found


@pytest.mark.slow
def test_ranks_layouts_and_engines_learn_alike(tmp_path: Path) -> None:
    """DDP and FSDP2, three layouts, and a run that stops under DDP and goes on under FSDP2."""
    modes = ["--modes", "packed", "padded", "single"]
    ddp = torchrun(tmp_path / "ddp", *modes, "--steps=4")
    fsdp = torchrun(tmp_path / "fsdp", *modes, "--steps=4", "--engine=fsdp")
    torchrun(tmp_path / "both", "--steps=2")
    both = torchrun(tmp_path / "both", "--steps=4", "--engine=fsdp", "--resume")
    runs = [*ddp.values(), *fsdp.values(), *both.values()]
    assert len(runs) == 7
    for each in runs:
        losses = (torch.tensor(one["history"]["losses"]) for one in (each, runs[0]))
        close(*losses, "model_fp32")
        assert each["history"]["tokens"] == runs[0]["history"]["tokens"]
        for name, value in runs[0]["model"].items():
            close(each["model"][name], value, "trained_fp32")
    assert (tmp_path / "ddp" / "loss.png").exists()


@pytest.mark.slow
def test_the_script_runs(tmp_path: Path) -> None:
    command = [
        sys.executable,
        str(EXAMPLES / "train_packed_mamba.py"),
        *TINY,
        "--compiler=inductor",
    ]
    done = subprocess.run(
        [*command, "--steps=2"], cwd=tmp_path, capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "packed" in done.stdout and "held out" in done.stdout
    state = json.loads((tmp_path / "packed_mamba/packed/step-000002/state.json").read_text())
    assert state["step"] == 2 and len(state["history"]["losses"]) == 2
