"""A model in several graphs keeps packed sequences apart in every one of them, or raises."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import effpass
from tests.tolerances import close

OPTIONS = {"compiler": "eager"}
ONE = effpass.pack([torch.arange(12)], 12)[0]
TWO = effpass.pack([torch.arange(1, 6), torch.arange(20, 27)], 12)[0]
EVERY = ("input_ids", "cu_seq_lens_q", "cu_seq_lens_k", "position_ids", "seq_idx")
POSITIONS = ("input_ids", "position_ids")
# torch's own: Dynamo instantiates a model's autograd.Function, which torch deprecates
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


def build(name: str) -> nn.Module:
    import transformers

    small = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "use_cache": False}
    more: dict[str, dict[str, Any]] = {
        "Mamba": {"state_size": 4},
        "Mamba2": {"state_size": 4, "num_heads": 2, "head_dim": 32, "n_groups": 1},
        "Llama": {"num_attention_heads": 2, "intermediate_size": 64},
    }
    config = getattr(transformers, f"{name}Config")(**small, **more[name])
    return getattr(transformers, f"{name}Model")(config).eval()


def layer_by_layer(model: Any) -> nn.Module:
    for layer in model.layers:
        layer.compile(backend="effpass", options=OPTIONS)
    return model


def with_hooks(model: Any) -> nn.Module:
    """As FSDP2 has them: each breaks the graph."""
    for layer in model.layers:
        layer.register_forward_pre_hook(torch.compiler.disable(lambda *args: None))
    return torch.compile(model, backend="effpass", options=OPTIONS)  # type: ignore[return-value]


def cut_everywhere(model: nn.Module) -> nn.Module:
    """DDP cuts a graph where a bucket of gradients is full; these hold one parameter each."""
    compiled = torch.compile(model, backend="effpass", options=OPTIONS)
    return DistributedDataParallel(compiled, bucket_cap_mb=1e-6)  # type: ignore[arg-type]


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def arguments(row: effpass.rows.Row, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name, value in row.kwargs().items() if name in names}


def alone(model: Any, row: effpass.rows.Row) -> Tensor:
    parts = row.unpack(row.input_ids)
    return torch.cat([model(input_ids=ids[None])[0] for ids in parts], 1)


def kept_or_refused(
    name: str, divide: Callable[[Any], nn.Module], names: tuple[str, ...], first: effpass.rows.Row
) -> str:
    """Runs two rows; raises AssertionError for sequences that see each other."""
    torch.manual_seed(0)
    model = build(name)
    run = divide(copy.deepcopy(model))
    with torch.no_grad():
        for row in (first, TWO):
            try:
                actual = run(**arguments(row, names))[0]
            except (ValueError, torch._dynamo.exc.BackendCompilerFailed) as error:
                assert "packed_rows: " in str(error)
                return str(error)
            close(actual, alone(model, row), "zoo_fp32")
    return "kept"


@pytest.mark.parametrize(
    ("divide", "names", "first"),
    [
        (layer_by_layer, POSITIONS, ONE),
        (with_hooks, EVERY, TWO),
        pytest.param(layer_by_layer, EVERY, TWO, marks=pytest.mark.slow),
        pytest.param(with_hooks, POSITIONS, ONE, marks=pytest.mark.slow),
    ],
    ids=["layers-positions", "hooks-every", "layers-every", "hooks-positions"],
)
def test_layers_that_are_not_told(divide: Any, names: tuple[str, ...], first: Any) -> None:
    """Mamba's layers are not handed the boundaries; Mamba-2's are."""
    said = kept_or_refused("Mamba", divide, names, first)
    assert "does not reach a layer that is compiled by itself (mixer" in said
    assert names[1] in said
    assert kept_or_refused("Mamba2", divide, names, first) == "kept"


@pytest.mark.parametrize(
    ("name", "names", "first"),
    [
        ("Mamba2", EVERY, TWO),
        ("Llama", POSITIONS, ONE),
        *(
            pytest.param(name, names, first, marks=pytest.mark.slow)
            for name in ("Mamba", "Mamba2", "Llama")
            for names in (EVERY, POSITIONS)
            for first in (ONE, TWO)
        ),
    ],
)
@pytest.mark.usefixtures("one_rank")
def test_ddp_in_the_smallest_pieces(name: str, names: tuple[str, ...], first: Any) -> None:
    """Boundaries are in every piece that mixes tokens, for what a front door marks."""
    said = kept_or_refused(name, cut_everywhere, names, first)
    assert said == "kept" or name != "Mamba2"


@pytest.mark.parametrize("name", ["Mamba", "Mamba2"])
def test_what_is_no_packed_row_is_not_refused(name: str) -> None:
    """Positions of padded rows restart, too; and several rows have positions of their own."""
    torch.manual_seed(0)
    model = build(name)
    run = layer_by_layer(copy.deepcopy(model))
    ids = torch.randint(64, (2, 6))
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    padded = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    plain = {"position_ids": torch.arange(3, 9).expand(2, 6)}
    with torch.no_grad():
        for more in (padded, plain):
            close(run(ids, **more)[0], model(ids, **more)[0], "zoo_fp32")
