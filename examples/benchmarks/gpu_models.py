"""The models, packing and reduction sections of ``gpu.py``: transformers models, random weights.

Only what measures effpass imports it: its substitutions would reach stock torch too.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from gpu_timing import DEVICE, Case, WrongNumber, seconds
from torch import Tensor, nn

ARMS: dict[str, dict[str, Any] | None] = {
    "eager": None,
    "inductor": {"backend": "inductor" if DEVICE == "cuda" else "aot_eager"},
    "effpass": {"backend": "effpass"},
}
TARGETS = ["step", "gpu"]
HELD = contextlib.ExitStack()
LENGTHS = (57, 2048, 646)  # least, most, mean: PackMamba's setting


def _model(name: str, size: str, tiny: bool) -> nn.Module:
    """A causal model of the named shape, or BERT, in bfloat16."""
    from transformers import (
        BertConfig,
        BertModel,
        Mamba2Config,
        Mamba2ForCausalLM,
        MambaConfig,
        MambaForCausalLM,
    )

    width, layers = {"130m": (768, 24), "1.4b": (2048, 48), "2.8b": (2560, 64), "base": (768, 12)}[
        size
    ]
    width, layers = (32, 1) if tiny else (width, layers)
    words = 64 if tiny else 50280
    torch.manual_seed(0)
    if name == "bert":
        inner = {"intermediate_size": 4 * width, "num_attention_heads": 2 if tiny else 12}
        model: nn.Module = BertModel(
            BertConfig(hidden_size=width, num_hidden_layers=layers, vocab_size=words, **inner)
        )
    elif name == "mamba":
        model = MambaForCausalLM(
            MambaConfig(hidden_size=width, num_hidden_layers=layers, vocab_size=words)
        )
    else:
        more = {"head_dim": 64, "num_heads": 2 * width // 64, "n_groups": 1, "state_size": 128}
        model = Mamba2ForCausalLM(
            Mamba2Config(hidden_size=width, num_hidden_layers=layers, vocab_size=words, **more)
        )
    return model.to(DEVICE, torch.bfloat16).eval()


def _compiled(run: Any, arm: str, options: dict[str, Any] | None = None) -> Any:
    """A model, or its forward, as the arm runs it; RuntimeError where stock torch is not stock."""
    given = ARMS[arm]
    if arm != "effpass" and "effpass" in sys.modules:
        raise RuntimeError("expected stock torch, found effpass in its process")
    torch._dynamo.reset()
    if given is None:
        return run
    return torch.compile(run, **given, **({"options": options} if options else {}))


def _options(**more: Any) -> dict[str, Any]:
    """effpass's options here; imports it."""
    import effpass.lowering  # noqa: F401  kernels that targets can name

    if DEVICE == "cuda":
        return {"targets": TARGETS, **more}
    from effpass.lowering.gpu import launch

    HELD.enter_context(launch.interpreted())  # for good: a case is a process
    return {
        "targets": TARGETS,
        "compiler": "eager",
        **{n: v for n, v in more.items() if n != "mode"},
    }


def _ids(rows: int, tokens: int, tiny: bool) -> Tensor:
    return torch.randint(1, 64 if tiny else 50000, (rows, tokens), device=DEVICE)


def _first(made: Any) -> Tensor:
    return made.logits if "logits" in made else made.last_hidden_state


def _agree(model: nn.Module, tiny: bool) -> float:
    """effpass against eager on 64 tokens, in bfloat16; the error over the largest value."""
    ids = _ids(1, 64, tiny)
    with torch.no_grad():
        wanted = _first(model(ids))
        found = _first(_compiled(model, "effpass", _options())(ids))
    return _error(type(model).__name__, found, wanted)


def _error(name: str, found: Tensor, wanted: Tensor) -> float:
    """The largest error over the largest value; WrongNumber above what bfloat16 explains."""
    error = ((found.float() - wanted.float()).abs().max() / wanted.float().abs().max()).item()
    if not error <= 6e-2:
        raise WrongNumber(f"{name}: off by {error:.1e} of the largest value")
    return error


def models(tiny: bool) -> Iterator[Case]:
    """Prefill, a training step and decoding, three ways."""
    shapes = [("mamba", "130m"), ("mamba2", "130m"), ("mamba", "1.4b"), ("mamba2", "1.4b")]
    lengths = (16,) if tiny else (2048, 8192)
    for name, size in shapes[: 2 if tiny else None]:
        yield f"{name}-{size} correct", functools.partial(_correct, name, size, tiny)
        for arm in reversed(ARMS):
            for tokens in lengths:
                case = functools.partial(_prefill, name, size, arm, tokens, tiny)
                yield f"{name}-{size} prefill {tokens} {arm}", case
            train = functools.partial(_training, name, size, arm, lengths[0], tiny)
            yield f"{name}-{size} train {lengths[0]} {arm}", train
            decode = functools.partial(_decode, name, size, arm, tiny)
            yield f"{name}-{size} decode {arm}", decode
    ways = (("eager", False), ("inductor", False), ("effpass", False), ("effpass", True))
    for arm, packed in ways:
        label = f"bert-base {arm}{' packed' if packed else ' padded'}"
        yield label, functools.partial(_bert, arm, packed, tiny)


