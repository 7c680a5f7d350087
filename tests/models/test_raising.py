"""Families of the zoo raised by patterns alone, as for code that no table knows."""

import pytest

from effpass.report import Report
from tests.models import coverage
from tests.models.through_graph import check, checked, rows, with_eager_attention
from tests.models.zoo import FAMILIES

# torch's own: Dynamo instantiates a model's autograd.Function, which torch deprecates
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
QUICK = ("lfm2", "recurrent_gemma", "gpt2")


def found(report: Report) -> list[dict[str, int]]:
    """Ops of each graph, with counts."""
    ops = ("causal_conv1d", "linear_recurrence", "selective_scan", "ssd_scan", "sdpa", "ffn")
    reports = [Report([graph]) for graph in report.graphs]
    return [{op: r.count(op) for op in ops if r.count(op)} for r in reports]


def test_recurrent_gemma() -> None:
    """Its recurrence is a loop in a method, its convolution a module, its attention written out."""
    report = checked(*with_eager_attention("recurrent_gemma"), "zoo_fp32")
    wanted = {"causal_conv1d": 1, "linear_recurrence": 1, "sdpa": 1, "ffn": 2}
    assert found(report) == [wanted] * len(report.graphs) and report.graphs
    assert not report.misses


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_attention_written_out(family: str) -> None:
    report = checked(*with_eager_attention(family), "zoo_fp32")
    assert found(report) == [{"sdpa": 2, "ffn": 2}] * len(report.graphs) and report.graphs


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_through_the_graph_equals_eager(family: str) -> None:
    check([family])


def written() -> tuple[str, str]:
    """The two halves of the page: as the families come, and through the graph."""
    head, comes, graph = coverage.PATH.read_text().split("\n## ")
    if coverage.versions() not in head:
        pytest.skip(f"docs/coverage.md was not written with {coverage.versions()}")
    return comes, graph


def check_page(families: list[str]) -> None:
    for half, fresh in zip(written(), (coverage.comes(families), rows(families)), strict=True):
        header = next(line for line in half.splitlines() if line.startswith("| family"))
        idioms = [cell.strip() for cell in header.strip("|").split("|")][1:]
        assert set(coverage.columns(fresh.values())) <= set(idioms)
        for family, row in fresh.items():
            assert coverage.line(family, row, idioms) in half.splitlines()
            assert reasons(half, family) == set(row["misses"])


def reasons(half: str, family: str) -> set[str]:
    """Why this family's misses are not raised, as the page lists them."""
    lines = [line[2:].rpartition(": ") for line in half.splitlines() if line.startswith("- ")]
    return {
        reason
        for reason, _, families in lines
        if family in {each.partition(" ")[0] for each in families.split(", ")}
    }


def test_page_of_coverage_is_as_measured() -> None:
    check_page(list(QUICK))


@pytest.mark.slow
def test_whole_page_of_coverage_is_as_measured() -> None:
    written()
    page = coverage.page(coverage.comes(FAMILIES), rows(list(FAMILIES)))
    assert page == coverage.PATH.read_text()
