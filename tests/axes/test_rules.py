"""Every rule's claims, probed: what is free, a set, folded or ordered along an axis must be so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx import Node
from torch.fx.experimental.proxy_tensor import make_fx

from effpass import ops
from effpass.axes.labels import Dims, opname
from effpass.axes.relation import RULES, Kind, Relation, relation, values
from tests.tolerances import close

Sample = tuple[Callable[..., Any], tuple[Any, ...]]


def r(*shape: int) -> Tensor:
    """Distinct values: no permutation goes unnoticed."""
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def whole(*shape: int, below: int = 3) -> Tensor:
    return torch.randint(0, below, shape, generator=torch.Generator().manual_seed(0))


SAMPLES: dict[str, Sample] = {
    "add": (lambda x, y: x + y, (r(2, 3, 5), r(3, 1))),
    "addcmul": (lambda x, y: torch.addcmul(x, x, y), (r(2, 3, 5), r(5))),
    "and": (lambda x, y: (x > 0) & (y > 0), (r(3, 5), r(5))),
    "where": (lambda x, y: torch.where(x > 0, x, y), (r(3, 5), r(3, 1))),
    "where_number": (lambda x: torch.where(x > 0, x, 2.0), (r(3, 5),)),
    "floor_divide": (lambda x: torch.floor_divide(x, 2), (r(3, 5),)),
    "cast": (lambda x: x.to(torch.float32).double(), (r(2, 3),)),
    "transpose": (lambda x: x.transpose(1, 2), (r(2, 3, 5),)),
    "permute": (lambda x: x.permute(2, 0, 1), (r(2, 3, 5),)),
    "t": (lambda x: x.t(), (r(2, 3),)),
    "merge": (lambda x: x.reshape(6, 5), (r(2, 3, 5),)),
    "split_dim": (lambda x: x.view(2, 3, 2, 4), (r(2, 3, 8),)),
    "merge_and_split": (lambda x: x.reshape(2, 3, 4, 2).flatten(1, 2), (r(2, 3, 8),)),
    "regroup": (lambda x: x.reshape(4, 9), (r(2, 6, 3),)),
    "unflatten": (lambda x: x.unflatten(-1, (2, 4)), (r(3, 8),)),
    "unsqueeze": (lambda x: x.unsqueeze(1), (r(2, 3),)),
    "squeeze": (lambda x: x.squeeze(1), (r(2, 1, 3),)),
    "expand": (lambda x: x.expand(4, 2, 3), (r(2, 1),)),
    "repeat": (lambda x: x.repeat(2, 1, 3), (r(2, 3),)),
    "repeat_interleave": (lambda x: x.repeat_interleave(2, dim=1), (r(2, 3, 5),)),
    "whole_slice": (lambda x: x[:, 0:3], (r(2, 3),)),
    "slice": (lambda x: x[:, 1:], (r(2, 3),)),
    "narrow": (lambda x: x.narrow(1, 1, 2), (r(2, 4),)),
    "select": (lambda x: x[:, 1], (r(2, 3, 5),)),
    "split": (lambda x: x.split([2, 3], -1)[1], (r(3, 5),)),
    "chunk": (lambda x: x.chunk(2, 1), (r(3, 6),)),
    "unbind": (lambda x: x.unbind(1), (r(3, 2, 5),)),
    "cat": (lambda x, y: torch.cat([x, y], 1), (r(2, 3), r(2, 4))),
    "cat_one": (lambda x: torch.cat([x], 1), (r(2, 3),)),
    "stack": (lambda x, y: torch.stack([x, y], 1), (r(2, 3), r(2, 3))),
    "pad": (lambda x: F.pad(x, (1, 2)), (r(2, 3, 5),)),
    "pad_second": (lambda x: F.pad(x, (0, 0, 1, 0)), (r(2, 3, 5),)),
    "roll": (lambda x: x.roll(1, 1), (r(2, 3),)),
    "flip": (lambda x: x.flip(0), (r(2, 3),)),
    "tril": (lambda x: x.tril(), (r(2, 4, 4),)),
    "one_hot": (lambda x: F.one_hot(x, 3), (whole(2, 4),)),
    "index_select": (lambda x, i: x.index_select(1, i), (r(2, 3, 5), whole(4))),
    "gather": (lambda x, i: x.gather(1, i), (r(2, 3, 5), whole(2, 4, 5))),
    "index_pair": (lambda x, i, j: x[i[:, None], j], (r(3, 3, 5), whole(2), whole(4))),
    "index_one": (lambda x, i: x[:, i], (r(2, 3, 5), whole(4))),
    "linear": (F.linear, (r(2, 3, 5), r(4, 5), r(4))),
    "matmul": (torch.matmul, (r(2, 3, 4, 5), r(2, 1, 5, 6))),
    "matmul_vector": (torch.matmul, (r(2, 4, 5), r(5))),
    "mm": (torch.mm, (r(3, 4), r(4, 5))),
    "bmm": (torch.bmm, (r(2, 3, 4), r(2, 4, 5))),
    "baddbmm": (torch.baddbmm, (r(2, 1, 5), r(2, 3, 4), r(2, 4, 5))),
    "addmm": (torch.addmm, (r(5), r(3, 4), r(4, 5))),
    "einsum": (lambda a, b: torch.einsum("bthd,bshd->bhts", a, b), (r(2, 3, 2, 4), r(2, 5, 2, 4))),
    "einsum_dots": (lambda a, b: torch.einsum("...d,de->...e", a, b), (r(2, 3, 4), r(4, 5))),
    "einsum_three": (
        lambda a, b, c: torch.einsum("bl,bln,bld->bldn", a, b, c),
        (r(2, 3), r(2, 3, 4), r(2, 3, 5)),
    ),
    "embedding": (lambda w, i: F.embedding(i, w), (r(3, 5), whole(2, 4))),
    "attention": (F.scaled_dot_product_attention, (r(2, 3, 4, 5), r(2, 3, 6, 5), r(2, 3, 6, 7))),
    "attention_masked": (
        lambda q, k, v, m: F.scaled_dot_product_attention(q, k, v, m),
        (r(2, 3, 4, 5), r(2, 3, 6, 5), r(2, 3, 6, 7), r(2, 1, 1, 6)),
    ),
    "attention_causal": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True),
        (r(2, 3, 4, 5), r(2, 3, 4, 5), r(2, 3, 4, 7)),
    ),
    "attention_grouped": (
        lambda q, k, v: F.scaled_dot_product_attention(q, k, v, enable_gqa=True),
        (r(2, 4, 3, 5), r(2, 2, 3, 5), r(2, 2, 3, 7)),
    ),
    "conv1d": (F.conv1d, (r(2, 3, 8), r(4, 3, 2), r(4))),
    "cross_entropy": (lambda x, y: F.cross_entropy(x, y), (r(5, 3), whole(5))),
    "cross_entropy_each": (
        lambda x, y: F.cross_entropy(x, y, reduction="none"),
        (r(5, 3), whole(5)),
    ),
    "cross_entropy_positions": (
        lambda x, y: F.cross_entropy(x, y, reduction="none"),
        (r(5, 3, 4), whole(5, 4)),
    ),
    "cross_entropy_of_positions": (lambda x, y: F.cross_entropy(x, y), (r(5, 3, 4), whole(5, 4))),
    "sum": (lambda x: x.sum(1), (r(2, 3, 5),)),
    "sum_all": (lambda x: x.sum(), (r(2, 3),)),
    "mean_kept": (lambda x: x.mean((0, -1), keepdim=True), (r(2, 3, 5),)),
    "amax": (lambda x: x.amax(-1), (r(2, 3),)),
    "max_dim": (lambda x: x.max(1).values, (r(2, 3),)),
    "argmax": (lambda x: x.argmax(0) * 0, (r(2, 3),)),
    "norm": (lambda x: torch.linalg.vector_norm(x, dim=1), (r(2, 3),)),
    "softmax": (lambda x: x.softmax(1), (r(2, 3, 5),)),
    "log_softmax": (lambda x: x.log_softmax(-1), (r(2, 3),)),
    "cumsum": (lambda x: x.cumsum(1), (r(2, 6),)),
    "sort": (lambda x: x.sort(1).values, (r(2, 3),)),
    "topk": (lambda x: x.topk(2, 1).values, (r(2, 5),)),
    "layer_norm": (lambda x, w, b: F.layer_norm(x, (5,), w, b), (r(2, 3, 5), r(5), r(5))),
    "rms_norm": (lambda x, w: F.rms_norm(x, (5,), w), (r(2, 3, 5), r(5))),
    "group_norm": (lambda x, w: F.group_norm(x, 2, w), (r(3, 4, 5), r(4))),
    "glu": (lambda x: F.glu(x, 1), (r(2, 4, 5),)),
    "dropout": (lambda x: F.dropout(x, 0.5, False), (r(2, 3),)),
    "zeros_like": (lambda x: torch.zeros_like(x) + x, (r(2, 3),)),
    "new_ones": (lambda x: x.new_ones(2, 3) * x, (r(2, 3),)),
    "arange": (lambda x: torch.arange(3) * x, (r(2, 3),)),
    "selective_scan": (
        lambda x, dt, A, B, C: torch.ops.effpass.selective_scan(x, dt, A, B, C)[0],
        (r(2, 4, 3), r(2, 4, 3).abs(), -r(3, 5).abs(), r(2, 4, 5), r(2, 4, 5)),
    ),
    "ssd_scan": (
        lambda x, dt, A, B, C: torch.ops.effpass.ssd_scan(x, dt, A, B, C)[0],
        (r(2, 4, 6, 3), r(2, 4, 6).abs(), -r(6).abs(), r(2, 4, 2, 5), r(2, 4, 2, 5)),
    ),
    "linear_recurrence": (
        lambda a, b, h: torch.ops.effpass.linear_recurrence(a, b, h)[1],
        (r(2, 4, 3), r(2, 4, 3), r(2, 3)),
    ),
    "causal_conv1d": (
        lambda x, w: torch.ops.effpass.causal_conv1d(x, w)[0],
        (r(2, 6, 3), r(3, 4)),
    ),
}


def nodes(name: str) -> tuple[list[Node], dict[Node, Any]]:
    """The calls that a sample makes, and the value of every node."""
    function, args = SAMPLES[name]
    gm = make_fx(function, pre_dispatch=True, tracing_mode="fake")(*args)
    known: dict[Node, Any] = dict(zip(gm.graph.find_nodes(op="placeholder"), args, strict=True))
    found = []
    for node in gm.graph.find_nodes(op="get_attr"):
        known[node] = getattr(gm, node.target)
    for node in gm.graph.nodes:
        if node.op == "call_function":
            known[node] = run(node, known)
            found += [node] if values(node) and opname(node) + str(node.target) else []
    return [n for n in found if "getitem" not in str(n.target)], known


def run(node: Node, known: dict[Node, Any]) -> Any:
    args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), known.__getitem__)
    return node.target(*args, **kwargs)  # type: ignore[operator]


def moved(found: Relation, value: Any, dims: Dims, label: int, order: Tensor) -> Any:
    """A tensor, indexed along one axis, which may be part of a dim."""
    for d, dim in enumerate(dims):
        if label in dim:
            sizes = [int(found.labels.sizes[each]) for each in dim]
            parts = value.unflatten(d, sizes)
            value = parts.index_select(d + dim.index(label), order).flatten(d, d + len(dim) - 1)
    return value


def outcome(node: Node, known: dict[Node, Any]) -> list[Tensor]:
    made = run(node, known)
    return list(made) if isinstance(made, list | tuple) else [made]


def probe(found: Relation, known: dict[Node, Any], label: int) -> None:
    kind, size = found.kind(label), int(found.labels.sizes[label])
    if kind in (Kind.BOUND, Kind.UNKNOWN):
        return
    before, changed = outcome(found.node, known), dict(known)
    order = torch.arange(size).roll(1)
    if kind is Kind.ORDERED:
        order = torch.arange(size)
        order[size // 2 :] = order[size // 2 :].flip(0)
    for source, dims in found.inputs:
        changed[source] = moved(found, known[source], dims, label, order)
    after = outcome(found.node, changed)
    for was, now, dims in zip(before, after, found.outputs, strict=True):
        for d, dim in enumerate(dims):
            if label in dim and kind is Kind.ORDERED:
                assert dim == (label,)
                was, now = was.narrow(d, 0, size // 2), now.narrow(d, 0, size // 2)
        wanted = was if kind is Kind.ORDERED else moved(found, was, dims, label, order)
        if kind is Kind.ORDERED and not any(label in dim for dim in dims):
            continue  # the last state has seen everything
        close(now.double(), wanted.double(), "raised_fp64")


@pytest.mark.parametrize("name", SAMPLES)
def test_claims_hold(name: str) -> None:
    calls, known = nodes(name)
    assert calls
    for node in calls:
        found = relation(node)
        assert found is not None
        labels = {label for _, dims in found.inputs for dim in dims for label in dim}
        for label in labels:
            probe(found, known, label)


def test_every_sample_has_a_rule() -> None:
    """No operation of a sample is opaque, so every claim above was one."""
    for name in SAMPLES:
        for node in nodes(name)[0]:
            found = relation(node)
            assert found is not None
            assert Kind.UNKNOWN not in found.kinds.values(), (name, node)


def test_a_wrong_claim_is_caught() -> None:
    """Were a cumulative sum free along its dim, the probe would say so."""
    (node, *_), known = nodes("cumsum")
    found = relation(node)
    assert found is not None
    ordered = next(label for label, kind in found.kinds.items() if kind is Kind.ORDERED)
    found.kinds.clear()
    with pytest.raises(AssertionError):
        probe(found, known, ordered)


def test_every_op_has_a_rule() -> None:
    assert {f"effpass::{name}" for name in ops.OPS} <= set(RULES)
