"""The key side: gradients of a block of keys in one pass over all rows, the terms recomputed from the saved state."""

from typing import NamedTuple

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
    inputs_of,
    int64,
    lse_gradient,
    pointer,
)  # fmt: skip
from . import far
from .rows import FAR, NEAR, block_for, block_of, effective_state, load_block, project
from .tiles import (
    TILE,
    bounds_for,
    least_score,
    no_survey,
    pack,
    shifted_terms,
    survey,
    terms_for,
    tile_for,
    tile_scores,
    tile_terms_unshifted,
)

ROWS_AT_ONCE = 64  # summed in the dtype of the data, then added to float64


class Gradients(NamedTuple):
    """Sums for some keys: key (D, n), value (C, n), weight (n)."""

    key: np.ndarray
    value: np.ndarray
    weight: np.ndarray


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
def gradients_for(about, size, dtype):
    """Zeros for the gradients of so many keys."""
    return Gradients(
        np.zeros((about[D], size), dtype), np.zeros((about[C], size), dtype), np.zeros(size, dtype)
    )


@njit(**EXACT)
def add_block(part, whole):
    """Add what a few rows gave, in the dtype of the data, to the sums in float64."""
    for f in range(len(part.key)):
        for j in range(len(part.weight)):
            whole.key[f, j] += double(part.key[f, j])
    for c in range(len(part.value)):
        for j in range(len(part.weight)):
            whole.value[c, j] += double(part.value[c, j])
    for j in range(len(part.weight)):
        whole.weight[j] += double(part.weight[j])


@njit(**EXACT, inline="always")
def add_near(example, about, given, b, start, stop, exponent, bounds, kinds, whole):
    """Add what near rows give to the gradients of the keys start .. stop."""
    n, n_features, n_channels, dtype = stop - start, about[D], about[C], example.dtype
    through_keys = about[GRAD_KEY] != 0 or about[GRAD_WEIGHT] != 0
    skip = 180.0 if example.itemsize == 4 else 500.0
    low, high = bounds.low[start // TILE], bounds.high[start // TILE]
    grad_out = pointer(about[GRAD_OUT], example)
    out, state = pointer(about[OUT], example), pointer(about[STATE], double)
    tile, terms = tile_for(example, about, n), terms_for(example, n)
    keys, values, s, p = tile.keys, tile.values, terms.s, terms.p
    part, block = gradients_for(about, n, dtype), block_for(example, about, int64(ROWS_AT_ONCE))
    grad_key, grad_value, grad_weight = part.key, part.value, part.weight
    w, gradients, projected = block.w, np.empty(n_channels, dtype), np.empty(n, dtype)
    pack(about, given, start, n, bounds.centre, exponent, tile)
    reached = False
    for first in range(0, about[M], ROWS_AT_ONCE):
        last = min(first + ROWS_AT_ONCE, about[M])
        load_block(example, about, given, first, last, block)
        grad_key[:] = 0
        grad_value[:] = 0
        grad_weight[:] = 0
        touched = False
        for i in range(first, last):
            row = b * about[M] + i
            if kinds[row] != NEAR:
                continue
            q = block.queries[i - first]
            top, total = effective_state(state[2 * row], state[2 * row + 1], exponent, n_features)
            if least_score(q, w, low, high) - top > skip:
                continue
            touched = True
            if n_features == 1:
                tile_terms_unshifted(q, keys, w, n, p)
            else:
                tile_scores(q, keys, w, n, s, p, terms.rest)
                shifted_terms(s, dtype.type(top), n, p)
            if about[SELF] and start <= i < stop:
                p[i - start] = 0
            level = -lse_gradient(example, about, row) / total if about[GRAD_LSE] != 0 else 0.0
            for c in range(n_channels):
                g = double(grad_out[row * n_channels + c]) / total
                gradients[c] = g
                level += g * (double(out[row * n_channels + c]) - double(bounds.centre[c]))
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
            add_block(part, whole)
            reached = True
    if not reached:  # the sums are zeros, and without rows no w has been loaded that could scale them
        return
    scale = 2.0**-exponent
    for j in range(n):
        a = double(tile.weights[j]) if about[WEIGHT] != 0 else 1.0
        for f in range(n_features):
            whole.key[f, j] *= a * double(w[f]) * double(w[f])
        for c in range(n_channels):
            whole.value[c, j] *= a
        whole.weight[j] *= scale


@njit(**EXACT)
def rows_of_kind(about, b, kinds, kind):
    """The rows of batch element b that are of this kind."""
    count = 0
    for i in range(about[M]):
        count += kinds[b * about[M] + i] == kind
    found = np.empty(count, np.int64)
    count = 0
    for i in range(about[M]):
        if kinds[b * about[M] + i] == kind:
            found[count] = i
            count += 1
    return found


@entry
def backward_keys(example, about, first, last):
    """Gradients of keys, values and weights."""
    bounds, found, surveyed = bounds_for(example, about), no_survey(), -1
    rows, means = pointer(about[ROWS], double), pointer(about[MEANS], double)
    kinds = pointer(about[KINDS], np.int8)
    n, n_features, n_channels = about[N], about[D], about[C]
    grad_key, grad_value = pointer(about[GRAD_KEY], example), pointer(about[GRAD_VALUE], example)
    grad_weight = pointer(about[GRAD_WEIGHT], example)
    for unit in range(first, last):
        b, start, stop = block_of(unit, n, int64(TILE))
        given = inputs_of(example, about, b)
        if b != surveyed:
            found, surveyed = survey(example, about, given, bounds), b
        whole = gradients_for(about, stop - start, np.float64)
        if found.ordinary:
            add_near(example, about, given, b, start, stop, found.exponent, bounds, kinds, whole)
        far_rows = rows_of_kind(about, b, kinds, FAR)
        if len(far_rows) > 0:
            far.key_side(example, about, b, start, stop, rows, means, far_rows, whole)
        for j in range(start, stop):
            if about[GRAD_KEY] != 0:
                for f in range(n_features):
                    grad_key[(b * n + j) * n_features + f] = whole.key[f, j - start]
            if about[GRAD_VALUE] != 0:
                for c in range(n_channels):
                    grad_value[(b * n + j) * n_channels + c] = whole.value[c, j - start]
            if about[GRAD_WEIGHT] != 0:
                grad_weight[b * n + j] = whole.weight[j - start]
