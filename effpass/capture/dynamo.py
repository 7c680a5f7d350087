"""From a Dynamo graph to the pre-dispatch ATen graph that every rewrite works on.

The graph is run once, on fake values, under ``make_fx(pre_dispatch=True)``: autograd has not been
applied, in-place writes, ``no_grad`` and autocast regions survive as nodes, module paths and source
lines are kept. ``torch.export`` yields the same dialect. A higher-order op keeps its node; the body
of a checkpoint is captured as a graph of its own. A vmap becomes the operations that it stands for.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from typing import Any

import torch
from torch import Tensor
from torch._guards import TracingContext
from torch._ops import HigherOrderOperator
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.amp.autocast_mode import _enter_autocast, _exit_autocast
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import (
    disable_proxy_modes_tracing,
    get_proxy_mode,
    make_fx,
    track_tensor_tree,
)
from torch.fx.node import map_arg
from torch.fx.traceback import preserve_node_meta
from torch.utils import _pytree as pytree

from effpass.capture.vmapped import Like, VmapError, fold, is_vmap

CHECKPOINT = torch.ops.higher_order.tag_activation_checkpoint
FUNCTION = torch.ops.higher_order.autograd_function_apply
# these change a tensor's shape or history in place, which a traced graph does not show
RESHAPES_IN_PLACE = frozenset(
    (
        *("t_", "transpose_", "swapaxes_", "swapdims_", "unsqueeze_", "squeeze_", "resize_"),
        *("resize_as_", "set_", "as_strided_", "detach_", "requires_grad_"),
    )
)
UNRECORDED = ("_enter_inference_mode", "_exit_inference_mode")


class CaptureError(Exception):
    """This graph cannot be captured; the text says why. It runs as Dynamo made it."""


def capture(gm: GraphModule, example_inputs: Sequence[Any]) -> GraphModule:
    """The pre-dispatch ATen graph of a Dynamo graph, with the same inputs and outputs.

    ``example_inputs`` are what Dynamo gives a backend: real tensors (or fakes) and SymInts. Raises
    CaptureError when the graph holds what cannot be traced.
    """
    mode = _fake_mode()
    traced = _capture(gm, [_fake(value, mode) for value in example_inputs], mode)
    for node, value in zip(_placeholders(traced), example_inputs, strict=True):
        node.meta["effpass_parameter"] = isinstance(value, torch.nn.Parameter)
    return traced


def _capture(gm: GraphModule, values: list[Any], mode: FakeTensorMode) -> GraphModule:
    _refuse(gm)
    try:
        gm = fold(gm, mode, _like)
    except VmapError as reason:
        raise CaptureError(str(reason)) from reason
    constants = _constants(gm)
    bodies = {}
    for name, body, regions in _checkpoint_bodies(gm):
        bodies[name] = _body(body, regions, mode, _like)
    for name, body, regions in _function_bodies(gm):
        with suppress(Exception):  # it then stays as Dynamo made it
            bodies[name] = _body(body, regions, mode, _made_like)  # it runs without gradients
    lifted = [mode.from_tensor(t, static_shapes=True) for t in constants.values()]
    recorder = _Recorder(gm, mode, list(constants), bodies)

    def run(*args: Any) -> Any:
        return recorder.run_lifted(args[: len(values)], args[len(values) :])

    with mode, preserve_node_meta():
        traced = make_fx(run, pre_dispatch=True)(*values, *lifted)
    for node in traced.graph.find_nodes(op="call_function", target=operator.getitem):
        if not node.users:  # an output of a higher-order op that nobody reads
            traced.graph.erase_node(node)
    _unlift(traced, len(values), constants)
    _refuse_fakes(traced)
    traced.meta.update(gm.meta)
    return traced


def _body(gm: GraphModule, regions: list[Node], mode: FakeTensorMode, like: Like) -> GraphModule:
    """The captured body of a higher-order op that lies in these autocast regions."""
    with ExitStack() as stack:
        stack.enter_context(torch.set_grad_enabled(torch.is_grad_enabled()))
        for region in regions:
            stack.enter_context(_region(region))
        with mode:
            unread = torch.empty(0)
        inputs = [like(_example(n), mode) if n.users else unread for n in _placeholders(gm)]
        return _capture(gm, inputs, mode)


class _Recorder(Interpreter):
    """Runs a Dynamo graph under make_fx; keeps higher-order ops as single nodes."""

    def __init__(
        self,
        gm: GraphModule,
        mode: FakeTensorMode,
        constants: list[str],
        bodies: dict[str, GraphModule],
    ) -> None:
        super().__init__(gm)
        self.mode, self.names, self.bodies = mode, constants, bodies
        self.constants: dict[str, Any] = {}
        self.regions: dict[Node, torch.autocast] = {}

    def run_lifted(self, inputs: Sequence[Any], constants: Sequence[Any]) -> Any:
        self.constants = dict(zip(self.names, constants, strict=True))
        try:
            return self.run(*inputs)
        finally:  # only a failed run leaves a region open
            while self.regions:
                self.regions.popitem()[1].__exit__(None, None, None)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target in self.constants:
            return self.constants[target]
        return super().get_attr(target, args, kwargs)

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Records the operations of a vmap, each with its own line of the model."""
        return Interpreter(self.submodules[target]).run(*args)

    def run_node(self, n: Node) -> Any:
        if n.target in (_enter_autocast, _exit_autocast):
            return self._autocast(n)
        if n.op == "call_function" and isinstance(n.target, HigherOrderOperator):
            return self._keep(n)
        return super().run_node(n)

    def _autocast(self, n: Node) -> Any:
        """Records the node, and enters or leaves the region: values inside need its dtypes."""
        proxy = super().run_node(n)
        if n.target is _enter_autocast:
            self.regions[n] = _region(n)
            self.regions[n].__enter__()
        else:
            self.regions.pop(n.args[0]).__exit__(None, None, None)  # type: ignore[arg-type]
        return proxy

    def _keep(self, n: Node) -> Any:
        """Records the node as it is; its outputs are the fakes that Dynamo found."""
        mode = get_proxy_mode()
        assert mode is not None
        tracer = mode.tracer
        args = tuple(self._operand(tracer, arg) for arg in n.args)
        kwargs = {key: self._operand(tracer, value) for key, value in n.kwargs.items()}
        proxy = tracer.create_proxy("call_function", n.target, args, kwargs, name=n.name)
        for key in ("stack_trace", "nn_module_stack", "example_value"):
            if key in n.meta:
                proxy.node.meta[key] = n.meta[key]
        with disable_proxy_modes_tracing():
            value = pytree.tree_map(lambda v: _like(v, self.mode), n.meta["example_value"])
        return track_tensor_tree(value, proxy, constant=None, tracer=tracer)

    def _operand(self, tracer: Any, arg: Any) -> Any:
        def one(node: Node) -> Any:
            value = self.env[node]
            if isinstance(value, torch.nn.Module):
                name = str(node.target)
                body = self.bodies.get(name, value)
                tracer.root.register_module(name, body)
                return tracer.create_proxy("get_attr", name, (), {}, name=name)
            return tracer.unwrap_proxy(value)

        return map_arg(arg, one)


