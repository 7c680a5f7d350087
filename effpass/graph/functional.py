"""Functional form: in-place writes become dataflow. Exact, gradients included.

``ys[:, t] = y`` is captured as ``select`` and ``copy_``; it becomes ``select_scatter``, and whoever
reads ``ys`` or a view of it afterwards reads the new value. In the order of the graph, every
storage has a current version of its base; a write computes the new value of the view it writes to,
puts it back into the base (``effpass.graph.put_back``), and that is the next version. Which writes
stay, and why: ``effpass.graph.storages``. Last, buffers that were filled piece by piece become one
``stack`` or ``cat`` (``effpass.graph.buffers``).
"""

from __future__ import annotations

import operator
import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from effpass.graph.buffers import tidy
from effpass.graph.emit import Emitter, fake_mode, row_major, same_layout, same_sizes, storage_key
from effpass.graph.put_back import Change, all_of, cut, put_back
from effpass.graph.reach import Reach
from effpass.graph.storages import Storage, Storages, gapped, idle, out_of_place, removable

aten = torch.ops.aten
ARITHMETIC = (
    *(aten.add_.Tensor, aten.sub_.Tensor, aten.mul_.Tensor, aten.div_.Tensor),
    *(aten.addcmul_.default, aten.addcdiv_.default, aten.lerp_.Tensor, aten.lerp_.Scalar),
)
# these read nothing but the shape, which no write changes
SHAPE_READERS = ("sym_size", "sym_numel", "sym_stride", "sym_storage_offset")


def functional(gm: GraphModule) -> int:
    """Rewrites the writes of one graph (not of the bodies inside it); answers how many.

    The module is not recompiled.
    """
    mode = fake_mode(gm)
    if mode is None:
        return 0
    found = Storages(gm)
    count = sum(len(storage.writes) for storage in found if storage.live)
    if count:
        _Rewriting(gm, found, Emitter(gm.graph, mode)).run()
    tidy(gm, mode)
    return count


@dataclass
class _Version:
    """The current version of a storage: ``base``, and the views ``taken`` of it so far, each with
    the number of the version it shows. ``place`` is the last write: views are taken before it."""

    base: Node
    number: int = 0
    place: Node | None = None
    taken: dict[Node, tuple[int, Node]] = field(default_factory=dict)


