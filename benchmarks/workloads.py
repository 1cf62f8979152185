"""What is timed: each computation with its competitors, and the float64 result that each has to give first.

The baseline is the textbook: the two lines

    Q = query.repeat_interleave(n).reshape(-1, n)
    out = torch.softmax(-((Q - key) * w)**2 / 2, dim=1) @ value

as they stand, and under torch.compile. Queries and keys are uniform on (0, 5) in every feature, unsorted, and w = 1:
each pair counts then, so that no kernel gains by skipping tiles and pairs per second mean what they say.
"""

import functools
import runpy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import nwfast

ROOT = Path(__file__).resolve().parent.parent
WIDTH = 5.0
TOLERANCE = 2e-4  # relative to the largest entry: far above float32 rounding, far below any mistake
COMPETITORS = ("native", "numba", "torch.compile", "textbook")

Call = Callable[[], tuple[Tensor, ...]]


class WrongResultError(AssertionError):
    """A competitor does not compute what it is timed for."""


@dataclass(frozen=True)
class Work:
    """One computation: how each competitor does it, what it must return, and how many pairs (i, j) it visits."""

    name: str
    pairs: int
    build: dict[str, Callable[[], Call]]
    exact: Callable[[], tuple[Tensor, ...]]

    def prepare(self, competitor: str) -> Call:
        """The call to time, its result already found right."""
        call = self.build[competitor]()
        check(call(), self.exact(), f"{self.name}, {competitor}")
        return call


def check(found: tuple[Tensor, ...], exact: tuple[Tensor, ...], what: str) -> None:
    """Raise WrongResultError unless every tensor agrees with its float64 counterpart."""
    for position, (actual, expected) in enumerate(zip(found, exact, strict=True)):
        if actual.numel() != expected.numel():
            raise WrongResultError(
                f"{what}: result {position} has shape {tuple(actual.shape)}, not {tuple(expected.shape)}"
            )
        error = (actual.detach().double().reshape(expected.shape) - expected).abs().max()
        limit = TOLERANCE * expected.abs().max()
        if not error <= limit:  # also where it is NaN
            raise WrongResultError(f"{what}: result {position} is off by {error:.3g}, more than {limit:.3g}")


@functools.cache
def why_not(competitor: str) -> str:
    """Empty if the competitor can run here, else the reason."""
    if competitor in nwfast.backends.NAMES:
        answer = nwfast.backends.available()[competitor]
        return "" if answer is True else str(answer)
    if competitor == "torch.compile":
        return runpy.run_path(str(ROOT / "setup.py"))["missing_toolchain"]()
    return ""


def two_lines(query: Tensor, key: Tensor, value: Tensor, w: Tensor) -> Tensor:
    """The textbook's lines for one feature, (M,) and (N,), and as little changed as can be for (M, D) and (N, D)."""
    if query.ndim == 1:
        n = key.shape[0]
        Q = query.repeat_interleave(n).reshape(-1, n)
        return torch.softmax(-(((Q - key) * w) ** 2) / 2, dim=1) @ value
    return torch.softmax(-(((query[:, None] - key) * w) ** 2).sum(-1) / 2, dim=1) @ value


@dataclass(frozen=True)
class Data:
    """float32 inputs and the gradient that comes from above."""

    query: Tensor
    key: Tensor
    value: Tensor
    w: Tensor
    cotangent: Tensor

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        return self.query, self.key, self.value, self.w


