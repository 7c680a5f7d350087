"""Several nodes as the one operator that the runtime has for them: norms, GELU, rotary embedding.

Rewrites of a translated graph, of float32 alone: the runtime's CPU kernels have no others.
"""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript.rewriter import MatchResult, RewriteRuleClassBase, RewriteRuleSet
from onnxscript.rewriter.ort_fusions.bias_gelu import fuse_bias_gelu
from onnxscript.rewriter.rules.fusion._rotary_embedding import RotaryEmbedding23Fusion

from effpass.lowering.ort.operators import CONTRIB


def known(*values: ir.Value | None) -> bool:
    """Whether values are float32 and their shapes are known."""
    return all(
        v is not None and v.dtype == ir.DataType.FLOAT and v.shape is not None for v in values
    )


def _rank(value: ir.Value) -> int:
    return 0 if value.shape is None else len(value.shape)


class _SumAndNorm(RewriteRuleClassBase):
    """A sum of two branches and its norm: one pass over both, answering the sum as well."""

    def __init__(self, name: str, mean: bool) -> None:
        super().__init__(name=name)
        self.mean = mean

    def pattern(self, op: Any, x: Any, skip: Any, gamma: Any, beta: Any) -> Any:
        """The nodes that are replaced."""
        total = op.Add(x, skip)
        given = (total, gamma, beta) if self.mean else (total, gamma)
        name = "LayerNormalization" if self.mean else "RMSNormalization"
        norm = getattr(op, name)(*given, axis=-1, _allow_other_attributes=True, _outputs=["norm"])
        return norm, total

    def check(
        self,
        context: Any,
        x: ir.Value,
        skip: ir.Value,
        gamma: ir.Value,
        norm: ir.Value,
        beta: ir.Value | None = None,
        **_: Any,
    ) -> MatchResult:
        """Both branches are float32 (batch, length, channels) of one shape."""
        found = MatchResult()
        values = (x, skip, gamma, beta) if self.mean else (x, skip, gamma)
        if not known(*values) or _rank(x) != 3 or x.shape != skip.shape:
            return found.fail("branches of other shapes, or no float32")
        stash = norm.producer().attributes.get("stash_type")  # type: ignore[union-attr]
        if _rank(gamma) != 1 or (stash is not None and stash.as_int() != 1):
            return found.fail("weights of another shape, or a narrow norm")
        return found

    def rewrite(
        self,
        op: Any,
        x: ir.Value,
        skip: ir.Value,
        gamma: ir.Value,
        norm: ir.Value,
        beta: ir.Value | None = None,
        **_: Any,
    ) -> Any:
        """The one operator: (norm, sum)."""
        name = "SkipLayerNormalization" if self.mean else "SkipSimplifiedLayerNormalization"
        given = (x, skip, gamma, beta) if self.mean else (x, skip, gamma)
        epsilon = norm.producer().attributes.get_float("epsilon", 1e-5)  # type: ignore[union-attr]
        made, _mean, _deviation, total = getattr(op, name)(
            *given, epsilon=epsilon, _outputs=4, _domain=CONTRIB
        )
        return made, total


class _TanhGelu(RewriteRuleClassBase):
    """GELU by tanh, with the bias in front of it."""

    def pattern(self, op: Any, x: Any, bias: Any) -> Any:
        """The nodes that are replaced."""
        return op.Gelu(op.Add(x, bias), approximate="tanh")

    def check(self, context: Any, x: ir.Value, bias: ir.Value, **_: Any) -> MatchResult:
        """The bias is one a channel."""
        found = MatchResult()
        if not known(x, bias) or _rank(bias) != 1 or x.shape[-1] != bias.shape[0]:  # type: ignore[index]
            return found.fail("a bias of another shape, or no float32")
        return found

    def rewrite(self, op: Any, x: ir.Value, bias: ir.Value, **_: Any) -> Any:
        """The one operator."""
        return op.FastGelu(x, bias, _domain=CONTRIB)


class _Rotary(RotaryEmbedding23Fusion):
    """Queries or keys (batch, heads, length, channels), turned by the angles of their places.

    The operator wants the angles of every row of the batch, where models make them once.
    """

    def check(self, op: Any, x: ir.Value, freqs: ir.Value, **given: Any) -> MatchResult:  # type: ignore[override]
        """As the rule of onnxscript, and angles (1 or batch, length, channels / 2)."""
        found = super().check(op, x, **given)
        if found and (not known(x, freqs) or _rank(freqs) != 3):
            return found.fail("angles of another rank, or no float32")
        if found and freqs.shape[0] not in (1, x.shape[0]):  # type: ignore[index]
            return found.fail("angles of other rows")
        return found

    def rewrite(self, op: Any, x: ir.Value, freqs: ir.Value, **_: Any) -> Any:
        """The one operator."""
        angles = op.Cos(freqs), op.Sin(freqs)
        if freqs.shape[0] == 1:  # type: ignore[index]
            rows = op.Concat(op.Shape(x, start=0, end=1), op.Shape(freqs, start=1), axis=0)
            angles = tuple(op.Expand(each, rows) for each in angles)
        return op.RotaryEmbedding(x, *angles, interleaved=0)


_LAYER_NORM = RewriteRuleSet([_SumAndNorm.rule("sum_and_layer_norm", True)])
_RMS_NORM = RewriteRuleSet([_SumAndNorm.rule("sum_and_rms_norm", False)])
_TANH_GELU = RewriteRuleSet([_TanhGelu.rule()])
_ROTARY = RewriteRuleSet([_Rotary.rule()])


def fuse_layer_norm(model: ir.Model) -> int:
    """Sums and layer norms behind them; answers how many."""
    return _LAYER_NORM.apply_to_model(model)


def fuse_rms_norm(model: ir.Model) -> int:
    """Sums and RMS norms behind them; answers how many."""
    return _RMS_NORM.apply_to_model(model)


def fuse_gelu(model: ir.Model) -> int:
    """Biases and exact GELU behind them; answers how many."""
    return fuse_bias_gelu(model)


def fuse_tanh_gelu(model: ir.Model) -> int:
    """Biases and GELU by tanh behind them; answers how many."""
    return _TANH_GELU.apply_to_model(model)


def fuse_rotary(model: ir.Model) -> int:
    """Rotary embeddings; answers how many."""
    return _ROTARY.apply_to_model(model)
