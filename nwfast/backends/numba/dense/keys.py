"""The key side: gradients of a block of keys in one pass over all rows, the terms recomputed from the saved state."""

import numpy as np
from numba import njit

from ..base import (
    EXACT,
    GRAD_KEY,
    GRAD_LSE,
    GRAD_OUT,
    GRAD_VALUE,
    GRAD_WEIGHT,
    KINDS,
    MEANS,
    OUT,
    ROWS,
    SELF,
    STATE,
    WEIGHT,
    C,
    D,
    M,
    N,
    double,
    entry,
    pointer,
)  # fmt: skip
from ..exp2 import gauss
from . import far
from .rows import FAR, NEAR, effective_state, load_queries, load_w, project
from .tiles import TILE, least_score, pack, survey, tile_scores, tile_terms_unshifted

ROWS_AT_ONCE = 64  # summed in the dtype of the data, then added to float64


@njit(**EXACT)
def add_single(p, k, v, q, g, level, grad_key, grad_value, grad_weight, n):
    """A single feature and channel: all three gradients in one loop."""
    for j in range(n):
        pull = p[j] * (g * v[j] - level)
        grad_value[j] += p[j] * g
        grad_weight[j] += pull
        grad_key[j] += pull * (q - k[j])


@njit(**EXACT)
def add_value(p, gradients, grad_value, n):
    """Add p g to the gradients of the values."""
    for c in range(len(gradients)):
        g, column = gradients[c], grad_value[c]
        for j in range(n):
            column[j] += p[j] * g


@njit(**EXACT)
def add_key(p, projected, q, keys, grad_key, grad_weight, n):
    """Add p times `projected` to the gradients of the weights, and that times (q - k) to those of the keys."""
    for j in range(n):
        projected[j] *= p[j]
        grad_weight[j] += projected[j]
    for f in range(len(q)):
        q_f, k, column = q[f], keys[f], grad_key[f]
        for j in range(n):
            column[j] += projected[j] * (q_f - k[j])


@njit(**EXACT)
def add_near(example, about, b, start, stop, exponent, centre, low, high, kinds, by_key, by_value, by_weight):
    """Add what near rows give to the gradients of the keys start..stop: by_key (D, n), by_value (C, n), by_weight."""
    n, n_features, n_channels = stop - start, about[D], about[C]
    through_keys = about[GRAD_KEY] != 0 or about[GRAD_WEIGHT] != 0
    skip = 180.0 if example.itemsize == 4 else 500.0
    tile = start // TILE
    weighted = about[WEIGHT] != 0
    grad_out, grad_lse = pointer(about[GRAD_OUT], example), pointer(about[GRAD_LSE], example)
    out, state = pointer(about[OUT], example), pointer(about[STATE], np.empty(0))
    dtype = example.dtype
    keys, values, weights = (
        np.empty((n_features, n), dtype),
        np.empty((n_channels, n), dtype),
        np.empty(n, dtype),
    )
    grad_key, grad_value = np.empty((n_features, n), dtype), np.empty((n_channels, n), dtype)
    grad_weight = np.empty(n, dtype)
    s, p, projected = np.empty(n, dtype), np.empty(n, dtype), np.empty(n, dtype)
    rest = np.empty(n, dtype)
    w, gradients = np.empty(n_features, dtype), np.empty(n_channels, dtype)
    queries, fit = np.empty((ROWS_AT_ONCE, n_features), dtype), np.empty(ROWS_AT_ONCE, np.bool_)
    load_w(example, about, b, w)
    pack(example, about, b, start, n, centre, exponent, keys, values, weights)
    for first in range(0, about[M], ROWS_AT_ONCE):
        last = min(first + ROWS_AT_ONCE, about[M])
        load_queries(example, about, b, first, last, queries, fit)
        grad_key[:] = 0
        grad_value[:] = 0
        grad_weight[:] = 0
        touched = False
        for i in range(first, last):
            row = b * about[M] + i
            if kinds[row] != NEAR:
                continue
            q = queries[i - first]
            top, total = effective_state(state[2 * row], state[2 * row + 1], exponent, n_features)
            if least_score(q, w, low[tile], high[tile]) - top > skip:
                continue
            touched = True
            if n_features == 1:
                tile_terms_unshifted(q, keys, w, n, p)
            else:
                tile_scores(q, keys, w, n, s, p, rest)
                shift = dtype.type(top)
                for j in range(n):
                    p[j] = gauss(s[j] - shift)
            if about[SELF] and start <= i < stop:
                p[i - start] = 0
            level = -double(grad_lse[row]) / total if about[GRAD_LSE] != 0 else 0.0
            for c in range(n_channels):
                g = double(grad_out[row * n_channels + c]) / total
                gradients[c] = g
                level += g * (double(out[row * n_channels + c]) - double(centre[c]))
            level = dtype.type(level)
            if n_features == 1 and n_channels == 1 and through_keys:
                add_single(
                    p,
                    keys[0],
                    values[0],
                    q[0],
                    gradients[0],
                    level,
                    grad_key[0],
                    grad_value[0],
                    grad_weight,
                    n,
                )
            else:
                if about[GRAD_VALUE] != 0:
                    add_value(p, gradients, grad_value, n)
                if through_keys:
                    project(gradients, values, level, n, projected)
                    add_key(p, projected, q, keys, grad_key, grad_weight, n)
        if touched:
            for f in range(n_features):
                for j in range(n):
                    by_key[f, j] += double(grad_key[f, j])
            for c in range(n_channels):
                for j in range(n):
                    by_value[c, j] += double(grad_value[c, j])
            for j in range(n):
                by_weight[j] += double(grad_weight[j])
    scale = 2.0**-exponent
    for j in range(n):
        a = double(weights[j]) if weighted else 1.0
        for f in range(n_features):
            by_key[f, j] *= a * double(w[f]) * double(w[f])
        for c in range(n_channels):
            by_value[c, j] *= a
        by_weight[j] *= scale


