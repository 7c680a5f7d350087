"""Mutants: the captured graph of a program with one or a few small changes, as a program again.

Whatever a pattern looks at may be changed: an index, a number, an operation, which tensor is read.
What is left is nearly the mathematics that the program was, without anyone having thought of it.
"""

from __future__ import annotations

import operator
import random
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, Node
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from tests.patterns.programs import LARGEST, Program
from tests.patterns.runs import Invalid, capture, run

aten = torch.ops.aten
OTHERS: dict[Any, tuple[Any, ...]] = {
    aten.mul.Tensor: (aten.add.Tensor, aten.sub.Tensor, aten.div.Tensor),
    aten.add.Tensor: (aten.mul.Tensor, aten.sub.Tensor, aten.maximum.default),
    aten.sub.Tensor: (aten.add.Tensor, aten.mul.Tensor),
    aten.div.Tensor: (aten.mul.Tensor,),
    aten.exp.default: (aten.neg.default, aten.sigmoid.default, aten.exp2.default),
    aten.sigmoid.default: (aten.tanh.default, aten.relu.default),
    aten.cumsum.default: (aten.cumprod.default,),
    aten.tril.default: (aten.triu.default,),
    aten.triu.default: (aten.tril.default,),
    aten.mean.dim: (aten.sum.dim_IntList,),
    aten.sum.dim_IntList: (aten.mean.dim,),
}
ROUNDS = 12


def mutant(program: Program, seed: str) -> Program | None:
    """One to three changes of the captured graph; None where none of some tries runs."""
    choice = random.Random(seed + "mutant")
    try:
        graph, _ = capture(program)
    except Invalid:
        return None
    for _ in range(ROUNDS):
        copy = Graph()
        copy.output(copy.graph_copy(graph.graph, {}))
        if not all([_change(copy, choice) for _ in range(choice.choice((1, 1, 2, 3)))]):
            continue
        made = _program(copy, program)
        if made is not None and sound(made):
            return made
    return None


def sound(program: Program) -> bool:
    """It runs, nothing is too large, and nothing is written over what it is made of."""
    try:
        with _Writes():
            result = run(program.function(), program)
    except Exception:
        return False
    return all(_tame(o) for o in result.outputs if o.is_floating_point())


def _tame(value: Tensor) -> bool:
    value = value.detach().double()
    return bool(value.isfinite().all()) and bool((value.abs() < LARGEST).all())