class _Rewriting:
    def __init__(self, gm: GraphModule, found: Storages, emit: Emitter) -> None:
        self.graph, self.found, self.emit = gm.graph, found, emit
        self.reach = Reach(found)
        self.versions = {s: _Version(s.base) for s in found if s.live}
        self.moved: set[Node] = set()  # views of other memory than before

    def run(self) -> None:
        for node in list(self.graph.nodes):
            self.emit.see(node)
            storage = self.found.of.get(node)
            if node in self.found.results and storage in self.versions:
                self._write(node, storage)
            elif any(self.found.of.get(n) in self.versions for n in node.all_input_nodes):
                self._read(node)
        self._erase()
        self._revalue()

    def now(self, node: Node) -> Node:
        """The node that holds what ``node`` would show here."""
        storage = self.found.of.get(node)
        if storage not in self.versions:
            return node
        version, view = self.versions[storage], self.found.rooted(node)
        stale = []
        while view is not storage.base and version.taken[view][0] != version.number:
            stale.append(view)
            view = self.found.parent[view]
        source = version.base if view is storage.base else version.taken[view][1]
        for view in reversed(stale):
            source = self._taken_again(view, source, version)
            version.taken[view] = (version.number, source)
        return source

    def _taken_again(self, view: Node, source: Node, version: _Version) -> Node:
        assert version.place is not None
        if view.target is not operator.getitem:
            rest, kwargs = view.args[1:], dict[str, Any](view.kwargs)
            return self.emit.call(version.place, view, view.target, source, *rest, **kwargs)
        parent = self.found.parent[view]
        piece = cut(view, parent)
        if piece is not None:
            return self.emit.call(version.place, view, piece[0], source, *piece[1])
        pieces: Node = view.args[0]  # type: ignore[assignment]
        again = self.emit.call(version.place, pieces, pieces.target, source, *pieces.args[1:])
        return self.emit.call(version.place, view, view.target, again, view.args[1])

    def _read(self, node: Node) -> None:
        storage = self.found.of.get(node)
        version = self.versions.get(storage) if storage else None
        if getattr(node.target, "_opname", "") in SHAPE_READERS:
            node.args = map_arg(node.args, self.found.rooted)  # any version
            return
        if version is not None and node.target is operator.getitem:
            pieces: Node = node.args[0]  # type: ignore[assignment]
            version.taken[node] = (version.taken[pieces][0], node)
            self.moved.add(node)
            return
        node.args, node.kwargs = map_arg((node.args, node.kwargs), self.now)
        if version is not None:
            version.taken[node] = (version.number, node)
            if version.number:
                self.moved.add(node)

    def _write(self, write: Node, storage: Storage) -> None:
        version = self.versions[storage]
        view = self.found.rooted(write.args[0])  # type: ignore[arg-type]
        if idle(write) or self._onto_itself(write, view):
            return
        part, source = self._new_value(write, view)
        changed, memory = [(view, part)], self.found.memory
        while view is not storage.base:
            parent = self.found.parent[view]
            change = Change(view, parent, part, lambda p=parent: self.now(p), write, self.emit)
            view, part = parent, put_back(change)
            changed.append((view, part))
        changed.pop()
        base = self._settled(write, storage, part, source)
        old, version.base = version.base, base
        version.place, version.number = write, version.number + 1
        for view, part in changed:
            like = not gapped(memory[view]) and same_layout(memory[view], part.meta["val"])
            if like and not _shares(part, source) and self._passes_on(old, part):
                version.taken[view] = (version.number, part)

    def _passes_on(self, old: Node, new: Node) -> bool:
        """Whoever reads ``new`` gives no gradient of zero less than memory that was ``old``."""
        return not self.reach.of(old) & ~self.reach.of(new)

    def _onto_itself(self, write: Node, view: Node) -> bool:
        """``y[i] += 1`` is an ``add_``, and then a copy of the result to where it is."""
        if write.target is not aten.copy_.default:
            return False
        source: Node = write.args[1]  # type: ignore[assignment]
        if self.found.of.get(source) is not self.found.of[view]:
            return False
        if self.found.stuck.get(self.found.rooted(source)):  # detached, say
            return False
        return all_of(self.found.memory[view], self.found.memory[source])

    def _new_value(self, write: Node, view: Node) -> tuple[Node, Node | None]:
        """The new value of ``view``, and the node whose memory that may be."""
        name = write.target._opname  # type: ignore[union-attr]
        if name == "copy_" or write.target is aten.fill_.Tensor:
            return self._copied(write, view)
        dtype, device = view.meta["val"].dtype, view.meta["val"].device
        if name in ("fill_", "zero_"):
            value = write.args[1] if name == "fill_" else 0
            sizes = self.emit.sizes(write, view)
            made = self._call(write, aten.full.default, sizes, value, dtype=dtype, device=device)
            return made, None
        args, kwargs = map_arg((write.args, write.kwargs), self.now)
        form, like = out_of_place(write.target), view if _plain(write, view) else None  # type: ignore[arg-type]
        made = self.emit.call(write, write, form, *args, like=like, **kwargs)
        return self._cast(write, made, dtype), None

    def _copied(self, write: Node, view: Node) -> tuple[Node, Node | None]:
        given: Node = write.args[1]  # type: ignore[assignment]
        source, storage = self.now(given), self.found.of.get(given)
        if storage is None or storage.written:  # what was copied must not change with it
            source = self._call(write, aten.clone.default, source)
        part = self._cast(write, source, view.meta["val"].dtype)
        if not same_sizes(part.meta["val"].shape, view.meta["val"].shape):
            part = self._call(write, aten.expand.default, part, self.emit.sizes(write, view))
        return part, source

    def _settled(self, write: Node, storage: Storage, new: Node, source: Node | None) -> Node:
        """The next version of the base: ``new``, with the layout and the gradients of memory."""
        old, value = self.versions[storage].base, new.meta["val"]
        fits = same_layout(storage.base.meta["val"], value) and not _lazy(value)
        if not self._passes_on(old, new):
            return self._over(write, old, new)
        if fits and not (storage.outputs and _shares(new, source)):
            return new
        dense = torch.contiguous_format
        copied = self._call(write, aten.clone.default, new, memory_format=dense)
        if same_layout(storage.base.meta["val"], copied.meta["val"]) and not _lazy(value):
            return copied
        return self._over(write, old, new)

    def _over(self, write: Node, old: Node, new: Node) -> Node:
        """``new`` written over all of ``old``: its layout, and a gradient of zero to it."""
        if not new.meta["val"].dim():
            return self._call(write, aten.fill.Tensor, old, new)
        return self._call(write, aten.slice_scatter.default, old, new, 0, 0, sys.maxsize)

    def _cast(self, write: Node, node: Node, dtype: torch.dtype) -> Node:
        if node.meta["val"].dtype == dtype:
            return node
        return self._call(write, aten.to.dtype, node, dtype)

    def _call(self, write: Node, target: object, *args: Any, **kwargs: Any) -> Node:
        return self.emit.call(write, write, target, *args, **kwargs)

    def _erase(self) -> None:
        """Writes, and the views that only they read."""
        own = {n for n, storage in self.found.of.items() if storage in self.versions}
        own.update(self.emit.made)
        for node in reversed(list(self.graph.nodes)):
            if node in own and not node.users and (node in self.found.results or removable(node)):
                self.graph.erase_node(node)

    def _revalue(self) -> None:
        """Views that moved, and what was made of them, get values that share the right memory."""
        old: dict[Node, int | None] = {}
        made = set(self.emit.made)
        for node in self.graph.nodes:
            sources = [old[n] for n in node.all_input_nodes if n in old]
            if node in self.moved or (sources and node in made and _key(node) in sources):
                old[node] = _key(node)
                self.emit.run(node)


def _key(node: Node) -> int | None:
    """The storage of a value, or of the first of several."""
    first = next((v for v in pytree.tree_leaves(node.meta["val"]) if isinstance(v, Tensor)), None)
    return None if first is None else storage_key(first)


def _plain(write: Node, view: Node) -> bool:
    """Arithmetic of a contiguous float tensor and others of its dtype gives another such one."""
    values = [n.meta["val"] for n in write.all_input_nodes]
    value = view.meta["val"]
    same = all(v.dtype == value.dtype for v in values if isinstance(v, Tensor))
    return write.target in ARITHMETIC and same and value.is_floating_point() and row_major(value)


def _shares(node: Node, source: Node | None) -> bool:
    if source is None:
        return False
    return storage_key(node.meta["val"]) == storage_key(source.meta["val"])


def _lazy(value: Tensor) -> bool:
    """A conjugate or a negative that is taken when it is read."""
    return value.is_conj() or value.is_neg()
