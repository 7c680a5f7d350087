"""Which nodes of a graph share memory, which writes they see, and which of these must stay.

A storage is known by the fake values of its nodes: views and results of in-place ops share one. Its
base is the node that made it. Writes to it stay where dataflow cannot say the same as memory:

* the base is an input, an attribute, or comes out of anything but an ATen op or one of effpass;
* it is read by a higher-order op, by any other op, or by one that writes without saying so;
* base, views and writes lie in several regions (grad mode and autocast may differ);
* an op that writes is random, writes to several tensors, or has no form out of place;
* a view that is written through cannot be put back (``detach``, ``expand``, ``as_strided``, ...);
* two outputs of the graph lie in it; the base has gaps in memory; fake values are missing.

A write whose operand overlaps the written view reads what was there before the write: eager leaves
the result of that open.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from effpass.graph.emit import same_layout, same_sizes, storage_key
from effpass.graph.put_back import all_of, irreversible
from effpass.graph.regions import Modes, region, region_modes
from effpass.graph.writes import writes

aten = torch.ops.aten
NAMESPACES = ("aten", "effpass", "prims")
FILLS = ("copy_", "fill_", "zero_")
# mutated by batch_norm and instance_norm, whose schemas do not say so
STATISTICS = ("running_mean", "running_var")
# these take memory as it lies
RAW = ("as_strided", "unsafe_split", "unsafe_split_with_sizes", "unsafe_chunk", "set", "data")
# the second tensor gives but a shape or a dtype
SHAPED_LIKE = ("view_as", "reshape_as", "expand_as", "type_as")


@dataclass(eq=False)
class Storage:
    """One piece of memory: ``base`` made it, ``writes`` go to it or to views of it."""

    base: Node
    writes: list[Node] = field(default_factory=list)
    outputs: set[Node] = field(default_factory=set)
    elsewhere: bool = False  # a view lies in another region
    problem: str = ""  # why writes stay

    @property
    def live(self) -> bool:
        """Its writes can become dataflow."""
        return bool(self.writes) and not self.problem

    @property
    def written(self) -> bool:
        """Its contents change, and will go on doing so."""
        return bool(self.writes) and bool(self.problem)

    def stays(self, problem: str) -> None:
        """Notes why the writes stay; the first reason counts."""
        self.problem = self.problem or problem


class Storages:
    """All storages of a graph. ``results``: of in-place ops; ``root``: the view or base that these,
    and views of all of it, are; ``parent``: the view or base that a view was taken of; ``memory``:
    values, as they share memory now; ``stuck``: why a view cannot be written through."""

    def __init__(self, gm: GraphModule) -> None:
        self.of: dict[Node, Storage] = {}
        self.results: set[Node] = set()
        self.root: dict[Node, Node] = {}
        self.parent: dict[Node, Node] = {}
        self.memory: dict[Node, Any] = {}
        self.modes: list[Modes] = region_modes(gm)
        self.unknown: set[Node] = set()  # written, without a fake value
        self._keyed: dict[int, Storage] = {}
        self.stuck: dict[Node, str] = {}
        for node in gm.graph.nodes:
            self._add(node)

    def __iter__(self) -> Iterator[Storage]:
        return iter(self._keyed.values())

    def rooted(self, node: Node) -> Node:
        """The view or base that ``node`` is."""
        return self.root.get(node, node)

    def _add(self, node: Node) -> None:
        read = [self.of[n] for n in node.all_input_nodes if n in self.of]
        if node.op == "output":
            self._returned(node)
            return
        problem = _reader_problem(node) if read else ""
        for storage in read if problem else ():
            storage.stays(problem)
        for target in (*writes(node), *_statistics(node)):
            if target in self.of:
                self.of[target].writes.append(node)
                self.of[target].stays(self._write_problem(node, self.of[target]))
            else:
                self.unknown.add(target)
        self._join(node)

    def _returned(self, output: Node) -> None:
        for node in output.all_input_nodes:
            if node in self.of:
                storage = self.of[node]
                storage.outputs.add(node)
                if len(storage.outputs) > 1:
                    storage.stays("two outputs of the graph share it")

    def _join(self, node: Node) -> None:
        """Finds the storage that ``node`` lies in, or starts one."""
        value = node.meta.get("val")
        tensors = [v for v in pytree.tree_leaves(value) if isinstance(v, Tensor)]
        keys = {key for v in tensors if (key := storage_key(v)) is not None}
        if keys:
            self.memory[node] = value
        known = [self._keyed[key] for key in keys if key in self._keyed]
        if isinstance(value, Tensor) and keys and not known:
            storage = Storage(node)
            storage.stays(_base_problem(node))
            self.of[node] = self._keyed[keys.pop()] = storage
        for storage in known:
            self.of[node] = storage
            storage.stays("" if len(known) == 1 else f"{node.name} lies in several storages")
            self._view(node, storage)

    def _view(self, node: Node, storage: Storage) -> None:
        source = node.args[0] if node.args else None
        if source in writes(node):
            self.results.add(node)
            self.root[node] = self.rooted(source)  # type: ignore[arg-type]
            return
        if node.target is operator.getitem:  # one of the pieces of a chunk or split
            source = self.parent.get(source)  # type: ignore[arg-type]
        if not isinstance(source, Node) or self.of.get(source) is not storage:
            storage.stays(f"{node.name} shares it in an unknown way")
            return
        self.parent[node] = parent = self.rooted(source)
        here = region(node) == region(storage.base)
        storage.elsewhere |= not here
        storage.stays(_view_problem(node))
        value = node.meta["val"]
        if isinstance(value, Tensor):
            stuck = irreversible(node, parent)
            self.stuck[node] = self.stuck.get(parent, "") or stuck
            if here and not stuck and all_of(value, parent.meta["val"]):
                self.root[node] = parent

    def _write_problem(self, node: Node, storage: Storage) -> str:
        """Why this write cannot become dataflow; empty if it can."""
        target, view = node.target, node.args[0] if node.args else None
        if not isinstance(target, OpOverload) or target.namespace != "aten":
            return f"{node.name} writes to it, and is not an ATen op"
        if not writes(node):
            return f"{node.name} writes to it without saying so"
        if not isinstance(view, Node) or writes(node) != [view]:
            return f"{node.name} writes to more than its first operand"
        if idle(node):
            return ""
        if torch.Tag.nondeterministic_seeded in target.tags:
            return f"{node.name} is random"
        if target._opname not in FILLS and out_of_place(target) is None:
            return f"{target} has no form out of place"
        if storage.elsewhere or region(node) != region(storage.base):
            return f"{node.name} writes in another grad mode or autocast region"
        if self._cast_by_autocast(node):
            return f"autocast changes the form of {target} out of place"
        if self.stuck.get(self.rooted(view)):
            return self.stuck[self.rooted(view)]
        if gapped(storage.base.meta["val"]):
            return f"{storage.base.name} has gaps in memory"
        return _value_problem(node, view)

    def _cast_by_autocast(self, node: Node) -> bool:
        target = out_of_place(node.target)  # type: ignore[arg-type]
        on = self.modes[region(node)].autocast
        if target is None or node.target._opname in FILLS:  # type: ignore[union-attr]
            return False
        has = torch._C._dispatch_has_kernel_for_dispatch_key
        return any(has(target.name(), f"Autocast{device.upper()}") for device in on)


def written_storages(gm: GraphModule) -> set[Node]:
    """The nodes whose contents some node of the graph changes after they are made."""
    found = Storages(gm)
    return found.unknown | {node for node, storage in found.of.items() if storage.writes}


@functools.cache
def out_of_place(target: OpOverload) -> OpOverload | None:
    """The overload that computes what ``op_`` writes: ``add_.Tensor`` -> ``add.Tensor``."""
    name, schema = target._opname, target._schema
    plain = f"__{name[3:]}" if name.startswith("__i") else name.removesuffix("_")
    packet = getattr(aten, plain, None)
    if plain == name or packet is None:
        return None
    wanted = [(a.name, str(a.type)) for a in schema.arguments]
    for overload in packet.overloads():
        form = getattr(packet, overload)
        same = [(a.name, str(a.type)) for a in form._schema.arguments] == wanted
        pure = not form._schema.is_mutable and torch.Tag.generated not in form.tags
        fresh = all(r.alias_info is None for r in form._schema.returns)
        if same and pure and fresh and len(form._schema.returns) == 1:
            return form
    return None


def idle(node: Node) -> bool:
    """Writes nothing: dropout in evaluation, and ``torch.tensor``'s way to detach a constant."""
    name, source = getattr(node.target, "_opname", ""), node.args[0]
    if name == "detach_":
        return isinstance(source, Node) and source.target is aten.lift_fresh_copy.default
    return name in ("dropout_", "alpha_dropout_", "feature_dropout_") and node.args[2] is False