@entry
def backward_keys(example, about, first, last):
    """Gradients of keys, values and weights."""
    tiles = (about[N] + TILE - 1) // TILE
    centre = np.empty(about[C], example.dtype)
    low, high = np.empty((tiles, about[D]), example.dtype), np.empty((tiles, about[D]), example.dtype)
    rows, means = pointer(about[ROWS], np.empty(0)), pointer(about[MEANS], np.empty(0))
    kinds = pointer(about[KINDS], np.empty(0, np.int8))
    n, n_features, n_channels = about[N], about[D], about[C]
    grad_key, grad_value = pointer(about[GRAD_KEY], example), pointer(about[GRAD_VALUE], example)
    grad_weight = pointer(about[GRAD_WEIGHT], example)
    surveyed, ordinary, exponent = -1, False, 0.0
    for unit in range(first, last):
        b = unit // tiles
        start = (unit % tiles) * TILE
        stop = min(start + TILE, n)
        count = stop - start
        if b != surveyed:
            ordinary, exponent, _, _, _ = survey(example, about, b, centre, low, high)
            surveyed = b
        by_key, by_value, by_weight = (
            np.zeros((n_features, count)),
            np.zeros((n_channels, count)),
            np.zeros(count),
        )
        if ordinary:
            add_near(
                example,
                about,
                b,
                start,
                stop,
                exponent,
                centre,
                low,
                high,
                kinds,
                by_key,
                by_value,
                by_weight,
            )
        count_far = 0
        for i in range(about[M]):
            count_far += kinds[b * about[M] + i] == FAR
        if count_far > 0:
            indices = np.empty(count_far, np.int64)
            count_far = 0
            for i in range(about[M]):
                if kinds[b * about[M] + i] == FAR:
                    indices[count_far] = i
                    count_far += 1
            far.key_side(example, about, b, start, stop, rows, means, indices, by_key, by_value, by_weight)
        for j in range(start, stop):
            if about[GRAD_KEY] != 0:
                for f in range(n_features):
                    grad_key[(b * n + j) * n_features + f] = by_key[f, j - start]
            if about[GRAD_VALUE] != 0:
                for c in range(n_channels):
                    grad_value[(b * n + j) * n_channels + c] = by_value[c, j - start]
            if about[GRAD_WEIGHT] != 0:
                grad_weight[b * n + j] = by_weight[j - start]
