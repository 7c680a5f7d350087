"""Compiles what every op would launch, for a GPU that need not be here, and prints what it takes.

    python -m tests.lowering.compile_for_gpu bf16|fp32 [op ...]

Arguments are those of real calls, on the "meta" device; Triton and its assembler run as on a GPU of
compute capability 9.0, in every configuration for the first call of an op and the first for others.
One JSON line a kernel; a kernel that does not compile is an exception.
"""

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

import effpass.lowering
from effpass.lowering.gpu import launch as launching
from effpass.ops import OPS
from effpass.ops.token_matching import token_matching
from tests.lowering.realistic import CALLS

TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int32: "*i32",
    torch.int64: "*i64",
    torch.bool: "*i1",
}
TARGET = GPUTarget("cuda", 90, 32)
SHARED = 232448  # bytes that a program may have on an H200


def _argument(value: Any, special: bool) -> tuple[str, bool]:
    """Triton's type of an argument, and whether it is a multiple of 16."""
    if isinstance(value, Tensor):
        return TYPES[value.dtype], True
    if isinstance(value, float):
        return "fp32", False
    if value == 1 and special:
        return "constexpr", False
    return ("i32" if abs(value) < 2**31 else "i64"), special and value % 16 == 0


def _compile(kernel: JITFunction, values: tuple[Any, ...], meta: dict[str, Any]) -> dict[str, Any]:
    options = {name: meta.pop(name) for name in ("num_warps", "num_stages") if name in meta}
    plain = dict(zip((p.name for p in kernel.params), values, strict=False))
    special = {p.name: not p.do_not_specialize for p in kernel.params}
    types = {name: _argument(value, special[name]) for name, value in plain.items()}
    constants = {n: plain[n] for n, (kind, _) in types.items() if kind == "constexpr"} | meta
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types[n][0] for n in names}
    aligned = {(names.index(n),): [["tt.divisibility", 16]] for n, (_, yes) in types.items() if yes}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    made = triton.compile(source, target=TARGET, options=options)
    ptx = made.asm["ptx"]
    return {
        "kernel": f"{kernel.__module__.rpartition('.')[2]}.{kernel.__name__}",
        **{n: v for n, v in constants.items() if n.isupper()},
        "shared": made.metadata.shared,
        "products": ptx.count("wgmma.mma_async") + ptx.count("mma.sync"),
        "shuffles": ptx.count("shfl.sync"),
    }


def _record(found: list[dict[str, Any]], every: bool) -> Callable[..., None]:
    """Stands for ``launch``; of a kernel's configurations ``every`` one, or the first."""

    def record(kernel: Any, grid: Any, *values: Any, **meta: Any) -> None:
        if isinstance(kernel, Autotuner):
            configs = [
                {**c.kwargs, "num_warps": c.num_warps, "num_stages": c.num_stages}
                for c in kernel.configs[: None if every else 1]
            ]
            kernel = kernel.fn
        else:
            configs = [{}]
        for config in configs:
            assert callable(grid) or 0 not in grid
            found.append(_compile(kernel, values, {**meta, **config}))

    return record


def main(dtype: str, ops: list[str]) -> None:
    """Prints one line a kernel; SystemExit where one takes more shared memory than there is."""
    storage = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[dtype]
    assert not launching.interpreting(), "unset TRITON_INTERPRET"
    for name in ops or list(CALLS):
        found: list[dict[str, Any]] = []
        module = getattr(effpass.lowering.gpu, name)
        op = OPS.get(name, token_matching)
        gpu = next(w for w in op.lowerings if w.target == "gpu")
        for i, call in enumerate(CALLS[name](storage)):
            module.launch = _record(found, every=i == 0)
            arguments = [*op.bind(**call).values()]
            outputs = gpu.forward(*arguments)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            if op is not token_matching:
                gpu.backward(*outputs, *arguments)
        for each in found:
            print(json.dumps(each), flush=True)
        if any(each["shared"] > SHARED for each in found):
            raise SystemExit(f"{name}: more shared memory than an H200 has")


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