def _correct(name: str, size: str, tiny: bool) -> dict[str, Any]:
    return {"checked": True, "error": _agree(_model(name, size, tiny), tiny)}


def _clean() -> None:
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _peak() -> int:
    return torch.cuda.max_memory_allocated() if DEVICE == "cuda" else 0


def _chosen(compiled: Any, arm: str) -> dict[str, Any]:
    """Which implementation ran, so that a time is never credited to another one."""
    if arm != "effpass":
        return {}
    import effpass

    found = effpass.report(compiled)
    return {
        "chosen": sorted({f"{c.op}: {c.implementation}" for c in found.chosen}),
        "declined": sorted({f"{d.code}: {d.reason}"[:200] for d in found.declined}),
    }


def _arm(run: Any, arm: str, **more: Any) -> Any:
    return _compiled(run, arm, _options(**more) if arm == "effpass" else None)


def _prefill(name: str, size: str, arm: str, tokens: int, tiny: bool) -> dict[str, Any]:
    _clean()
    model = _model(name, size, tiny)
    run, ids = _arm(model, arm), _ids(1, tokens, tiny)
    with torch.inference_mode():
        run(ids, use_cache=False)
        taken = seconds(lambda: run(ids, use_cache=False))
    return {"s": taken, "tokens_s": tokens / taken, "peak": _peak(), **_chosen(run, arm)}


def _training(name: str, size: str, arm: str, tokens: int, tiny: bool) -> dict[str, Any]:
    _clean()
    model = _model(name, size, tiny).train()
    run, ids = _arm(model, arm), _ids(1, tokens, tiny)

    def step() -> None:
        run(ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=True)

    step()
    taken = seconds(step)
    return {"s": taken, "tokens_s": tokens / taken, "peak": _peak(), **_chosen(run, arm)}


def _decode(name: str, size: str, arm: str, tiny: bool) -> dict[str, Any]:
    """Time of a token in ``generate``, from two lengths; CUDA graphs where the arm compiles."""
    _clean()
    model, short, long = _model(name, size, tiny), 2, 4 if tiny else 66
    ids = _ids(1, 16, tiny)
    if arm == "inductor" and DEVICE == "cuda":
        model.forward = torch.compile(model.forward, mode="reduce-overhead")  # type: ignore[method-assign]
    else:
        model.forward = _arm(model.forward, arm, mode="reduce-overhead")  # type: ignore[method-assign]

    def run(count: int) -> Callable[[], Any]:
        return lambda: model.generate(ids, max_new_tokens=count, min_new_tokens=count)  # type: ignore[operator]

    run(short)()
    return {"token_s": (seconds(run(long)) - seconds(run(short))) / (long - short)}


def _bert(arm: str, packed: bool, tiny: bool) -> dict[str, Any]:
    _clean()
    model = _model("bert", "base", tiny)
    rows, longest = (2, 16) if tiny else (64, 512)
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(4, longest + 1, (rows,), generator=generator)
    ids = _ids(rows, longest, tiny)
    mask = (torch.arange(longest) < lengths[:, None]).long().to(DEVICE)
    run = _arm(model, arm, **({"pack_varlen": True} if packed else {}))
    with torch.inference_mode():
        wanted = model(ids, attention_mask=mask).last_hidden_state[mask.bool()]
        found = run(ids, attention_mask=mask).last_hidden_state[mask.bool()]
        error = _error(f"bert {arm}, packed {packed}", found, wanted)
        taken = seconds(lambda: run(ids, attention_mask=mask))
    return {"s": taken, "tokens_s": int(lengths.sum()) / taken, "error": error, **_chosen(run, arm)}


def _lengths(count: int, tiny: bool) -> list[int]:
    """Lengths from 57 to 2048, mean 646: an exponential cut at both ends."""
    least, most, mean = (3, 12, 6) if tiny else LENGTHS
    generator = torch.Generator().manual_seed(0)
    drawn = (
        torch.empty(20 * count).exponential_(generator=generator) * (mean - least) * 1.08 + least
    )
    return drawn[drawn <= most].int().tolist()[:count]


