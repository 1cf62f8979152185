"""Binning and a fast Fourier transform, as R's smoothers do: KDEpy's FFTKDE for numerator and denominator.

Keys are split between the points of a regular grid, both densities are convolved there, and their ratio is interpolated
linearly at the queries. Fast, and only as accurate as the grid: it is held to 1e-3.
"""

import functools

import numpy as np

from benchmarks.problems.workloads import Call, Data

from .peer import Peer, missing

CELLS_PER_BANDWIDTH = 64
MARGIN = 5  # bandwidths beyond the data


def smooth(query: np.ndarray, key: np.ndarray, value: np.ndarray, w: float) -> np.ndarray:
    """One feature, one channel, float64."""
    from KDEpy import FFTKDE

    h = 1 / w
    low = min(key.min(), query.min()) - MARGIN * h
    high = max(key.max(), query.max()) + MARGIN * h
    cells = 2 ** int(np.ceil(np.log2((high - low) * w * CELLS_PER_BANDWIDTH)))
    grid = np.linspace(low, high, cells)
    least = value.min() - 1  # weights have to be positive
    density = FFTKDE(kernel="gaussian", bw=h)
    ones = density.fit(key).evaluate(grid)
    weighted = density.fit(key, weights=value - least).evaluate(grid)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = weighted / ones * (value - least).mean() + least
    return np.interp(query, grid, ratio)


def _forward(given: Data) -> Call:
    query, key, value = (tensor.numpy().astype(float) for tensor in (given.query, given.key, given.value))
    w = float(given.w)
    return lambda: (smooth(query, key, value, w),)


PEERS = (
    Peer(
        name="KDEpy binned",
        about=f"`FFTKDE` of 1 and of v, {CELLS_PER_BANDWIDTH} grid points a bandwidth, ratio, linear interpolation",
        why_not=functools.cache(lambda: missing("KDEpy")),
        package="kdepy",
        precision="float64",
        tolerance=1e-3,
        forward=_forward,
        one_feature=True,
        seconds_per_pair=0,
        seconds_per_point=5e-7,
    ),
)
