"""Attention whose heads are cut out of a projection, and put together again behind it.

Where queries, keys and values (batch, length, heads * width) are split into heads, and the result
joined, an operator that takes them unsplit needs no transpositions: ``ai.onnx.Attention`` of three
dims, ``com.microsoft.MultiHeadAttention``, or ``com.microsoft.Attention``, which takes the
projections of all three as one weight.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript.rewriter import MatchResult, RewriteRuleClassBase, RewriteRuleSet, pattern

from effpass.lowering.ort.fuse import known
from effpass.lowering.ort.operators import CONTRIB

LOWEST = float(np.finfo(np.float32).min)  # added to a score that counts for nothing
SPLIT = [0, 2, 1, 3]


class _Heads(RewriteRuleClassBase):
    """The pattern of all three forms; each writes its own operator.

    ``forgets``: for a query that sees no key it answers the mean of all, where torch answers 0.
    """

    forgets = True

    def pattern(
        self, op: Any, q: Any, k: Any, v: Any, q_to: Any, k_to: Any, v_to: Any, to: Any
    ) -> Any:
        """The nodes that are replaced."""
        split = [
            op.Transpose(
                op.Reshape(x, shape, _allow_other_attributes=True, _outputs=[f"{name}_split"]),
                perm=SPLIT,
            )
            for x, shape, name in ((q, q_to, "q"), (k, k_to, "k"), (v, v_to, "v"))
        ]
        y = op.Attention(
            *split,
            pattern.Var("mask", can_match_none=True),
            _allow_other_attributes=True,
            _outputs=["y"],
        )
        joined = op.Transpose(y, perm=SPLIT)
        return op.Reshape(joined, to, _allow_other_attributes=True, _outputs=["out"])

    def check(
        self,
        context: Any,
        q: ir.Value,
        k: ir.Value,
        v: ir.Value,
        q_split: ir.Value,
        k_split: ir.Value,
        v_split: ir.Value,
        y: ir.Value,
        out: ir.Value,
        mask: ir.Value | None = None,
        **_: Any,
    ) -> MatchResult:
        """Heads are split and joined as they lie, and the attention is a plain one."""
        found = MatchResult()
        for whole, parts in ((q, q_split), (k, k_split), (v, v_split)):
            if not known(whole, parts) or not _splits(whole.shape, parts.shape):
                return found.fail("not split as it lies", whole)
        if not known(out) or not (_is_joined(q, out) or _stands(out)):
            return found.fail("not joined as it lies", out)
        attributes = y.producer().attributes  # type: ignore[union-attr]
        plain = not attributes.get_float("softcap", 0.0)
        if not plain or len(y.producer().inputs) > 4:  # type: ignore[union-attr]
            return found.fail("attention with a soft cap, or with keys of its own", y)
        if attributes.get_int("qk_matmul_output_mode", 0) or len(y.producer().outputs) > 1:  # type: ignore[union-attr]
            return found.fail("attention that answers more", y)
        if mask is not None and not _fits(mask, q_split, k_split):
            return found.fail("a mask of another shape", mask)
        return self.own(found, q, k, v, q_split, k_split, v_split)

    def own(self, found: MatchResult, *values: ir.Value) -> MatchResult:
        """What one form asks besides."""
        return found

    def rewrite(
        self, op: Any, q: Any, k: Any, v: Any, q_split: Any, k_split: Any, y: Any, out: Any,
        to: Any, mask: Any = None, **_: Any,
    ) -> Any:  # fmt: skip
        """The one operator, and whatever shape is wanted of its result."""
        made = self.attention(op, q, k, v, mask, (q_split, k_split), y)
        if mask is not None and self.forgets:
            seen = op.Squeeze(op.ReduceMax(mask, op.Constant(value_ints=[3])), _one(op))
            made = op.Where(seen, made, op.Constant(value_float=0.0))
        return made if _is_joined(q, out) else op.Reshape(made, to, allowzero=1)

    def attention(self, op: Any, q: Any, k: Any, v: Any, mask: Any, split: Any, y: Any) -> Any:
        """The one operator; ``split``: queries and keys, in heads."""
        raise NotImplementedError


def _splits(whole: Any, parts: Any) -> bool:
    """(b, t, h d) -> (b, t, h, d)."""
    if len(whole) != 3 or len(parts) != 4 or not isinstance(parts[2], int):
        return False
    same = [_text(n) for n in whole[:2]] == [_text(n) for n in parts[:2]]
    return same and isinstance(parts[3], int) and whole[2] == parts[2] * parts[3]


def _is_joined(q: ir.Value, out: ir.Value) -> bool:
    """(b, t, h d), as the queries."""
    return len(out.shape) == 3 and list(map(_text, out.shape[:2])) == list(map(_text, q.shape[:2]))  # type: ignore[index,arg-type]


def _stands(out: ir.Value) -> bool:
    """Whether the shape of a Reshape is meant as it stands: a 0 would be a dim of its input."""
    node = out.producer()
    assert node is not None and node.inputs[1] is not None
    if node.attributes.get_int("allowzero", 0) == 1:
        return True
    shape = ir.convenience.get_const_tensor(node.inputs[1])
    return shape is not None and 0 not in shape.numpy().tolist()


def _fits(mask: ir.Value, q: ir.Value, k: ir.Value) -> bool:
    """Whether a mask is booleans (1 or b, 1, t, t): the kernels repeat rows and heads alone."""
    if mask.shape is None or len(mask.shape) != 4 or q.shape is None or k.shape is None:
        return False
    if mask.dtype != ir.DataType.BOOL:
        return False
    batch, heads, tokens, keys = (_text(n) for n in mask.shape)
    rows = batch in ("1", _text(q.shape[0])) and heads == "1"
    return rows and (tokens, keys) == (_text(q.shape[1]), _text(k.shape[1]))


def _text(size: Any) -> str:
    return str(getattr(size, "value", size))


class _Flat(_Heads):
    """``ai.onnx.Attention`` of three dims."""

    forgets = False

    def attention(self, op: Any, q: Any, k: Any, v: Any, mask: Any, split: Any, y: Any) -> Any:
        """The one operator; ``split``: queries and keys, in heads."""
        given = (q, k, v) if mask is None else (q, k, v, mask)
        return op.Attention(
            *given,
            q_num_heads=split[0].shape[2],
            kv_num_heads=split[1].shape[2],
            **_attributes(y, "scale", "is_causal"),
        )


class _MultiHead(_Heads):
    """``com.microsoft.MultiHeadAttention``."""

    def own(self, found: MatchResult, *values: ir.Value) -> MatchResult:
        """As many heads of keys and values as of queries."""
        heads = {each.shape[2] for each in values[3:]}  # type: ignore[index]
        return found if len(heads) == 1 else found.fail("heads share keys")

    def attention(self, op: Any, q: Any, k: Any, v: Any, mask: Any, split: Any, y: Any) -> Any:
        """The one operator; ``split``: queries and keys, in heads."""
        return op.MultiHeadAttention(
            *(q, k, v, None, None, _bias(op, mask)),
            num_heads=split[0].shape[2],
            unidirectional=y.producer().attributes.get_int("is_causal", 0),
            **_attributes(y, "scale"),
            _domain=CONTRIB,
        )


class _Projected(_MultiHead):
    """``com.microsoft.Attention``: one weight for queries, keys and values of the same input."""

    def own(self, found: MatchResult, *values: ir.Value) -> MatchResult:
        """All three are projections of one input by weights that are constants."""
        found = super().own(found, *values)
        parts = [_projection(each) for each in values[:3]]
        if not found or not all(parts) or len({id(p[0]) for p in parts if p}) != 1:
            return found.fail("no projections of one input")
        widths = {each.shape[2] for each in values[:3]}  # type: ignore[index]
        return found if len(widths) == 1 else found.fail("values of another width")

    def attention(self, op: Any, q: Any, k: Any, v: Any, mask: Any, split: Any, y: Any) -> Any:
        """The one operator; ``split``: queries and keys, in heads."""
        parts = [part for part in map(_projection, (q, k, v)) if part is not None]
        name = f"{q.name}_projections"
        weight = np.concatenate([part[1] for part in parts], axis=1)
        bias = np.concatenate([part[2] for part in parts])
        return op.Attention(
            parts[0][0],
            op.initializer(ir.tensor(weight, name=f"{name}_weight")),
            op.initializer(ir.tensor(bias, name=f"{name}_bias")),
            *(None, None, _bias(op, mask)),
            num_heads=split[0].shape[2],
            unidirectional=y.producer().attributes.get_int("is_causal", 0),
            **_attributes(y, "scale"),
            _domain=CONTRIB,
        )


def _projection(value: ir.Value) -> tuple[ir.Value, np.ndarray, np.ndarray] | None:
    """The input, weight (in, out) and bias (out,) of a linear map with constants."""
    node, bias = value.producer(), None
    if node is not None and node.op_type == "Add":
        sides = [ir.convenience.get_const_tensor(v) for v in node.inputs if v is not None]
        places = [i for i, side in enumerate(sides) if side is not None and len(side.shape) == 1]
        if len(places) != 1:
            return None
        bias = sides[places[0]].numpy()  # type: ignore[union-attr]
        source = node.inputs[1 - places[0]]
        node = None if source is None else source.producer()
    if node is None or node.op_type != "MatMul" or node.inputs[1] is None:
        return None
    weight = ir.convenience.get_const_tensor(node.inputs[1])
    if weight is None or len(weight.shape) != 2 or node.inputs[0] is None:
        return None
    matrix = weight.numpy()
    bias = np.zeros(matrix.shape[1], matrix.dtype) if bias is None else bias
    return (node.inputs[0], matrix, bias) if bias.shape == matrix.shape[1:] else None


def _bias(op: Any, mask: Any) -> Any:
    """What is added to scores, of a mask of booleans."""
    if mask is None:
        return None
    numbers = [op.Constant(value_float=number) for number in (0.0, LOWEST)]
    return op.Where(mask, *numbers)


def _one(op: Any) -> Any:
    return op.Constant(value_ints=[1])


def _attributes(y: ir.Value, *names: str) -> dict[str, Any]:
    found = y.producer().attributes  # type: ignore[union-attr]
    return {name: found[name].value for name in names if name in found}


_RULES = {each: RewriteRuleSet([each.rule()]) for each in (_Flat, _MultiHead, _Projected)}


def fuse_flat(model: ir.Model) -> int:
    """``ai.onnx.Attention`` without transpositions; answers how many."""
    return _RULES[_Flat].apply_to_model(model)


def fuse_multi_head(model: ir.Model) -> int:
    """``com.microsoft.MultiHeadAttention``; answers how many."""
    return _RULES[_MultiHead].apply_to_model(model)


def fuse_projected(model: ir.Model) -> int:
    """``com.microsoft.Attention``, projections and all; answers how many."""
    return _RULES[_Projected].apply_to_model(model)
