"""What is computed: the data, the two textbook lines, and the float64 results that everything has to give first.

    Q = query.repeat_interleave(n).reshape(-1, n)
    out = torch.softmax(-((Q - key) * w)**2 / 2, dim=1) @ value

Queries and keys are uniform on (0, 5) in every feature. Unless said otherwise they are unsorted and w = 1: each pair
counts then, so that no kernel gains by skipping tiles and pairs per second mean what they say.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

WIDTH = 5.0
TOLERANCE = 2e-4  # relative to the largest entry: far above float32 rounding, far below any mistake

Call = Callable[[], tuple]  # what is timed: returns tensors, arrays or numbers, finished


class WrongResultError(AssertionError):
    """A peer does not compute what it is timed for."""


@dataclass(frozen=True)
class Data:
    """float32 inputs and the gradient that comes from above; `where` says in words where the points lie."""

    query: Tensor
    key: Tensor
    value: Tensor
    w: Tensor
    cotangent: Tensor
    where: str = ""

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return self.query, self.key, self.value, self.w

    @property
    def pairs(self) -> int:
        return self.query.shape[0] * self.key.shape[0]

    @property
    def features(self) -> int:
        return 1 if self.query.ndim == 1 else self.query.shape[1]

    @property
    def channels(self) -> int:
        return 1 if self.value.ndim == 1 else self.value.shape[1]


@functools.lru_cache(maxsize=4)
def data(n: int, features: int = 1, channels: int = 1, w: float = 1.0, ordered: bool = False) -> Data:
    """N = M = n points; one feature and one channel as vectors, more as matrices."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.rand(n, features, generator=generator) * WIDTH for _ in range(2))
    if ordered:
        query, key = query.sort(0).values, key.sort(0).values
    signal = 2 * torch.sin(key.sum(1)) + key.sum(1) ** 0.8
    value = signal[:, None] + 0.5 * torch.randn(n, channels, generator=generator)
    if features == channels == 1:
        query, key, value = query[:, 0].contiguous(), key[:, 0].contiguous(), value[:, 0].contiguous()
    cotangent = torch.randn(value.shape, generator=generator)
    return Data(query, key, value, torch.tensor(w), cotangent)


def two_lines(query: Tensor, key: Tensor, value: Tensor, w: Tensor) -> Tensor:
    """The textbook's lines for one feature, (M,) and (N,), and as little changed as can be for (M, D) and (N, D)."""
    if query.ndim == 1:
        n = key.shape[0]
        Q = query.repeat_interleave(n).reshape(-1, n)
        return torch.softmax(-(((Q - key) * w) ** 2) / 2, dim=1) @ value
    return torch.softmax(-(((query[:, None] - key) * w) ** 2).sum(-1) / 2, dim=1) @ value


