"""The tiled kernels, for near rows: blocks of rows against tiles of keys, in the dtype of the data.

For a row and a tile of keys the terms p_j = a_j exp(-(s_j - top) / 2), s_j = |(q - k_j) w|^2, go to a small buffer,
from which all sums of that row are taken. Sums over a tile are in the dtype of the data, over tiles in float64. With
one feature top = 0: a row near its keys needs no shift. With more, top is the running minimum of s (online softmax).

A row is *near* when its sums show that they can be trusted: finite, total at least 2^-16, scores small enough for their
dtype. All other rows are *far*, also all of data that are not ordinary (not finite, extreme scale): see `far.py`.
"""

from typing import NamedTuple

import numpy as np
from numba import njit

from ..base import (
    EXACT,
    KEY_D,
    KEY_N,
    SUMS,
    VALUE_C,
    VALUE_N,
    W_D,
    WEIGHT,
    WEIGHT_N,
    C,
    D,
    N,
    double,
)  # fmt: skip
from ..exp2 import gauss
from ..scores import minus

TILE = 512
FEATURES = 15  # summed at once, a multiple of 3
ABSENT = 1e30  # the score of a key that is left out: its term is 0
LEAST_TOTAL = 2.0**-16


class Bounds(NamedTuple):
    """Of the data of a batch element.

    Of each channel, centre: the value nearest to 0 if all have one sign, else 0 (subtracting it costs no digit, and
    makes equal values exact). Of each tile and feature, low and high: the bounds of the keys.
    """

    centre: np.ndarray
    low: np.ndarray
    high: np.ndarray


class Survey(NamedTuple):
    """What else there is to know of the data of a batch element."""

    ordinary: bool  # fit for the tiled kernels
    exponent: float  # of the power of 2 that brings the largest weight to at most 1
    spread: float  # bound of the centred values
    reach: float  # bound of the coordinates, at least 1
    unit: float  # bound of the distances that matter, at most 1


class Tile(NamedTuple):
    """Keys (features first), centred values (channels first) and scaled weights of a tile."""

    keys: np.ndarray
    values: np.ndarray
    weights: np.ndarray


class Terms(NamedTuple):
    """Of one row and a tile of keys: terms p, and scratch for their scores."""

    p: np.ndarray
    s: np.ndarray
    rest: np.ndarray


@njit(**EXACT)
def bounds_for(example, about):
    """Room for the bounds of any batch element."""
    tiles, dtype = (about[N] + TILE - 1) // TILE, example.dtype
    shape = tiles, about[D]
    return Bounds(np.empty(about[C], dtype), np.empty(shape, dtype), np.empty(shape, dtype))


@njit(**EXACT)
def no_survey():
    """What is known before the first."""
    return Survey(False, 0.0, 0.0, 1.0, 1.0)


@njit(**EXACT)
def tile_for(example, about, size):
    """Room for a tile of so many keys."""
    dtype = example.dtype
    keys, values = np.empty((about[D], size), dtype), np.empty((about[C], size), dtype)
    return Tile(keys, values, np.empty(size if about[WEIGHT] != 0 else 0, dtype))


@njit(**EXACT)
def terms_for(example, size):
    """Room for the terms of a tile of so many keys."""
    return Terms(np.empty(size, example.dtype), np.empty(size, example.dtype), np.empty(size, example.dtype))


