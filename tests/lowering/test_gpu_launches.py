"""How Triton kernels are chosen and launched: configurations, CUDA graphs, a decoder's tokens."""

import importlib
import inspect
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import effpass
from effpass.lowering.gpu import causal_conv1d, launch, selective_scan, ssd_scan
from effpass.lowering.gpu.launch import tiled
from tests.models.zoo import FAMILIES
from tests.tolerances import close

pytest.importorskip("triton", reason="Triton is not installed")
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
pytestmark = pytest.mark.usefixtures("triton_runs")
FILES = ("carry", "causal_conv1d", "linear_recurrence", "selective_scan", "ssd_scan")
FIXED = {
    "causal_conv1d.final_state": "one program a sequence, a few numbers",
    "causal_conv1d.backward_init": "one program a sequence, a few numbers",
    "selective_scan.backward": "its blocks are the rows of a buffer that is summed later",
    "ssd_scan.steps": "one warp a chunk and head",
}


def _kernels() -> Iterator[tuple[str, Any]]:
    for file in (*FILES, "token_matching", "varlen_attention"):
        module = importlib.import_module(f"effpass.lowering.gpu.kernels.{file}")
        for name, value in vars(module).items():
            inner = value
            while not inspect.isfunction(inner):
                inner = getattr(inner, "kernel", None) or getattr(inner, "fn", None)
                if inner is None:
                    break
            if inner is not None and inner.__module__ == module.__name__:
                if "program_id" in inspect.getsource(inner):
                    yield f"{file}.{name}", value


def test_every_kernel_with_a_choice_states_its_set() -> None:
    kernels = dict(_kernels())
    assert len(kernels) == 25
    tuned = {
        name
        for name, kernel in kernels.items()
        if hasattr(kernel, "config" if not GPU else "configs")
    }
    assert kernels.keys() - tuned == FIXED.keys()


class Kernel:
    """Stands for a kernel: notes its configurations, of which the second is the fastest."""

    def __init__(self) -> None:
        self.ran: list[int] = []

    @staticmethod
    def fn(width: int, BLOCK: int) -> None: ...

    def run(self, *args: Any, **meta: Any) -> None:
        self.ran.append(meta["BLOCK"])


def _measured(kernel: Kernel) -> Any:
    import triton

    from effpass.lowering.gpu.kernels.tuning import Measured

    configs = [triton.Config({"BLOCK": block}) for block in (16, 32, 64)]
    made = Measured(kernel, ["width", "BLOCK"], configs, ["width"], None, None)

    def bench(run: Any, quantiles: Any) -> list[float]:
        run()
        return [abs(kernel.ran[-1] - 32.0)] * 3

    made._do_bench = bench
    return made


def test_the_fastest_configuration_is_measured_once_for_each_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernel = Kernel()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    tuned = _measured(kernel)
    for width, ran in ((8, [16, 32, 64, 32]), (8, [32]), (9, [16, 32, 64, 32])):
        kernel.ran = []
        tuned.run(width)
        assert kernel.ran == ran


def test_nothing_is_measured_while_a_cuda_graph_is_captured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    kernel = Kernel()
    tuned = _measured(kernel)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    tuned.run(8)
    assert kernel.ran == [16] and not tuned.cache
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    tuned.run(8)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    kernel.ran = []
    tuned.run(8)
    assert kernel.ran == [32], "what was measured before is used in a graph"


def test_a_grid_follows_the_tuned_block() -> None:
    assert tiled(3, 100, "BD", 7)({"BD": 32}) == (3, 4, 7)
    assert tiled(0, 100, "BD") == (0,) and tiled(3, 0, "BD") == (0,)


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_a_decoder_runs_the_kernels_for_one_token(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []

    def noted(kernel: Any, grid: Any, *arguments: Any, **meta: Any) -> None:
        inner = getattr(kernel, "kernel", None) or kernel
        ran.append(inner.fn.__name__)
        launch.launch(kernel, grid, *arguments, **meta)

    for module in (causal_conv1d, selective_scan, ssd_scan):
        monkeypatch.setattr(module, "launch", noted)
    model, make_inputs = FAMILIES[family]()
    model = model.to(DEVICE)
    ids = make_inputs(2, 4, False)["input_ids"].to(DEVICE)
    options = {"compiler": "eager", "targets": ["gpu"]}
    compiled = torch.compile(model, backend="effpass", options=options)
    caches, logits = [], []
    with torch.no_grad():
        for run in (compiled, model):
            out = run(input_ids=ids, use_cache=True)
            ran.clear()
            for token in (3, 5):
                step = torch.full((2, 1), token, device=DEVICE)
                out = run(input_ids=step, cache_params=out.cache_params, use_cache=True)
                if run is compiled:
                    assert ran and set(ran) == {"update"}
                    ran.clear()
            caches.append(out.cache_params)
            logits.append(out.logits)
    close(*logits, "model_fp32")
    for layer in range(model.config.num_hidden_layers):  # type: ignore[attr-defined]
        close(*(c.layers[layer].conv_states[0] for c in caches), "model_fp32")
        close(*(c.layers[layer].recurrent_states[0] for c in caches), "model_fp32")
    assert {c.implementation for c in effpass.report(compiled).chosen} == {"gpu"}
