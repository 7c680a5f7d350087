"""Kernels for NVIDIA GPUs in Triton; importing this registers them, and does not import Triton.

One file an op says what is launched, the file of the same name in ``kernels`` holds the kernels.
"""

from effpass.lowering.gpu import (
    causal_conv1d,
    linear_recurrence,
    selective_scan,
    ssd_scan,
    token_matching,
    varlen_attention,
)

__all__ = [
    "causal_conv1d",
    "linear_recurrence",
    "selective_scan",
    "ssd_scan",
    "token_matching",
    "varlen_attention",
]