def _refuse(gm: GraphModule) -> None:
    for node in gm.graph.nodes:
        if node.op == "call_module":
            raise CaptureError(f"it calls the module {node.target} without tracing into it")
        if getattr(node.target, "__name__", "") in UNRECORDED:
            raise CaptureError(f"{node.name} changes a mode that a traced graph does not show")
        if not is_vmap(node) and "functorch" in (getattr(node.target, "__module__", None) or ""):
            raise CaptureError(f"{node.name} is part of a grad transform")
        name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
        if str(name).partition(".")[0] in RESHAPES_IN_PLACE:
            raise CaptureError(f"{name} changes a tensor's shape or history in place")


def _fake_mode() -> FakeTensorMode:
    """A fresh mode over Dynamo's symbols: Dynamo's own fakes may have been changed in place."""
    context = TracingContext.try_get()
    if context is None or context.fake_mode is None:
        raise CaptureError("there is no Dynamo tracing context")
    return FakeTensorMode(shape_env=context.fake_mode.shape_env)


def _fake(value: Any, mode: FakeTensorMode) -> Any:
    """The fake of one graph input, with the dynamic dims that Dynamo gave it."""
    if not isinstance(value, Tensor):
        return value
    if isinstance(value, FakeTensor):
        return _like(value, mode)
    context = TracingContext.get().tensor_to_context.get(value)
    if context is None:
        return mode.from_tensor(value, static_shapes=True)
    source = getattr(context, "tensor_source", None)
    return mode.from_tensor(value, symbolic_context=context, source=source)


