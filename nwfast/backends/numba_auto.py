"""The faster of the Numba backend's two methods for a call: see `csrc/cpu/method.cpp`, whose model of times this is.

Both methods take and save the same things, so that the backward pass may choose anew.
"""

import math
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from . import load
from .numba_math import ROOT

_KEY_SAMPLE, _QUERY_SAMPLE = 256, 64
_LEAST_LINEAR_PAIRS = 65536
# Nanoseconds of a query: dense, a part for each and one for each pair; linear, a part for each call, each point, each
# pair that is taken by itself, and each translation of all boxes around into one.
_DENSE_ROW, _DENSE_PAIR = 150.0, {torch.float32: 0.45, torch.float64: 1.1}
_LINEAR_CALL, _LINEAR_POINT, _LINEAR_PAIR, _TRANSLATION = 400_000.0, 30.0, 2.0, 4000.0


def forward(query: Tensor, key: Tensor, value: Tensor, w: Tensor, *rest):
    """As `nwfast.backends` says, by the method expected to be faster."""
    return _module(query, key, value, w).forward(query, key, value, w, *rest)


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, w: Tensor, *rest
):
    """As `nwfast.backends` says, by the method expected to be faster."""
    return _module(query, key, value, w).backward(grad_out, grad_lse, query, key, value, w, *rest)


def _module(query: Tensor, key: Tensor, value: Tensor, w: Tensor) -> ModuleType:
    return load("numba_fgt" if linear_is_faster(query, key, value, w) else "numba")


def linear_is_faster(query: Tensor, key: Tensor, value: Tensor, w: Tensor) -> bool:
    """Whether the linear method is expected to be faster for these canonical inputs."""
    m, n = query.shape[-2], key.shape[-2]
    if query.shape[-1] != 1 or m * n < _LEAST_LINEAR_PAIRS:
        return False
    keys, queries = _sample(key, _KEY_SAMPLE), _sample(query, _QUERY_SAMPLE)
    inverse_bandwidth = abs(w.flatten()[0].item())
    if not (math.isfinite(inverse_bandwidth) and np.isfinite(keys).all() and np.isfinite(queries).all()):
        return False
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    negligible = (57 if dtype == torch.float64 else 27) + math.log2(n)
    radius = math.sqrt(negligible) / (ROOT * inverse_bandwidth) if inverse_bandwidth > 0 else math.inf
    window = n * _share_within(keys, queries, radius)
    visited = min(n, window + 512) if value.shape[-1] == 1 else n
    dense = _DENSE_ROW + visited * value.shape[-1] * _DENSE_PAIR[dtype]
    directly = _LINEAR_PAIR * (window + 8 * max(1, n / m))
    by_series = _TRANSLATION / max(1, m * min(1, window / n / 6))
    return (1 + n / m) * _LINEAR_POINT + min(directly, by_series) + _LINEAR_CALL / m < dense


def _sample(points: Tensor, most: int) -> np.ndarray:
    """Evenly spaced members of the first batch element, ascending, in float64."""
    column = points.reshape(-1, *points.shape[-2:])[0, :, 0] if points.ndim > 2 else points[:, 0]
    places = torch.linspace(0, len(column) - 1, min(most, len(column)), dtype=torch.float64).long()
    return np.sort(column[places].double().numpy())


def _share_within(keys: np.ndarray, queries: np.ndarray, radius: float) -> float:
    """The share of the keys that count for the mean query, those up to sqrt(nearest^2 + radius^2) away."""
    above = np.searchsorted(keys, queries)
    nearest = np.minimum(
        np.abs(keys[np.minimum(above, len(keys) - 1)] - queries),
        np.abs(queries - keys[np.maximum(above - 1, 0)]),
    )
    # The nearest key of a sample is further away than that of all keys.
    nearest = np.maximum(0, nearest - 4 * (keys[-1] - keys[0]) / len(keys))
    reach = np.sqrt(nearest**2 + radius**2)
    counts = np.searchsorted(keys, queries + reach, "right") - np.searchsorted(keys, queries - reach)
    return float(counts.mean()) / len(keys)
