"""How far results lie from the exact ones, against how far the two textbook lines lie in the same precision.

Exact means the formulas of the output and of its gradient to the query, evaluated in NumPy's long double:

    out_i = sum_j p_ij v_j,    d L / d q_i = -w^2 sum_j p_ij <g_i, v_j - out_i> (q_i - k_j)

And how far the results of all peers lie from them as queries move away from the data.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from benchmarks.peers import Peer
from benchmarks.problems import workloads
from benchmarks.problems.workloads import Data, two_lines


@dataclass(frozen=True)
class Finding:
    """Largest absolute errors of one result on one data set, and the error that is allowed."""

    case: str
    quantity: str
    peer: str
    dtype: str
    error: float
    textbook_error: float
    limit: float

    @property
    def share(self) -> float:
        """The part of the limit that is used; the result is accurate enough up to 1."""
        return self.error / self.limit if np.isfinite(self.error) else np.inf


def cases(n: int, dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Data sets by name: query, key, value, w."""
    generator = torch.Generator().manual_seed(0)

    def uniform(*shape: int) -> Tensor:
        return torch.rand(*shape, dtype=torch.float64, generator=generator)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    query, key, value = 5 * uniform(n), 5 * uniform(n), normal(n)
    clusters = torch.tensor([0.0, 3.0, 50.0])[torch.arange(n) % 3] + 0.1 * normal(n)
    found = {
        "uniform": (query, key, value, 1.0),
        "wide": (query, key, value, 0.01),
        "narrow": (query, key, value, 30.0),
        "clusters and gaps": (60 * uniform(n), clusters, value, 2.0),
        "far queries": (query + 10, key, value, 3.0),
        "large offset": (query + 1000, key + 1000, value, 1.0),
        "duplicates": ((2 * query).round(), (2 * key).round(), value, 1.0),
        "D = 2, narrow": (uniform(n, 2), uniform(n, 2), value, 30.0),
        "D = 3, C = 4": (5 * uniform(n, 3), 5 * uniform(n, 3), normal(n, 4), 1.0),
    }
    return {
        name: (*(tensor.to(dtype) for tensor in tensors), torch.tensor(w, dtype=dtype))
        for name, (*tensors, w) in found.items()
    }


def exact(query: Tensor, key: Tensor, value: Tensor, w: Tensor, cotangent: Tensor) -> tuple:
    """Output and gradient to the query, in long double."""
    q, k, v, g = (_rows(tensor) for tensor in (query, key, value, cotangent))
    scale = np.longdouble(w.numpy())
    differences = q[:, None] - k
    scores = -((differences * scale) ** 2).sum(-1) / 2
    p = np.exp(scores - scores.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    out = p @ v
    pull = p * ((g[:, None] * (v - out[:, None])).sum(-1))
    gradient = -(scale**2) * (pull[..., None] * differences).sum(1)
    return out.reshape(cotangent.shape), gradient.reshape(query.shape)


def _rows(tensor: Tensor) -> np.ndarray:
    array = tensor.numpy().astype(np.longdouble)
    return array[:, None] if array.ndim == 1 else array


def findings(n: int, peers: Iterable[Peer]) -> list[Finding]:
    """All data sets in float32 and float64, for our own backends and methods.

    Allowed are, in float32, twice the textbook's own error and four units in the last place of the largest term; in
    float64, 1e-12 of the largest term, or twice the textbook's own error where the textbook does not reach that. The
    linear-time method may be off by 2e-6 in float32, and gradients by 1e-11 in float64.
    """
    peers = tuple(peers)
    found = []
    for dtype in (torch.float32, torch.float64):
        single = dtype == torch.float32
        for case, inputs in cases(n, dtype).items():
            cotangent = torch.linspace(-1, 2, inputs[2].numel(), dtype=dtype).reshape(inputs[2].shape)
            given = Data(*inputs, cotangent)
            truth = exact(*inputs, cotangent)
            value, w = (float(tensor.abs().max()) for tensor in inputs[2:])
            scales = value, 2 * w * value * inputs[2][0].numel()
            textbook = _errors(two_lines, inputs, cotangent, truth)
            for peer in peers:
                if not peer.takes(given.features, given.channels):
                    continue
                errors = _errors(peer.function, inputs, cotangent, truth)
                for i, (quantity, scale) in enumerate(zip(("output", "gradient"), scales, strict=True)):
                    own = textbook[i]
                    limit = 2 * own + 4 * 2.0**-23 * scale if single else max(2 * own, 1e-12 * scale)
                    if "fgt" in peer.name:
                        limit = max(
                            limit, (2e-6 if single else 1e-12 if quantity == "output" else 1e-11) * scale
                        )
                    name = str(dtype).removeprefix("torch.")
                    found.append(Finding(case, quantity, peer.name, name, errors[i], own, limit))
    return found


def _errors(function, inputs, cotangent, truth) -> tuple[float, ...]:
    query, *others = inputs
    query = query.clone().requires_grad_()
    out = function(query, *others)
    found = out, *torch.autograd.grad(out, query, cotangent)
    return tuple(
        float(np.abs(actual.detach().numpy().astype(np.longdouble) - wanted).max())
        for actual, wanted in zip(found, truth, strict=True)
    )


DISTANCES = tuple(float(f"{distance:.2g}") for distance in np.geomspace(0.1, 1000, 33))


def against_distance(n: int, peer: Peer) -> list[float]:
    """The error at DISTANCES beyond the last key, in bandwidths, relative to the largest value.

    float32, n keys uniform on (0, 5), w = 10. Errors are NaN or infinite where a peer returns that.
    """
    given = workloads.data(n, ordered=True)
    w = 10.0
    query = given.key.max() + torch.tensor(DISTANCES) / w
    inside = given.query[: n // 2]  # so that the call is as it would be: most queries among the data
    asked = Data(torch.cat([inside, query]), given.key, given.value, torch.tensor(w), torch.ones(1))
    (found,) = peer.forward(asked)()
    part = Data(query, given.key, given.value, torch.tensor(w), torch.ones(len(query)))
    wanted, _ = exact(*part.inputs, part.cotangent)
    errors = np.abs(np.asarray(found, dtype=np.longdouble).reshape(-1)[len(inside) :] - wanted)
    return [float(error) for error in errors / given.value.abs().max().item()]
