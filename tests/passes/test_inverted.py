"""Masks that are true at padding, as torch's own Transformer takes them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.passes import small
from tests.passes.paddings import paddings, real
from tests.passes.test_pack_varlen import ROWS, compiled, declined, ids, ran, seeded
from tests.tolerances import close


class Torch(nn.Module):
    """``nn.TransformerEncoder`` with ``src_key_padding_mask``."""

    def __init__(self, batch_first: bool = True, norm_first: bool = False) -> None:
        super().__init__()
        self.embed, self.batch_first = nn.Embedding(small.VOCAB, small.WIDTH), batch_first
        layer = nn.TransformerEncoderLayer(
            small.WIDTH, 2, 16, 0.0, batch_first=batch_first, norm_first=norm_first
        )
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, ids: Tensor, padding: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x if self.batch_first else x.transpose(0, 1)
        x = self.encoder(x, src_key_padding_mask=padding)
        return x if self.batch_first else x.transpose(0, 1)


def check(model: nn.Module, lengths: tuple[int, ...] = (9, 6)) -> None:
    run = compiled(model)
    calls = 0
    for tokens in lengths:
        for _, mask in paddings(ROWS, tokens):
            x = ids(ROWS, tokens)
            actual, expected = (f(x, mask == 0) for f in (run, model))
            close(real(actual, mask), real(expected, mask), "model_fp32")
            assert not actual[mask == 0].any()
            calls += 1
    assert ran(run) == {"plain": 0, "packed": calls}, declined(run)


@pytest.mark.parametrize("batch_first", [True, False], ids=["rows_first", "tokens_first"])
def test_the_encoder_of_torch(batch_first: bool) -> None:
    check(seeded(lambda: Torch(batch_first)).train())


def test_evaluation() -> None:
    """Without gradients torch takes one fused call a layer, unless that is switched off."""
    model = seeded(Torch)
    x, (_, mask) = ids(ROWS, 9), next(paddings(ROWS, 9))
    with torch.no_grad():
        run = compiled(model)
        close(real(run(x, mask == 0), mask), real(model(x, mask == 0), mask), "model_fp32")
        assert "_transformer_encoder_layer_fwd" in declined(run)[0].reason
        torch._dynamo.reset()
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            check(seeded(Torch), (9,))
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)


def test_gradients_of_the_encoder_of_torch() -> None:
    model = seeded(lambda: Torch(norm_first=True)).train()
    run = compiled(model)
    x, (_, mask) = ids(ROWS, 9), next(paddings(ROWS, 9))
    losses = [real(f(x, mask == 0), mask).square().sum() for f in (run, model)]
    for a, e in zip(
        *(torch.autograd.grad(y, list(model.parameters())) for y in losses), strict=True
    ):
        close(a, e, "model_gradient_fp32")
    assert ran(run) == {"plain": 0, "packed": 1}, declined(run)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
def test_dtypes(dtype: torch.dtype) -> None:
    model = seeded(lambda: small.Encoder(lambda m: m[:, None, None, :] == 0, small.tokens))
    run = compiled(model)
    x, (_, mask) = ids(ROWS, 8), next(paddings(ROWS, 8))
    padding = (1 - mask).to(dtype)
    close(real(run(x, padding), mask), real(model(x, padding), mask), "model_fp32")
    assert ran(run) == {"plain": 0, "packed": 1}, declined(run)
    assert not run(x, padding)[mask == 0].any()


def test_a_mask_of_other_values() -> None:
    model = seeded(lambda: small.Encoder(lambda m: m[:, None, None, :] == 0, small.tokens))
    run = compiled(model)
    with pytest.raises(ValueError, match=r"hold 1 \(padding\) and 0 \(a token\) only, found"):
        run(ids(2, 4), torch.tensor([[0, 0, 2, 1], [0, 0, 0, 1]]))
