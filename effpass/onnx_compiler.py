"""ONNX Runtime as the compiler of a captured graph: ``options={"compiler": "onnxruntime"}``.

Weights stay where they are, as inputs bound by their address: a model that is changed in place is
read as it is at every call. Each graph is compared once with its eager form; what cannot be
translated, or disagrees, is declined with the reason, and Inductor compiles it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import SymInt, Tensor, nn
from torch._guards import tracing
from torch.export import Dim
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.traceback import preserve_node_meta
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree

from effpass.axes.relation import draws
from effpass.graph.verify import VerificationError, cannot_run, difference
from effpass.graph.writes import writes

UNREAD = (-1, -1)  # an input that no node reads, a stride perhaps
MODES = ("_enter_autocast", "_exit_autocast", "_enter_inference_mode", "_exit_inference_mode")


class Unsuitable(Exception):
    """This graph does not run in ONNX Runtime; the text says why."""


def in_runtime(graph: GraphModule, inputs: Sequence[Any]) -> tuple[Callable[..., Any], str]:
    """A callable that runs ``graph`` in ONNX Runtime, and how close it is to eager.

    Raises Unsuitable.
    """
    try:
        from effpass.lowering.ort.convert import Untranslatable, convert
        from effpass.lowering.ort.session import Session, SessionError
    except ImportError as error:
        reason = f"{error.name} is not installed; pip install 'effpass[onnx]'"
        raise Unsuitable(reason) from error
    _refuse(graph, inputs)
    import onnx_ir as ir

    tensors = [i for i, value in enumerate(inputs) if isinstance(value, Tensor)]
    wrapped = _Flat(graph, inputs)
    try:
        with tracing(None):  # sizes of the export are not those of Dynamo's graph
            program = _exported(wrapped, graph, [inputs[i] for i in tensors], tensors)
            converted = convert(program)
        session = Session(ir.to_proto(converted.model).SerializeToString())
    except (Untranslatable, SessionError) as error:
        raise Unsuitable(str(error)) from error
    except Exception as error:  # torch.export's own classes, many
        text = str(error).strip().splitlines() or [""]
        raise Unsuitable(f"it cannot be exported: {type(error).__name__}: {text[0]}") from error
    if len(session.inputs) > len(tensors):
        raise Unsuitable("its ONNX form has other inputs than the graph")
    names = _names(program, tensors)
    run = _Runner(graph, session, names, SessionError)
    return run, _compared(graph, run, inputs)


def _refuse(graph: GraphModule, inputs: Sequence[Any]) -> None:
    """Whatever ONNX Runtime would do otherwise than eager, or not at all."""
    if torch.is_grad_enabled() and any(isinstance(v, Tensor) and v.requires_grad for v in inputs):
        raise Unsuitable("gradients are wanted; ONNX Runtime runs inference: use torch.no_grad()")
    devices = {v.device.type for v in inputs if isinstance(v, Tensor)}
    if devices - {"cpu"}:
        raise Unsuitable(f"its inputs are on {', '.join(sorted(devices))}")
    if torch.is_autocast_enabled("cpu"):
        raise Unsuitable("autocast is on, which an ONNX graph does not show")
    reason = cannot_run(graph, inputs)
    if reason is not None:
        raise Unsuitable(reason)
    if any(isinstance(v, Tensor) and v.numel() == 0 for v in inputs):
        raise Unsuitable("an input is empty, which the runtime has no answer for")
    for node in graph.graph.nodes:
        if getattr(node.target, "__name__", "") in MODES:
            raise Unsuitable(f"{node.name} changes a mode that an ONNX graph does not show")
        if node.op == "call_function" and writes(node):
            raise Unsuitable(f"{node.name} writes in place")
        if draws(node):
            raise Unsuitable(f"{node.name} draws random numbers")
    _refuse_aliases(graph)


def _refuse_aliases(graph: GraphModule) -> None:
    """Outputs that share memory with an input, or with one another, would be copies."""
    seen = {}
    for node in graph.graph.find_nodes(op="placeholder"):
        if isinstance(node.meta.get("val"), Tensor):
            seen[StorageWeakRef(node.meta["val"].untyped_storage())] = node
    found = dict.fromkeys(pytree.tree_leaves(graph.graph.output_node().args[0]))
    for node in found:
        if isinstance(node, Node) and node.op == "placeholder":
            continue
        value = node.meta.get("val") if isinstance(node, Node) else None
        if isinstance(value, SymInt):
            raise Unsuitable(f"it answers a size, {node.name}")
        if not isinstance(value, Tensor):
            continue
        storage = StorageWeakRef(value.untyped_storage())
        if storage in seen:
            raise Unsuitable(f"its output {node.name} shares memory with {seen[storage].name}")
        seen[storage] = node


class _Flat(nn.Module):
    """A graph as a module of its tensors alone: sizes among the inputs are read from them."""

    def __init__(self, graph: GraphModule, inputs: Sequence[Any]) -> None:
        super().__init__()
        self.graph = graph
        self.places: list[tuple[int, int] | None] = []
        nodes = graph.graph.find_nodes(op="placeholder")
        values = [n.meta.get("val") for n in nodes]
        for node, value, given in zip(nodes, values, inputs, strict=True):
            if isinstance(given, Tensor):
                self.places.append(None)
                continue
            place = UNREAD if not node.users else _size_of(value, values)
            if place is None:
                raise Unsuitable(f"its input {given} is no tensor, nor the size of one")
            self.places.append(place)

    def forward(self, *tensors: Tensor) -> Any:
        """Outputs of the graph that are tensors, and not inputs."""
        each = iter(tensors)
        given = [next(each) if place is None else _read(tensors, place) for place in self.places]
        with preserve_node_meta():
            made = Interpreter(self.graph).run(*given)
        nodes = pytree.tree_leaves(self.graph.graph.output_node().args[0])
        leaves = pytree.tree_leaves(made)
        return [v for n, v in zip(nodes, leaves, strict=True) if _computed(n)]


def _read(tensors: Sequence[Tensor], place: tuple[int, int]) -> Any:
    return 0 if place == UNREAD else tensors[place[0]].shape[place[1]]


def _computed(node: Any) -> bool:
    return isinstance(node, Node) and node.op != "placeholder"


def _size_of(size: Any, values: Sequence[Any]) -> tuple[int, int] | None:
    """Which tensor (counted among tensors), and which dim of it, has this size."""
    tensors = [v for v in values if isinstance(v, Tensor)]
    for i, value in enumerate(tensors):
        for d, found in enumerate(value.shape):
            if isinstance(found, SymInt) and str(found) == str(size):
                return i, d
    return None


def _exported(
    module: nn.Module, graph: GraphModule, given: Sequence[Tensor], tensors: Sequence[int]
) -> Any:
    nodes = graph.graph.find_nodes(op="placeholder")
    shapes = []
    for i in tensors:
        value = nodes[i].meta.get("val")
        sizes = value.shape if isinstance(value, Tensor) else ()
        shapes.append({d: Dim.AUTO for d, s in enumerate(sizes) if isinstance(s, SymInt)})
    plain = tuple(v.detach() for v in given)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.export's own talk
        return torch.export.export(module, plain, dynamic_shapes=(tuple(shapes),), strict=False)


def _names(program: Any, tensors: Sequence[int]) -> dict[str, int]:
    """The argument of the graph that each input of the ONNX model is."""
    return dict(zip(program.graph_signature.user_inputs, tensors, strict=True))


class _Runner:
    """Runs a session on the arguments of a graph; puts outputs in the layout the graph has."""

    def __init__(
        self, graph: GraphModule, session: Any, names: dict[str, int], failures: Any
    ) -> None:
        self.graph, self.session, self.failures = graph, session, failures
        self.names = {n: i for n, i in names.items() if n in session.inputs}
        inputs = list(graph.graph.find_nodes(op="placeholder"))
        self.spec: Any = graph.graph.output_node().args[0]
        leaves = pytree.tree_leaves(self.spec)
        self.sources = [inputs.index(n) if n in inputs else None for n in leaves]
        self.leaves = leaves
        self.orders = [_order(n.meta["val"]) if _computed(n) else None for n in leaves]
        self.failed = False

    def __call__(self, *args: Any) -> Any:
        """Outputs of the graph."""
        if self.failed:
            return self.graph(*args)
        try:
            return self.run(args)
        except self.failures as error:
            self.failed = True
            warnings.warn(f"effpass: ONNX Runtime failed ({error}); eager runs", stacklevel=2)
            return self.graph(*args)

    def run(self, args: Sequence[Any]) -> Any:
        """The same, or the runtime's error."""
        given = {name: args[i] for name, i in self.names.items()}
        made = iter(self.session.run(given).values())
        outputs = []
        for leaf, source, order in zip(self.leaves, self.sources, self.orders, strict=True):
            if source is not None:
                outputs.append(args[source])
            elif not isinstance(leaf, Node):
                outputs.append(leaf)
            else:
                value = next(made)
                outputs.append(value if order is None else _laid_out(value, order))
        return pytree.tree_unflatten(outputs, pytree.tree_structure(self.spec))