def oracle(given: Data, gradients: bool = False) -> tuple[Tensor, ...]:
    """The two lines in float64: out and, asked for, the gradients of query, key, value, w. A few rows at a time."""
    query, key, value, w = (tensor.double().requires_grad_(gradients) for tensor in given.inputs)
    rows = max(1, 2**21 // (key.shape[0] * given.features))
    cotangents = given.cotangent.double()
    # Allocated once: a small result of each part, kept where a large matrix has been, would leave no room for the next.
    found = torch.empty_like(cotangents)
    for part, cotangent, place in zip(*(x.split(rows) for x in (query, cotangents, found)), strict=True):
        out = two_lines(part, key, value, w)
        if gradients:
            (out * cotangent).sum().backward(retain_graph=True)  # the graph of split, which all parts share
        place.copy_(out.detach())
    return (found, query.grad, key.grad, value.grad, w.grad) if gradients else (found,)


def some_rows(given: Data, most: int = 32) -> tuple[Tensor, Tensor]:
    """Rows spread over the result, and what the oracle gives there: for sizes at which all rows take too long."""
    rows = torch.linspace(0, given.query.shape[0] - 1, min(most, given.query.shape[0])).long()
    part = Data(given.query[rows], given.key, given.value, given.w, given.cotangent[rows])
    return rows, oracle(part)[0]


def error_of(found: object, exact: Tensor, what: str) -> float:
    """Largest difference to the float64 result, relative to its largest entry."""
    actual = found.detach().cpu() if isinstance(found, Tensor) else torch.from_numpy(np.array(found))
    if actual.numel() != exact.numel():
        raise WrongResultError(f"{what}: shape {tuple(actual.shape)}, not {tuple(exact.shape)}")
    return float((actual.double().reshape(exact.shape) - exact).abs().max() / exact.abs().max())


def check(found: Sequence, exact: Sequence[Tensor], what: str, tolerance: float = TOLERANCE) -> float:
    """The largest error; raises WrongResultError unless every result agrees with its float64 counterpart."""
    errors = []
    for position, (actual, expected) in enumerate(zip(found, exact, strict=True)):
        errors.append(error_of(actual, expected, f"{what}, result {position}"))
        if not errors[-1] <= tolerance:  # also where it is NaN
            raise WrongResultError(
                f"{what}: result {position} is off by {errors[-1]:.3g} of its largest entry, more than {tolerance:.3g}"
            )
    return max(errors)


# The chapter's own size, with the keys and values that leave each example out.


def per_query_lines(query: Tensor, keys: Tensor, values: Tensor, w: Tensor) -> Tensor:
    """The textbook's lines where each query has a row of keys of its own, (M, n), as its training does."""
    n = keys.shape[1]
    Q = query.repeat_interleave(n).reshape(-1, n)
    weights = torch.softmax(-(((Q - keys) * w) ** 2) / 2, dim=1)
    return torch.bmm(weights.unsqueeze(1), values.unsqueeze(-1)).reshape(-1)


class TextbookModule(nn.Module):
    """The same as a module, with the parameter w."""

    def __init__(self, w: float):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([w]))

    def forward(self, queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        return per_query_lines(queries, keys, values, self.w)


def examples(n: int) -> tuple[Tensor, Tensor]:
    """The chapter's data: sorted inputs on (0, 5), targets 2 sin x + x^0.8 + noise."""
    generator = torch.Generator().manual_seed(0)
    x = torch.sort(torch.rand(n, generator=generator) * WIDTH).values
    return x, 2 * torch.sin(x) + x**0.8 + 0.5 * torch.randn(n, generator=generator)


def others(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Each (n,) as (n, n - 1): row i leaves entry i out."""
    n = tensors[0].shape[0]
    keep = ~torch.eye(n, dtype=torch.bool)
    return tuple(tensor.repeat(n, 1)[keep].reshape(n, -1) for tensor in tensors)


@functools.cache
def chapter(n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs, targets, and the keys and values that leave each example out, (n, n - 1)."""
    x, y = examples(n)
    return x, y, *others(x, y)


SMALL = ("forward", "forward + backward", "training step")


def small(
    kind: str, function: Callable[..., Tensor], module: Callable[..., nn.Module], chapter: tuple[Tensor, ...]
) -> Call:
    """A call of one of the kinds SMALL on the chapter's tensors: by a function, or a training step of a module.

    forward: under no_grad. forward + backward: to w, from a given gradient. training step: zero_grad, halved squared
    loss, backward, SGD.
    """
    x, y, keys, values = chapter
    if kind == "training step":
        return _training_step(module(w=1.0).to(x.device, x.dtype), x, y, keys, values)
    w = torch.ones(1, device=x.device, dtype=x.dtype, requires_grad=kind != "forward")
    cotangent = torch.linspace(-1, 2, len(x), device=x.device, dtype=x.dtype)

    def forward_only() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (function(x, keys, values, w),)

    def forward_and_backward() -> tuple[Tensor, ...]:
        out = function(x, keys, values, w)
        return out.detach(), *torch.autograd.grad(out, [w], cotangent)

    return forward_only if kind == "forward" else forward_and_backward


def _training_step(net: nn.Module, x: Tensor, y: Tensor, keys: Tensor, values: Tensor) -> Call:
    # So small a rate that w, and with it the work, stays the same however often the step is repeated.
    trainer = torch.optim.SGD(net.parameters(), lr=1e-9)
    loss = nn.MSELoss(reduction="none")

    def call() -> tuple[Tensor, ...]:
        trainer.zero_grad()
        errors = loss(net(x, keys, values), y) / 2
        errors.sum().backward()
        trainer.step()
        return errors.detach(), net.w.grad

    return call


# Bandwidth selection.


def leave_one_out_loss(x: Tensor, y: Tensor, w: float) -> float:
    """Mean squared leave-one-out error in float64, a few rows at a time."""
    x, y = x.double(), y.double()
    rows = max(1, 2**21 // len(x))
    total = 0.0
    for first in range(0, len(x), rows):
        part = slice(first, first + rows)
        scores = -(((x[part, None] - x) * w) ** 2) / 2
        own = torch.arange(len(x))[part]
        scores[torch.arange(len(own)), own] = -torch.inf
        total += float(((torch.softmax(scores, 1) @ y - y[part]) ** 2).sum())
    return total / len(x)


@functools.cache
def best(n: int) -> tuple[float, float]:
    """The w with the least leave-one-out loss on `examples`, and that loss: golden section in float64."""
    x, y = examples(n)

    def loss(log_w: float) -> float:
        return leave_one_out_loss(x, y, float(np.exp(log_w)))

    golden = (np.sqrt(5) - 1) / 2
    low, high = np.log(1.0), np.log(50.0)
    left, right = high - golden * (high - low), low + golden * (high - low)
    at_left, at_right = loss(left), loss(right)
    while high - low > 2e-4:
        if at_left < at_right:
            high, right, at_right = right, left, at_left
            left = high - golden * (high - low)
            at_left = loss(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + golden * (high - low)
            at_right = loss(right)
    return float(np.exp(low)), min(at_left, at_right)
