"""What every implementation of an op is held to: the definition in float64."""

from typing import Any

import torch
from torch import Tensor

from effpass.ops import OPS, Lowering
from tests.ops.samples import Sample, doubled
from tests.tolerances import close

ROWS = {
    torch.float32: "kernel_fp32",
    torch.bfloat16: "kernel_bf16",
    torch.float16: "kernel_fp16",
}


def compiled(op: str, target: str = "cpu") -> Lowering:
    """The implementation of an op for a target."""
    return next(w for w in OPS[op].lowerings if w.target == target)


def gradients_of(outputs: tuple[Tensor, ...]) -> list[Tensor]:
    """Some gradients for these outputs, the same every time."""
    made = torch.Generator().manual_seed(7)
    return [torch.randn(out.shape, generator=made).to(out) for out in outputs]


def run(op: str, arguments: list[Any], target: str = "cpu") -> dict[str, Tensor]:
    """Outputs, and gradients through autograd, of an implementation, by name."""
    leaves = [
        a.detach().requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a
        for a in arguments
    ]
    outputs = compiled(op, target).overload(*leaves)
    names = [n for n, a in zip(OPS[op].signature.parameters, leaves, strict=True) if _wants(a)]
    grads = torch.autograd.grad(outputs, [a for a in leaves if _wants(a)], gradients_of(outputs))
    found = dict(zip(OPS[op].axes.outputs, (o.detach() for o in outputs), strict=True))
    return found | {f"grad {n}": g for n, g in zip(names, grads, strict=True)}


def _wants(argument: Any) -> bool:
    return isinstance(argument, Tensor) and argument.requires_grad


def define(op: str, arguments: list[Any], like: dict[str, Tensor]) -> dict[str, Tensor]:
    """What the definition says in float64, in the dtypes of ``like``."""
    exact = doubled(arguments)
    outputs = OPS[op].reference(*exact)
    given = [like[name] for name in OPS[op].axes.outputs]
    grads = OPS[op].backward(*(g.double() for g in gradients_of(tuple(given))), *exact)
    found = dict(zip(OPS[op].axes.outputs, outputs, strict=True))
    found |= {f"grad {n}": g for n, g in zip(OPS[op].tensor_names, grads, strict=True)}
    return {name: found[name].to(tensor.dtype) for name, tensor in like.items()}


def agree(found: dict[str, Tensor], wanted: dict[str, Tensor], row: str | None = None) -> None:
    """Every value within ``row``, or the row of its dtype; names the first that is not."""
    for name, tensor in found.items():
        try:
            close(tensor, wanted[name], row or ROWS[tensor.dtype])
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


def piece(sample: Sample, i: int, tensors: dict[str, Any]) -> dict[str, Any]:
    """Of every tensor what belongs to sequence ``i``: its tokens, its state, or all of it."""
    op = OPS[sample.op]
    given = op.bind(*sample.arguments())
    start, end = given["cu_seqlens"][i : i + 2].tolist()
    axes = {**op.axes.inputs, **op.axes.outputs}
    axes |= {f"grad {name}": dims for name, dims in op.axes.inputs.items()}
    piece = {}
    for name, tensor in tensors.items():
        dims = axes.get(name, ())
        if isinstance(tensor, Tensor) and "t" in dims:
            tensor = tensor[:, start:end]
        elif isinstance(tensor, Tensor) and "s" in dims:
            tensor = tensor[i : i + 1]
        piece[name] = tensor
    return piece
