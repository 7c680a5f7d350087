"""Axes over whole graphs: names reach up and down, through merges, splits and products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from effpass.axes.relation import Kind, is_tensor
from effpass.axes.solve import Solution, solve
from effpass.capture.dynamo import capture
from tests.passes import small


def captured(function: Callable[..., Any], *args: Tensor, symbolic: bool = False) -> GraphModule:
    mode = "symbolic" if symbolic else "fake"
    return make_fx(function, pre_dispatch=True, tracing_mode=mode)(*args)


def named(gm: GraphModule, *names: str) -> tuple[Solution, list[Node]]:
    """The axes of a graph; names for the dims of its first input; the nodes that make tensors."""
    found = solve(gm)
    first = next(iter(gm.graph.nodes))
    for dim, name in zip(found.dims(first), names, strict=False):
        found.name(dim, name)
    return found, [n for n in gm.graph.nodes if n in found and n.op == "call_function"]


def test_names_go_through_merges_and_splits() -> None:
    def heads(x: Tensor) -> Tensor:
        merged = x.reshape(-1, x.shape[2])
        parts = merged.view(x.shape[0], x.shape[1], 2, -1).transpose(1, 2)
        return parts.flatten(0, 1)

    found, nodes = named(captured(heads, torch.randn(3, 5, 8)), "batch", "token")
    assert [found.text(node) for node in nodes] == [
        *("batch·token 2·4", "batch token 2 4", "batch 2 token 4", "batch·2 token 4")
    ]
    assert not found.conflicts


def test_sizes_may_be_symbols() -> None:
    def merge(x: Tensor) -> Tensor:
        return (x.reshape(-1, x.shape[2]) * 2).view(x.shape).transpose(0, 1)

    found, nodes = named(captured(merge, torch.randn(3, 5, 8), symbolic=True), *"btd")
    made = [n for n in nodes if n.meta["val"].dim() > 1]
    assert [found.text(node) for node in made] == ["b·t d", "b·t d", "b t d", "t b d"]


def test_names_go_up() -> None:
    """What a table is added to names its positions, and the arange that looked them up."""

    def embed(x: Tensor, table: Tensor) -> Tensor:
        return x + torch.nn.functional.embedding(torch.arange(5), table)

    found, nodes = named(captured(embed, torch.randn(3, 5, 8), torch.randn(9, 8)), "batch", "token")
    assert found.text(nodes[0]) == "token" and found.text(nodes[1]) == "token 8"
    table = next(n for n in found.relations if n.name == "table_1")
    assert found.text(table) == "9 8"
    path = [n.name for n in found.why(nodes[0], 0, "token")]
    assert path == ["x_1", "embedding", "arange"]
    assert found.why(table, 0, "token") == []


def test_a_cut_is_another_axis() -> None:
    found, nodes = named(captured(lambda x: x[:, 1:] + 1, torch.randn(3, 5)), "batch", "token")
    assert found.text(nodes[-1]) == "batch 4"
    cut = next(n for n in nodes if n.name.startswith("slice"))
    assert found.kinds(cut, found.dims(next(iter(found.relations)))[1]) == {Kind.BOUND}
    assert found.kinds(cut, found.dims(cut)[0]) == {Kind.FREE}


def test_ops_name_what_they_take() -> None:
    def scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        return torch.ops.effpass.selective_scan(x * 2, dt, A, B, C)[0]

    shapes = ((2, 5, 3), (2, 5, 3), (3, 4), (2, 5, 4), (2, 5, 4))
    found = solve(captured(scan, *map(torch.randn, shapes)))
    texts = {n.name: found.text(n) for n in found.relations}
    assert texts["x_1"] == texts["mul"] == "batch token 3"
    assert texts["b_1"] == "batch token 4" and texts["a_1"] == "3 4"


def test_what_cannot_be_one_axis_is_a_conflict() -> None:
    """Three rows of four and four of three are the same memory, and no axes of each other."""
    found = solve(captured(lambda x: x.view(3, 4) + x.view(4, 3).t(), torch.randn(12)))
    assert found.conflicts and found.conflicts[0].node.name == "view_1"


@pytest.mark.parametrize("spell", [small.additive, small.causal, small.filled])
def test_a_model_is_named_throughout(spell: small.Bias) -> None:
    """Every activation of a small encoder has its tokens named, from the embedding to the head."""
    model = small.Encoder(spell, small.tokens).eval()
    ids, mask = torch.zeros(3, 5, dtype=torch.long), torch.ones(3, 5, dtype=torch.long)
    graphs: list[GraphModule] = []

    def keep(gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        graphs.append(capture(gm, inputs))
        return gm.forward

    torch.compile(model, backend=keep)(ids, mask)
    found, nodes = named(graphs[0])
    for node in graphs[0].graph.find_nodes(op="placeholder"):
        if tuple(node.meta["val"].shape) == (3, 5):
            found.name(found.dims(node)[0], "batch")
            found.name(found.dims(node)[1], "token")
    tensors = [n for n in nodes if is_tensor(n)]
    hidden = [n for n in tensors if tuple(n.meta["val"].shape) == (3, 5, 8)]
    assert len(hidden) > 10
    assert {" ".join(found.text(n).split()[:2]) for n in hidden} == {"batch token"}
