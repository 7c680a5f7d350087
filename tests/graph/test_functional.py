"""In-place writes become dataflow: programs that lose all of theirs, and stay what they are."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from effpass.graph.emit import Emitter
from effpass.graph.source import line
from effpass.graph.storages import out_of_place, written_storages
from tests.graph.rewritten import Rewritten, equal, leaf, same
from tests.tolerances import close

aten = torch.ops.aten
Program = Callable[..., Any]
PROGRAMS: dict[str, Program] = {}


def program(run: Program) -> Program:
    """Adds a function of x (3, 4) and y (2, 3, 4) to the table."""
    PROGRAMS[run.__name__] = run
    return run


@program
def chain(x: Tensor, y: Tensor) -> Tensor:
    state = torch.zeros(3, 4)
    for t in range(2):
        state.mul_(x).add_(y[t])
    return state


@program
def returned_by_the_op(x: Tensor, y: Tensor) -> Tensor:
    z = x * 2
    w = z.add_(1).mul_(x)
    return w.sum() + z.sum()


@program
def reads_between(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    z = x.clone()
    before, row = z.sum(1), z[1]
    z[1] *= 3
    between = row * 1
    z[0] = row
    return before, between, row * z[0], z * 1


@program
def views_of_views(x: Tensor, y: Tensor) -> Tensor:
    z = y.clone()
    z.transpose(0, 1)[1:, ::2][0].unsqueeze(-1).mul_(2)
    z.permute(2, 0, 1)[-1].flatten()[1::2] += 5
    z.view(6, 4).unflatten(0, (3, 2))[:, -1, 1:3].squeeze().clamp_(max=0.1)
    return z * 1


@program
def moved(x: Tensor, y: Tensor) -> Tensor:
    z = y.clone()
    z.movedim(0, -1)[..., 0].add_(1)
    z.movedim((0, 1), (2, 0))[0].mul_(2)
    z.swapaxes(1, 2)[:, 3].sub_(1)
    z[0].t()[1].mul_(3)
    z[1].T[2].mul_(4)
    z.mT[:, 1].mul_(5)
    z[0].diagonal(1).add_(7)
    return z * 1


@program
def whole_through_a_transpose(x: Tensor, y: Tensor) -> Tensor:
    z = x.clone()
    z.t().copy_(y[0].t() * 2)
    return z.view(-1) * 1


@program
def numbers_from_the_end(x: Tensor, y: Tensor) -> Tensor:
    z = y.clone()
    z[-1, :, -3:-1] = 1.5
    z[:, -2:, ::3] *= 2
    z.narrow(-1, -2, 2).add_(1)
    z.select(-2, -3).neg_()
    z[5:] += 1
    return z * 1


@program
def masks_and_indices(x: Tensor, y: Tensor) -> Tensor:
    z, where = y * 1, torch.tensor([0, 2, 2])
    z[y > 0.5] = 0.25
    z.masked_fill_(y < -0.5, -0.25)
    z[:, where[:2]] = x[:2]
    z.index_add_(1, where, y)
    z.index_fill_(2, torch.tensor([3]), 2.0)
    z.scatter_(0, torch.zeros(1, 3, 4, dtype=torch.int64), y[:1])
    z.index_put_((where % 2,), x[1], accumulate=True)
    return z * 1


@program
def unary(x: Tensor, y: Tensor) -> Tensor:
    z = F.relu(y * 2, inplace=True)
    z = z * (y + 9).sqrt_()
    w = (y * 3).neg_().exp_()
    v = (y * 1).cumsum_(1).tril_()
    return F.silu(y * 1, inplace=True).mul_(2).tanh_() + z * w * v


@program
def ternary(x: Tensor, y: Tensor) -> Tensor:
    z = x * 1
    z.addcmul_(x, y[0], value=0.5).lerp_(y[1], 0.3).addcdiv_(y[0], x.exp())
    return z.sub_(y[0], alpha=2) * 1


@program
def other_dtypes(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
    z = x.clone()
    z += y[0].double()
    z[0].copy_(y[0, 0].to(torch.bfloat16))
    whole = torch.zeros(3, 4, dtype=torch.float64)
    whole.copy_(x)
    count = torch.zeros(4, dtype=torch.int64)
    count[1:] = (x[0, 1:] * 3).detach()
    flag = x > 0
    flag &= y[0] > 0
    flag[0] |= x[1] > 1
    flag[2] = 1
    test = x.detach() * 1
    test.gt_(0).logical_not_()
    return z * 1, whole, count, flag, test


@program
def other_overloads(x: Tensor, y: Tensor) -> Tensor:
    z = x * 3
    z **= 2
    z /= y[0].exp()
    w = x.detach().exp()
    w **= y[0].detach()
    w //= 0.1
    w %= 3
    return z * w


@program
def broadcast(x: Tensor, y: Tensor) -> Tensor:
    z = torch.zeros(2, 3, 4)
    z[:] = x
    z[0] = x[0]
    z[1, :, 2] = 3
    z[:, 1].copy_(y[0, 0].sum())
    w = torch.zeros(4)
    w[...] = x.mean()
    return z * w


@program
def nothing_left_of_the_input(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    z, w = x * 2, y[0] * 2
    z.zero_()
    w.copy_(torch.ones(4))
    return z, w[1] * 2


@program
def single_numbers(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    z = x.sum()
    z += 1
    w = x.mean()
    w.fill_(2)
    return z, w * y.sum()


@program
def pieces(x: Tensor, y: Tensor) -> Tensor:
    z = y.detach().clone()
    z.unbind(1)[2].mul_(2)
    z.chunk(2, -1)[1].add_(1)
    z.split([1, 3], 2)[1].mul_(3)
    a, b = z.tensor_split(2)
    a.add_(b)
    return z * x


@program
def pieces_read_later(x: Tensor, y: Tensor) -> Tensor:
    z = y.detach().clone()
    rows, halves = z.unbind(1), z.chunk(2, 2)
    z.mul_(2)
    z[:, 0] = rows[1]
    return rows[0] * x[0] + rows[1] + halves[1].sum()


@program
def detached(x: Tensor, y: Tensor) -> Tensor:
    z = x * 2
    frozen = z.detach()
    z.mul_(y[0])
    return z * frozen


@program
def copied_onto_itself_detached(x: Tensor, y: Tensor) -> Tensor:
    z = x * 2
    z.copy_(z.detach())
    return z * y[0]


@program
def a_view_is_returned(x: Tensor, y: Tensor) -> Tensor:
    z = y * 1
    last = z[:, -1]
    z.mul_(2)
    return last


@program
def a_transpose_is_returned(x: Tensor, y: Tensor) -> Tensor:
    z = y * 1
    z[0] = x
    return z.transpose(0, 2)


@program
def copies_do_not_follow(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    z, w = x * 2, torch.zeros(3, 4)
    w.copy_(z)
    z.add_(1)
    return z * 1, w


@program
def laid_out_otherwise(x: Tensor, y: Tensor) -> Tensor:
    z = torch.zeros(4, 3).t()
    z.copy_(x)
    w = x.clone()
    w.copy_(y[0].t().contiguous().t())
    return w.view(-1).sum() + z.t().view(-1)


@program
def dropout_in_evaluation(x: Tensor, y: Tensor) -> Tensor:
    z = x * 2
    F.dropout(z, 0.5, training=False, inplace=True).add_(1)
    return F.dropout(z, 0.5, training=False).mul_(y[0])


@program
def shapes_of_views(x: Tensor, y: Tensor) -> Tensor:
    z = y.clone()
    v = z.view_as(y)
    z[0] = x
    return v.view(*v.shape[:1], -1) + z.reshape(v.size(0), -1)


@program
def nothing_to_write(x: Tensor, y: Tensor) -> Tensor:
    z = x.clone()
    z[1:1] = 5
    z[:, 4:].add_(1)
    return z * 1


INPUTS = torch.linspace(-1, 1, 12).view(3, 4).sin(), torch.linspace(-2, 2, 24).view(2, 3, 4).cos()


@pytest.mark.parametrize("name", PROGRAMS)
def test_all_writes_become_dataflow(name: str) -> None:
    compiled = equal(PROGRAMS[name], *INPUTS)
    assert compiled.count > 0
    assert compiled.left == 0 and not compiled.problems


def test_symbolic_sizes() -> None:
    def run(x: Tensor) -> Tensor:
        z, state = x.clone(), torch.zeros(x.shape[0], 3)
        for t in range(1, 4):
            state.mul_(0.5).add_(x[:, t])
            z[:, t] = state
            z.flatten(0, 1)[::2] *= 2
        z[:, 0] = 1
        z[:, :2].fill_(x.sum())
        return z.view(x.shape[0] * 4, 3) + z.transpose(0, 1).reshape(-1, 3)

    compiled = Rewritten(run)
    for batch in (5, 7):
        x = torch.randn(batch, 4, 3)
        mine, theirs = leaf(x), leaf(x)
        torch._dynamo.mark_dynamic(mine, 0)
        same([compiled(mine)], [mine], [run(theirs)], [theirs])
    assert compiled.left == 0
    assert len(compiled.graphs) == 1


def test_buffers_of_the_model_are_written_and_the_rest_is_dataflow() -> None:
    cache = torch.zeros(3, 4)

    def run(x: Tensor, y: Tensor) -> Tensor:
        z = x.detach() * 1
        z.mul_(2)
        cache.copy_(z)
        z.add_(cache)
        w = torch.zeros(3, 4)
        w.copy_(cache)
        cache.zero_()
        return z * w * y[0]

    compiled = equal(run, *INPUTS)
    assert compiled.count == 3 and compiled.left == 2
    assert not cache.any()


def test_new_nodes_know_where_they_come_from() -> None:
    compiled = equal(PROGRAMS["views_of_views"], *INPUTS)
    graph = compiled.graph.graph
    made = [n for n in graph.nodes if n.op == "call_function"]
    assert {"slice_scatter", "select_scatter"} <= {getattr(n.target, "_opname", "") for n in made}
    assert all(line(n).startswith("test_functional.py:") for n in made)
    assert {n.meta["effpass_region"] for n in made} == {0}


def test_the_cost_grows_with_the_graph_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(x: Tensor, steps: int) -> Tensor:
        z = torch.zeros(steps, 4)
        rows = [z[t] for t in range(steps)]
        for t in range(steps):
            rows[t] += x[0] * z[t - 1]
            z[t].mul_(2)
        return z * 1 + sum(rows)

    def counted(steps: int) -> int:
        calls: list[Any] = []
        original = Emitter.call
        counting = lambda *a, **k: (calls.append(None), original(*a, **k))[1]  # noqa: E731
        with monkeypatch.context() as patch:
            patch.setattr(Emitter, "call", counting)
            assert Rewritten(lambda x: run(x, steps))(INPUTS[0]) is not None
        return len(calls)

    ten, twenty, forty = counted(10), counted(20), counted(40)
    assert forty - twenty == 2 * (twenty - ten) > 0


def test_written_storages_are_the_views_too() -> None:
    def run(x: Tensor, cache: Tensor) -> Tensor:
        row = cache[0]
        z = x * 2
        z.add_(1)
        cache[1].copy_(x[0])
        return row + z

    compiled = Rewritten(run)
    compiled(INPUTS[0], torch.zeros(2, 4))
    written = written_storages(compiled.graph)
    views = [n for n in written if getattr(n.target, "_opname", "") == "select"]
    assert compiled.count == 1 and len(views) == 2
    assert [n.op for n in written].count("placeholder") == 1
    assert not any(getattr(n.target, "_opname", "") in ("add", "mul") for n in written)


@pytest.mark.parametrize(
    ("target", "form"),
    [
        (aten.add_.Tensor, aten.add.Tensor),
        (aten.pow_.Scalar, aten.pow.Tensor_Scalar),
        (aten.pow_.Tensor, aten.pow.Tensor_Tensor),
        (aten.floor_divide_.Tensor, aten.floor_divide.default),
        (aten.__iand__.Tensor, aten.__and__.Tensor),
        (aten.t_.default, None),
        (aten.detach_.default, None),
        (aten.uniform_.default, None),
        (aten.fill_diagonal_.default, None),
        (aten.add.Tensor, None),
    ],
)
def test_the_form_out_of_place_has_the_same_operands(target: Any, form: Any) -> None:
    assert out_of_place(target) is form


def test_inductor_compiles_the_result() -> None:
    from torch._inductor.compile_fx import compile_fx

    def run(x: Tensor, y: Tensor) -> Tensor:
        return PROGRAMS["views_of_views"](x, y) + PROGRAMS["laid_out_otherwise"](x, y).sum()

    kept = Rewritten(run)
    kept(*INPUTS)
    compiled = compile_fx(kept.graph, kept.inputs)
    close(compiled(*kept.inputs)[0], run(*INPUTS), "model_fp32")  # type: ignore[operator]