def removable(node: Node) -> bool:
    """Without users, the node does nothing."""
    target = node.target
    if target is operator.getitem:
        return True
    if not isinstance(target, OpOverload) or target.namespace not in NAMESPACES:
        return False
    random = torch.Tag.nondeterministic_seeded in target.tags
    return not random and not writes(node) and not _statistics(node)


def _reader_problem(node: Node) -> str:
    target = node.target
    if target is operator.getitem:
        return ""
    if not isinstance(target, OpOverload):
        return f"{node.name} reads it, and is not an ATen op"
    if target.namespace not in NAMESPACES:
        return f"{node.name} reads it, and is an op of {target.namespace}"
    if target._opname in RAW:
        return f"{node.name} takes its memory as it lies"
    return "" if "val" in node.meta or not target._schema.returns else f"{node.name} has no value"


def _base_problem(node: Node) -> str:
    maker = node.args[0] if node.target is operator.getitem else node
    if node.op != "call_function" or not isinstance(maker, Node):
        return f"{node.name} is not made in the graph"
    if not isinstance(maker.target, OpOverload) or maker.target.namespace not in NAMESPACES:
        return f"{node.name} is not made by an ATen op"
    return ""


def _view_problem(node: Node) -> str:
    """Why a view cannot be taken again of a later version."""
    if node.target is operator.getitem:
        return ""
    name = getattr(node.target, "_opname", "")
    if len(node.all_input_nodes) > 1 and name not in SHAPED_LIKE:
        tensors = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
        return f"{node.name} shares it with other operands" if len(tensors) > 1 else ""
    return ""


