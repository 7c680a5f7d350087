"""Random programs of views and in-place writes, spelled by numbers that Hypothesis shrinks."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Pick = Callable[[int], int]  # a number below its argument, the next choice
View = Callable[[Tensor, Pick], Tensor]


class Rejected(Exception):
    """Eager does not take this program."""


def dim(t: Tensor, pick: Pick) -> int:
    """A dim of ``t``, counted from either end."""
    return pick(2 * t.dim()) - t.dim()


def cut(t: Tensor, pick: Pick) -> Tensor:
    """A slice with any start, end and step."""
    d = pick(t.dim())
    n = t.shape[d]
    index = [slice(None)] * t.dim()
    index[d] = slice(pick(2 * n + 1) - n, pick(2 * n + 2) - n, 1 + pick(3))
    return t[tuple(index)]


VIEWS: tuple[View, ...] = (
    cut,
    cut,
    lambda t, pick: t.select(d := dim(t, pick), pick(2 * t.shape[d]) - t.shape[d]),
    lambda t, pick: t.transpose(dim(t, pick), dim(t, pick)),
    lambda t, pick: t.movedim(dim(t, pick), dim(t, pick)),
    lambda t, pick: t.permute(*range(t.dim() - 1, -1, -1)),
    lambda t, pick: t.unsqueeze(pick(t.dim() + 1)),
    lambda t, pick: t.squeeze(),
    lambda t, pick: t.view(-1) if t.is_contiguous() else t,
    lambda t, pick: t.reshape(-1),
    lambda t, pick: t.flatten(0, 1),
    lambda t, pick: t.diagonal(pick(3) - 1),
    lambda t, pick: t.chunk(2, dim(t, pick))[0],
    lambda t, pick: t.unbind(dim(t, pick))[0],
    lambda t, pick: t.narrow(-1, 0, 1 + pick(t.shape[-1])),
    lambda t, pick: t.contiguous(),
    lambda t, pick: t.expand(2, *t.shape),
    lambda t, pick: t.detach(),
    lambda t, pick: t[:],
)
MAKE: tuple[Callable[[Tensor], Tensor], ...] = (
    torch.clone,
    lambda t: t * 2,
    lambda t: torch.zeros(t.shape),
    torch.zeros_like,
    lambda t: t.transpose(0, -1).clone(),
    lambda t: t.transpose(0, -1).contiguous(),
    lambda t: (t > 0).to(torch.int64),
    lambda t: t.double(),
)


def operand(t: Tensor, x: Tensor, pick: Pick) -> Tensor:
    """Something to write to ``t``: of its shape or smaller, of its dtype or wider."""
    full = torch.linspace(-1, 1, max(1, t.numel()))[: t.numel()].view(t.shape)
    small = torch.ones(t.shape[-1:])
    made = (full * x.sum(), x.mean(), small * x.mean(), full, t.sum() * 0.1)[pick(5)]
    made = made.double() if pick(6) == 0 else made
    return made if t.is_floating_point() else (made > 0).to(t.dtype)


def scatter(t: Tensor, o: Tensor, pick: Pick) -> object:
    """Writes to chosen indices."""
    rows = torch.arange(2) % t.shape[0]
    return (
        lambda: t.index_fill_(0, rows, 0.25),
        lambda: t.masked_fill_(t.detach() > 0.3, 2),
        lambda: t.index_put_((rows,), o.to(t.dtype).sum(), accumulate=bool(pick(2))),
        lambda: t.__setitem__(t.detach() > 0.2, 0.5),
    )[pick(4)]()


WRITES: tuple[Callable[[Tensor, Tensor, Pick], object], ...] = (
    lambda t, o, pick: t.copy_(o),
    lambda t, o, pick: t.copy_(o),
    lambda t, o, pick: t.add_(o),
    lambda t, o, pick: t.mul_(o),
    lambda t, o, pick: t.sub_(o, alpha=2),
    lambda t, o, pick: t.fill_(1),
    lambda t, o, pick: t.fill_(o.sum()),
    lambda t, o, pick: t.zero_(),
    lambda t, o, pick: t.relu_(),
    lambda t, o, pick: t.tanh_(),
    lambda t, o, pick: t.clamp_(max=1),
    lambda t, o, pick: t.cumsum_(0),
    lambda t, o, pick: t.copy_(t.detach()),
    lambda t, o, pick: t.__setitem__(..., o),
    lambda t, o, pick: t.__setitem__(0, 3),
    lambda t, o, pick: t.gt_(0),
    scatter,
    scatter,
)


def run(choices: list[int], x: Tensor, y: Tensor) -> list[Tensor]:
    """The program that ``choices`` spell, on x (4, 3) and y (2, 3, 4); up to three outputs."""
    numbers: Iterator[int] = iter(choices)
    pick: Pick = lambda n: next(numbers) % n if n > 0 else _reject()  # noqa: E731
    pool, outputs = [x * 1, torch.zeros(2, 3, 4)], list[Tensor]()
    try:
        while True:
            _step(pool, outputs, x, y, pick)
    except StopIteration:
        return [*outputs[-2:], pool[-1], *([pool[0].sum()] if len(choices) % 2 else [])]


def _step(pool: list[Tensor], outputs: list[Tensor], x: Tensor, y: Tensor, pick: Pick) -> None:
    t, kind = pool[pick(len(pool))], pick(10)
    try:
        if kind < 4:
            pool.append(VIEWS[pick(len(VIEWS))](t, pick))
        elif kind < 8:
            with torch.set_grad_enabled(True) if pick(12) else torch.no_grad():
                WRITES[pick(len(WRITES))](t, operand(t, x, pick), pick)
        elif kind == 8:
            outputs.append(t * 2 if pick(2) else t.sum())
        else:
            pool.append(MAKE[pick(len(MAKE))](pool[-1] if pick(2) else y))
    except (RuntimeError, IndexError, ValueError, UserWarning) as error:  # eager warns or raises
        raise Rejected from error


def _reject() -> int:
    raise Rejected
