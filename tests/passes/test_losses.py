"""Losses inside the graph, of packed tokens where no padding token has a target."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.models.zoo import FAMILIES
from tests.passes import small
from tests.passes.paddings import paddings
from tests.passes.test_pack_varlen import ROWS, compiled, declined, ids, ran, seeded
from tests.tolerances import close

Loss = Callable[[Tensor, Tensor], Tensor]


class Trained(small.Encoder):
    """An encoder whose forward answers its loss."""

    def __init__(self, loss: Loss) -> None:
        super().__init__(small.causal, small.tokens, layers=1)
        self.loss, self.classes = loss, nn.Linear(small.WIDTH, 11)

    def forward(self, ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
        return self.loss(self.classes(super().forward(ids, mask)), labels)


def each_token(x: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(x.view(-1, 11), labels.view(-1))


def summed(x: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(x.flatten(0, 1), labels.flatten(), reduction="sum", label_smoothing=0.1)


def weighted(x: Tensor, labels: Tensor) -> Tensor:
    weight = torch.linspace(0.5, 2.0, 11)
    return F.nll_loss(x.log_softmax(-1).view(-1, 11), labels.view(-1), weight)


def classes_second(x: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(x.transpose(1, 2), labels)


def padded_labels(x: Tensor, labels: Tensor) -> Tensor:
    """As transformers shifts."""
    labels = F.pad(labels, (0, 1), value=-100)[..., 1:].contiguous()
    return F.cross_entropy(x.view(-1, 11), labels.view(-1), ignore_index=-100)


def cut_scores(x: Tensor, labels: Tensor) -> Tensor:
    """As most others shift."""
    x, labels = x[:, :-1].contiguous(), labels[:, 1:].contiguous()
    return F.cross_entropy(x.view(-1, 11), labels.view(-1))


def unshifted_part(x: Tensor, labels: Tensor) -> Tensor:
    """Without the first position, which is a mark."""
    return F.cross_entropy(x[:, 1:].reshape(-1, 11), labels[:, 1:].reshape(-1)) * 2


LOSSES = (each_token, summed, weighted, classes_second, padded_labels, cut_scores, unshifted_part)


def labelled(tokens: int, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, a mask, and labels that are -100 at padding and at one real token."""
    _, mask = list(paddings(ROWS, tokens))[side]
    labels = (ids(ROWS, tokens) % 11).masked_fill(mask == 0, -100)
    labels[0, 1] = -100
    return ids(ROWS, tokens), mask, labels


QUICK = (each_token, padded_labels, cut_scores)
each = [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in LOSSES]


@pytest.mark.parametrize("loss", each, ids=lambda f: f.__name__)
def test_losses_and_gradients(loss: Loss) -> None:
    model = seeded(lambda: Trained(loss))
    run = compiled(model)
    for tokens in (9, 6):
        inputs = labelled(tokens, 0)
        losses = [f(*inputs) for f in (run, model)]
        close(*losses, "model_fp32")
        weights = list(model.parameters())
        for a, e in zip(*(torch.autograd.grad(y, weights) for y in losses), strict=True):
            close(a, e, "model_gradient_fp32")
    assert ran(run) == {"plain": 0, "packed": 2}, declined(run)


@pytest.mark.parametrize("loss", [each_token, cut_scores], ids=lambda f: f.__name__)
def test_a_target_at_padding_runs_plain(loss: Loss) -> None:
    """One forgotten label of padding makes another loss, which is kept."""
    model = seeded(lambda: Trained(loss))
    run = compiled(model)
    x, mask, labels = labelled(9, 0)
    row = int((mask[:, -1] == 0).nonzero()[0])
    with torch.no_grad():
        right = run(x, mask, labels)
        labels[row, -1] = 3
        wrong = run(x, mask, labels)
        close(wrong, model(x, mask, labels), "model_fp32")
    assert abs(float(wrong - right)) > 1e-4
    assert ran(run) == {"plain": 1, "packed": 1}, declined(run)


def test_padding_in_front_predicts_the_first_token() -> None:
    """With shifted labels, the last padding token has a target there, unless it is left out."""
    model = seeded(lambda: Trained(padded_labels))
    run = compiled(model)
    x, mask, labels = labelled(9, 1)
    with torch.no_grad():
        close(run(x, mask, labels), model(x, mask, labels), "model_fp32")
        assert ran(run) == {"plain": 1, "packed": 0}, declined(run)
        first = mask.argmax(1)
        labels[torch.arange(ROWS), first] = -100
        close(run(x, mask, labels), model(x, mask, labels), "model_fp32")
    assert ran(run) == {"plain": 1, "packed": 1}, declined(run)


def test_what_is_not_ignored_is_declined() -> None:
    """Scores themselves as targets, and a mean over all tokens."""

    def distilled(x: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(x.flatten(0, 1), x.detach().roll(1, 1).flatten(0, 1).softmax(-1))

    model = seeded(lambda: Trained(distilled))
    run = compiled(model)
    inputs = labelled(9, 0)
    close(run(*inputs), model(*inputs), "model_fp32")
    assert [d.code.split(":")[0] for d in declined(run)] == ["pack_varlen"]


# torch's own: Dynamo instantiates a model's autograd.Function, which torch deprecates
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("family", ["llama", pytest.param("mamba2", marks=pytest.mark.slow)])
def test_models_with_labels(family: str) -> None:
    model, make_inputs = FAMILIES[family]()
    run = compiled(model)
    _, mask = next(paddings(3, 11))
    inputs = make_inputs(3, 11, True) | {"attention_mask": mask}
    inputs["labels"] = inputs["input_ids"].masked_fill(mask == 0, -100)
    losses = [f(**inputs)[0] for f in (run, model)]
    close(*losses, "model_fp32")
    weights = [p for p in model.parameters() if p.requires_grad]
    grads = [torch.autograd.grad(y, weights, allow_unused=True) for y in losses]
    for a, e in zip(*grads, strict=True):
        assert (a is None) == (e is None)
        if a is not None and e is not None:
            close(a, e, "zoo_gradient_fp32")
    assert ran(run) == {"plain": 0, "packed": 1}, declined(run)
