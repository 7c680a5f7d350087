"""What an idiom says it has found: a region of the graph, and the function that replaces it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from torch.fx import Graph, Node

from effpass.graph.region import Region

Build = Callable[..., Sequence[Tensor]]


class Missed(Exception):
    """Nearly this idiom: the first condition that failed, and at which node."""

    def __init__(self, reason: str, node: Node) -> None:
        super().__init__(reason)
        self.reason, self.node = reason, node


@dataclass(frozen=True)
class Proposal:
    """The nodes from ``inputs`` to ``outputs`` compute ``build(*inputs)``.

    ``op`` is the name that reports count. ``build`` takes the tensors of ``inputs`` (fakes while
    the graph is rewritten, real ones in a proof) and returns one tensor an output, of the same
    shape and dtype; it must read sizes from them, never from the graph. ``tokens`` gives the dim of
    an input that is time: with them, the proof also checks that no output reads a later token
    (``causal``, along ``output_tokens`` of each output). ``draw`` gives inputs other random values
    than normal ones, e.g. positive. ``attributes`` go into the record of a region that is only
    recorded. ``prove_always``: structure alone does not settle it, numbers must. ``reference``
    computes what ``build`` does, faster on float64: a proof runs it instead.
    """

    op: str
    inputs: tuple[Node, ...]
    outputs: tuple[Node, ...]
    build: Build
    draw: Mapping[Node, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    tokens: Mapping[Node, int] = field(default_factory=dict)
    output_tokens: tuple[int, ...] = ()
    attributes: Mapping[str, Any] = field(default_factory=dict)
    prove_always: bool = False
    reference: Build | None = None


@dataclass(frozen=True)
class Idiom:
    """One way in which mathematics is written.

    ``find`` yields rare nodes where it may be; ``check`` answers the proposal, None where the node
    is something else, or raises Missed with the first failed condition. With ``records`` the
    regions stay as they are and are recorded for later passes.
    """

    name: str
    find: Callable[[Graph], Iterable[Node]]
    check: Callable[[Node], Proposal | None]
    records: bool = False


@dataclass(frozen=True)
class Recorded:
    """A region that was recognised and left as it is, e.g. a feed-forward block."""

    op: str
    region: Region
    attributes: Mapping[str, Any]
