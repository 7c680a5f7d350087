"""vmap in a captured graph: plain operations, equal forward and back; or declined."""

import copy
from collections.abc import Callable
from operator import getitem
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._C._functorch import get_dynamic_layer_stack_depth
from torch._higher_order_ops.associative_scan import associative_scan, associative_scan_op
from torch.fx import Interpreter
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import effpass
from effpass.capture.dynamo import capture
from effpass.capture.vmapped import VmapError, _SameDtypes
from effpass.graph.source import layer, line
from tests.tolerances import close

EAGER = {"compiler": "eager"}
WEIGHT = torch.linspace(-1, 1, 24).view(3, 8)


def scan(x: Tensor, dim: int = 1, reverse: bool = False) -> Tensor:
    """h[t] = sigmoid(x[t]) h[t-1] + x[t], by the generic scan."""

    def combine(left: Any, right: Any) -> Any:
        return left[0] * right[0], right[0] * left[1] + right[1]

    return associative_scan(combine, (x.sigmoid(), x), dim, reverse, "generic")[1]


def nested(x: Tensor) -> Tensor:
    def outer(rows: Tensor) -> Tensor:
        return torch.vmap(lambda row: row * rows.sum(0), out_dims=1)(rows)

    return torch.vmap(outer, in_dims=1, out_dims=2)(x)


def written_inside(x: Tensor) -> Tensor:
    def one(row: Tensor) -> Tensor:
        made = row * 2
        made[:, 0] += row.sum(-1)
        return made.mul_(row)

    return torch.vmap(one)(x)


def detached_inside(x: Tensor) -> Tensor:
    return torch.vmap(lambda row: row * row.detach() + row)(x)


def normalised(x: Tensor) -> Tensor:
    return torch.vmap(lambda r: nn.functional.layer_norm(r, (8,)).softmax(-1))(x)


def attends(x: Tensor) -> Tensor:
    def one(row: Tensor) -> Tensor:
        heads = row[None]
        return nn.functional.scaled_dot_product_attention(heads, heads, heads)[0]

    return torch.vmap(one)(x)


PROGRAMS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows": lambda x: torch.vmap(lambda row: row * 2 + row.sum())(x),
    "linear": lambda x: torch.vmap(lambda v: nn.functional.linear(v, WEIGHT).sin())(x),
    "in_dims": lambda x: torch.vmap(torch.dot, in_dims=(1, 0))(x[0].t(), x[1].t().contiguous().t()),
    "one of two": lambda x: torch.vmap(lambda a, b: a @ b, in_dims=(0, None))(x, x[0].t()),
    "nested": nested,
    "two in a row": lambda x: torch.vmap(torch.cumsum, (0, None))(torch.vmap(torch.exp)(x), 0),
    "tuple": lambda x: sum(torch.vmap(lambda r: r.split(4, -1))(x)),  # type: ignore[arg-type, return-value]
    "identity": lambda x: torch.vmap(lambda r: r)(x) * 2,
    "unbatched result": lambda x: torch.vmap(lambda r: WEIGHT)(x) * x,
    "constant": lambda x: torch.vmap(lambda r: r * torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8]))(x),
    "chunked": lambda x: torch.vmap(torch.sin, chunk_size=1)(x),
    "written inside": written_inside,
    "detached inside": detached_inside,
    "normalised": normalised,
    "attends": attends,
    "conv": lambda x: torch.vmap(
        lambda r: nn.functional.conv1d(r[None], WEIGHT[:, None, :3], groups=3)
    )(x),
    "dropout off": lambda x: torch.vmap(
        lambda r: nn.functional.dropout(r, 0.5, False), randomness="different"
    )(x),
    "scan": scan,
    "scan of channels": lambda x: scan(x, dim=2),
    "reversed scan": lambda x: scan(x, dim=0, reverse=True),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_equal_to_eager_forward_and_backward(name: str) -> None:
    run = PROGRAMS[name]
    x = torch.rand(2, 3, 8)
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    compiled = torch.compile(run, backend="effpass", options=EAGER, fullgraph=True)
    actual, expected = compiled(mine), run(theirs)
    assert not effpass.report(compiled).declined
    close(actual, expected, "model_fp32")
    actual.square().sum().backward()
    expected.square().sum().backward()
    assert mine.grad is not None and theirs.grad is not None
    close(mine.grad, theirs.grad, "model_gradient_fp32")


