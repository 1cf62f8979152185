"""The query side: sums over all keys for a block of rows, by tiles of keys (see tiles.py for the terms)."""

import numpy as np
from numba import njit

from ..base import (
    BATCH,
    EXACT,
    GRAD_LSE,
    GRAD_OUT,
    GRAD_QUERY,
    GRAD_W,
    HALF_LOG2E,
    KINDS,
    LN2,
    LSE,
    MEANS,
    OUT,
    QUERY,
    QUERY_D,
    QUERY_M,
    ROWS,
    SELF,
    STATE,
    TANGENT_Q,
    TANGENT_W,
    W_D,
    WEIGHT,
    C,
    D,
    M,
    N,
    W,
    double,
    entry,
    offset,
    pointer,
)  # fmt: skip
from ..exp2 import exp2_double, gauss
from . import far
from .tiles import (
    ABSENT,
    TILE,
    in_range,
    least_of,
    least_score,
    pack,
    products4,
    scores_trusted,
    survey,
    tile_moments,
    tile_scores,
    tile_terms_unshifted,
    total_and_product,
    total_of,
    unshifted_total_and_product,
)  # fmt: skip

QUERY_BLOCK = 256
NEAR, FAR, EMPTY = 0, 1, 2  # kinds of rows; those without any gradient are EMPTY


@njit(**EXACT)
def load_queries(example, about, b, start, stop, queries, fit):
    """Copy the rows start..stop and mark those whose numbers the tiled kernels can take."""
    query = pointer(about[QUERY], example)
    at = offset(about, b, 0)
    limit = 1e15 if example.itemsize == 4 else 1e100
    for i in range(start, stop):
        fit[i - start] = True
        for f in range(about[D]):
            q = query[at + i * about[QUERY_M] + f * about[QUERY_D]]
            queries[i - start, f] = q
            fit[i - start] &= abs(double(q)) < limit


@njit(**EXACT)
def load_w(example, about, b, w):
    """Copy the bandwidths of batch element b, one a feature."""
    bandwidth, at = pointer(about[W], example), offset(about, b, 4)
    for f in range(about[D]):
        w[f] = bandwidth[at + f * about[W_D]]


@njit(**EXACT)
def row_terms(q, w, keys, weights, weighted, n, mine, top, s, p, rest):
    """Terms p of one tile relative to the lower of `top` and the tile's least score, which is returned."""
    absent = 0 <= mine < n
    if len(q) == 1:
        tile_terms_unshifted(q, keys, w, n, p)
        if absent:
            p[mine] = 0
        top = 0.0
    else:
        tile_scores(q, keys, w, n, s, p, rest)
        if absent:
            s[mine] = ABSENT
        if weighted:
            for j in range(n):
                s[j] = s[j] if weights[j] > 0 else s.dtype.type(ABSENT)
        least = least_of(s, n, p)
        top = min(top, double(least))
        shift = s.dtype.type(top)
        for j in range(n):
            p[j] = gauss(s[j] - shift)
    if weighted:
        for j in range(n):
            p[j] *= weights[j]
    return top


@njit(**EXACT)
def project(gradient, values, level, n, projected):
    """<g, v_j> - level for the keys of a tile."""
    g, v = gradient[0], values[0]
    for j in range(n):
        projected[j] = g * v[j] - level
    for c in range(1, len(gradient)):
        g, v = gradient[c], values[c]
        for j in range(n):
            projected[j] += g * v[j]


