"""A parallel scan as an ``autograd.Function``: raised when its backward is the gradient it has."""

from typing import Any

import pytest
import torch
from torch import Tensor

from effpass.patterns import associative, discretised, own_gradient
from tests.patterns.raising import Raiser, equal
from tests.patterns.spellings import trees
from tests.patterns.spellings.trees import PairScan
from tests.patterns.test_associative import BY_FUNCTION, Calls

IDIOMS = [own_gradient.IDIOM]
# torch's own: Dynamo instantiates a model's autograd.Function, which torch deprecates
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
Grads = tuple[Tensor | None, ...]


def functions(compiled: Raiser) -> int:
    """How many autograd functions are left."""
    nodes = [node for graph in compiled.graphs for node in graph.graph.nodes]
    return sum(node.target is own_gradient.FUNCTION for node in nodes)


def ab(length: int) -> tuple[Tensor, Tensor]:
    """Coefficients and values (b, l, d, n)."""
    return torch.rand(2, length, 4, 3) * 0.5 + 0.5, torch.randn(2, length, 4, 3)


@pytest.mark.parametrize("length", [2, 5, 8])
@pytest.mark.parametrize("spelling", BY_FUNCTION, ids=lambda s: s.name)
def test_spellings_are_raised(spelling: Any, length: int) -> None:
    compiled = equal(spelling.make(), spelling.inputs(length), [*IDIOMS, discretised.IDIOM])
    assert compiled.nodes(spelling.op) == 1 and not compiled.reasons
    assert not functions(compiled)


class Unpadded(torch.autograd.Function):
    """By doubling, all saved as it comes; the gradient of a is written where it belongs."""

    @staticmethod
    def forward(ctx: Any, A: Tensor, X: Tensor) -> Tensor:
        H = trees.doubling_by_cat(A, X)
        ctx.save_for_backward(H, A)
        return H

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Grads:
        H, A = ctx.saved_tensors
        coefficients = torch.nn.functional.pad(A[:, 1:], (0, 0, 0, 0, 0, 1))
        G = trees.doubling_by_cat(coefficients.flip(1), grads[0].flip(1)).flip(1)
        Q = torch.zeros_like(H)
        Q[:, 1:].add_(H[:, :-1] * G[:, 1:])
        return Q, G


def test_another_function() -> None:
    compiled = equal(Calls(lambda a, b: Unpadded.apply(a, b)), ab(6), IDIOMS)  # type: ignore[no-untyped-call]
    assert compiled.nodes("linear_recurrence") == 1 and not compiled.reasons


def shifted(A: Tensor) -> Tensor:
    """a of the next token."""
    return torch.cat([A[:, 1:], torch.zeros_like(A[:, :1])], dim=1)


def backwards(A: Tensor, grad: Tensor) -> Tensor:
    """db for the coefficients ``A`` of each token."""
    return PairScan.scan(A.flip(1), grad.flip(1)).transpose(1, 2).flip(1)


def before(H: Tensor) -> Tensor:
    """h of the token before."""
    return torch.cat([torch.zeros_like(H[:, :1]), H[:, :-1]], dim=1)


def doubled(A: Tensor, H: Tensor, grad: Tensor) -> Grads:
    dX = backwards(shifted(A), grad)
    return dX * before(H), dX * 2


def own_coefficient(A: Tensor, H: Tensor, grad: Tensor) -> Grads:
    dX = backwards(A, grad)
    return dX * before(H), dX


def own_state(A: Tensor, H: Tensor, grad: Tensor) -> Grads:
    dX = backwards(shifted(A), grad)
    return dX * H, dX


def no_gradient_of_a(A: Tensor, H: Tensor, grad: Tensor) -> Grads:
    return None, backwards(shifted(A), grad)


def straight_through(A: Tensor, H: Tensor, grad: Tensor) -> Grads:
    return grad * before(H), grad


def swapped(A: Tensor, H: Tensor, grad: Tensor) -> Grads:
    dX = backwards(shifted(A), grad)
    return dX, dX * before(H)


def forwards(A: Tensor, H: Tensor, grad: Tensor) -> Grads:
    dX = PairScan.scan(shifted(A), grad).transpose(1, 2)
    return dX * before(H), dX


def other_channels(A: Tensor, H: Tensor, grad: Tensor) -> Grads:
    dX = backwards(shifted(A), grad)
    return dX * before(H.flip(2)), dX


OTHERS = [doubled, own_coefficient, own_state, no_gradient_of_a, straight_through]
OTHERS += [swapped, forwards, other_channels]


@pytest.mark.parametrize("gradient", OTHERS, ids=lambda f: f.__name__)
def test_any_other_gradient_stays_the_users(gradient: Any) -> None:
    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, A: Tensor, X: Tensor) -> Tensor:
            H = PairScan.scan(A, X).transpose(1, 2)
            ctx.save_for_backward(A, H)
            return H

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Grads:
            return gradient(*ctx.saved_tensors, grads[0])

    module = Calls(lambda a, b: Function.apply(a, b))  # type: ignore[no-untyped-call]
    compiled = equal(module, ab(5), [*IDIOMS, associative.IDIOM])
    assert functions(compiled) == 1
    assert "not seen to be the gradient" in " ".join(compiled.reasons)


@pytest.mark.parametrize("length", [4, 7, 16])
def test_the_function_of_mambapy(length: int) -> None:
    pscan = pytest.importorskip("mambapy.pscan").pscan
    compiled = equal(Calls(lambda a, b: pscan(a, b)), ab(length), IDIOMS)
    assert compiled.nodes("linear_recurrence") == 1 and not functions(compiled)
