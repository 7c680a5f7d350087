"""Stateful export: one program that does prefill and decoding, states as inputs and outputs.

The model is exported without its cache; then every raised op's state becomes an input and an
output, attention reads earlier keys and values before its own, and positions count from them. What
a layer's mask lets a token see is found by evaluating the mask, so nothing depends on its spelling.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from torch import SymInt, Tensor, nn
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensor
from torch.export.graph_signature import (
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.fx import Node
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext
from torch.nn.functional import scaled_dot_product_attention as sdpa
from torch.utils import _pytree as pytree
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges

from effpass.export.check import VerificationError, Verified, difference, eager, tolerance
from effpass.export.masks import reach
from effpass.export.program import ExportError, Program, resign, resized
from effpass.graph.source import layer
from effpass.graph.splice import insert
from effpass.lowering.ort.session import Session
from effpass.ops import OPS, Op

ATTENTION = torch.ops.aten.scaled_dot_product_attention.default
POSITIONS = (
    torch.ops.aten.arange.default,
    torch.ops.aten.arange.start,
    torch.ops.aten.arange.start_step,
)
KINDS = {
    "causal_conv1d": "conv",
    "selective_scan": "ssm",
    "ssd_scan": "ssm",
    "linear_recurrence": "recurrent",
}
ZEROS = ("zeros", "new_zeros", "zeros_like")
PIECES = "in pieces of"
State = dict[str, Any]


def lift(made: Program) -> list[State]:
    """Makes every state of ``made`` an input and an output, in place; answers a record of each.

    Raises ExportError where a layer carries something between tokens that is not understood.
    """
    named = {called for dims in made.open.values() for called in dims.values()}
    if named != {"batch", "length"}:
        raise ExportError(
            "stateful: expected open dims named batch and length, and no others, found "
            f"{', '.join(sorted(named)) or 'none'}"
        )
    lifting = _Lifting(made)
    ops = {op.overload: op for op in OPS.values()}
    attentions = [n for n in lifting.graph.nodes if n.target is ATTENTION]
    windows = {node: reach(made, node) for node in attentions}
    for node in list(lifting.graph.nodes):
        if node.target in ops:
            lifting.op(node, ops[node.target])
        elif node.target is ATTENTION:
            lifting.attention(node, windows[node])
    if not lifting.states:
        raise ExportError(
            "stateful: expected a scan, a causal convolution or causal attention in the model, "
            "found none; export it with stateful=False"
        )
    output = lifting.graph.output_node()
    output.args = ((*output.args[0], *lifting.presents),)  # type: ignore[misc]
    lifting.positions()
    lifting.sign()
    return lifting.states


class _Lifting:
    """One program whose states become inputs and outputs."""

    def __init__(self, made: Program) -> None:
        self.made, self.graph = made, made.program.graph
        self.states: list[State] = []
        self.pasts: list[Node] = []
        self.presents: list[Node] = []
        self.keys: Node | None = None  # the past keys of the first attention
        self.values = {n.name: n for n in self.graph.find_nodes(op="placeholder")}
        tensors = [n.meta["val"] for n in self.values.values()]
        self.mode = next(t.fake_mode for t in tensors if isinstance(t, FakeTensor))
        self.past_length: SymInt | None = None
        self.counted = [n for n in self.graph.nodes if n.target in POSITIONS]

    def op(self, node: Node, op: Op) -> None:
        """The state of a scan or a convolution."""
        if op.name not in KINDS:
            raise ExportError(f"stateful: {op.name} at {layer(node)} carries no state to lift")
        given = op.bind(*node.args, **node.kwargs)
        if given["cu_seqlens"] is not None:
            raise ExportError(f"stateful: {op.name} at {layer(node)} runs packed sequences")
        start = given["initial_state"]
        if start is not None and not _is_zero(start):
            raise ExportError(f"stateful: {op.name} at {layer(node)} has a state of its own")
        value = node.meta["val"][1]
        given["initial_state"] = self._past(KINDS[op.name], value, value.shape)
        node.args, node.kwargs = tuple(given.values()), {}
        found = [u for u in node.users if u.args[1] == 1]
        if not found:
            with self.graph.inserting_after(node):
                found = [self.graph.call_function(operator.getitem, (node, 1))]
            found[0].meta["val"] = value
        self.presents.append(found[0])

    def attention(self, node: Node, window: int | None) -> None:
        """Keys and values of the tokens before; ``window``: how many tokens one sees, itself in."""
        names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
        given: dict[str, Any] = dict(zip(names, node.args, strict=False)) | node.kwargs
        query, key, value = (_unrepeated(given[n]) for n in names[:3])
        repeats = given["query"].meta["val"].shape[1] // key.meta["val"].shape[1]
        scale = given.get("scale")
        pasts = [
            self._past(name, n.meta["val"], self._earlier(n.meta["val"]))
            for name, n in (("key", key), ("value", value))
        ]
        self.keys = self.keys or pasts[0]
        step = _attend(repeats, window, scale)
        out, *present = insert(step, [query, key, value, *pasts], node, node)
        node.replace_all_uses_with(out)
        self.graph.erase_node(node)
        self.presents += present

    def _earlier(self, value: Tensor) -> list[Any]:
        """The shape of past keys: as many tokens as there were."""
        if self.past_length is None:
            context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
            probe = self.mode.from_tensor(
                torch.zeros(7), symbolic_context=context, source=ConstantSource("past_length")
            )
            self.past_length = length = cast(SymInt, probe.shape[0])
            symbol = length.node.expr
            self.made.program.range_constraints[symbol] = ValueRanges(0, int_oo)
            self.made.dims[str(symbol)] = "past"
        return [value.shape[0], value.shape[1], self.past_length, value.shape[3]]

    def _past(self, kind: str, like: Tensor, shape: Any) -> Node:
        """A new input of the program."""
        number = sum(s["kind"] == kind for s in self.states)
        name = f"past_{kind}_{number}"
        last = self.graph.find_nodes(op="placeholder")[-1]
        with self.graph.inserting_after(last):
            node = self.graph.placeholder(name)
        with self.mode:
            node.meta["val"] = torch.empty(list(shape), dtype=like.dtype)
        dims = [
            self.made.dims.get(str(size), str(size)) if isinstance(size, SymInt) else int(size)
            for size in shape
        ]
        dtype = str(like.dtype).removeprefix("torch.")
        output = f"present_{kind}_{number}"
        state = {"input": name, "output": output, "kind": kind, "shape": dims, "dtype": dtype}
        self.states.append(state)
        self.pasts.append(node)
        return node

    def positions(self) -> None:
        """Positions that remain (masks are gone) count from the tokens before."""
        self.graph.eliminate_dead_code()
        length = next((symbol for symbol, name in self.made.dims.items() if name == "length"), None)
        for node in [n for n in self.counted if not n._erased]:
            if str(node.meta["val"].shape[0]) != length:
                continue
            if self.keys is None:
                raise ExportError(
                    f"stateful: {layer(node) or 'the model'} counts positions, and no attention "
                    "remembers how many tokens there were"
                )
            users = list(node.users)
            (moved,) = insert(lambda at, k: [at + k.shape[2]], [node, self.keys], node, node)
            for user in users:
                user.replace_input_with(node, moved)

    def sign(self) -> None:
        """Adds the states to the signature of the program."""
        made, program = self.made, self.made.program
        signature = program.graph_signature
        signature.input_specs += [
            InputSpec(InputKind.USER_INPUT, TensorArgument(n.name), None) for n in self.pasts
        ]
        signature.output_specs += [
            OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(n.name), None) for n in self.presents
        ]
        names = [s["input"] for s in self.states], [s["output"] for s in self.states]
        call = program.module_call_graph[0].signature
        assert call is not None
        args, kwargs = pytree.tree_unflatten([0] * call.in_spec.num_leaves, call.in_spec)
        call.in_spec = pytree.tree_structure((args, kwargs | dict.fromkeys(names[0], 0)))
        if call.forward_arg_names is not None:
            call.forward_arg_names += names[0]
        outs = pytree.tree_unflatten([0] * call.out_spec.num_leaves, call.out_spec)
        call.out_spec = pytree.tree_structure((outs, dict.fromkeys(names[1], 0)))
        given = program.example_inputs
        if given is not None:
            program.example_inputs = (given[0], given[1] | self._examples())
        resign(program)
        self.graph.lint()
        program.graph_module.recompile()
        made.inputs += names[0]
        made.outputs += names[1]

    def _examples(self) -> dict[str, Tensor]:
        """A real tensor for each state."""
        made = {}
        for node in self.pasts:
            value = node.meta["val"]
            sizes = [s.node.hint if isinstance(s, SymInt) else s for s in value.shape]
            made[node.name] = torch.zeros(sizes, dtype=value.dtype)
        return made


def _is_zero(start: Any) -> bool:
    return isinstance(start, Node) and _op(start) in ZEROS


def _op(node: Any) -> str:
    return getattr(getattr(node, "target", None), "_opname", "")


def _unrepeated(node: Node) -> Node:
    """Keys of grouped heads before each was repeated: reshape(expand(unsqueeze(k)))."""
    found: Any = node
    while _op(found) in ("reshape", "view", "clone", "_unsafe_view"):
        found = found.args[0]
    if _op(found) != "expand":
        return node
    found = found.args[0]
    while _op(found) == "slice":
        found = found.args[0]
    if _op(found) != "unsqueeze" or found.args[1] != 2:
        return node
    inner = found.args[0]
    wide, narrow = node.meta["val"].shape, inner.meta["val"].shape
    fits = len(narrow) == 4 and all(str(wide[d]) == str(narrow[d]) for d in (0, 2, 3))
    return inner if fits else node


def _attend(repeats: int, window: int | None, scale: float | None) -> Callable[..., list[Tensor]]:
    """Attention of new tokens to those before and among themselves; keys and values of them all."""

    def attend(q: Tensor, k: Tensor, v: Tensor, past_k: Tensor, past_v: Tensor) -> list[Tensor]:
        keys, values = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
        before, now = past_k.shape[2], q.shape[2]
        at = torch.arange(now, device=q.device)[:, None] + before
        key_at = torch.arange(before + now, device=q.device)[None, :]
        seen = key_at <= at
        if window is not None:
            seen = seen & (key_at > at - window)
        wide = [_repeated(each, repeats) for each in (keys, values)]
        return [sdpa(q, *wide, attn_mask=seen, scale=scale), keys, values]

    return attend


def _repeated(x: Tensor, repeats: int) -> Tensor:
    """(b, hk, t, d) -> (b, h, t, d)."""
    if repeats == 1:
        return x
    return x[:, :, None].expand(-1, -1, repeats, -1, -1).flatten(1, 2)


def verify(path: Path, model: nn.Module, made: Program, states: list[State]) -> Verified:
    """Compares the file, fed in pieces of several lengths, with eager on the whole sequence.

    Raises VerificationError.
    """
    session, worst, compared = Session(path), 0.0, []
    for batch, length in ((1, 9), (3, 12)):
        kwargs = dict(made.kwargs)
        for name, dims in made.open.items():
            for dim, called in dims.items():
                size = {"batch": batch, "length": length}.get(called)
                if size is not None:
                    kwargs[name] = resized(kwargs[name], dim, size)
        expected = eager(model, kwargs)
        allowed = tolerance(model, expected)
        for pieces in ((length,), (1,) * length, (length - 3, 2, 1)):
            found = _pieces(session, made, kwargs, states, pieces)
            text = f"batch {batch}, length {length} {PIECES} {', '.join(map(str, pieces))}"
            for output, want in zip(made.outputs, expected, strict=False):
                error = difference(want, found[output])
                if not error <= allowed:
                    raise VerificationError(
                        f"expected output {output} at {text} within {allowed:.0e} of its largest "
                        f"value, found {error:.1e}; some layer carries what was not lifted"
                    )
                worst = max(worst, error)
            compared.append(text)
    return Verified(worst, tuple(compared), ())


def _pieces(
    session: Session,
    made: Program,
    kwargs: dict[str, Any],
    states: list[State],
    pieces: tuple[int, ...],
) -> dict[str, Tensor]:
    """Outputs of consecutive calls, joined along the tokens."""
    batch = next(v.shape[0] for v in kwargs.values() if isinstance(v, Tensor))
    dims: dict[Any, Any] = {"batch": batch, "past": 0}
    carried = {
        s["input"]: torch.zeros(
            [dims.get(d, d) for d in s["shape"]], dtype=getattr(torch, s["dtype"])
        )
        for s in states
    }
    parts: list[dict[str, Tensor]] = []
    first = 0
    for piece in pieces:
        given = dict(carried)
        for name, dims_of in made.open.items():
            value = kwargs[name]
            for dim, called in dims_of.items():
                value = value.narrow(dim, first, piece) if called == "length" else value
            given[name] = value
        given |= {n: kwargs[n] for n in session.inputs if n not in given}
        parts.append(session.run(given))
        carried = {s["input"]: parts[-1][s["output"]] for s in states}
        first += piece
    kept = {s["output"] for s in states}
    return {n: torch.cat([part[n] for part in parts], 1) for n in session.outputs if n not in kept}