@functools.cache
def data(n: int, features: int = 1, channels: int = 1) -> Data:
    """N = M = n points; one feature and one channel as vectors, more as matrices."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.rand(n, features, generator=generator) * WIDTH for _ in range(2))
    signal = 2 * torch.sin(key.sum(1)) + key.sum(1) ** 0.8
    value = signal[:, None] + 0.5 * torch.randn(n, channels, generator=generator)
    w = torch.ones(())
    if features == channels == 1:
        query, key, value = query[:, 0], key[:, 0], value[:, 0]
    cotangent = torch.randn(value.shape, generator=generator)
    return Data(query, key, value, w, cotangent)


@functools.cache
def exact(n: int, features: int, channels: int, gradients: bool) -> tuple[Tensor, ...]:
    """The two lines in float64: out and, asked for, the gradients of query, key, value, w. A few rows at a time."""
    given = data(n, features, channels)
    query, key, value, w = (tensor.double().requires_grad_(gradients) for tensor in given.inputs)
    rows = max(1, 2**21 // (n * features))
    outs = []
    for part, cotangent in zip(query.split(rows), given.cotangent.double().split(rows), strict=True):
        out = two_lines(part, key, value, w)
        if gradients:
            (out * cotangent).sum().backward(retain_graph=True)  # the graph of split, which all parts share
        outs.append(out.detach())
    found = (torch.cat(outs),)
    return (*found, query.grad, key.grad, value.grad, w.grad) if gradients else found


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(two_lines, fullgraph=True, dynamic=False)


def _function(competitor: str) -> Callable[..., Tensor]:
    if competitor == "textbook":
        return two_lines
    if competitor == "torch.compile":
        return _compiled()
    return functools.partial(nwfast.nadaraya_watson, backend=competitor)


def forward(n: int, features: int = 1, channels: int = 1) -> Work:
    """The forward pass alone, nothing requires a gradient."""
    given = data(n, features, channels)

    def build(competitor: str) -> Call:
        function = _function(competitor)
        return lambda: (function(*given.inputs),)

    shape = "one feature, one channel" if features == channels == 1 else f"D = {features}, C = {channels}"
    return Work(
        f"forward, N = M = {n}, {shape}",
        n * n,
        {name: functools.partial(build, name) for name in COMPETITORS},
        lambda: exact(n, features, channels, False),
    )


def gradients(n: int, wanted: str) -> Work:
    """Forward and backward: to w (`wanted` = "w") or to query, key, value and w ("qkvw")."""
    given = data(n)

    def build(competitor: str) -> Call:
        function = _function(competitor)
        leaves = [
            tensor.clone().requires_grad_(letter in wanted)
            for tensor, letter in zip(given.inputs, "qkvw", strict=True)
        ]
        required = [leaf for leaf in leaves if leaf.requires_grad]

        def call() -> tuple[Tensor, ...]:
            out = function(*leaves)
            return out.detach(), *torch.autograd.grad(out, required, given.cotangent)

        return call

    def result() -> tuple[Tensor, ...]:
        out, *grads = exact(n, 1, 1, True)
        return out, *(grad for grad, letter in zip(grads, "qkvw", strict=True) if letter in wanted)

    return Work(
        f"forward + backward to {', '.join(wanted)}, N = M = {n}",
        n * n,
        {name: functools.partial(build, name) for name in COMPETITORS},
        result,
    )


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


@functools.cache
def _chapter(n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs, targets, and the keys and values that leave each example out, (n, n - 1)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.sort(torch.rand(n, generator=generator) * WIDTH).values
    y = 2 * torch.sin(x) + x**0.8 + 0.5 * torch.randn(n, generator=generator)
    others = ~torch.eye(n, dtype=torch.bool)
    keys, values = (tensor.repeat(n, 1)[others].reshape(n, -1) for tensor in (x, y))
    return x, y, keys, values


SMALL = ("forward", "forward + backward", "training step")


def small(kind: str, n: int = 50) -> Work:
    """The chapter's own size, where the op's overhead matters more than its arithmetic.

    forward: the op against the lines, under no_grad. forward + backward: the same, to w, from a given gradient.
    training step: module against module, with zero_grad, halved squared loss, backward, SGD.
    """

    def build(competitor: str) -> Call:
        if kind == "training step":
            textbook = competitor == "textbook"
            net = TextbookModule(1.0) if textbook else nwfast.NWKernelRegression(w=1.0, backend=competitor)
            return _training_step(net, *_chapter(n))
        if competitor == "textbook":
            return _small_call(kind, per_query_lines, *_chapter(n))
        return _small_call(kind, functools.partial(nwfast.nadaraya_watson, backend=competitor), *_chapter(n))

    def result() -> tuple[Tensor, ...]:
        chapter = [tensor.double() for tensor in _chapter(n)]
        if kind == "training step":
            return _training_step(TextbookModule(1.0).double(), *chapter)()
        return _small_call(kind, per_query_lines, *chapter)()

    return Work(
        f"{kind}, n = {n}, keys ({n}, {n - 1})",
        n * (n - 1),
        {name: functools.partial(build, name) for name in ("native", "numba", "textbook")},
        result,
    )


def _small_call(
    kind: str, function: Callable[..., Tensor], x: Tensor, y: Tensor, keys: Tensor, values: Tensor
) -> Call:
    w = torch.ones(1, dtype=x.dtype, requires_grad=kind != "forward")
    cotangent = torch.linspace(-1, 2, len(x), dtype=x.dtype)

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