def _value_problem(node: Node, view: Node) -> str:
    if any("val" not in n.meta for n in node.all_input_nodes) or "val" not in node.meta:
        return f"{node.name} has no fake value"
    value, result = view.meta["val"], node.meta["val"]
    if not same_layout(value, result):
        return f"{node.name} changes the shape"
    copies = node.target._opname in FILLS  # type: ignore[union-attr]
    others = [n.meta["val"] for n in node.all_input_nodes if isinstance(n.meta["val"], Tensor)]
    if any(v.device != value.device and (v.dim() or copies) for v in others):
        return f"{node.name} copies from another device"
    return ""


def gapped(value: Tensor) -> bool:
    """Some memory between the elements, or elements that share memory."""
    strides = value.stride()
    wide = [d for d, n in enumerate(value.shape) if not (isinstance(n, int) and n == 1)]
    hints = [s.node.hint if isinstance(s, torch.SymInt) else s for s in strides]
    if value.shape.count(0) or any(hint is None for hint in hints):
        return any(hint is None for hint in hints)
    expected: Any = 1
    for d in sorted(wide, key=lambda d: hints[d]):
        if not same_sizes([strides[d]], [expected]):
            return True
        expected = expected * value.shape[d]
    return False


def _statistics(node: Node) -> list[Node]:
    schema: Any = getattr(node.target, "_schema", None)
    if schema is None or "_norm" not in schema.name:
        return []
    given = {a.name: v for a, v in zip(schema.arguments, node.args, strict=False)} | node.kwargs
    return [v for name in STATISTICS if isinstance(v := given.get(name), Node)]
