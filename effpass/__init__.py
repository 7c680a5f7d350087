"""effpass: a torch.compile backend; unmodified Mamba, hybrid and Transformer models run faster.

``torch.compile(model, backend="effpass")`` needs no import of this package; the names here explain
and inspect what it did.
"""

from typing import TYPE_CHECKING, Any

from effpass import ops
from effpass.config import Config
from effpass.debug import dump
from effpass.explain import explain
from effpass.ledger import report
from effpass.passes.pack_varlen import PackVarlen
from effpass.passes.reduce_tokens import ReduceTokens
from effpass.report import Report
from effpass.rows import PackedDataset, pack

if TYPE_CHECKING:
    from effpass.export.onnx import OnnxExport, export_onnx
    from effpass.export.program import ExportError
    from effpass.export.runner import OnnxModel

__version__ = "0.1.0"

__all__ = [
    "Config",
    "ExportError",
    "OnnxExport",
    "OnnxModel",
    "PackVarlen",
    "PackedDataset",
    "ReduceTokens",
    "Report",
    "dump",
    "explain",
    "export_onnx",
    "ops",
    "pack",
    "report",
]


def __getattr__(name: str) -> Any:
    """The names of ONNX export: they need the extra ``onnx``, and load it when first used."""
    if name not in ("ExportError", "OnnxExport", "OnnxModel", "export_onnx"):
        raise AttributeError(f"module 'effpass' has no attribute {name!r}")
    try:
        from effpass.export import onnx, program, runner
    except ImportError as error:
        raise ImportError(
            f"effpass.{name} needs {error.name}, which is not installed; "
            "pip install 'effpass[onnx]'"
        ) from error
    owners = {"ExportError": program, "OnnxModel": runner}
    return getattr(owners.get(name, onnx), name)