def packing(tiny: bool) -> Iterator[Case]:
    """PackMamba's setting: training on sequences alone, padded, and packed in rows of 4096."""
    yield "correct", functools.partial(_packed_correct, tiny)
    for size in ("1.4b", "2.8b"):
        for way in ("packed", "single", "padded"):
            yield f"mamba-{size} {way}", functools.partial(_packed, size, way, tiny)


def _batch(lengths: list[int], tiny: bool) -> tuple[Tensor, Tensor]:
    """Token ids, padded on the right to the longest, and their mask."""
    longest = max(lengths)
    mask = torch.arange(longest, device=DEVICE) < torch.tensor(lengths, device=DEVICE)[:, None]
    return _ids(len(lengths), longest, tiny), mask.long()


def _packed_correct(tiny: bool) -> dict[str, Any]:
    """Logits and gradients of sequences packed in one row beside those of each sequence alone."""
    model = _model("mamba", "130m", tiny).train()
    run = _arm(model, "effpass", pack_varlen=True)
    lengths = [5, 3, 9] if tiny else [300, 57, 191]
    ids, mask = _batch(lengths, tiny)
    packed = run(ids, attention_mask=mask, use_cache=False).logits
    rows = [model(ids[i : i + 1, :n], use_cache=False).logits[0] for i, n in enumerate(lengths)]
    both = [packed[mask.bool()], torch.cat(rows)]
    error = _error("a packed row", both[0], both[1])
    weights = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    grads = [torch.autograd.grad(y.float().square().mean(), weights) for y in both]
    one, other = (torch.cat([g.float().flatten() for g in each]) for each in grads)
    apart = ((one - other).norm() / other.norm()).item()
    if not apart <= 6e-2:
        raise WrongNumber(f"gradients of a packed row: off by {apart:.1e} of their length")
    return {"checked": True, "error": error, "gradient": apart, **_chosen(run, "effpass")}


def _packed(size: str, way: str, tiny: bool) -> dict[str, Any]:
    _clean()
    row = 24 if tiny else 4096
    model = _model("mamba", size, tiny).train()
    lengths = _lengths(4 if tiny else 24, tiny)
    run = _arm(model, "effpass", **({"pack_varlen": True} if way == "packed" else {}))
    batches = _batches(lengths, row, way)

    def epoch() -> None:
        for batch in batches:
            ids, mask = _batch(batch, tiny)
            made = run(ids, attention_mask=mask, use_cache=False).logits
            (made.float().square() * mask[..., None]).mean().backward()
            model.zero_grad(set_to_none=True)

    epoch()
    taken = seconds(epoch)
    made = {"s": taken, "tokens_s": sum(lengths) / taken, "peak": _peak(), "batches": len(batches)}
    return made | _chosen(run, "effpass")


def _batches(lengths: list[int], row: int, way: str) -> list[list[int]]:
    """One sequence a batch, or as many as fill ``row`` tokens (padded ones counting as longest)."""
    if way == "single":
        return [[length] for length in lengths]
    made: list[list[int]] = [[]]
    for length in lengths:
        held = [*made[-1], length]
        tokens = sum(held) if way == "packed" else len(held) * max(held)
        if made[-1] and tokens > row:
            made.append([length])
        else:
            made[-1] = held
    return made


def reduction(tiny: bool) -> Iterator[Case]:
    """ReduceTokens at three ratios against none."""
    yield "correct", functools.partial(_reduced_correct, tiny)
    for ratio in (0.0, 0.1, 0.2, 0.3):
        yield f"mamba-1.4b ratio {ratio}", functools.partial(_reduced, ratio, tiny)


def _reduced_correct(tiny: bool) -> dict[str, Any]:
    """The kernels beside the definitions of the same reduction, of a 130m shape.

    In float32: of two tokens alike but for bfloat16's rounding, either might leave.
    """
    model, ids = _model("mamba", "130m", tiny).float(), _ids(1, 16 if tiny else 256, tiny)
    options = _options(reduce_tokens={"ratio": 0.2})
    found = []
    with torch.no_grad():
        for targets in (TARGETS, ["inline"]):
            run = _compiled(copy.deepcopy(model), "effpass", {**options, "targets": targets})
            found.append(_first(run(ids, use_cache=False)))
    return {"checked": True, "error": _error("reduced", *found)}


def _reduced(ratio: float, tiny: bool) -> dict[str, Any]:
    _clean()
    model, tokens = _model("mamba", "1.4b", tiny), 16 if tiny else 2048
    run = _arm(model, "effpass", **({"reduce_tokens": {"ratio": ratio}} if ratio else {}))
    ids = _ids(1, tokens, tiny)
    with torch.inference_mode():
        run(ids, use_cache=False)
        taken = seconds(lambda: run(ids, use_cache=False))
    return {"s": taken, "tokens_s": tokens / taken, "peak": _peak(), **_chosen(run, "effpass")}
