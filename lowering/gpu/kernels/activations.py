"""The two functions of step sizes and gates."""

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x)) without overflow."""
    return 1.0 / (1.0 + tl.exp2(-x * 1.4426950408889634))


@triton.jit
def softplus(x):
    """log(1 + exp(x)); x itself beyond 20, as torch has it."""
    small = tl.exp2(tl.where(x > 20.0, 20.0, x) * 1.4426950408889634)  # NaN stays NaN
    # log1p: log(1 + e) * e / ((1 + e) - 1), exact to an ulp for small e
    u = 1.0 + small
    lost = u - 1.0
    made = tl.where(lost == 0.0, small, tl.log(u) * (small / tl.where(lost == 0.0, 1.0, lost)))
    return tl.where(x > 20.0, x, made)
