"""scikit-learn's trees: KernelDensity, which bounds what distant nodes weigh, and a Gaussian cut at six bandwidths.

Both walk a k-d tree for each query, in float64. With one feature, sorting does what a tree would.
"""

import functools
import os
import warnings

import numpy as np

from benchmarks.problems.workloads import Call, Data

from .peer import Peer, missing

RELATIVE = 1e-4  # what KernelDensity may be off by
RADIUS = 6  # bandwidths: what lies further weighs less than 2e-8


def _arrays(given: Data) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    query, key, value = (tensor.numpy().astype(float) for tensor in (given.query, given.key, given.value))
    return query.reshape(len(query), -1), key.reshape(len(key), -1), value.reshape(-1)


def _densities(given: Data) -> Call:
    from sklearn.neighbors import KernelDensity

    query, key, value = _arrays(given)
    least = value.min() - 1  # weights have to be positive
    tree = KernelDensity(bandwidth=1 / float(given.w), algorithm="kd_tree", rtol=RELATIVE)

    def call() -> tuple[np.ndarray]:
        ones = tree.fit(key).score_samples(query)
        weighted = tree.fit(key, sample_weight=value - least).score_samples(query)
        return (np.exp(weighted - ones) * (value - least).mean() + least,)

    return call


def _neighbours(given: Data) -> Call:
    from sklearn.neighbors import RadiusNeighborsRegressor

    query, key, value = _arrays(given)
    w = float(given.w)

    def weights(distances: np.ndarray) -> np.ndarray:
        """Of an array for each query, in an array of arrays."""
        found = np.empty(len(distances), object)
        for row, own in enumerate(distances):
            found[row] = np.exp(-((own * w) ** 2) / 2)
        return found

    model = RadiusNeighborsRegressor(
        radius=RADIUS / w, weights=weights, algorithm="kd_tree", n_jobs=len(os.sched_getaffinity(0))
    )

    def call() -> tuple[np.ndarray]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of queries without neighbours, which it makes NaN
            return (model.fit(key, value).predict(query),)

    return call


_why_not = functools.cache(lambda: missing("sklearn"))
PEERS = (
    Peer(
        name="KernelDensity",
        about=f"scikit-learn's `KernelDensity` on a k-d tree with `rtol={RELATIVE:g}`, of 1 and of v, and their ratio",
        why_not=_why_not,
        package="scikit-learn",
        precision="float64",
        tolerance=1e-2,  # rtol holds for each sum, and values are shifted to be positive
        forward=_densities,
        least_features=2,
        one_channel=True,
        seconds_per_pair=2e-8,
    ),
    Peer(
        name="RadiusNeighbors",
        about=f"scikit-learn's `RadiusNeighborsRegressor` within {RADIUS} bandwidths, Gaussian weights",
        why_not=_why_not,
        package="scikit-learn",
        precision="float64",
        forward=_neighbours,
        least_features=2,
        one_channel=True,
        bytes_per_pair=2,
        seconds_per_pair=3.5e-9,
    ),
)
