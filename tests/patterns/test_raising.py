"""The frame around the idioms: proofs that veto, failures that are misses, copies dropped."""

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from effpass.graph.clean import clean
from effpass.patterns.proposal import Idiom, Missed, Proposal
from effpass.patterns.raising import raise_ops, recorded


def traced(run: Callable[..., Any], *args: Tensor) -> GraphModule:
    gm = make_fx(run, pre_dispatch=True, tracing_mode="fake")(*args)
    clean(gm)
    return gm


def ops(gm: GraphModule) -> list[str]:
    return [n.target._opname for n in gm.graph.nodes if hasattr(n.target, "_opname")]


def idiom(build: Callable[..., Any], target: str = "exp", **fields: Any) -> Idiom:
    """Takes ``exp`` of something for ``build`` of it."""

    def find(graph: Graph) -> Iterable[Node]:
        return [n for n in graph.nodes if getattr(n.target, "_opname", "") == target]

    def check(node: Node) -> Proposal:
        given = node.all_input_nodes
        tokens, along = ({given[0]: 1}, (1,)) if fields.get("tokens") else ({}, ())
        return Proposal("other", (given[0],), (node,), build, tokens=tokens, output_tokens=along)

    return Idiom("a test", find, check, records=fields.get("records", False))


X = torch.randn(2, 6)


def test_a_wrong_replacement_is_vetoed_by_numbers() -> None:
    gm = traced(lambda x: x.exp() + 1, X)
    outcome = raise_ops(gm, True, [idiom(lambda x: [x.exp() * (1 + 1e-4)])])
    assert not outcome.raised and "exp" in ops(gm)
    assert outcome.misses[0].reason.startswith("proof: region and op differ by 1")


def test_a_right_one_is_taken_and_says_how_close() -> None:
    gm = traced(lambda x: x.exp() + 1, X)
    outcome = raise_ops(gm, True, [idiom(lambda x: [torch.exp2(x * 1.4426950408889634)])])
    assert "exp2" in ops(gm) and "exp" not in ops(gm)
    assert outcome.raised[0].proof.startswith("equal within")
    torch.testing.assert_close(gm(X), X.exp() + 1)


def test_without_proof_it_says_by_structure() -> None:
    twice = idiom(lambda x: [torch.exp2(x * 1.4426950408889634)])
    outcome = raise_ops(traced(lambda x: x.exp() + 1, X), False, [twice])
    assert [r.proof for r in outcome.raised] == ["by structure"]


def test_an_idiom_that_finds_its_own_work_ends() -> None:
    gm = traced(lambda x: x.exp() + 1, X)
    outcome = raise_ops(gm, False, [idiom(lambda x: [x.exp()])])
    assert len(outcome.raised) > 1
    torch.testing.assert_close(gm(X), X.exp() + 1)


def test_a_nan_in_another_place_is_vetoed() -> None:
    build = idiom(lambda x: [torch.where(x > 1.5, torch.nan, x.exp())])
    outcome = raise_ops(traced(lambda x: x.exp() + 1, torch.randn(30, 30)), True, [build])
    assert outcome.misses[0].reason == "proof: NaN in different places"


def test_what_reads_the_future_is_vetoed() -> None:
    flipped = idiom(lambda x: [x.flip(1)], "flip", tokens=True)
    outcome = raise_ops(traced(lambda x: x.flip(1) + 1, X), True, [flipped])
    assert outcome.misses[0].reason == "proof: it reads tokens of the future"


@pytest.mark.parametrize("where", ["find", "check"])
def test_an_idiom_that_fails_is_a_miss(where: str) -> None:
    def broken(_: Any) -> Any:
        raise KeyError("lost")

    good = idiom(lambda x: [x.exp()])
    bad = Idiom("broken", *((broken, good.check) if where == "find" else (good.find, broken)))
    gm = traced(lambda x: x.exp() + 1, X)
    outcome = raise_ops(gm, False, [bad])
    assert [m.reason for m in outcome.misses] == ["it failed: KeyError: 'lost'"]
    torch.testing.assert_close(gm(X), X.exp() + 1)
    with pytest.raises(KeyError):
        raise_ops(gm, False, [bad], strict=True)


def test_a_replacement_of_another_shape_is_a_miss() -> None:
    gm = traced(lambda x: x.exp() + 1, X)
    outcome = raise_ops(gm, False, [idiom(lambda x: [x.exp().unsqueeze(0)])])
    assert "the op does not fit: expected torch.float32 of shape (2, 6)" in outcome.misses[0].reason
    torch.testing.assert_close(gm(X), X.exp() + 1)


def test_a_miss_that_another_idiom_takes_is_not_reported() -> None:
    def check(node: Node) -> Proposal:
        raise Missed("not mine", node)

    good = idiom(lambda x: [torch.exp2(x * 1.4426950408889634)])
    outcome = raise_ops(
        traced(lambda x: x.exp() + 1, X), True, [Idiom("picky", good.find, check), good]
    )
    assert outcome.raised and not outcome.misses


def test_writes_stay_where_nothing_is_raised() -> None:
    def run(x: Tensor) -> Tensor:
        y = x.sin()
        y.add_(1)
        return y.cos()

    gm = traced(run, X)
    raise_ops(gm, True, [idiom(lambda x: [x.exp()])])
    assert "add_" in ops(gm)


def test_recorded_regions_stay_in_the_graph() -> None:
    gm = traced(lambda x: x.exp() + 1, X)
    outcome = raise_ops(gm, True, [idiom(lambda x: [x.exp()], records=True)])
    (region,) = recorded(gm)
    assert region.op == "other" and region.region.outputs[0] in gm.graph.nodes
    assert len(outcome.raised) == 1 and "exp" in ops(gm)
