"""Which input, if any, says what tokens are padding."""

from __future__ import annotations

from torch import Tensor
from torch.fx import GraphModule, Node

from effpass.axes.labels import opname, single
from effpass.axes.relation import arguments, is_tensor, values
from effpass.graph.region import ancestors
from effpass.passes.packing.masks import Seen, seen, who_sees
from effpass.passes.packing.places import Unpackable
from effpass.passes.packing.samples import Samples
from effpass.passes.reduction.stream import ATTENTION, Irreducible, Stream

ORDERS = frozenset(("tril", "triu", "le", "lt", "ge", "gt"))  # what causal masks are made with
SPELLED = (
    *("to", "_to_copy", "type_as", "unsqueeze", "expand", "slice", "alias", "clone", "index"),
    *("contiguous", "ne", "view", "reshape"),
)
LOOKED_UP = ("embedding", "cos", "sin", "cross_entropy_loss", "nll_loss", "nll_loss_nd")


def padding_mask(
    gm: GraphModule, stream: Stream, content: set[Node], padded: bool = True
) -> Node | None:
    """The input (b, t) that is not zero at real tokens; None where there is none.

    An attention mask must come out as "real keys, perhaps within a window" on sample paddings, or
    the input must multiply the stream itself. Raises Irreducible for an input that masks attention
    in another way: padding could not be told from tokens. Not without ``padded``: then there is
    none, and it is positions that tell sequences apart.
    """
    stopped: Irreducible | None = None
    for node in gm.graph.find_nodes(op="placeholder"):
        if not _shaped(node, stream):
            continue
        reached = _reached(node)
        if any(opname(n) in LOOKED_UP for n in reached):
            continue  # tokens, their types, positions or labels
        masked = [n for n in reached if opname(n) == ATTENTION and _masks(n, reached)]
        try:
            if masked:
                window(masked[0], Samples(node))
                return node
        except Unpackable as reason:
            hint = "pass the usual padding mask, or rows without padding"
            stopped = Irreducible("padding", masked[0], reason.reason, hint)
            continue
        if _closes(node, content):
            return node
    if stopped is not None and padded:
        raise stopped
    return None


def window(attention: Node, samples: Samples) -> Seen | None:
    """What an attention's mask lets tokens see, on sample paddings. Raises Unpackable."""
    given = arguments(attention)
    return seen(attention, given["attn_mask"], bool(given["is_causal"]), samples)


def ordered(attention: Node, stream: Stream, padding: Node | None) -> bool:
    """Whether no token sees a later one, by the mask of an attention without padding.

    Where that mask is made of other inputs than ``padding`` or ids, by what it is spelled with.
    """
    given = arguments(attention)
    mask = given["attn_mask"]
    if bool(given["is_causal"]) or not is_tensor(mask):
        return bool(given["is_causal"])
    above = ancestors([mask])
    inputs = [n for n in above if n.op == "placeholder" and values(n)]
    every = attention.graph.find_nodes(op="placeholder")
    own = padding or next((n for n in every if _shaped(n, stream)), None)
    if own is not None and set(inputs) <= {own}:
        samples = Samples(own)
        if samples.light(mask):
            try:
                sees = who_sees(attention, samples.value(mask, 0), samples.masks[0])
                return not bool(sees.triu(1).any())
            except (Unpackable, RuntimeError, IndexError, ValueError):
                pass  # a mask that cannot be computed alone is judged by its operations
    return any(opname(node) in ORDERS for node in above)


def _shaped(node: Node, stream: Stream) -> bool:
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.dim() != 2 or not node.users:
        return False
    if node.meta.get("effpass_parameter") or value.requires_grad or single(value.shape[1]):
        return False
    if value.is_floating_point() and stream.of(node).token != 1:
        return False  # a weight, unless it meets the tokens
    return bool(values(node))


def _reached(node: Node) -> set[Node]:
    """All that depends on a node, up to the first attention."""
    found, pending = set[Node](), [node]
    while pending:
        for user in pending.pop().users:
            if user not in found:
                found.add(user)
                pending += [] if opname(user) == ATTENTION else [user]
    return found


def _masks(attention: Node, reached: set[Node]) -> bool:
    mask = arguments(attention)["attn_mask"]
    return is_tensor(mask) and mask in reached


def _closes(node: Node, content: set[Node]) -> bool:
    """Whether the input, cast and spread over channels, multiplies what is made of tokens."""
    pending, seen_ = [node], set[Node]()
    while pending:
        source = pending.pop()
        for user in source.users:
            if user in seen_:
                continue
            seen_.add(user)
            if opname(user) == "mul" and any(a in content for a in user.args[:2] if is_tensor(a)):
                return True
            if opname(user) in SPELLED:
                pending.append(user)
    return False
