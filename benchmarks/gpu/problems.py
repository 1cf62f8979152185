"""What is timed on a GPU: the op on large problems, and who else computes the same.

Queries and keys are uniform on (0, 5) in every feature, unsorted, and w = 1: every pair counts, so that no kernel gains
by skipping tiles and pairs per second mean what they say. The competitors:

* two lines: the textbook's, eager, and under torch.compile, with values (N,) and (N, 1);
* SDPA: scaled_dot_product_attention on the features [k, k^2], -w^2 |q - k|^2 / 2 = w^2 q.k - w^2 k^2 / 2 + a constant
  of the query; its scores are differences of large numbers, so its error is reported and not held against a limit;
* FlexAttention, with a score_mod that computes the score from the coordinates;
* KeOps, where it is installed.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import nwfast
from benchmarks.gpu.machine import missing
from benchmarks.problems.workloads import WIDTH, Call, WrongResultError, two_lines

SAMPLE = 256  # queries whose results are computed in float64
TOLERANCE = {
    torch.float32: 2e-4,
    torch.float16: 5e-3,
}  # relative to the largest entry: above rounding, below mistakes


@dataclass(frozen=True)
class Problem:
    """M = N = n points on a device, w = 1, and the gradient from above; `wanted` gradients: letters of qkvw."""

    n: int
    features: int
    channels: int
    dtype: torch.dtype
    wanted: str
    query: Tensor
    key: Tensor
    value: Tensor
    w: Tensor
    cotangent: Tensor

    @property
    def name(self) -> str:
        passes = f"forward + backward to {', '.join(self.wanted)}" if self.wanted else "forward"
        shape = "" if self.features == self.channels == 1 else f", D = {self.features}, C = {self.channels}"
        return f"{passes}, N = M = {self.n}{shape}{', float16' * (self.dtype == torch.float16)}"

    @property
    def pairs(self) -> int:
        return self.n * self.n

    def results(self, function: Callable[..., Tensor]) -> Call:
        """A call that returns out, and the wanted gradients of what stands for query, key, value and w."""
        leaves = [
            tensor.detach().clone().requires_grad_(letter in self.wanted)
            for tensor, letter in zip((self.query, self.key, self.value, self.w), "qkvw", strict=True)
        ]
        required = [leaf for leaf in leaves if leaf.requires_grad]

        def forward() -> tuple[Tensor, ...]:
            with torch.no_grad():
                return (function(*leaves),)

        def forward_and_backward() -> tuple[Tensor, ...]:
            out = function(*leaves)
            return out.detach(), *torch.autograd.grad(out, required, self.cotangent.reshape(out.shape))

        return forward_and_backward if required else forward

    @functools.cached_property
    def rows(self) -> Tensor:
        """The queries that are checked; all where gradients are wanted, which all of them enter."""
        if self.wanted or self.n <= SAMPLE:
            return torch.arange(self.n)
        return torch.randperm(self.n, generator=torch.Generator().manual_seed(1))[:SAMPLE]

    @functools.cached_property
    def exact(self) -> tuple[Tensor, ...]:
        """In float64 on the CPU, of the C++ backend where it is built: out of `rows`, and the wanted gradients."""
        query, key, value, w = (
            tensor.detach().cpu().double().requires_grad_(letter in self.wanted)
            for tensor, letter in zip((self.query, self.key, self.value, self.w), "qkvw", strict=True)
        )
        chosen = query[self.rows] if not self.wanted else query
        out = nwfast.nadaraya_watson(chosen, key, value, w, method="dense")
        if not self.wanted:
            return (out,)
        required = [leaf for leaf in (query, key, value, w) if leaf.requires_grad]
        return out.detach(), *torch.autograd.grad(out, required, self.cotangent.cpu().double())

    def error(self, results: tuple[Tensor, ...]) -> float:
        """The largest error relative to the largest entry, over all results; infinite where one is not a number."""
        worst = 0.0
        for place, (found, right) in enumerate(zip(results, self.exact, strict=True)):
            found = found.detach()
            if place == 0:
                found = found.reshape(self.n, -1)[self.rows.to(found.device)]
            own = (found.cpu().double().reshape(right.shape) - right).abs().max() / right.abs().max()
            worst = max(worst, float(own)) if own == own else float("inf")
        return worst


@functools.cache
def problem(
    device: torch.device,
    n: int,
    features: int = 1,
    channels: int = 1,
    dtype: torch.dtype = torch.float32,
    wanted: str = "",
) -> Problem:
    """One feature and one channel as vectors, more as matrices; the same numbers on every device."""
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.rand(n, features, generator=generator) * WIDTH for _ in range(2))
    signal = 2 * torch.sin(key.sum(1)) + key.sum(1) ** 0.8
    value = signal[:, None] + 0.5 * torch.randn(n, channels, generator=generator)
    if features == channels == 1:
        query, key, value = query[:, 0], key[:, 0], value[:, 0]
    cotangent = torch.randn(value.shape, generator=generator)
    moved = (tensor.to(device, dtype) for tensor in (query, key, value, torch.ones(()), cotangent))
    return Problem(n, features, channels, dtype, wanted, *moved)


@dataclass(frozen=True)
class Competitor:
    """Who computes a problem: `build` gives the call, `exactly` whether its error is held against the limit."""

    name: str
    build: Callable[[Problem], Call]
    exactly: bool = True
    why_not: str = ""

    def prepare(self, given: Problem) -> tuple[Call, float]:
        """The call to time and its error; WrongResultError if that is too large."""
        call = self.build(given)
        error = given.error(call())
        limit = TOLERANCE[given.dtype] if self.exactly else 1.0
        if not error <= limit:
            raise WrongResultError(f"{given.name}, {self.name}: off by {error:.3g}, allowed {limit:.3g}")
        return call, error


def backend(name: str) -> Competitor:
    """The op on a backend, summing over all pairs."""

    def build(given: Problem) -> Call:
        function = functools.partial(nwfast.nadaraya_watson, backend=name, method="dense")
        return given.results(function)

    answer = nwfast.backends.available()[name]
    return Competitor(name, build, why_not="" if answer is True else str(answer))


def lines() -> Competitor:
    """The two lines as they stand."""
    return Competitor("two lines", lambda given: given.results(two_lines))


def compiled(column: bool = False) -> Competitor:
    """The two lines under torch.compile; `column`: with values (N, 1) for (N,)."""

    def as_column(query: Tensor, key: Tensor, value: Tensor, w: Tensor) -> Tensor:
        return two_lines(query, key, value[:, None], w)[:, 0]

    function = torch.compile(as_column if column else two_lines, fullgraph=True, dynamic=False)
    name = "torch.compile, value (N, 1)" if column else "torch.compile"
    return Competitor(name, lambda given: given.results(function))


def _columns(*tensors: Tensor) -> tuple[Tensor, ...]:
    """(n, X) for each."""
    return tuple(tensor[:, None] if tensor.ndim == 1 else tensor for tensor in tensors)


def _padded(tensor: Tensor, width: int) -> Tensor:
    return torch.nn.functional.pad(tensor, (0, width - tensor.shape[-1]))


def attention() -> Competitor:
    """scaled_dot_product_attention on [k, k^2] features, padded to what its fused kernels take."""

    def build(given: Problem) -> Call:
        query, key, value = (tensor[None, None] for tensor in _columns(given.query, given.key, given.value))
        half = given.dtype == torch.float16
        # The flash kernels want one width for all three and run for half precision alone; float32 wants multiples of 4.
        width = max(2 * given.features, value.shape[-1], 8) if half else 2 * given.features
        width = -(-width // 8) * 8
        w = given.w
        features = _padded(torch.cat([query * w**2, (-(w**2) / 2).expand(query.shape)], -1), width)
        squares = _padded(torch.cat([key, key**2], -1), width)
        values = _padded(value, width if half else -(-value.shape[-1] // 8) * 8)

        def call() -> tuple[Tensor, ...]:
            out = torch.nn.functional.scaled_dot_product_attention(features, squares, values, scale=1.0)
            return (out[0, 0, :, : given.channels],)

        return call

    return Competitor("SDPA on [k, k^2]", build, exactly=False)


def flex_attention() -> Competitor:
    """FlexAttention, with the score from the coordinates; it wants at least 16 features and multiplies them, too."""

    def build(given: Problem) -> Call:
        from torch.nn.attention.flex_attention import flex_attention

        query, key, value = _columns(given.query, given.key, given.value)
        w = given.w
        if given.features == 1:
            q, k = query[:, 0].contiguous(), key[:, 0].contiguous()
            features, others = (torch.zeros_like(_padded(tensor, 16)) for tensor in (query, key))

            def score_mod(score, batch, head, i, j):
                return -(((q[i] - k[j]) * w) ** 2) / 2
        else:
            squares = -(key.float() ** 2).sum(-1) * w.float() ** 2 / 2
            features, others = _padded(query * w**2, 16), _padded(key, 16)

            def score_mod(score, batch, head, i, j):
                return score + squares[j]

        values = _padded(value, -(-value.shape[-1] // 16) * 16)
        function = torch.compile(flex_attention, fullgraph=True, dynamic=False)
        arguments = [tensor[None, None].contiguous() for tensor in (features, others, values)]

        def call() -> tuple[Tensor, ...]:
            with torch.no_grad():
                out = function(*arguments, score_mod=score_mod, scale=1.0)
            return (out[0, 0, :, : given.channels],)

        return call

    return Competitor("FlexAttention", build, exactly=False)


def keops() -> Competitor:
    """The formula as a symbolic matrix of KeOps."""

    def build(given: Problem) -> Call:
        from pykeops.torch import LazyTensor

        def function(query: Tensor, key: Tensor, value: Tensor, w: Tensor) -> Tensor:
            columns = _columns(query * w, key * w)
            difference = LazyTensor(columns[0][:, None].contiguous()) - LazyTensor(
                columns[1][None].contiguous()
            )
            weights = (-(difference**2).sum(-1) / 2).exp()
            rows = value[:, None] if value.ndim == 1 else value
            out = (weights @ rows.contiguous()) / weights.sum(1)
            return out[:, 0] if value.ndim == 1 else out

        return given.results(function)

    return Competitor("KeOps", build, why_not=missing("pykeops"))