@njit(**EXACT)
def sum_rows(
    example,
    about,
    b,
    start,
    queries,
    fit,
    w,
    exponent,
    centre,
    low,
    high,
    gradients,
    levels,
    moments,
    sums,
    tops,
):
    """Fill, for fit rows, tops and sums: sum p; sum p v per channel; per feature, sum p d, p d v, p d^2, p d^2 v.

    v is centred. With gradients (rows, C) there is one channel, <g, v> - level. Moments only if asked for.
    """
    n, n_features, n_channels = about[N], about[D], about[C]
    weighted = about[WEIGHT] != 0
    through_gradients = len(gradients) > 0
    channels = 1 if through_gradients else n_channels
    buffer_free = n_features == 1 and n_channels == 1 and not (weighted or through_gradients or moments)
    skip = 180.0 if example.itemsize == 4 else 500.0
    size = min(n, TILE)
    keys, values = np.empty((n_features, size), example.dtype), np.empty((n_channels, size), example.dtype)
    weights = np.empty(size if weighted else 0, example.dtype)
    s, p, rest = np.empty(size, example.dtype), np.empty(size, example.dtype), np.empty(size, example.dtype)
    projected = np.empty(size if through_gradients else 0, example.dtype)
    sums[:] = 0.0
    tops[:] = 0.0 if n_features == 1 else np.inf
    for tile in range((n + TILE - 1) // TILE):
        first = tile * TILE
        size = min(TILE, n - first)
        packed = False
        for r in range(len(queries)):
            if not fit[r] or least_score(queries[r], w, low[tile], high[tile]) - tops[r] > skip:
                continue
            if not packed:
                pack(example, about, b, first, size, centre, exponent, keys, values, weights)
                packed = True
            q, row = queries[r], sums[r]
            mine = start + r - first if about[SELF] else -1
            if buffer_free and not 0 <= mine < size:
                total, product = unshifted_total_and_product(q[0], keys[0], w[0], values[0], size)
                row[0] += double(total)
                row[1] += double(product)
                continue
            top = row_terms(q, w, keys, weights, weighted, size, mine, tops[r], s, p, rest)
            if top >= ABSENT:
                continue
            if top < tops[r]:
                if tops[r] < ABSENT:
                    scale = exp2_double((top - tops[r]) * HALF_LOG2E)
                    for part in range(len(row)):
                        row[part] *= scale
                tops[r] = top
            if channels == 1:
                column = values[0]
                if through_gradients:
                    project(gradients[r], values, levels[r], size, projected)
                    column = projected
                total, product = total_and_product(p, column, size)
                total, product = double(total), double(product)
                row[0] += total
                row[1] += product
                if moments:
                    for f in range(n_features):
                        reference = min(max(q[f], low[tile, f]), high[tile, f])
                        by_u, by_uv, by_z, by_zv = tile_moments(p, column, keys[f], q[f], reference, size)
                        d = double(q[f]) - double(reference)
                        at = 2 + 4 * f
                        row[at] += double(by_u) + d * total
                        row[at + 1] += double(by_uv) + d * product
                        row[at + 2] += double(by_z) + d * d * total
                        row[at + 3] += double(by_zv) + d * d * product
            else:
                row[0] += double(total_of(p, size))
                for c in range(0, channels - 3, 4):
                    parts = products4(p, values[c], values[c + 1], values[c + 2], values[c + 3], size)
                    row[1 + c] += double(parts[0])
                    row[2 + c] += double(parts[1])
                    row[3 + c] += double(parts[2])
                    row[4 + c] += double(parts[3])
                for c in range(channels - channels % 4, channels):
                    row[1 + c] += double(total_and_product(p, values[c], size)[1])


@njit(**EXACT)
def row_trusted(sums, top, n_features, is_float):
    """Whether no sum of the row overflowed and scores_trusted holds."""
    if not scores_trusted(top, sums[0], n_features, is_float):
        return False
    for part in range(1, len(sums)):  # noqa: SIM110 (numba compiles no generators here)
        if not abs(sums[part]) < np.inf:
            return False
    return True


@njit(**EXACT)
def effective_state(shift, total, exponent, n_features):
    """(top, total) as sum_rows would leave them, from the saved state."""
    if n_features == 1:
        return 0.0, total * 2.0 ** (-shift - exponent)
    return (shift + exponent) / HALF_LOG2E, total


@entry
def forward_rows(example, about, first, last):
    """Out, lse, state and tangents."""
    tiles = (about[N] + TILE - 1) // TILE
    blocks = (about[M] + QUERY_BLOCK - 1) // QUERY_BLOCK
    centre = np.empty(about[C], example.dtype)
    low, high = np.empty((tiles, about[D]), example.dtype), np.empty((tiles, about[D]), example.dtype)
    n_features, n_channels = about[D], about[C]
    moments = about[TANGENT_W] != 0 or about[TANGENT_Q] != 0
    count = min(QUERY_BLOCK, about[M])
    queries, fit = np.empty((count, n_features), example.dtype), np.empty(count, np.bool_)
    w = np.empty(n_features, example.dtype)
    sums, tops = np.empty((count, 1 + n_channels + (4 if moments else 0))), np.empty(count)
    out, lse = pointer(about[OUT], example), pointer(about[LSE], example)
    state = pointer(about[STATE], np.empty(0))
    tangent_w, tangent_q = pointer(about[TANGENT_W], example), pointer(about[TANGENT_Q], example)
    no_gradients, no_levels = np.empty((0, 0), example.dtype), np.empty(0, example.dtype)
    surveyed, ordinary, exponent = -1, False, 0.0
    for unit in range(first, last):
        b = unit // blocks
        start = (unit % blocks) * QUERY_BLOCK
        stop = min(start + QUERY_BLOCK, about[M])
        count = stop - start
        if b != surveyed:
            ordinary, exponent, _, _, _ = survey(example, about, b, centre, low, high)
            surveyed = b
        if ordinary:
            load_queries(example, about, b, start, stop, queries, fit)
            load_w(example, about, b, w)
            sum_rows(
                example,
                about,
                b,
                start,
                queries[:count],
                fit,
                w,
                exponent,
                centre,
                low,
                high,
                no_gradients,
                no_levels,
                moments,
                sums,
                tops,
            )
        for r in range(count):
            i = start + r
            row = b * about[M] + i
            if not (ordinary and fit[r] and row_trusted(sums[r], tops[r], n_features, example.itemsize == 4)):
                far.forward_rows(example, about, b, i, i + 1)
                continue
            total = sums[r, 0]
            shift = tops[r] * HALF_LOG2E - exponent
            state[2 * row], state[2 * row + 1] = shift, total
            lse[row] = LN2 * (np.log2(total) - shift)
            for c in range(n_channels):
                out[row * n_channels + c] = double(centre[c]) + sums[r, 1 + c] / total
            if moments:
                bandwidth, mean = double(w[0]), sums[r, 1] / total
                if about[TANGENT_W] != 0:
                    tangent_w[row] = -bandwidth * ((sums[r, 5] - mean * sums[r, 4]) / total)
                if about[TANGENT_Q] != 0:
                    tangent_q[row] = -bandwidth * (bandwidth * ((sums[r, 3] - mean * sums[r, 2]) / total))


@entry
def backward_rows(example, about, first, last):
    """Gradients of queries, each unit's sum for w, and what keys.py needs of each row."""
    tiles = (about[N] + TILE - 1) // TILE
    blocks = (about[M] + QUERY_BLOCK - 1) // QUERY_BLOCK
    centre = np.empty(about[C], example.dtype)
    low, high = np.empty((tiles, about[D]), example.dtype), np.empty((tiles, about[D]), example.dtype)
    n_features, n_channels = about[D], about[C]
    is_float = example.itemsize == 4
    count = min(QUERY_BLOCK, about[M])
    moments = about[GRAD_QUERY] != 0 or about[GRAD_W] != 0
    queries, fit = np.empty((count, n_features), example.dtype), np.empty(count, np.bool_)
    w = np.empty(n_features, example.dtype)
    gradients, levels = np.empty((count, n_channels), example.dtype), np.empty(count, example.dtype)
    grad_out, grad_lse = pointer(about[GRAD_OUT], example), pointer(about[GRAD_LSE], example)
    state = pointer(about[STATE], np.empty(0))
    grad_query, out = pointer(about[GRAD_QUERY], example), pointer(about[OUT], example)
    sums, tops = (
        np.empty((count if moments else 0, 2 + 4 * n_features)),
        np.empty(count if moments else 0),
    )
    rows, means = pointer(about[ROWS], np.empty(0)), pointer(about[MEANS], np.empty(0))
    kinds = pointer(about[KINDS], np.empty(0, np.int8))
    unit_sums, grad_w = pointer(about[GRAD_W], np.empty(0)), np.empty(n_features)
    surveyed, ordinary, exponent, spread, reach, least = -1, False, 0.0, 0.0, 1.0, 1.0
    for unit in range(first, last):
        b = unit // blocks
        start = (unit % blocks) * QUERY_BLOCK
        stop = min(start + QUERY_BLOCK, about[M])
        count = stop - start
        if b != surveyed:
            ordinary, exponent, spread, reach, least = survey(example, about, b, centre, low, high)
            surveyed = b
        grad_w[:] = 0.0
        load_queries(example, about, b, start, stop, queries, fit)
        load_w(example, about, b, w)
        for r in range(count):
            row = b * about[M] + start + r
            top, total = effective_state(state[2 * row], state[2 * row + 1], exponent, n_features)
            near = ordinary and fit[r] and scores_trusted(top, total, n_features, is_float)
            level, most, silent = 0.0, 0.0, True
            for c in range(n_channels):
                g = double(grad_out[row * n_channels + c])
                gradients[r, c] = g
                level += g * (double(out[row * n_channels + c]) - double(centre[c]))
                most = max(most, abs(g))
                silent &= g == 0.0
            levels[r] = level  # any constant would do; this one leaves sums of few digits to lose
            near &= in_range(most, 1.0, 1.0, is_float)
            size = most * spread
            if about[GRAD_LSE] != 0:
                size += abs(double(grad_lse[row]))
                silent &= double(grad_lse[row]) == 0.0
            most_reach = reach
            for f in range(n_features):
                most_reach = max(most_reach, abs(double(queries[r, f])))
            near &= in_range(size, least, most_reach, is_float)
            # Without a key, or if nothing depends on it, a row adds nothing, even if it is NaN.
            empty = silent or state[2 * row + 1] == 0.0
            kinds[row] = EMPTY if empty else (NEAR if near else FAR)
            fit[r] = near and not empty
        if moments and ordinary:
            sum_rows(
                example,
                about,
                b,
                start,
                queries[:count],
                fit,
                w,
                exponent,
                centre,
                low,
                high,
                gradients,
                levels,
                moments,
                sums,
                tops,
            )
        for r in range(count):
            i = start + r
            row = b * about[M] + i
            if moments and fit[r] and not row_trusted(sums[r], tops[r], n_features, is_float):
                kinds[row] = FAR
            if kinds[row] == EMPTY:
                if about[GRAD_QUERY] != 0:
                    for f in range(n_features):
                        grad_query[row * n_features + f] = 0
            elif kinds[row] == FAR:
                far.query_side(example, about, b, i, i + 1, rows, means, grad_w)
            elif moments:
                total = sums[r, 0]
                mean = sums[r, 1] / total
                through_lse = double(grad_lse[row]) if about[GRAD_LSE] != 0 else 0.0
                for f in range(n_features):
                    at = 2 + 4 * f
                    bandwidth = double(w[f])
                    by_q = (sums[r, at + 1] - (mean - through_lse) * sums[r, at]) / total
                    by_w = (sums[r, at + 3] - (mean - through_lse) * sums[r, at + 2]) / total
                    if about[GRAD_QUERY] != 0:
                        grad_query[row * n_features + f] = -bandwidth * (bandwidth * by_q)
                    grad_w[f] -= bandwidth * by_w
        if about[GRAD_W] != 0:
            for f in range(n_features):
                unit_sums[unit * n_features + f] = grad_w[f]


@entry
def backward_tangents(example, about):
    """grad_query and the sum for w of each batch element, as products with the tangents (D = C = 1)."""
    grad_out, grad_query = pointer(about[GRAD_OUT], example), pointer(about[GRAD_QUERY], example)
    tangent_w, tangent_q = pointer(about[TANGENT_W], example), pointer(about[TANGENT_Q], example)
    state, sums = pointer(about[STATE], np.empty(0)), pointer(about[GRAD_W], np.empty(0))
    for b in range(about[BATCH]):
        by_w = 0.0
        for row in range(b * about[M], (b + 1) * about[M]):
            empty = grad_out[row] == 0 or state[2 * row + 1] == 0.0  # 0 times NaN adds nothing
            if about[GRAD_QUERY] != 0:
                grad_query[row] = example.dtype.type(0) if empty else grad_out[row] * tangent_q[row]
            if about[GRAD_W] != 0 and not empty:
                by_w += double(grad_out[row]) * double(tangent_w[row])
        if about[GRAD_W] != 0:
            sums[b] = by_w
