"""The coverage of a report: layer by layer, what was found and the nearest miss."""

import json

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import effpass
from effpass.ops import OPS
from effpass.report import (
    NODES,
    Called,
    Chosen,
    Coverage,
    Found,
    GraphReport,
    Miss,
    Raised,
    Report,
)
from tests.tiny import Mixer, Stack


class Loop(nn.Module):
    """A gated recurrence written as a loop; with ``squashed`` it is none."""

    def __init__(self, squashed: bool = False) -> None:
        super().__init__()
        self.gate, self.squashed = nn.Linear(8, 8), squashed

    def forward(self, x: Tensor) -> Tensor:
        a, h, out = self.gate(x).sigmoid(), torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            h = a[:, t] * h + x[:, t]
            h = h.tanh() if self.squashed else h
            out.append(h)
        return torch.stack(out, 1)


class Attend(nn.Module):
    """Attention by torch's own op."""

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)


class Layers(nn.Module):
    """One after the other, each added to its input."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


def explained(*layers: nn.Module) -> Report:
    return effpass.explain(Layers(*layers), torch.randn(2, 6, 8))


def chosen(op: str, where: str) -> Chosen:
    return Chosen(op, where, "cpu")


def raised(idiom: str, op: str, where: str = "") -> Raised:
    return Raised(idiom, op, where, "model.py:1", 3, "by structure")


def miss(where: str, reason: str = "padding 1") -> Miss:
    return Miss("causal convolution", where, reason, "model.py:2")


def found(graph: GraphReport) -> list[str]:
    return [str(each) for row in graph.coverage for each in row.found]


def test_ops_of_effpass_are_counted_as_nodes() -> None:
    assert set(OPS) == NODES


def test_layers_alike_are_one_row() -> None:
    report = explained(Loop(), Loop(), Mixer(), Loop())
    gated = (Found("linear_recurrence", ("unrolled loop",)),)
    mixer = (Found("causal_conv1d"), Found("selective_scan"))
    assert report.coverage == [
        Coverage("layers.0-1,3", 3, gated),
        Coverage("layers.2", 1, mixer),
    ]


def test_the_nearest_miss_is_told_with_its_line() -> None:
    (row,) = explained(Loop(squashed=True)).coverage
    assert row.where == "layers.0" and not row.found
    assert row.nearest is not None and row.nearest.idiom == "unrolled loop"
    assert row.nearest.reason and row.nearest.source.startswith("test_coverage.py:")


def test_attention_called_as_torchs_own_is_found() -> None:
    report = explained(Attend(), Attend())
    assert report.coverage == [Coverage("layers.0-1", 2, (Found("sdpa"),))]
    assert report.count("sdpa") == 0  # nothing was raised


def test_it_comes_first_in_the_text_and_in_the_json() -> None:
    report = effpass.explain(Stack(layers=3), torch.randn(2, 6, 8))
    text = str(report)
    assert text.index("coverage") < text.index("implementation")
    assert "layers.0-2 (3 layers)" in text and "causal_conv1d, selective_scan" in text
    (row,) = json.loads(report.to_json())["graphs"][0]["coverage"]
    assert row["where"] == "layers.0-2" and row["layers"] == 3
    assert [f["op"] for f in row["found"]] == ["causal_conv1d", "selective_scan"]


def test_a_graph_without_anything_says_so() -> None:
    report = effpass.explain(nn.Linear(8, 8), torch.randn(2, 8))
    assert report.coverage == [] and "nothing was found, nor nearly" in str(report)


def test_what_lies_in_no_layer_is_named() -> None:
    text = str(effpass.explain(lambda x: F.scaled_dot_product_attention(x, x, x), torch.ones(1, 4)))
    assert "(the model itself)" in text


def test_an_idiom_that_takes_the_op_of_another_is_a_chain() -> None:
    graph = GraphReport("g", "eager")
    graph.chosen = [chosen("selective_scan", ""), chosen("linear_recurrence", "")]
    graph.raised = [
        raised("unrolled loop", "linear_recurrence"),
        raised("cumulative", "linear_recurrence"),
        raised("discretised", "selective_scan"),
        raised("attention", "sdpa"),
    ]
    assert found(graph) == [
        "linear_recurrence <- cumulative",
        "selective_scan <- discretised <- unrolled loop",
        "sdpa <- attention",
    ]


def test_ops_are_counted_once_with_and_once_without_an_idiom() -> None:
    graph = GraphReport("g", "eager")
    graph.chosen = [chosen("causal_conv1d", "")] * 3
    graph.raised = [raised("causal convolution", "causal_conv1d")] * 2
    graph.called = [Called("sdpa", "", "model.py:9")]
    assert found(graph) == ["causal_conv1d", "sdpa", "2 causal_conv1d <- causal convolution"]
    assert Report([graph]).count("causal_conv1d") == 3


def test_an_op_that_was_taken_into_another_is_not_counted() -> None:
    graph = GraphReport("g", "eager", chosen=[chosen("selective_scan", "")])
    graph.raised = [
        raised("unrolled loop", "linear_recurrence"),
        raised("discretised", "selective_scan"),
    ]
    assert Report([graph]).count("linear_recurrence") == 0
    assert Report([graph]).count("selective_scan") == 1


@pytest.mark.parametrize(
    ("paths", "rows"),
    [
        (["a.10", "a.9", "a.2"], ["a.2,9-10"]),
        (["a.0.x.0", "a.0.x.1", "a.1.x.0", "a.1.x.1"], ["a.0-1.x.0-1"]),
        (["a.0.x", "a.1.y", "b.0.x"], ["a.0.x", "a.1.y", "b.0.x"]),
        (["a.0", "a", ""], ["", "a", "a.0"]),
    ],
)
def test_paths_fold_where_one_number_differs(paths: list[str], rows: list[str]) -> None:
    graph = GraphReport("g", "eager", chosen=[chosen("ssd_scan", path) for path in paths])
    assert [row.where for row in graph.coverage] == rows
    assert sum(row.layers for row in graph.coverage) == len(paths)


def test_layers_that_differ_in_a_reason_do_not_fold() -> None:
    misses = [miss("a.0"), miss("a.1"), miss("a.2", "dilation 2"), miss("a.2", "stride 2")]
    graph = GraphReport("g", "eager", misses=misses)
    assert graph.coverage == [
        Coverage("a.0-1", 2, (), misses[0]),
        Coverage("a.2", 1, (), misses[2], others=1),
    ]
    assert "causal convolution: dilation 2 (and 1 more)" in " ".join(str(Report([graph])).split())
