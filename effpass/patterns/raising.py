"""Raise: every idiom in turn looks at a graph; what it finds, and can prove, becomes an op.

Propose loosely, prove: an idiom checks structure and proposes (``effpass.patterns.proposal``); the
region is carved out of the graph, compared in numbers where asked, and replaced.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch.fx import Graph, GraphModule, Node

from effpass.graph.clean import graphs
from effpass.graph.duplicates import merge_duplicates
from effpass.graph.functional import functional
from effpass.graph.region import CarveError, Region, carve, early_users
from effpass.graph.source import layer, line
from effpass.graph.splice import SpliceError, insert, replace
from effpass.graph.writes import writes
from effpass.patterns import (
    associative,
    attention,
    chunked,
    convolution,
    cumulative,
    discretised,
    feed_forward,
    own_gradient,
    scan_op,
    unrolled,
)
from effpass.patterns.proof import prove
from effpass.patterns.proposal import Idiom, Missed, Proposal, Recorded
from effpass.report import Miss, Raised

IDIOMS: tuple[Idiom, ...] = (
    convolution.IDIOM,
    unrolled.IDIOM,
    own_gradient.IDIOM,
    associative.IDIOM,
    scan_op.IDIOM,
    cumulative.IDIOM,
    chunked.IDIOM,
    discretised.IDIOM,
    *attention.IDIOMS,
    feed_forward.IDIOM,
)


PASSES = 4  # of one idiom over a graph


@dataclass
class Raising:
    """What became of one graph: records of what was raised, and of the nearest misses."""

    proving: bool
    strict: bool = False
    raised: list[Raised] = field(default_factory=list)
    missed: list[tuple[Node, Miss]] = field(default_factory=list)
    proven: dict[Any, str] = field(default_factory=dict)

    def miss(self, idiom: Idiom, anchor: Node, at: Node, reason: str) -> None:
        """Records why ``anchor`` was not raised, and at which node."""
        self.missed.append((anchor, Miss(idiom.name, layer(at), reason, line(at))))

    @property
    def misses(self) -> list[Miss]:
        """Misses at nodes that are still there: no other idiom took them."""
        return list(dict.fromkeys(miss for node, miss in self.missed if not node._erased))


def raise_ops(
    gm: GraphModule,
    proving: bool,
    idioms: Sequence[Idiom] | None = None,
    strict: bool = False,
) -> Raising:
    """Replaces what the idioms recognise, in place, in a graph and the bodies inside it.

    ``proving`` compares every region with its replacement on random inputs (always done where
    structure alone does not settle it). An idiom that fails is a miss, with ``strict`` an
    exception. Graphs with in-place writes are matched in a functional form, which is kept only if
    something was raised or recorded in it.
    """
    outcome = Raising(proving, strict)
    idioms = IDIOMS if idioms is None else idioms
    for body in graphs(gm):
        if body not in graphs(gm):  # of an operator that was raised
            continue
        original, count = body.graph, len(outcome.raised)
        if any(writes(node) for node in original.nodes):
            body.graph = _copied(original)
            functional(body)
        merge_duplicates(body.graph)
        for idiom in sorted(idioms, key=lambda idiom: idiom.records):
            _apply(idiom, body, outcome)
        if body.graph is not original and len(outcome.raised) == count:
            body.graph = original
        body.recompile()
        body.delete_all_unused_submodules()
    return outcome


def recorded(gm: GraphModule) -> list[Recorded]:
    """The regions of one graph (not of the bodies inside it) that idioms only recorded."""
    return gm.meta.get("effpass_recorded", [])


def _copied(graph: Graph) -> Graph:
    made, names = Graph(graph.owning_module), {}
    result = made.graph_copy(graph, names)
    made.output(result)
    made.output_node().meta = dict(graph.output_node().meta)
    return made


def _apply(idiom: Idiom, body: GraphModule, outcome: Raising) -> None:
    """Until nothing more is found: what was raised may have uncovered more."""
    before = list(outcome.missed)
    for _ in range(PASSES):
        count = len(outcome.raised)
        outcome.missed = list(before)  # of the last pass alone
        for node in _anchors(idiom, body, outcome):
            if not node._erased:
                _try(idiom, node, body, outcome)
        if idiom.records or len(outcome.raised) == count:
            return


def _anchors(idiom: Idiom, body: GraphModule, outcome: Raising) -> list[Node]:
    try:
        return list(idiom.find(body.graph))
    except Exception as error:  # never the user's problem: the nodes stay as they are
        if outcome.strict:
            raise
        first = next(iter(body.graph.nodes))
        outcome.miss(idiom, first, first, f"it failed: {type(error).__name__}: {error}")
        return []


def _try(idiom: Idiom, node: Node, body: GraphModule, outcome: Raising) -> None:
    try:
        proposal = idiom.check(node)
        if proposal is not None:
            outcome.raised.append(_accept(idiom, proposal, body, outcome))
    except Missed as miss:
        outcome.miss(idiom, node, miss.node, miss.reason)
    except Exception as error:  # as above
        if outcome.strict:
            raise
        outcome.miss(idiom, node, node, f"it failed: {type(error).__name__}: {error}")


def _accept(idiom: Idiom, proposal: Proposal, body: GraphModule, outcome: Raising) -> Raised:
    """Carves, proves, and replaces or records. Raises Missed."""
    try:
        region = carve(proposal.inputs, proposal.outputs)
    except CarveError as error:
        raise Missed(str(error), error.node) from error
    proof = "by structure"
    if outcome.proving or proposal.prove_always:
        proof = _proof(proposal, region, outcome)
    origin = region.outputs[0]
    record = Raised(idiom.name, proposal.op, layer(origin), line(origin), len(region.nodes), proof)
    if idiom.records:
        found = Recorded(proposal.op, region, dict(proposal.attributes))
        body.meta.setdefault("effpass_recorded", []).append(found)
    else:
        _replace(proposal, region)
    return record


def _proof(proposal: Proposal, region: Region, outcome: Raising) -> str:
    """Identical layers are proven once."""
    key = (proposal.op, region.key())
    if key not in outcome.proven:
        outcome.proven[key] = prove(proposal, region, thorough=outcome.proving)
    return outcome.proven[key]


def _replace(proposal: Proposal, region: Region) -> None:
    place = region.place
    for node in reversed(early_users(region)):
        place.append(node)
    try:
        made = insert(proposal.build, proposal.inputs, place, region.outputs[0])
        replace(region.outputs, made, region.nodes)
    except SpliceError as error:
        raise Missed(f"the op does not fit: {error}", region.outputs[0]) from error