def test_inductor_compiles_what_is_written_out() -> None:
    x = torch.rand(2, 3, 8)
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    compiled = torch.compile(scan, backend="effpass")
    close(compiled(mine), scan(theirs), "model_fp32")
    compiled(mine).square().sum().backward()
    scan(theirs).square().sum().backward()
    assert mine.grad is not None and theirs.grad is not None
    close(mine.grad, theirs.grad, "model_gradient_fp32")


def test_sizes_stay_symbolic() -> None:
    def run(x: Tensor) -> Tensor:
        return torch.vmap(lambda row: row * row.sum() / x.shape[0])(x)

    compiled = torch.compile(run, backend="effpass", options=EAGER, fullgraph=True)
    for rows in (3, 5, 4):
        x = torch.rand(rows, 3, 8)
        torch._dynamo.mark_dynamic(x, 0)
        close(compiled(x), run(x), "model_fp32")
    assert len(effpass.report(compiled).graphs) == 1


def captured(run: Callable[..., Any], *args: Any) -> torch.fx.GraphModule:
    """The captured graph of a program."""
    found: list[torch.fx.GraphModule] = []

    def keep(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        found.append(capture(gm, inputs))
        return gm.forward

    torch._dynamo.reset()
    torch.compile(run, backend=keep, fullgraph=True)(*args)
    return found[0]


class Layer(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.vmap(lambda row: row.exp())(x)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Layer()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + 1


def test_operations_keep_their_layer_and_their_line() -> None:
    graph = captured(Model(), torch.rand(2, 3)).graph
    (node,) = graph.find_nodes(op="call_function", target=torch.ops.aten.exp.default)
    assert layer(node) == "inner"
    assert line(node).startswith("test_vmapped.py:")
    assert "row.exp()" in node.meta["stack_trace"]
    assert isinstance(node.meta["val"], Tensor)


def test_no_operation_is_hidden_from_autograd() -> None:
    """Traced below autograd, what autograd itself would save is not written down."""
    x = torch.rand(2, 3, requires_grad=True)
    graph = captured(lambda x: torch.vmap(lambda r: r.exp().tanh() * r.sigmoid())(x), x).graph
    names = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    assert "aten.tanh.default" in names and "aten.detach.default" not in names


AUTOCASTS: dict[str, Callable[[Tensor], Tensor]] = {
    "products": lambda x: torch.vmap(lambda r: (r @ WEIGHT.t()).softmax(-1))(x),
    "dot": lambda x: torch.vmap(torch.vmap(lambda r: torch.dot(r, r)))(x).exp(),
    "mixed": lambda x: torch.vmap(lambda r: nn.functional.linear(r, WEIGHT) + r.sum())(x),
    "scan": scan,
}


@pytest.mark.parametrize("name", AUTOCASTS)
@pytest.mark.parametrize("where", ["outside", "inside"])
def test_autocast(name: str, where: str) -> None:
    run, x = AUTOCASTS[name], torch.rand(2, 3, 8)

    def inside(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return run(x) * 2

    program = run if where == "outside" else inside
    compiled = torch.compile(program, backend="effpass", options=EAGER, fullgraph=True)
    mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16, enabled=where == "outside"):
        actual, expected = compiled(mine), program(theirs)
    assert not effpass.report(compiled).declined
    close(actual, expected, "model_bf16")
    actual.float().sum().backward()
    expected.float().sum().backward()
    assert mine.grad is not None and theirs.grad is not None
    close(mine.grad, theirs.grad, "model_bf16")


def test_casts_that_autocast_would_add_are_refused() -> None:
    """Operations inside one that autocast leaves in float32 would be cast when run alone."""
    x = torch.rand(3, 3)
    traced = make_fx(lambda x: x @ x)(x)
    _SameDtypes(traced).run(x)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(VmapError, match="cast mm"):
        _SameDtypes(traced).run(x)


def test_without_gradients_and_under_a_checkpoint() -> None:
    def quiet(x: Tensor) -> Tensor:
        with torch.no_grad():
            y = scan(x)
        return y * x

    def remembered(x: Tensor) -> Tensor:
        return checkpoint(scan, x, use_reentrant=False) * x  # type: ignore[operator, no-any-return]

    for run in (quiet, remembered):
        x = torch.rand(2, 3, 8)
        mine, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        compiled = torch.compile(run, backend="effpass", options=EAGER, fullgraph=True)
        close(compiled(mine), run(theirs), "model_fp32")
        assert not effpass.report(compiled).declined
        compiled(mine).sum().backward()
        run(theirs).sum().backward()
        assert mine.grad is not None and theirs.grad is not None
        close(mine.grad, theirs.grad, "model_gradient_fp32")


def writes_outside(x: Tensor) -> Tensor:
    made = x * 2

    def one(row: Tensor, where: Tensor) -> Tensor:
        where.add_(row)
        return row

    return torch.vmap(one)(x, made) + made


def no_grad_inside(x: Tensor) -> Tensor:
    def one(row: Tensor) -> Tensor:
        with torch.no_grad():
            kept = row.exp()
        return kept * row

    return torch.vmap(one)(x)


def autocast_inside(x: Tensor) -> Tensor:
    def one(row: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return row @ WEIGHT.t()

    return torch.vmap(one)(x)


DECLINED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "a gradient": (lambda x: torch.func.grad(lambda v: (v**3).sum())(x), "grad transform"),
    "a gradient a row": (
        lambda x: torch.vmap(torch.func.grad(lambda v: (v**3).sum()))(x),
        "grad transform",
    ),
    "a jacobian": (lambda x: torch.func.jacfwd(lambda v: v.exp().sum(0))(x), "grad transform"),
    "random numbers": (
        lambda x: torch.vmap(nn.functional.dropout, randomness="different")(x),
        "draws random numbers",
    ),
    "a write outside": (writes_outside, "to a tensor made outside it"),
    "no_grad inside": (no_grad_inside, "changes the gradient mode"),
    "autocast inside": (autocast_inside, "changes autocast"),
}


@pytest.mark.parametrize("name", DECLINED)
def test_declined_with_a_reason_and_no_level_is_left(name: str) -> None:
    run, reason = DECLINED[name]
    x = torch.rand(2, 3, 8)
    compiled = torch.compile(run, backend="effpass", options=EAGER, fullgraph=True)
    torch.manual_seed(1)
    actual = compiled(x)
    torch.manual_seed(1)
    close(actual, run(x), "model_fp32")
    (declined,) = effpass.report(compiled).declined
    assert reason in declined.reason
    assert get_dynamic_layer_stack_depth() == 0


def test_a_trace_that_fails_leaves_no_level(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> Any:
        raise RuntimeError("no rule")

    monkeypatch.setattr(Interpreter, "call_method", fails)
    x = torch.rand(2, 3)
    compiled = torch.compile(Model(), backend="effpass", options=EAGER)
    close(compiled(x), x.exp() + 1, "model_fp32")
    (declined,) = effpass.report(compiled).declined
    assert "no rule" in declined.reason
    assert get_dynamic_layer_stack_depth() == 0


def test_an_associative_scan_op_keeps_its_node_and_its_body() -> None:
    def fake_cuda(gm: torch.fx.GraphModule) -> torch.fx.GraphModule:
        """The graph that a GPU would get: its scan is one node (which a CPU cannot run)."""
        graph = gm.graph
        old = graph.output_node().args[0][0]  # type: ignore[index]
        a, b = graph.find_nodes(op="placeholder")
        body = torch.fx.symbolic_trace(lambda a1, b1, a2, b2: (a1 * a2, a2 * b1 + b2))
        gm.add_submodule("combine", body)
        with graph.inserting_before(graph.output_node()):
            combine = graph.get_attr("combine")
            found = graph.call_function(associative_scan_op, (combine, (a, b), ()))
            found.meta["example_value"] = (old.meta["example_value"],) * 2
            h = graph.call_function(getitem, (found, 1))
        old.replace_all_uses_with(h)
        graph.erase_node(old)
        gm.recompile()
        return gm

    found: list[torch.fx.GraphModule] = []

    def keep(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        run = gm.forward
        found.append(capture(fake_cuda(torch.fx.GraphModule(gm, copy.deepcopy(gm.graph))), inputs))
        return run

    torch.compile(torch.add, backend=keep)(torch.rand(4, 2), torch.rand(4, 2))
    (node,) = found[0].graph.find_nodes(op="call_function", target=associative_scan_op)
    combine, (a, b), extra = node.args
    assert combine.op == "get_attr" and a.op == b.op == "placeholder" and not extra
    body = getattr(found[0], combine.target)
    values = [torch.rand(2) for _ in range(4)]
    close(body(*values)[1], values[2] * values[1] + values[3], "model_fp32")
    assert [v.shape for v in node.meta["val"]] == [(4, 2), (4, 2)]
