"""The faster of the Numba backend's two methods for a call: see `csrc/cpu/choose.cpp`, whose model of times this is.

Both methods take and save the same things, so that the backward pass may choose anew.
"""

import functools
import math
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

from ...constants import CHOICE_PAIRS_IN_PYTHON, NEGLIGIBLE_DOUBLE, NEGLIGIBLE_FLOAT
from .. import load
from .base import ROOT
from .linear.plan import ONE_BOX

_KEY_SAMPLE, _QUERY_SAMPLE = 256, 64
# Nanoseconds of a query, fitted by hand to sorted data on (0, 5) with one channel on two cores with AVX2: forward
# passes in float32 of 300 to 300,000 points, w from 0.1 to 1e5, in float64 of 400 to 10,000 points, w up to 1e4; with
# gradients the latter in both. `benchmarks/studies/method_cost.py --backend numba` shows how good they are.
# Dense: each query, each pair in the window, each key outside (its tile is skipped), and each pair of a query that no
# key is near, a far row, whose sum is taken anew. The backward pass has much the same proportions but for this last.
_DENSE_ROW, _DENSE_PAIR = 150.0, {torch.float32: 0.4, torch.float64: 0.95}
_DENSE_SKIPPED, _FAR_PAIR_FORWARD, _FAR_PAIR_BACKWARD = 0.03, 2.7, 20.0
# Linear: each call (less where all data are one box), each point, each query that takes its keys by themselves and
# each pair of these, each translation of all boxes around into one.
_LINEAR_CALL, _ONE_BOX_CALL = 1_300_000.0, 900_000.0
_LINEAR_POINT, _DIRECT_ROW, _DIRECT_PAIR = 10.0, 200.0, 1.0
_TRANSLATION = {torch.float32: 5000.0, torch.float64: 8000.0}


def forward(query: Tensor, key: Tensor, value: Tensor, w: Tensor, *rest):
    """As `nwfast.backends` says, by the method expected to be faster."""
    return _module(query, key, value, w, _FAR_PAIR_FORWARD).forward(query, key, value, w, *rest)


def output(query: Tensor, key: Tensor, value: Tensor, w: Tensor, *rest):
    """As `nwfast.backends` says, by the method expected to be faster."""
    return _module(query, key, value, w, _FAR_PAIR_FORWARD).output(query, key, value, w, *rest)


def backward(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, w: Tensor, *rest
):
    """As `nwfast.backends` says, by the method expected to be faster."""
    module = _module(query, key, value, w, _FAR_PAIR_BACKWARD)
    return module.backward(grad_out, grad_lse, query, key, value, w, *rest)


def _module(query: Tensor, key: Tensor, value: Tensor, w: Tensor, far_pair: float) -> ModuleType:
    return load("numba_fgt" if linear_is_faster(query, key, value, w, far_pair) else "numba")


def linear_is_faster(
    query: Tensor, key: Tensor, value: Tensor, w: Tensor, far_pair: float = _FAR_PAIR_FORWARD
) -> bool:
    """Whether the linear method is expected to be faster for these canonical inputs."""
    m, n = query.shape[-2], key.shape[-2]
    if query.shape[-1] != 1 or m * n < CHOICE_PAIRS_IN_PYTHON:
        return False
    inverse_bandwidth = abs(w.flatten()[0].item())
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    negligible = NEGLIGIBLE_DOUBLE if dtype == torch.float64 else NEGLIGIBLE_FLOAT
    negligible += math.log2(n)
    radius = math.sqrt(negligible) / (ROOT * inverse_bandwidth) if inverse_bandwidth > 0 else math.inf
    keys = _sample(key, _KEY_SAMPLE)
    all_pairs = m * (_DENSE_ROW + n * value.shape[-1] * _DENSE_PAIR[dtype])
    spread = keys[-1] - keys[0]
    call = _ONE_BOX_CALL if spread * inverse_bandwidth <= 2 * ONE_BOX else _LINEAR_CALL
    if all_pairs < call and 2 * radius * n > 20 * spread:
        return False  # small and no query likely far: a closer look would cost more than it saves
    queries = _sample(query, _QUERY_SAMPLE)
    if not (math.isfinite(inverse_bandwidth) and np.isfinite(keys).all() and np.isfinite(queries).all()):
        return False
    window = n * _share_within(keys, queries, radius)
    visited = min(n, window + 512) if value.shape[-1] == 1 else n
    far = math.exp(-0.6 * window)  # the share of queries, about
    dense = _DENSE_ROW + visited * value.shape[-1] * _DENSE_PAIR[dtype]
    dense += (n - visited) * _DENSE_SKIPPED + far * n * far_pair
    directly = _DIRECT_ROW + _DIRECT_PAIR * (window + 8 * max(1, n / m))
    by_series = _TRANSLATION[dtype] / max(1, m * min(1, window / n / 6))
    return (1 + n / m) * _LINEAR_POINT + min(directly, by_series) + call / m < dense


def _sample(points: Tensor, most: int) -> np.ndarray:
    """Evenly spaced members of the first batch element, ascending, in float64."""
    column = points.reshape(-1, *points.shape[-2:])[0, :, 0] if points.ndim > 2 else points[:, 0]
    if column.dtype == torch.bfloat16:  # numpy has none
        column = column.float()
    return np.sort(column.numpy()[_places(len(column), most)].astype(np.float64))


@functools.lru_cache(64)
def _places(count: int, most: int) -> np.ndarray:
    return np.linspace(0, count - 1, min(most, count)).astype(np.int64)


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
