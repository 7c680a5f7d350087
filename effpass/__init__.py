"""effpass: a torch.compile backend; unmodified Mamba, hybrid and Transformer models run faster.

``torch.compile(model, backend="effpass")`` needs no import of this package; the names here explain
and inspect what it did.
"""

from effpass import ops
from effpass.config import Config
from effpass.debug import dump
from effpass.explain import explain
from effpass.ledger import report
from effpass.passes.pack_varlen import PackVarlen
from effpass.passes.reduce_tokens import ReduceTokens
from effpass.report import Report
from effpass.rows import PackedDataset, pack

__version__ = "0.1.0"

__all__ = [
    "Config",
    "PackVarlen",
    "PackedDataset",
    "ReduceTokens",
    "Report",
    "dump",
    "explain",
    "ops",
    "pack",
    "report",
]
