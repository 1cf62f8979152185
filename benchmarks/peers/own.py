"""nwfast itself: its backends and methods, each named, so that nothing is chosen behind the scenes."""

import functools
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

import nwfast
from benchmarks.problems.workloads import Call, Data, small

from .peer import Peer


def why_not(backend: str, method: str) -> str:
    """Empty if the backend and the method can run here, else the reason."""
    answer = nwfast.backends.available().get(backend, f"there is no backend {backend!r}")
    if answer is not True:
        return str(answer)
    try:
        x = torch.linspace(0, 1, 4)
        nwfast.nadaraya_watson(x, x, x, method=method, backend=backend)
    except (ValueError, RuntimeError, NotImplementedError) as error:
        return str(error)
    return ""


def _function(backend: str, method: str) -> Callable[..., Tensor]:
    # Looked up at each call: what is timed is what the name means then.
    return lambda *inputs, **options: nwfast.nadaraya_watson(
        *inputs, method=method, backend=backend, **options
    )


def differentiate(function: Callable[..., Tensor], given: Data, wanted: str) -> Call:
    """Forward and backward by autograd, to those of q, k, v, w that are wanted."""
    leaves = [
        tensor.clone().requires_grad_(letter in wanted)
        for tensor, letter in zip(given.inputs, "qkvw", strict=True)
    ]
    required = [leaf for leaf in leaves if leaf.requires_grad]

    def call() -> tuple[Tensor, ...]:
        out = function(*leaves)
        return out.detach(), *torch.autograd.grad(out, required, given.cotangent)

    return call


def minimise(loss_of: Callable[[Tensor], Tensor], start: float) -> tuple[float]:
    """The w with the least loss: scipy's L-BFGS-B over log w, with the gradient that autograd gives."""
    from scipy.optimize import minimize

    def loss_and_gradient(log_w: np.ndarray) -> tuple[float, np.ndarray]:
        w = torch.tensor(float(np.exp(log_w[0])), requires_grad=True)
        loss = loss_of(w)
        (gradient,) = torch.autograd.grad(loss, w)
        return loss.item(), np.array([(gradient * w).item()])

    found = minimize(
        loss_and_gradient, [np.log(start)], jac=True, method="L-BFGS-B", options={"ftol": 1e-7, "gtol": 1e-5}
    )
    return (float(np.exp(found.x[0])),)


def rule_of_thumb(x: Tensor) -> float:
    """Where every search starts: 1/h of Silverman's rule."""
    return float(len(x) ** 0.2 / (1.06 * x.std()))


def _select(backend: str, method: str, x: Tensor, y: Tensor) -> Call:
    if (backend, method) == ("native", "fgt"):  # what it chooses of itself
        return lambda: (float(nwfast.select_bandwidth(x, y).w),)
    function = _function(backend, method)
    return lambda: minimise(
        lambda w: ((function(x, x, y, w, exclude_self=True) - y) ** 2).mean(), rule_of_thumb(x)
    )


def small_call(backend: str, kind: str, chapter: tuple[Tensor, ...]) -> Call:
    """A call of the chapter's own size: the function, or the module that trains."""
    function = functools.partial(nwfast.nadaraya_watson, backend=backend)
    return small(kind, function, functools.partial(nwfast.NWKernelRegression, backend=backend), chapter)


def _peer(backend: str, method: str, about: str, **limits: float) -> Peer:
    function = _function(backend, method)
    linear = method == "fgt"
    return Peer(
        name=f"{backend} fgt" if linear else backend,
        about=about,
        why_not=functools.cache(functools.partial(why_not, backend, method)),
        package="numba" if backend == "numba" else "",
        function=function,
        forward=lambda given: lambda: (function(*given.inputs),),
        gradients=functools.partial(differentiate, function),
        small=None if linear else functools.partial(small_call, backend),
        select=functools.partial(_select, backend, method),
        minimised_by="scipy",
        most_features=(3 if backend == "native" else 1) if linear else 1000,
        **limits,
    )


PEERS = (
    _peer(
        "native",
        "dense",
        '`backend="native", method="dense"`: the C++ kernels, all pairs',
        seconds_per_pair=1e-10,
    ),
    _peer(
        "numba",
        "dense",
        '`backend="numba", method="dense"`: the Numba kernels, all pairs',
        seconds_per_pair=2.5e-10,
    ),
    _peer(
        "native",
        "fgt",
        '`backend="native", method="fgt"`: linear time, C++; bandwidths by `nwfast.select_bandwidth`',
        seconds_per_pair=0,
        seconds_per_point=1e-7,
    ),
    _peer(
        "numba",
        "fgt",
        '`backend="numba", method="fgt"`: linear time, Numba',
        seconds_per_pair=0,
        seconds_per_point=3e-7,
    ),
)
OWN = tuple(peer.name for peer in PEERS)
