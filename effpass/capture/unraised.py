"""What stayed a plain graph: known functions that were traced instead of becoming an op.

A node keeps the call stack it was traced under, so a function that was not raised is found by its
name in there, whatever nodes it was traced into.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch.fx import Node

from effpass.graph.source import FRAME, layer

DELTA_RULE = "the gated delta rule has no op yet"
RWKV = "RWKV's weighted average has no op yet"
FUSED = "a fused convolution, scan and projection; effpass takes the separate functions"

WITHOUT_OP: dict[str, str] = {
    "torch_chunk_gated_delta_rule": DELTA_RULE,
    "torch_recurrent_gated_delta_rule": DELTA_RULE,
    "chunk_kimi_delta_attention": DELTA_RULE,
    "recurrent_kimi_delta_attention": DELTA_RULE,
    "rwkv_linear_attention": RWKV,
    "rwkv_linear_attention_cpu": RWKV,
    "mamba_inner_fn": FUSED,
    "mamba_split_conv1d_scan_combined": FUSED,
    "ssd_selective_scan": "a reference with numbers a channel, where ssd_scan has them a head",
}


def find(graph: torch.fx.Graph, reasons: Mapping[str, str]) -> list[tuple[Node, str, str]]:
    """``(first node, function, reason)`` of each layer and function that was not raised.

    ``reasons`` holds more functions to look for, by name. The outermost one of a call stack counts.
    """
    wanted = {**WITHOUT_OP, **reasons}
    found: dict[tuple[str, str], Node] = {}
    for node in graph.nodes:
        trace = node.meta.get("stack_trace") or ""
        name = next((m["function"] for m in FRAME.finditer(trace) if m["function"] in wanted), None)
        if name is not None:
            found.setdefault((layer(node), name), node)
    return [(node, name, wanted[name]) for (_, name), node in found.items()]
