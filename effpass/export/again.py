"""Exports a rewritten graph once more: with inputs of its own, and the weights of the program.

A rewrite that changes what the inputs are (a packed row and its offsets, sizes behind an anchor)
makes a graph of other placeholders. ``torch.export`` then writes its signature and its symbols
anew, so that nothing of the first program has to be patched.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import attrgetter
from typing import Any

from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind
from torch.fx import GraphModule, Interpreter
from torch.fx.traceback import preserve_node_meta

from effpass.export.program import Dims, ExportError, traced

Given = dict[str, Any]


def exported_again(
    program: ExportedProgram,
    graph: GraphModule,
    inputs: Mapping[str, Tensor],
    names: Dims,
    derive: Callable[[Given], Given],
) -> ExportedProgram:
    """``graph``, whose placeholders are those of ``program`` and more, as a program of ``inputs``.

    ``derive`` answers, of the inputs by name, every placeholder that is no weight. ``names``: the
    open dims of each input. Raises ExportError.
    """
    kinds = {spec.kind for spec in program.graph_signature.output_specs}
    if kinds != {OutputKind.USER_OUTPUT}:
        raise ExportError(
            "expected a model that writes to none of its buffers, found one that does"
        )
    module = _Held(program, graph, derive, inputs).eval()
    shapes = {n: dict.fromkeys(names.get(n, {}), Dim.AUTO) for n in inputs}
    failed = "the rewritten graph cannot be exported"
    return traced(module, dict(inputs), shapes, False, failed)


class _Held(nn.Module):
    """A graph with the weights of a program under the names that they have in the model."""

    def __init__(
        self,
        program: ExportedProgram,
        graph: GraphModule,
        derive: Callable[[Given], Given],
        names: Iterable[str],
    ) -> None:
        super().__init__()
        self.derive, self.graph = derive, (graph,)
        self.forward = _of(tuple(names), self.run)
        self.weights: dict[str, str] = {}
        self.constants: Given = {}
        for spec in program.graph_signature.input_specs:
            if spec.kind is not InputKind.USER_INPUT:
                self.weights[spec.arg.name] = str(spec.target)
                self._hold(program, str(spec.target))
            elif isinstance(spec.arg, ConstantArgument):
                self.constants[spec.arg.name] = spec.arg.value

    def _hold(self, program: ExportedProgram, target: str) -> None:
        value = program.state_dict.get(target, program.constants.get(target))
        *path, name = target.split(".")
        place: nn.Module = self
        for each in path:
            if each not in place._modules:
                place.add_module(each, nn.Module())
            place = place.get_submodule(each)
        if isinstance(value, nn.Parameter):
            place.register_parameter(name, value)
        else:
            assert isinstance(value, Tensor), f"{target} is {type(value).__name__}"
            place.register_buffer(name, value)

    def run(self, inputs: Given) -> list[Any]:
        """Outputs of the graph, in order."""
        (graph,), given = self.graph, self.constants | self.derive(inputs)
        for name, target in self.weights.items():
            given[name] = attrgetter(target)(self)
        names = [str(n.target) for n in graph.graph.find_nodes(op="placeholder")]
        with preserve_node_meta():
            return list(Interpreter(graph).run(*(given[name] for name in names)))


def _of(names: Sequence[str], run: Callable[[Given], list[Any]]) -> Callable[..., list[Any]]:
    """``run`` as a function of arguments with these names: torch.export reads its signature."""

    def forward(*args: Any, **kwargs: Any) -> list[Any]:
        return run(dict(zip(names, args, strict=False)) | kwargs)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    signature = inspect.Signature([inspect.Parameter(name, kind) for name in names])
    forward.__signature__ = signature  # type: ignore[attr-defined]
    return forward
