"""Binning and a fast Fourier transform, as R's smoothers do: KDEpy's FFTKDE for numerator and denominator.

Keys are split between the points of a regular grid, both densities are convolved there, and their ratio is interpolated
linearly at the queries. Fast, and only as accurate as the grid: it is held to 1e-3. In several features, where finer
grids would take longer than all pairs do, its error is shown, and held to nothing.
"""

import functools
import math

import numpy as np

from benchmarks.problems.workloads import Call, Data

from .peer import Peer, missing

CELLS_PER_BANDWIDTH = {1: 64, 2: 8, 3: 3}  # by features
MARGIN = 5  # bandwidths beyond the data


def smooth(query: np.ndarray, key: np.ndarray, value: np.ndarray, w: float) -> np.ndarray:
    """(M, D), (N, D) and (N,), float64."""
    from KDEpy import FFTKDE
    from scipy.ndimage import map_coordinates

    h, features = 1 / w, key.shape[1]
    low = np.minimum(key.min(0), query.min(0)) - MARGIN * h
    high = np.maximum(key.max(0), query.max(0)) + MARGIN * h
    cells = np.ceil((high - low) * w * CELLS_PER_BANDWIDTH[features]).astype(int)
    axes = [np.linspace(*ends) for ends in zip(low, high, cells + 1, strict=True)]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, features)
    least = value.min() - 1  # weights have to be positive
    density = FFTKDE(kernel="gaussian", bw=h)
    ones = density.fit(key).evaluate(grid)
    weighted = density.fit(key, weights=value - least).evaluate(grid)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = weighted / ones * (value - least).mean() + least
    places = [(column - axis[0]) / (axis[1] - axis[0]) for column, axis in zip(query.T, axes, strict=True)]
    return map_coordinates(ratio.reshape([len(axis) for axis in axes]), places, order=1)


def _forward(given: Data) -> Call:
    query, key, value = (tensor.numpy().astype(float) for tensor in (given.query, given.key, given.value))
    query, key = (points.reshape(len(points), -1) for points in (query, key))
    w = float(given.w)
    return lambda: (smooth(query, key, value.reshape(-1), w),)


PEERS = (
    Peer(
        name="KDEpy binned",
        about="`FFTKDE` of 1 and of v, ratio, linear interpolation; "
        + ", ".join(f"{cells}" for cells in CELLS_PER_BANDWIDTH.values())
        + " grid points a bandwidth with one, two, three features",
        why_not=functools.cache(lambda: missing("KDEpy", "scipy")),
        package="kdepy",
        precision="float64",
        tolerance=1e-3,
        several_tolerance=math.inf,
        forward=_forward,
        most_features=3,
        one_channel=True,
        seconds_per_pair=0,
        seconds_per_point=5e-7,
    ),
)