def _order(value: Tensor) -> list[int] | None:
    """Dims from the slowest to the fastest; None where they are in order."""
    strides = [s.node.hint if isinstance(s, SymInt) else s for s in value.stride()]
    order = sorted(range(value.dim()), key=lambda d: (-strides[d], d))
    return None if order == list(range(value.dim())) else order


def _laid_out(value: Tensor, order: list[int]) -> Tensor:
    back = [order.index(d) for d in range(value.dim())]
    return value.permute(order).contiguous().permute(back)


def _compared(graph: GraphModule, run: _Runner, inputs: Sequence[Any]) -> str:
    """Runs both once. Raises Unsuitable where they disagree, or the runtime fails."""
    sizes = [v.node.hint if isinstance(v, SymInt) else v for v in inputs]
    with torch.no_grad():
        expected = pytree.tree_leaves(graph(*sizes))
    try:
        found = pytree.tree_leaves(run.run(sizes))
    except run.failures as error:
        raise Unsuitable(f"the runtime fails: {error}") from error
    worst = 0.0
    for i, (want, have) in enumerate(zip(expected, found, strict=True)):
        if isinstance(want, Tensor):
            try:
                worst = max(worst, difference(i, want, have))
            except VerificationError as error:
                raise Unsuitable(f"it disagrees with eager: {error}") from error
    return f"equal within {worst:.1e} of the largest value, in ONNX Runtime"
