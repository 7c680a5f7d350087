"""All tolerances of the tests, each with its reason; nowhere else may one be written."""

import torch
from torch import Tensor

# name: (relative to the largest expected value, absolute, why)
TOLERANCES: dict[str, tuple[float, float, str]] = {
    "model_fp32": (1e-5, 1e-7, "a few layers of float32 rounding, sums in another order"),
    "model_gradient_fp32": (5e-5, 1e-7, "the same, forward and back"),
    "trained_fp32": (
        1e-3,
        1e-6,
        "a few steps of Adam, which divides a gradient by its size: where that is near zero its "
        "rounding counts",
    ),
    "raised_gradient_fp32": (
        5e-5,
        1e-6,
        "the same; a bias of keys has no gradient in truth, only the rounding of its terms",
    ),
    "raised_fp64": (1e-10, 1e-12, "float64 sums in another order, through exponentials"),
    "kernel_fp32": (3e-6, 1e-7, "float32 sums in another order; measured 8e-7 at most"),
    "kernel_bf16": (2**-8, 1e-7, "one rounding to 8 bits, on either side of a tie"),
    "kernel_fp16": (2**-10, 1e-7, "one rounding to 11 bits, on either side of a tie"),
    "products_fp32": (
        3e-5,
        1e-6,
        "matrix products in chunks; gradients of steps are sums of differences; measured 1.7e-5",
    ),
    "products_bf16": (
        2**-6,
        2e-2,
        "operands of products are rounded to 8 bits, whatever the dtype of the result",
    ),
    "products_fp16": (
        2**-8,
        3e-3,
        "the same to 11 bits; a gradient of one bias is a sum over all tokens; measured 2.8e-3",
    ),
    "attention_fp32": (
        3e-6,
        3e-6,
        "the same; a query with one key has no gradient in truth, only the rounding of its terms",
    ),
    "attention_bf16": (
        2**-6,
        2e-2,
        "torch's kernel keeps weights, outputs and their gradients in 8 bits between its products",
    ),
    "attention_fp16": (2**-9, 3e-3, "the same in 11 bits"),
    "model_bf16": (
        4e-2,
        1e-3,
        "bfloat16 keeps 8 bits; eager rounds between operations, a kernel not",
    ),
    "zoo_fp32": (1e-5, 1e-6, "a few layers of float32 rounding, chunked sums in another order"),
    "front_door_bf16": (
        4e-2,
        1e-3,
        "the libraries keep dt, a state or an output in 8 bits where the ops do not",
    ),
    "zoo_delta_rule_fp32": (
        5e-5,
        1e-6,
        "chunked inverses: an ulp of the weights moves 3e-6, stock Inductor is off by 1.1e-5",
    ),
    "interval_fp64": (1e-12, 1e-13, "products and sums of a few float64 values, in another order"),
    "program_fp64": (
        1e-9,
        1e-12,
        "float64 sums in another order, through quotients of running products down to 1e-5",
    ),
    "program_fp32": (
        3e-4,
        1e-6,
        "the same in float32: products of nine gates down to 0.2 cost three digits",
    ),
    "program_rounded_fp32": (
        2**-20,
        1e-12,
        "a float64 program that casts to float32: an op whose operand is the narrow tensor rounds "
        "its part of the gradient, eager the sum of all parts; and ties",
    ),
    "program_rounded_bf16": (2**-6, 1e-12, "the same where it casts to bfloat16"),
    "zoo_gradient_fp32": (
        1e-4,
        1e-6,
        "the same forward and back, through softmax, routing and exponentials",
    ),
}


# How many times farther from the truth than eager a value may be that is beyond its row: sums in
# another order, or a fused kernel, round as often but not alike.
FARTHER = 4.0


def close(actual: Tensor, expected: Tensor, row: str) -> None:
    """Raises unless dtypes and shapes are equal and the values are within the named row."""
    relative, absolute, _ = TOLERANCES[row]
    assert actual.dtype == expected.dtype, f"expected {expected.dtype}, found {actual.dtype}"
    assert actual.shape == expected.shape, f"expected {expected.shape}, found {actual.shape}"
    if expected.numel() == 0:
        return
    a, e = actual.detach().double(), expected.detach().double()
    assert torch.equal(a.isfinite(), e.isfinite()), "NaN or infinity in different places"
    finite = e.isfinite()
    if not finite.any():
        return
    largest = e[finite].abs().max().item()
    worst = (a - e)[finite].abs().max().item()
    allowed = relative * largest + absolute
    assert worst <= allowed, (
        f"off by {worst:.2e}, allowed {allowed:.2e} ({row}), largest {largest:.2e}"
    )


# name: (units in the last place of float32, why)
ULPS: dict[str, tuple[float, str]] = {
    "exp": (1.0, "a degree-6 polynomial behind an exact reduction: one rounding of the sum"),
    "exp2": (2.0, "degree 5, exact at 0: the polynomial is off by 0.8 itself"),
    "sigmoid": (2.0, "exp, a sum and a division"),
    "silu": (3.0, "sigmoid and a product"),
    "softplus": (3.0, "exp, a division and a polynomial"),
}