def _like(value: Any, mode: FakeTensorMode) -> Any:
    """A fake of the same size, strides, dtype, device and requires_grad in ``mode``."""
    made = _made_like(value, mode)
    if isinstance(value, Tensor) and value.requires_grad:
        made.requires_grad_()
        return made if value.is_leaf else made.clone()
    return made


def _made_like(value: Any, mode: FakeTensorMode) -> Any:
    """The same that requires no gradient."""
    if not isinstance(value, Tensor):
        return value
    with mode:
        size, stride = value.size(), value.stride()
        return torch.empty_strided(size, stride, dtype=value.dtype, device=value.device)


def _placeholders(gm: GraphModule) -> Sequence[Node]:
    return gm.graph.find_nodes(op="placeholder")


def _example(node: Node) -> Any:
    if "example_value" not in node.meta:
        raise CaptureError(f"input {node.name} has no fake value")
    return node.meta["example_value"]


def _constants(gm: GraphModule) -> dict[str, Tensor]:
    found = {}
    for node in gm.graph.find_nodes(op="get_attr"):
        value = operator.attrgetter(str(node.target))(gm)
        if isinstance(value, Tensor):
            found[node.target] = value
    return found


Bodies = list[tuple[str, GraphModule, list[Node]]]


def _checkpoint_bodies(gm: GraphModule) -> Bodies:
    """Name and body of each checkpoint, and the autocast regions around it, outermost first."""
    return [(*_named(gm, node.args[0]), regions) for node, regions in _operators(gm, CHECKPOINT)]


def _function_bodies(gm: GraphModule) -> Bodies:
    """The same of each ``autograd.Function``: forward, and backward where nothing is autocast."""
    found: Bodies = []
    for node, regions in _operators(gm, FUNCTION):
        forward, backward, *tensors = node.args
        devices = {_example(t).device.type for t in tensors if isinstance(t, Node)}
        if node.kwargs.get("dirty_idx"):
            continue
        found.append((*_named(gm, forward), regions))
        if not regions and not any(torch.is_autocast_enabled(device) for device in devices):
            found.append((*_named(gm, backward), regions))
    return found


def _named(gm: GraphModule, attribute: Any) -> tuple[str, GraphModule]:
    return attribute.target, getattr(gm, attribute.target)


def _operators(gm: GraphModule, target: Any) -> list[tuple[Node, list[Node]]]:
    """Nodes of a target, and the autocast regions around each, outermost first."""
    found, regions = [], []
    for node in gm.graph.nodes:
        if node.target is _enter_autocast:
            regions.append(node)
        elif node.target is _exit_autocast:
            regions.remove(node.args[0])
        elif node.target is target:
            found.append((node, list(regions)))
    return found


def _region(enter: Node) -> torch.autocast:
    """The autocast region that a node enters; without its cache, which would outlive the trace."""
    device, dtype, enabled, _ = enter.args
    return torch.autocast(device, dtype, enabled, cache_enabled=False)  # type: ignore[arg-type]


def _refuse_fakes(traced: GraphModule) -> None:
    for node in traced.graph.find_nodes(op="get_attr"):
        if isinstance(operator.attrgetter(str(node.target))(traced), FakeTensor):
            raise CaptureError(f"{node.name} was read past the trace (through .data, say)")


def _unlift(traced: GraphModule, inputs: int, constants: dict[str, Tensor]) -> None:
    """Turns the placeholders of constants back into attributes."""
    placeholders = _placeholders(traced)[inputs:]
    for i, (node, value) in enumerate(zip(placeholders, constants.values(), strict=True)):
        name = f"constant_{i}"
        traced.register_buffer(name, value, persistent=False)
        with traced.graph.inserting_before(node):
            attribute = traced.graph.get_attr(name)
        attribute.meta = dict(node.meta)
        node.replace_all_uses_with(attribute)
        traced.graph.erase_node(node)
    traced.recompile()
