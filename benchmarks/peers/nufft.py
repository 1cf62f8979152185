"""FINUFFT: convolution of keys with a Gaussian by Fourier series, once for 1 and once for the values; their ratio.

A nonuniform transform of type 1, a multiplication with the Gaussian's transform, a transform of type 2, in one to three
features. Errors are absolute, relative to the largest density: away from the data the ratio of two such sums has no
digit left.
"""

import functools
import math
import os

import numpy as np

from benchmarks.problems.workloads import Call, Data

from .peer import Peer, missing

EPSILON = 1e-7
SPARE = 1e-2  # the Gaussian is cut where it has fallen to EPSILON times this


def ratio(query: np.ndarray, key: np.ndarray, value: np.ndarray, w: float, threads: int) -> np.ndarray:
    """(M, D), (N, D) and (N,), float64."""
    import finufft

    reach = np.sqrt(-2 * np.log(EPSILON * SPARE))  # of the Gaussian, in bandwidths, and of its transform
    low, high = np.minimum(key.min(0), query.min(0)), np.maximum(key.max(0), query.max(0))
    units = 2 * np.pi / ((high - low) + reach / w)  # what wraps around that period is negligible
    modes = [2 * int(np.ceil(reach * w / unit)) + 2 for unit in units]
    transform = np.ones(())
    for unit, count in zip(units, modes, strict=True):
        factor = np.exp(-(((np.arange(count) - count // 2) * unit / w) ** 2) / 2)
        transform = np.multiply.outer(transform, factor)
    charges = np.empty((2, len(key)), complex)
    charges[0], charges[1] = 1, value
    features = key.shape[1]
    to_modes, to_points = (getattr(finufft, f"nufft{features}d{kind}") for kind in (1, 2))
    keys, queries = (np.ascontiguousarray(((points - low) * units - np.pi).T) for points in (key, query))
    options = dict(eps=EPSILON, nthreads=threads)
    series = to_modes(*keys, charges, tuple(modes), isign=-1, **options)
    sums = to_points(*queries, series * transform, isign=1, **options).real
    return sums[1] / sums[0]


def _forward(given: Data) -> Call:
    query, key, value = (tensor.numpy().astype(float) for tensor in (given.query, given.key, given.value))
    query, key = (points.reshape(len(points), -1) for points in (query, key))
    w, threads = float(given.w), len(os.sched_getaffinity(0))
    return lambda: (ratio(query, key, value.reshape(-1), w, threads),)


PEERS = (
    Peer(
        name="FINUFFT ratio",
        about=f"type 1 of (1, v), Gaussian, type 2, ratio, in one to three features; float64 with `eps={EPSILON:g}`; "
        "right only near data",
        why_not=functools.cache(lambda: missing("finufft")),
        package="finufft",
        precision="float64",
        several_tolerance=math.inf,  # corners and gaps are away from the data
        forward=_forward,
        most_features=3,
        one_channel=True,
        seconds_per_pair=0,
        seconds_per_point=1e-7,
    ),
)
