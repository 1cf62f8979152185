"""FINUFFT: convolution of keys with a Gaussian by Fourier series, once for 1 and once for the values; their ratio.

A nonuniform transform of type 1, a multiplication with the Gaussian's transform, a transform of type 2. Errors are
absolute, relative to the largest density: away from the data the ratio of two such sums has no digit left.
"""

import functools
import os

import numpy as np

from benchmarks.problems.workloads import Call, Data

from .peer import Peer, missing

EPSILON = 1e-7
SPARE = 1e-2  # the Gaussian is cut where it has fallen to EPSILON times this


def ratio(query: np.ndarray, key: np.ndarray, value: np.ndarray, w: float, threads: int) -> np.ndarray:
    """One feature, one channel, float64."""
    import finufft

    reach = np.sqrt(-2 * np.log(EPSILON * SPARE))  # of the Gaussian, in bandwidths, and of its transform
    low, high = min(key.min(), query.min()), max(key.max(), query.max())
    period = (high - low) + reach / w  # what wraps around is negligible
    unit = 2 * np.pi / period
    modes = 2 * int(np.ceil(reach * w / unit)) + 2
    transform = np.exp(-(((np.arange(modes) - modes // 2) * unit / w) ** 2) / 2)
    charges = np.empty((2, len(key)), complex)
    charges[0], charges[1] = 1, value
    options = dict(eps=EPSILON, nthreads=threads)
    series = finufft.nufft1d1((key - low) * unit - np.pi, charges, modes, isign=-1, **options)
    sums = finufft.nufft1d2((query - low) * unit - np.pi, series * transform, isign=1, **options).real
    return sums[1] / sums[0]


def _forward(given: Data) -> Call:
    query, key, value = (tensor.numpy().astype(float) for tensor in (given.query, given.key, given.value))
    w, threads = float(given.w), len(os.sched_getaffinity(0))
    return lambda: (ratio(query, key, value, w, threads),)


PEERS = (
    Peer(
        name="FINUFFT ratio",
        about=f"type 1 of (1, v), Gaussian, type 2, ratio; float64 with `eps={EPSILON:g}`; right only near data",
        why_not=functools.cache(lambda: missing("finufft")),
        package="finufft",
        precision="float64",
        forward=_forward,
        one_feature=True,
        seconds_per_pair=0,
        seconds_per_point=5e-7,
    ),
)
