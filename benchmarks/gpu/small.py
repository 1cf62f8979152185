"""The chapter's own size on a GPU, n = 50: launches and the host's overhead are all there is to time.

Forward, forward + backward to w, and a step of training, each with one row of keys a query as the chapter has it: the
op against the two lines, called from Python and replayed from a CUDA graph.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

import nwfast
from benchmarks.gpu.problems import Call, WrongResultError
from benchmarks.measure.gpu_timing import graphed
from benchmarks.problems.workloads import WIDTH, TextbookModule, per_query_lines

KINDS = ("forward", "forward + backward", "training step")
LINES = "two lines"
N = 50
TOLERANCE = 2e-4  # relative to the largest entry


def calls(kind: str, names: list[str], device: torch.device) -> dict[str, Call]:
    """A call for each of `names`, backends or LINES, and for each of them replayed where the device has graphs."""
    exact = _build(kind, LINES, torch.device("cpu"), torch.float64)()
    found: dict[str, Call] = {}
    for name in names:
        call = _build(kind, name, device, torch.float32)
        _check(call(), exact, f"{kind}, n = {N}, {name}")
        found[name] = call
        if device.type == "cuda":
            # A fresh one: what the warm-up of a capture leaves behind is not to be seen by the eager call.
            replay = graphed(_build(kind, name, device, torch.float32))
            _check(replay(), exact, f"{kind}, n = {N}, {name}, graph")
            found[f"{name}, graph"] = replay
    return found


def _check(results: tuple[Tensor, ...], exact: tuple[Tensor, ...], what: str) -> None:
    for place, (found, right) in enumerate(zip(results, exact, strict=True)):
        error = (found.detach().cpu().double() - right).abs().max()
        limit = TOLERANCE * right.abs().max()
        if not error <= limit:  # also where it is NaN
            raise WrongResultError(f"{what}: result {place} is off by {error:.3g}, allowed {limit:.3g}")


@functools.cache
def _chapter() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs, targets, and the keys and values that leave each example out, (n, n - 1); float64."""
    generator = torch.Generator().manual_seed(0)
    x = torch.sort(torch.rand(N, generator=generator, dtype=torch.float64) * WIDTH).values
    y = 2 * torch.sin(x) + x**0.8 + 0.5 * torch.randn(N, generator=generator, dtype=torch.float64)
    others = ~torch.eye(N, dtype=torch.bool)
    keys, values = (tensor.repeat(N, 1)[others].reshape(N, -1) for tensor in (x, y))
    return x, y, keys, values


def _build(kind: str, name: str, device: torch.device, dtype: torch.dtype) -> Call:
    x, y, keys, values = (tensor.to(device, dtype) for tensor in _chapter())
    if kind == "training step":
        net = TextbookModule(1.0) if name == LINES else nwfast.NWKernelRegression(w=1.0, backend=name)
        return _training_step(net.to(device, dtype), x, y, keys, values)
    function: Callable[..., Tensor] = (
        per_query_lines if name == LINES else functools.partial(nwfast.nadaraya_watson, backend=name)
    )
    w = torch.ones(1, device=device, dtype=dtype, requires_grad=kind != "forward")
    cotangent = torch.linspace(-1, 2, N, device=device, dtype=dtype)

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (function(x, keys, values, w),)

    def forward_and_backward() -> tuple[Tensor, ...]:
        out = function(x, keys, values, w)
        return out.detach(), *torch.autograd.grad(out, [w], cotangent)

    return forward if kind == "forward" else forward_and_backward


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
