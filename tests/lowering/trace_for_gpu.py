"""Traces every op and its gradient as AOTAutograd does, and prints each launch that it sees.

    python -m tests.lowering.trace_for_gpu

One JSON line a launch: the op, the kernel and the arguments it writes. An op that stays whole,
which would hide its kernels from Inductor, is an error.
"""

import json
from typing import Any

import torch
import triton
from functorch.compile import make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor
from torch._functorch.aot_autograd import aot_function
from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table
from torch._subclasses import FakeTensorMode
from torch.fx import GraphModule
from triton.backends.compiler import GPUTarget

import effpass.lowering  # noqa: F401  registers the implementations
from effpass.ops import OPS
from effpass.ops.token_matching import token_matching
from tests.lowering.realistic import CALLS


class Driver:
    """Stands for a GPU's driver: torch asks it what to compile for when it looks for writes."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def traced(op: str, call: dict[str, Any]) -> list[GraphModule]:
    """The graphs, forward and backward, of one call without values."""
    graphs: list[GraphModule] = []

    def keep(gm: GraphModule, _: Any) -> Any:
        graphs.append(gm)
        return make_boxed_func(gm.forward)

    made = OPS.get(op, token_matching)
    gpu = next(w for w in made.lowerings if w.target == "gpu")
    given = [*made.bind(**call).values()]
    with FakeTensorMode():
        leaves = [
            torch.empty_strided(a.shape, a.stride(), dtype=a.dtype).requires_grad_(
                a.is_floating_point() and op in OPS
            )
            for a in given
            if isinstance(a, Tensor)
        ]

        def run(*tensors: Tensor) -> tuple[Tensor, ...]:
            each = iter(tensors)
            outputs = gpu.overload(*(next(each) if isinstance(a, Tensor) else a for a in given))
            return outputs if isinstance(outputs, tuple) else (outputs,)

        partition = min_cut_rematerialization_partition
        function = aot_function(run, fw_compiler=keep, bw_compiler=keep, partition_fn=partition)
        first = function(*leaves)[0]
        if op in OPS:
            first.sum().backward()
    return graphs


def main() -> None:
    """Prints a line a launch; SystemExit where an op stays whole."""
    triton.runtime.driver.set_active(Driver())
    for op, calls in CALLS.items():
        for call in calls(torch.bfloat16):
            for graph in traced(op, call):
                for node in graph.graph.find_nodes(
                    op="call_function",
                    target=torch.ops.higher_order.triton_kernel_wrapper_functional,
                ):
                    kernel = kernel_side_table.get_kernel(node.kwargs["kernel_idx"])
                    while not hasattr(kernel, "__name__"):
                        kernel = kernel.fn
                    line = {"op": op, "kernel": kernel.__name__}
                    print(json.dumps({**line, "writes": node.kwargs["tensors_to_clone"]}))
                if any("effpass" in str(node.target) for node in graph.graph.nodes):
                    raise SystemExit(f"{op} stays whole in {graph.graph}")


if __name__ == "__main__":
    main()
