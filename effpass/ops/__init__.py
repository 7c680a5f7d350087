"""The ops of effpass: named pieces of mathematics, each defined by its reference function.

All are channel-last and take packed sequences, ``cu_seqlens`` int32 (S + 1,): those with states
with batch 1 and states (S, ...), ``varlen_attention`` without a batch dimension.
"""

from effpass.ops.causal_conv1d import causal_conv1d
from effpass.ops.linear_recurrence import linear_recurrence
from effpass.ops.op import OPS, Lowering, Op, implements
from effpass.ops.selective_scan import selective_scan
from effpass.ops.ssd_scan import ssd_scan
from effpass.ops.varlen_attention import varlen_attention

__all__ = [
    "OPS",
    "Lowering",
    "Op",
    "causal_conv1d",
    "implements",
    "linear_recurrence",
    "selective_scan",
    "ssd_scan",
    "varlen_attention",
]
