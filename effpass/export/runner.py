"""``effpass.OnnxModel``: loads an exported model, runs it, and generates text with it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from effpass.export import files
from effpass.lowering.ort.session import Session, SessionError
from effpass.rows import pack

STATES = "effpass.states"
PACKED = "effpass.packed"  # which inputs and outputs of packed rows hold one entry a token
LONGEST = "effpass.longest"  # up to how many tokens, and of which input, lengths are known
OFFSETS = "cu_seqlens"


class OnnxModel:
    """An ONNX model in ONNX Runtime.

    ``inputs``, ``outputs``: names, states left out; ``metadata``: what the export wrote down
    (effpass's version, options, the source model, the passes applied); ``stateful``: whether it
    takes states and can ``generate``. Raises ``FileError`` for a file that is missing, corrupted or
    no model, ``SessionError`` where the runtime cannot load it.

    ``providers``: execution providers of ONNX Runtime; default CUDA where there is one, then the
    CPU. ``threads``: default torch's.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        providers: Sequence[str] | None = None,
        threads: int | None = None,
    ) -> None:
        self.path = Path(path)
        self.metadata = files.metadata_of(self.path)
        files.check(self.path, self.metadata)
        self._session = Session(self.path, providers, threads)
        self._states: list[dict[str, Any]] = json.loads(self.metadata.get(STATES, "[]"))
        self._packed: dict[str, Any] = json.loads(self.metadata.get(PACKED, "{}"))
        self._longest: dict[str, Any] = json.loads(self.metadata.get(LONGEST, "{}"))
        past = {s["input"] for s in self._states}
        present = {s["output"] for s in self._states}
        self.inputs = tuple(n for n in self._session.inputs if n not in past)
        self.outputs = tuple(n for n in self._session.outputs if n not in present)

    @property
    def stateful(self) -> bool:
        """Whether states are inputs and outputs."""
        return bool(self._states)

    @property
    def packed(self) -> bool:
        """Whether it takes sequences end to end and ``cu_seqlens``."""
        return bool(self._packed)

    def __call__(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Runs the model on torch tensors or NumPy arrays; answers the same kind, by output name.

        Positional arguments are taken in the order of ``inputs``. A stateful model begins anew
        unless the states of an earlier call are passed (its outputs, under the names of inputs).
        Raises TypeError or ValueError on names, kinds, dtypes and shapes that do not fit.
        """
        if len(args) > len(self.inputs):
            raise TypeError(f"expected at most {len(self.inputs)} inputs, found {len(args)}")
        given = dict(zip(self.inputs, args, strict=False))
        twice = sorted(given.keys() & kwargs.keys())
        if twice:
            raise TypeError(f"input {twice[0]} was given twice")
        given |= kwargs
        arrays = any(isinstance(value, np.ndarray) for value in given.values())
        tensors = {name: self._tensor(name, value) for name, value in given.items()}
        missing = [name for name in self.inputs if name not in tensors]
        if missing:
            raise TypeError(f"expected inputs {', '.join(self.inputs)}, found no {missing[0]}")
        if self._states and not any(s["input"] in tensors for s in self._states):
            tensors |= self.start(next(iter(tensors.values())).shape[0])
        if self._packed:
            _check_offsets(tensors[OFFSETS], tensors[self._packed["inputs"][0]].shape[1])
        if self._longest:
            _check_length(tensors, **self._longest)
        made = self._session.run(tensors)
        return {n: v.numpy() for n, v in made.items()} if arrays else made

    def each(self, sequences: Any, max_tokens: int | None = None) -> list[dict[str, Tensor]]:
        """Runs a packed model on ``sequences``; answers its outputs for each of them, by name.

        ``sequences``: as ``effpass.pack`` takes them, token ids or dicts of ``input_ids`` and the
        model's other inputs. They are packed into rows of at most ``max_tokens`` tokens (None: all
        into one). Outputs of a token are (length, ...), views of the row's; outputs of a sequence
        have no such dim. Raises ValueError for a model that was not exported with ``packed=True``.
        """
        if not self._packed or "input_ids" not in self.inputs:
            raise ValueError(
                "expected a model of input_ids that was exported with packed=True, found inputs "
                f"{', '.join(self.inputs)}"
            )
        fields = [n for n in self._packed["inputs"] if n != "input_ids"]
        total = sum(len(s["input_ids"] if isinstance(s, dict) else s) for s in sequences)
        rows = pack(sequences, max_tokens or max(total, 1), fields=fields)
        found: dict[int, dict[str, Tensor]] = {}
        for row in rows:
            values = {n: row.fields[n] for n in fields} | {"input_ids": row.input_ids}
            made = self(**values, cu_seqlens=row.cu_seqlens)
            parts = {
                name: row.unpack(made[name]) if kind == "token" else list(made[name])
                for name, kind in self._packed["outputs"].items()
            }
            for i, index in enumerate(row.indices):
                found[index] = {name: part[i] for name, part in parts.items()}
        return [found[index] for index in range(len(found))]

    def start(self, batch: int) -> dict[str, Tensor]:
        """The states before the first token, by the names of their inputs."""
        dims: dict[Any, Any] = {"batch": batch, "past": 0}
        return {
            s["input"]: torch.zeros(
                [dims.get(d, d) for d in s["shape"]], dtype=getattr(torch, s["dtype"])
            )
            for s in self._states
        }

    def after(self, made: dict[str, Tensor]) -> dict[str, Tensor]:
        """The states in the outputs of a call, by the names of inputs, for the next call."""
        return {s["input"]: made[s["output"]] for s in self._states}

    def generate(self, input_ids: Any, max_new_tokens: int = 20, **sampling: Any) -> Tensor:
        """Token ids (batch, length + new), as ``model.generate`` gives them.

        See ``stream`` for the arguments. Rows that ended are filled with ``pad_token_id``.
        """
        self._check_generation(max_new_tokens)
        ids = self._tensor("input_ids", input_ids)
        made = list(self.stream(ids, max_new_tokens, **sampling))
        return torch.cat([ids, *(token[:, None] for token in made)], 1)

    def stream(
        self,
        input_ids: Any,
        max_new_tokens: int = 20,
        *,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        eos_token_id: int | None = None,
        pad_token_id: int = 0,
        generator: torch.Generator | None = None,
    ) -> Iterator[Tensor]:
        """Yields one token id a row (batch,) as soon as it is known.

        ``input_ids`` (batch, length): prompts of one length, without padding. Greedy, or with
        ``do_sample`` drawn by ``generator`` at a ``temperature`` among the ``top_k`` likeliest.
        A row stops at ``eos_token_id``; generation when all have. Raises ValueError for a model
        without states, or values out of range.
        """
        self._check_generation(max_new_tokens, temperature, top_k)
        ids = self._tensor("input_ids", input_ids)
        states, running = self.start(ids.shape[0]), torch.ones(ids.shape[0], dtype=torch.bool)
        for _ in range(max_new_tokens):
            made = self._session.run({"input_ids": ids, **states})
            states, logits = self.after(made), made["logits"][:, -1].float()
            if do_sample:
                token = _sample(logits / temperature, top_k, generator)
            else:
                token = logits.argmax(-1)
            token = torch.where(running, token, pad_token_id)
            yield token
            if eos_token_id is not None:
                running &= token != eos_token_id
                if not bool(running.any()):
                    return
            ids = token[:, None].to(self._session.inputs["input_ids"])

    def _check_generation(
        self, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None
    ) -> None:
        if not self.stateful or self.inputs != ("input_ids",) or "logits" not in self.outputs:
            raise ValueError(
                "expected a model of input_ids and logits exported with stateful=True, found "
                f"inputs {', '.join(self.inputs)}, outputs {', '.join(self.outputs)}, "
                f"{len(self._states)} states"
            )
        if max_new_tokens < 1:
            raise ValueError(f"expected max_new_tokens to be at least 1, found {max_new_tokens}")
        if not temperature > 0:
            raise ValueError(f"expected temperature to be above 0, found {temperature}")
        if top_k is not None and top_k < 1:
            raise ValueError(f"expected top_k to be None or at least 1, found {top_k}")

    def _tensor(self, name: str, value: Any) -> Tensor:
        if name not in self._session.inputs:
            raise TypeError(f"unknown input {name}; expected {', '.join(self._session.inputs)}")
        if isinstance(value, np.ndarray):
            value = torch.from_numpy(np.ascontiguousarray(value))
        if not isinstance(value, Tensor):
            raise TypeError(
                f"expected input {name} to be a torch tensor or a NumPy array, found "
                f"{type(value).__name__}"
            )
        wanted, dims = self._session.inputs[name], self._session.shapes[name]
        if value.dtype != wanted:
            raise TypeError(f"expected input {name} to be {wanted}, found {value.dtype}")
        fits = len(dims) == value.dim() and all(
            not isinstance(d, int) or d == size for d, size in zip(dims, value.shape, strict=True)
        )
        if not fits:
            raise ValueError(f"expected input {name} of shape {dims}, found {list(value.shape)}")
        if value.numel() == 0 and name in self.inputs:
            raise ValueError(
                f"expected input {name} to hold something, found shape "
                f"{list(value.shape)}; the runtime has no answer for no tokens"
            )
        return value


def _check_offsets(cu_seqlens: Tensor, tokens: int) -> None:
    offsets = cu_seqlens.tolist()
    if offsets[0] != 0 or offsets[-1] != tokens or bool((cu_seqlens.diff() <= 0).any()):
        raise ValueError(
            f"expected {OFFSETS} to increase from 0 to {tokens}, the number of tokens, found "
            f"{offsets}"
        )


def _check_length(tensors: dict[str, Tensor], input: str, dim: int, tokens: int) -> None:
    found = tensors[input].shape[dim]
    if found > tokens:
        raise ValueError(
            f"expected {input} of at most {tokens} tokens, up to which this file knows how many "
            f"stay, found {found}: export with keep instead of ratio"
        )


def _sample(logits: Tensor, top_k: int | None, generator: torch.Generator | None) -> Tensor:
    if top_k is not None:
        floor = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < floor, float("-inf"))
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]


__all__ = ["OnnxModel", "SessionError"]