@njit(**EXACT)
def survey(example, about, given, bounds):
    """Look over the data of a batch element before its rows are summed; fills the bounds."""
    key, value, weight, w = given.key, given.value, given.weight, given.w
    at_k, at_v, at_a, at_w = given.at_key, given.at_value, given.at_weight, given.at_w
    centre, low, high = bounds.centre, bounds.low, bounds.high
    n, n_features, n_channels = about[N], about[D], about[C]
    is_float = example.itemsize == 4
    largest_allowed = 1e15 if is_float else 1e100
    largest, spread, narrowest = 0.0, 0.0, 0.0
    ordinary = True
    for f in range(n_features):
        bandwidth = abs(double(w[at_w + f * about[W_D]]))
        narrowest = max(narrowest, bandwidth)
        ordinary &= bandwidth < (1e12 if is_float else 1e100)
        for tile in range((n + TILE - 1) // TILE):
            at = at_k + f * about[KEY_D] + tile * TILE * about[KEY_N]
            least = most = key[at]
            finite = True
            for j in range(min(TILE, n - tile * TILE)):
                k = key[at + j * about[KEY_N]]
                least, most = min(least, k), max(most, k)
                finite &= k == k
            low[tile, f], high[tile, f] = least, most
            ordinary &= finite
            largest = max(largest, max(-double(least), double(most)))
    # Not so large that squares overflow, nor so small that they all underflow.
    ordinary &= largest < largest_allowed and (largest == 0.0 or largest > 1.0 / largest_allowed)
    for c in range(n_channels):
        at = at_v + c * about[VALUE_C]
        least = most = value[at]
        finite = True
        for j in range(n):
            v = value[at + j * about[VALUE_N]]
            least, most = min(least, v), max(most, v)
            finite &= v == v
        # Terms flushed to 0 must not matter, whatever they are multiplied with.
        ordinary &= finite and max(-double(least), double(most)) < (1e18 if is_float else 1e80)
        centre[c] = least if least > 0 else (most if most < 0 else 0)
        spread = max(spread, max(double(most) - double(centre[c]), double(centre[c]) - double(least)))
    unit = min(1.0, 1.0 / narrowest) if narrowest > 0.0 else 1.0
    if largest > 0.0:
        unit = min(unit, largest)
    ordinary &= in_range(spread, unit, 1.0, is_float)
    exponent = 0.0
    if about[WEIGHT] != 0:
        most_weight, least_weight = 0.0, np.inf
        for j in range(n):
            a = double(weight[at_a + j * about[WEIGHT_N]])
            ordinary &= a >= 0.0
            most_weight = max(most_weight, a)
            least_weight = min(least_weight, a if a > 0.0 else np.inf)
        ordinary &= 0.0 < most_weight < np.inf
        # Scaled weights are normal numbers: one that became 0 would leave its key out of the choice of the shift.
        ordinary &= least_weight > (1e-36 if is_float else 1e-290) * most_weight
        if ordinary:
            exponent = np.ceil(np.log2(most_weight))
            ordinary &= abs(exponent) < 1000.0
    return Survey(ordinary, exponent, spread, max(1.0, largest), unit)


@njit(**EXACT)
def in_range(size, unit, reach, is_float):
    """Whether products of the size with two distances neither overflow nor lose digits below the normal numbers."""
    least, most = (1e-30, 1e30) if is_float else (1e-250, 1e250)
    return size == 0.0 or (least < size * unit * unit and size * reach * reach < most)


@njit(**EXACT)
def pack(about, given, first, n, centre, exponent, tile):
    """Copy n keys from `first` on, their centred values and scaled weights into the tile."""
    key, value, weight = given.key, given.value, given.weight
    keys, values, weights = tile.keys, tile.values, tile.weights
    at_k = given.at_key + first * about[KEY_N]
    at_v = given.at_value + first * about[VALUE_N]
    for f in range(about[D]):
        at = at_k + f * about[KEY_D]
        if about[KEY_N] == 1:
            for j in range(n):
                keys[f, j] = key[at + j]
        else:
            for j in range(n):
                keys[f, j] = key[at + j * about[KEY_N]]
    for c in range(about[C]):
        at = at_v + c * about[VALUE_C]
        if about[VALUE_N] == 1:
            for j in range(n):
                values[c, j] = value[at + j] - centre[c]
        else:
            for j in range(n):
                values[c, j] = value[at + j * about[VALUE_N]] - centre[c]
    if about[WEIGHT] != 0:
        at = given.at_weight + first * about[WEIGHT_N]
        scale = 2.0**-exponent
        for j in range(n):
            weights[j] = double(weight[at + j * about[WEIGHT_N]]) * scale


@njit(**EXACT)
def least_score(q, w, low, high):
    """The least s that any key within the bounds of a tile can have."""
    score = 0.0
    for f in range(len(q)):
        d = max(max(double(low[f]) - double(q[f]), double(q[f]) - double(high[f])), 0.0) * double(w[f])
        score += d * d
    return score


@njit(**EXACT)
def add_features(q, keys, w, first, last, n, s):
    """Add ((q - k_j) w)^2 of the features first .. last, a multiple of 3, to s_j."""
    for f in range(first, last, 3):
        a, b, c = keys[f], keys[f + 1], keys[f + 2]
        for j in range(n):
            x, y, z = (q[f] - a[j]) * w[f], (q[f + 1] - b[j]) * w[f + 1], (q[f + 2] - c[j]) * w[f + 2]
            s[j] += x * x + y * y + z * z


@njit(**EXACT)
def add_exactly(s, part, rest, n):
    """s_j += part_j and rest_j += what that rounds away."""
    for j in range(n):
        total = s[j] + part[j]
        added = total - s[j]
        rest[j] += (s[j] - (total - added)) + (part[j] - added)
        s[j] = total


@njit(**EXACT)
def tile_scores(q, keys, w, n, s, part, rest):
    """s_j = |(q - k_j) w|^2, the difference first: scaled numbers would have lost its digits.

    Many features are summed by blocks (`part`, `rest`: scratch), for one sum over all would lose digits to rounding.
    """
    n_features = len(q)
    start = n_features % 3
    if start == 0:
        start = 3
        a, b, c = keys[0], keys[1], keys[2]
        for j in range(n):
            x, y, z = (q[0] - a[j]) * w[0], (q[1] - b[j]) * w[1], (q[2] - c[j]) * w[2]
            s[j] = x * x + y * y + z * z
    elif start == 1:
        a = keys[0]
        q0, w0 = q[0], w[0]
        for j in range(n):
            x = (q0 - a[j]) * w0
            s[j] = x * x
    else:
        a, b = keys[0], keys[1]
        for j in range(n):
            x, y = (q[0] - a[j]) * w[0], (q[1] - b[j]) * w[1]
            s[j] = x * x + y * y
    first_block = min(n_features, start + FEATURES)
    add_features(q, keys, w, start, first_block, n, s)
    if first_block == n_features:
        return
    rest[:n] = 0
    for first in range(first_block, n_features, FEATURES):
        part[:n] = 0
        add_features(q, keys, w, first, min(n_features, first + FEATURES), n, part)
        add_exactly(s, part, rest, n)
    for j in range(n):
        s[j] += rest[j]


@njit(**EXACT)
def shifted_terms(s, shift, n, p):
    """p_j = exp(-(s_j - shift) / 2)."""
    for j in range(n):
        p[j] = gauss(s[j] - shift)


@njit(**EXACT)
def tile_terms_unshifted(q, keys, w, n, p):
    """As tile_scores and gauss for one feature, in one loop."""
    k = keys[0]
    q0, w0 = q[0], w[0]
    for j in range(n):
        x = (q0 - k[j]) * w0
        p[j] = gauss(x * x)


@njit(**EXACT)
def term(q, k, w):
    """Return exp(-((q - k) w)^2 / 2)."""
    x = (q - k) * w
    return gauss(x * x)


@njit(**SUMS)
def unshifted_total_and_product(q, k, w, v, n):
    """Sums of p and p v over a tile of one feature, without the buffer."""
    total = product = w - w
    for j in range(n):
        p = term(q, k[j], w)
        total += p
        product += p * v[j]
    return total, product


@njit(**EXACT)
def least_of(s, n, folded):
    """min(s[:n]) by halving, which vectorises."""
    half = (n + 1) // 2
    for j in range(half):
        folded[j] = min(s[j], s[n - half + j])
    while half > 1:
        n = half
        half = (n + 1) // 2
        for j in range(half):
            folded[j] = min(folded[j], folded[n - half + j])
    return folded[0]


@njit(**SUMS)
def total_of(p, n):
    """Sum of p[:n]."""
    total = p[0] - p[0]
    for j in range(n):
        total += p[j]
    return total


@njit(**SUMS)
def total_and_product(p, v, n):
    """Sums of p and of p v over the first n."""
    total = product = p[0] - p[0]
    for j in range(n):
        total += p[j]
        product += p[j] * v[j]
    return total, product


@njit(**SUMS)
def products4(p, a, b, c, d, n):
    """Four inner products with p, which share its loads."""
    w = x = y = z = p[0] - p[0]
    for j in range(n):
        w += p[j] * a[j]
        x += p[j] * b[j]
        y += p[j] * c[j]
        z += p[j] * d[j]
    return w, x, y, z


@njit(**EXACT)
def product_of_differences(u, q, k, reference):
    """d_j^2 - (q - reference)^2 for u = reference - k: no cancellation."""
    return u * ((q - k) + (q - reference))


@njit(**SUMS)
def tile_offset_sums(p, v, k, q, reference, n):
    """Sums of p u, p u v, p z, p z v with u = d - d_ref, z = d^2 - d_ref^2, for d = q - k and d_ref = q - reference."""
    by_u = by_uv = by_z = by_zv = p[0] - p[0]
    for j in range(n):
        u = minus(reference, k[j])
        z = p[j] * product_of_differences(u, q, k[j], reference)
        u = p[j] * u
        by_u += u
        by_uv += u * v[j]
        by_z += z
        by_zv += z * v[j]
    return by_u, by_uv, by_z, by_zv


@njit(**EXACT)
def scores_trusted(top, total, n_features, is_float):
    """Whether the sums of a row can be trusted: not too far from all keys, no overflow."""
    # Below 2 * 87 and 2 * 709, so that exp(top / 2) is finite: a key left out may be that much nearer than all others.
    limit = min(64.0 + 8.0 * n_features, 150.0) if is_float else 1400.0
    return LEAST_TOTAL <= total < np.inf and top < limit
