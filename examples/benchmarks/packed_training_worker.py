"""One arm of ``packed_training.py`` in a process of its own; requests as in ``worker.py``.

The arms ``eager`` and ``inductor`` never import effpass, whose substitutions are process-global.
Requests: ``prepare`` (a model, its first step in one layout), ``time`` (steps in that layout).
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import maybe_mark_dynamic
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from worker import COMPILE, serve

VOCABULARY, IGNORED = 256, -100
Batch = tuple[dict[str, Any], Tensor]  # arguments of the model, labels (b, t)


class Reader(nn.Module):
    """A backbone of transformers and a head: logits (b, t, 256)."""

    def __init__(self, name: str, hidden: int, layers: int, states: int) -> None:
        super().__init__()
        self.backbone = _backbone(name, hidden, layers, states)
        self.head = nn.Linear(hidden, VOCABULARY, bias=False)

    def forward(self, **kwargs: Any) -> Tensor:
        """Logits of whatever the backbone takes."""
        return self.head(self.backbone(**kwargs, use_cache=False)[0])


def _backbone(name: str, hidden: int, layers: int, states: int) -> nn.Module:
    from transformers import Mamba2Config, Mamba2Model, MambaConfig, MambaModel

    shape = {"vocab_size": VOCABULARY, "hidden_size": hidden, "num_hidden_layers": layers}
    if name == "mamba1":
        return MambaModel(MambaConfig(state_size=16, **shape))
    heads = {"num_heads": hidden * 2 // 64, "head_dim": 64, "n_groups": 1, "state_size": states}
    return Mamba2Model(Mamba2Config(**heads, **shape))


def sequences(lengths: Sequence[int], device: str) -> list[Tensor]:
    """Seeded token ids of these lengths."""
    generator = torch.Generator().manual_seed(sum(lengths))
    made = [torch.randint(VOCABULARY, (n,), generator=generator) for n in lengths]
    return [ids.to(device) for ids in made]


def single(parts: list[Tensor]) -> list[Batch]:
    """A batch (1, length) of each sequence."""
    return [({"input_ids": ids[None]}, _targets(ids)[None]) for ids in parts]


def padded(parts: list[Tensor]) -> list[Batch]:
    """One batch (sequences, longest)."""
    ids = pad_sequence(parts, batch_first=True)
    labels = pad_sequence([_targets(p) for p in parts], batch_first=True, padding_value=IGNORED)
    lengths = torch.tensor([len(p) for p in parts], device=ids.device)
    mask = (torch.arange(ids.shape[1], device=ids.device) < lengths[:, None]).long()
    return [({"input_ids": ids, "attention_mask": mask}, labels)]


def packed(parts: list[Tensor]) -> list[Batch]:
    """One row (1, tokens) and its boundaries."""
    import effpass

    (row,) = effpass.pack(parts, sum(map(len, parts)))
    inputs = row.to(parts[0].device).kwargs()
    return [(inputs, inputs.pop("labels"))]


LAYOUTS: dict[str, Callable[[list[Tensor]], list[Batch]]] = {
    "single": single,
    "padded": padded,
    "packed": packed,
}


def any_length(batches: list[Batch]) -> list[Batch]:
    """Batches that are compiled once for all lengths and numbers of sequences."""
    for inputs, _ in batches:
        for name in {"input_ids", "attention_mask", "position_ids", "seq_idx"} & set(inputs):
            value = inputs[name]
            maybe_mark_dynamic(value, [dim for dim, size in enumerate(value.shape) if size > 1])
    return batches


def _targets(ids: Tensor) -> Tensor:
    """The ids as labels, the first of which nothing predicts."""
    labels = ids.clone()
    labels[0] = IGNORED
    return labels


def _compiled(arm: str, model: nn.Module) -> Callable[..., Any]:
    if arm == "inductor":  # it cannot compile this for every length
        return torch.compile(model, dynamic=False)
    return COMPILE[arm](model)


class Worker:
    """Holds one model in one layout."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.model: nn.Module | None = None
        self.function: Callable[..., Any] | None = None
        self.rows: list[list[Batch]] = []

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """Does what ``request["do"]`` names, with the other entries as arguments."""
        do = {"prepare": self.prepare, "time": self.time}[request.pop("do")]
        reply = do(**request)
        if self.args.arm != "effpass" and "effpass" in sys.modules:
            raise RuntimeError(f"expected {self.args.arm} never to import effpass, but it did")
        return reply

    def prepare(
        self, model: str, layout: str, rows: list[list[int]], save: str, warm: int
    ) -> dict[str, Any]:
        """Makes a model and its batches; ``rows``: lengths of each. Steps on all of them."""
        self.model = self.function = None
        torch._dynamo.reset()
        gc.collect()
        torch.manual_seed(0)
        sizes = (self.args.hidden, self.args.layers, self.args.states)
        self.model = Reader(model, *sizes).to(self.args.device).train()
        self.function = _compiled(self.args.arm, self.model)
        self.rows = [LAYOUTS[layout](sequences(lengths, self.args.device)) for lengths in rows]
        if self.args.arm == "effpass":
            self.rows = [any_length(batches) for batches in self.rows]
        started = time.perf_counter()
        losses = [self.step(batches) for batches in self.rows]
        first = time.perf_counter() - started
        gradients = {
            f"gradient of {name}": p.grad.cpu()
            for name, p in self.model.named_parameters()
            if p.grad is not None
        }
        torch.save({"loss": torch.tensor(losses), **gradients}, save)
        for _ in range(warm):
            for batches in self.rows:
                self.step(batches)
        computed = sum(labels.numel() for batches in self.rows for _, labels in batches)
        return {"first_steps_s": first, "computed": computed}

    def time(self, repeats: int) -> dict[str, Any]:
        """Seconds of a step on every row, several times."""
        times = []
        for _ in range(repeats):
            started = time.perf_counter()
            for batches in self.rows:
                self.step(batches)
            times.append(time.perf_counter() - started)
        return {"times_s": times}

    def step(self, batches: list[Batch]) -> float:
        """The gradients of one row's mean loss, without an optimizer; the loss."""
        assert self.model is not None and self.function is not None
        self.model.zero_grad(set_to_none=True)
        targets = sum(int((labels != IGNORED).sum()) for _, labels in batches)
        total = 0.0
        for inputs, labels in batches:
            logits = self.function(**inputs)[:, :-1]
            flat = logits.flatten(0, 1), labels[:, 1:].flatten()
            loss = cross_entropy(*flat, ignore_index=IGNORED, reduction="sum") / targets
            loss.backward()
            total += loss.item()  # on a GPU it waits, too
        if self.args.device == "cuda":
            torch.cuda.synchronize()
        return total


def main() -> None:
    """Serves as one arm."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arm", choices=sorted(COMPILE), required=True)
    for name in ("threads", "hidden", "layers", "states"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--device", required=True)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    serve(Worker(args).answer)


if __name__ == "__main__":
    main()