class _Writes(TorchDispatchMode):
    """Refuses writes from memory that overlaps what is written: eager's result is any."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.is_mutable and args and isinstance(args[0], Tensor):
            for other in args[1:]:
                if isinstance(other, Tensor) and _overlap(args[0], other):
                    raise Invalid(f"{func} reads what it writes")
        return func(*args, **(kwargs or {}))


def _overlap(a: Tensor, b: Tensor) -> bool:
    if a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr():
        return False
    same = (a.shape, a.stride(), a.storage_offset()) == (b.shape, b.stride(), b.storage_offset())
    return not same and bool(_elements(a) & _elements(b))


def _elements(value: Tensor) -> set[int]:
    count = value.untyped_storage().nbytes() // value.element_size()
    places = torch.arange(count).as_strided(value.shape, value.stride(), value.storage_offset())
    return set(places.flatten().tolist())


def _program(graph: Graph, program: Program) -> Program | None:
    """The graph as text; None where it holds tensors."""
    code = graph.python_code("self").src
    if "self." in code:
        return None
    lines = [line.split(";  ")[0] for line in code.splitlines() if line.strip()]
    start = next(i for i, line in enumerate(lines) if line.startswith("def "))
    names = [node.name for node in graph.find_nodes(op="placeholder")]
    head = f"def program({', '.join(names)}):"
    body = [re.sub(r"^(\s*\w+) : [^=]+ =", r"\1 =", line) for line in lines[start + 1 :]]
    text = "\n".join([head, *body]) + "\n"
    return replace(program, text=text, twists=program.twists + 1)


def _change(graph: Graph, choice: random.Random) -> bool:
    nodes = [n for n in graph.nodes if n.op == "call_function"]
    for _ in range(ROUNDS if nodes else 0):
        node, how = choice.choice(nodes), choice.choice(CHANGES)
        if how(node, choice):
            return True
    return False


def _another_source(node: Node, choice: random.Random) -> bool:
    """Reads another tensor of the same shape."""
    sources = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
    if not sources:
        return False
    old = choice.choice(sources)
    before = []
    for other in node.graph.nodes:
        if other is node:
            break
        value = other.meta.get("val")
        if other is not old and isinstance(value, Tensor) and value.shape == old.meta["val"].shape:
            before.append(other)
    before = [n for n in before if n.meta["val"].dtype == old.meta["val"].dtype]
    if not before:
        return False
    node.replace_input_with(old, choice.choice(before))
    return True


def _another_number(node: Node, choice: random.Random) -> bool:
    """An index, a dim, a size or a factor that is a little off."""
    leaves, spec = pytree.tree_flatten((list(node.args), dict(node.kwargs)))
    at = [i for i, v in enumerate(leaves) if type(v) in (int, float)]
    if not at or node.target is operator.getitem:
        return False
    i = choice.choice(at)
    if isinstance(leaves[i], int):
        leaves[i] += choice.choice((1, -1))
    else:
        leaves[i] = leaves[i] * 0.5 + choice.choice((0.0, 0.5))
    args, kwargs = pytree.tree_unflatten(leaves, spec)
    node.args, node.kwargs = tuple(args), kwargs
    return True


def _another_index(node: Node, choice: random.Random) -> bool:
    """Another of several results."""
    if node.target is not operator.getitem:
        return False
    count = len(node.args[0].meta["val"])  # type: ignore[union-attr]
    node.args = (node.args[0], choice.randrange(count))
    return True


def _another_operation(node: Node, choice: random.Random) -> bool:
    if node.target not in OTHERS:
        return False
    node.target = choice.choice(OTHERS[node.target])
    return True


def _left_out(node: Node, choice: random.Random) -> bool:
    """Its first source of the same shape takes its place."""
    value = node.meta.get("val")
    for source in node.all_input_nodes:
        before = source.meta.get("val")
        if isinstance(value, Tensor) and isinstance(before, Tensor):
            if before.shape == value.shape and before.dtype == value.dtype:
                node.replace_all_uses_with(source)
                node.graph.erase_node(node)
                return True
    return False


def _swapped(node: Node, choice: random.Random) -> bool:
    """Its first two arguments change places."""
    tensors = [i for i, a in enumerate(node.args) if isinstance(a, Node)]
    if len(tensors) < 2:
        return False
    args = list(node.args)
    i, j = choice.sample(tensors, 2)
    args[i], args[j] = args[j], args[i]
    node.args = tuple(args)
    return True


def _inserted(node: Node, choice: random.Random) -> bool:
    """One more operation behind a node."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or not value.is_floating_point() or not value.dim():
        return False
    extra: Callable[..., Any]
    extra, *args = choice.choice(
        (
            (aten.neg.default,),
            (aten.mul.Tensor, 2.0),
            (aten.add.Tensor, 0.5),
            (aten.tanh.default,),
            (aten.flip.default, [choice.randrange(value.dim())]),
            (aten.roll.default, [1], [choice.randrange(value.dim())]),
            (aten.transpose.int, *choice.choices(range(value.dim()), k=2)),
            (aten.detach.default,),
            (aten.clone.default,),
        )
    )
    users = list(node.users)
    with node.graph.inserting_after(node):
        made = node.graph.call_function(extra, (node, *args))
    made.meta["val"] = value
    for user in choice.choice((users, users[:1], users[-1:])):
        user.replace_input_with(node, made)
    return True


CHANGES = (
    _another_source,
    _another_number,
    _another_index,
    _another_operation,
    _left_out,
    _swapped,
    _inserted,
)
