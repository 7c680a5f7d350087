"""Packed graphs keep the modes of the model: gradients off, autocast on and off inside."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.torch_version import TorchVersion

from tests.passes import small
from tests.passes.paddings import paddings, real
from tests.passes.test_pack_varlen import ROWS, compiled, declined, ids, ran, seeded
from tests.tolerances import close


class Frozen(small.Encoder):
    """A table of positions without gradients, as rotary embeddings are made."""

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.embed(ids)
        with torch.no_grad():
            x_detached = F.gelu(self.layers[0].up(x)[..., : small.WIDTH])
            place = self.positions(torch.arange(ids.shape[1]))
        x = x + place + x_detached
        bias = self.spell(mask)
        for layer in self.layers:
            x = layer(x, bias)
        return self.head(x, mask)


class Mixed(small.Encoder):
    """bfloat16 in one part, and float32 inside of it again."""

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        x = self.embed(ids)
        bias = self.spell(mask)
        with torch.autocast("cpu", torch.bfloat16):
            x = self.layers[0](x, bias)
            with torch.autocast("cpu", enabled=False):
                x = x.float() + F.linear(x.float(), self.layers[1].qkv.weight[: small.WIDTH])
            y = self.layers[1].up(x)
            assert y.dtype == torch.bfloat16
            x = x + self.layers[1].down(F.gelu(y))
        return self.head(self.layers[1](x.float(), bias), mask)


@pytest.mark.parametrize("compiler", ["eager", "inductor"])
@pytest.mark.parametrize(
    ("make", "row"), [(Frozen, "model_fp32"), (Mixed, "model_bf16")], ids=["grad", "autocast"]
)
def test_modes_inside(
    make: Callable[[small.Bias, small.Head], nn.Module], row: str, compiler: str
) -> None:
    if make is Mixed and TorchVersion(torch.__version__) < "2.13":
        pytest.skip("declined: this torch cannot trace autocast again")
    model = seeded(lambda: make(small.causal, small.tokens)).train()
    run = compiled(model, compiler)
    for tokens in (8, 13):
        x, (_, mask) = ids(ROWS, tokens), next(paddings(ROWS, tokens))
        ambient = torch.is_autocast_enabled("cpu")
        outputs = [real(f(x, mask), mask) for f in (run, model)]
        assert torch.is_autocast_enabled("cpu") is ambient
        assert outputs[0].dtype == outputs[1].dtype
        close(*outputs, row)
        weights = list(model.parameters())
        pairs = [
            torch.autograd.grad(y.square().mean(), weights, allow_unused=True) for y in outputs
        ]
        for a, e in zip(*pairs, strict=True):
            assert (a is None) == (e is None)
            if a is not None and e is not None:
                close(a, e, "model_gradient_fp32" if row == "model_fp32" else row)
    assert ran(run) == {"plain": 0, "packed": 2}, declined(run)


def test_a_plain_batch_of_a_mixed_model() -> None:
    """The form with padding is traced once more, too, and must not lose its autocast."""
    if TorchVersion(torch.__version__) < "2.13":
        pytest.skip("declined: this torch cannot trace autocast again")
    model = seeded(lambda: Mixed(small.causal, small.tokens))
    run = compiled(model)
    x, mask = ids(ROWS, 8), torch.ones(ROWS, 8, dtype=torch.long)
    actual, expected = run(x, mask), model(x, mask)
    assert actual.dtype == expected.dtype
    close(actual, expected, "model_bf16")
    assert ran(run) == {"plain": 1, "packed": 0}, declined(run)
    pieces = run(x, mask) - small.Encoder.forward(model, x, mask)  # type: ignore[arg-type]
    assert pieces.abs().max() > 1e-3  # the parts in bfloat16 are not those in float32
