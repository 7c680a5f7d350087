"""Which operator each piece of a model becomes: one table, so that a measurement changes one line.

``portable`` leaves out every form that is not of ``ai.onnx``; so does a form whose operator the
installed runtime has no CPU kernel for, which is then said.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
from onnx_ir.passes import common

from effpass.lowering.ort import fuse, heads
from effpass.lowering.ort.operators import CONTRIB, missing

Fuse = Callable[[ir.Model], int]
PLAIN = "plain"  # as the exporter writes it

# the forms that there are, by piece: an operator, and what writes it
FORMS: dict[str, dict[str, Fuse]] = {
    "attention": {
        "ai.onnx.Attention": heads.fuse_flat,
        f"{CONTRIB}.MultiHeadAttention": heads.fuse_multi_head,
        f"{CONTRIB}.Attention": heads.fuse_projected,
    },
    "rotary": {"ai.onnx.RotaryEmbedding": fuse.fuse_rotary},
    "gelu": {f"{CONTRIB}.BiasGelu": fuse.fuse_gelu},
    "tanh_gelu": {f"{CONTRIB}.FastGelu": fuse.fuse_tanh_gelu},
    "sum_and_layer_norm": {f"{CONTRIB}.SkipLayerNormalization": fuse.fuse_layer_norm},
    "sum_and_rms_norm": {f"{CONTRIB}.SkipSimplifiedLayerNormalization": fuse.fuse_rms_norm},
}

# the form of each piece, most wanted first: what one does not fit, the next may
CHOSEN: dict[str, tuple[str, ...]] = {
    "attention": ("ai.onnx.Attention",),  # docs/results/onnx.json: the fastest of four
    "rotary": ("ai.onnx.RotaryEmbedding",),
    "gelu": (f"{CONTRIB}.BiasGelu",),
    "tanh_gelu": (f"{CONTRIB}.FastGelu",),
    "sum_and_layer_norm": (f"{CONTRIB}.SkipLayerNormalization",),
    "sum_and_rms_norm": (f"{CONTRIB}.SkipSimplifiedLayerNormalization",),
}


def fuse_all(model: ir.Model, portable: bool) -> list[str]:
    """Writes the chosen forms into ``model``; answers what the runtime lacks for them."""
    lacks = []
    for piece, names in CHOSEN.items():
        for name in names:
            domain, _, operator = name.rpartition(".")
            if name == PLAIN or (portable and domain == CONTRIB):
                continue
            reason = missing(operator) if domain == CONTRIB else None
            if reason is not None:
                lacks.append(f"{reason}; {piece} is written with ai.onnx")
                continue
            FORMS[piece][name](model)
    common.CommonSubexpressionEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)
    return lacks
