"""The query side: sums over all keys for a block of rows, by tiles of keys (see tiles.py for the terms)."""

from typing import NamedTuple

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
    double,
    entry,
    inputs_of,
    int64,
    lse_gradient,
    pointer,
)  # fmt: skip
from ..exp2 import exp2_double
from . import far
from .tiles import (
    ABSENT,
    TILE,
    Bounds,
    Terms,
    Tile,
    bounds_for,
    in_range,
    least_of,
    least_score,
    no_survey,
    pack,
    products4,
    scores_trusted,
    shifted_terms,
    survey,
    terms_for,
    tile_for,
    tile_offset_sums,
    tile_scores,
    tile_terms_unshifted,
    total_and_product,
    total_of,
    unshifted_total_and_product,
)  # fmt: skip

QUERY_BLOCK = 256
NEAR, FAR, EMPTY = 0, 1, 2  # kinds of rows; those without any gradient are EMPTY


class Block(NamedTuple):
    """Rows of a batch element: queries (rows, D), whether the tiled kernels can take them, and w (D)."""

    queries: np.ndarray
    fit: np.ndarray
    w: np.ndarray


class Room(NamedTuple):
    """What rows meet: the bounds of all tiles, the tile of keys at hand, and the terms of a row with it."""

    bounds: Bounds
    tile: Tile
    terms: Terms


class Pull(NamedTuple):
    """Gradients g of the outputs of a block's rows (rows, C), of length 0 where there are none, and levels (rows)."""

    gradients: np.ndarray
    levels: np.ndarray


class RowSums(NamedTuple):
    """Sums of the rows of a block, and the score (top) that each row's are relative to.

    sum p; sum p v per channel, v centred; with offset sums, per feature, sum p d, p d v, p d^2, p d^2 v.
    """

    sums: np.ndarray
    tops: np.ndarray
    with_offsets: bool


@njit(**EXACT)
def block_of(unit, length, size):
    """Batch element, first and last row of a unit, by blocks of `size` of the rows of each element."""
    blocks = (length + size - 1) // size
    start = (unit % blocks) * size
    return unit // blocks, start, min(start + size, length)


@njit(**EXACT)
def block_for(example, about, size):
    """Room for so many rows."""
    queries = np.empty((size, about[D]), example.dtype)
    return Block(queries, np.empty(size, np.bool_), np.empty(about[D], example.dtype))


@njit(**EXACT)
def room_for(example, about, bounds):
    """Room for one tile."""
    size = min(TILE, about[N])
    return Room(bounds, tile_for(example, about, size), terms_for(example, size))


@njit(**EXACT)
def load_block(example, about, given, start, stop, block):
    """Copy the rows start .. stop, and mark those whose numbers the tiled kernels can take."""
    queries, fit = block.queries, block.fit
    limit = 1e15 if example.itemsize == 4 else 1e100
    for i in range(start, stop):
        fit[i - start] = True
        for f in range(about[D]):
            q = given.query[given.at_query + i * about[QUERY_M] + f * about[QUERY_D]]
            queries[i - start, f] = q
            fit[i - start] &= abs(double(q)) < limit
    for f in range(about[D]):
        block.w[f] = given.w[given.at_w + f * about[W_D]]


@njit(**EXACT, inline="always")
def terms_of_tile(q, w, tile, n, mine, top, terms):
    """Terms p of one tile relative to the lower of `top` and the tile's least score, which is returned."""
    keys, weights, s, p = tile.keys, tile.weights, terms.s, terms.p
    absent, weighted = 0 <= mine < n, len(weights) > 0
    if len(q) == 1:
        tile_terms_unshifted(q, keys, w, n, p)
        if absent:
            p[mine] = 0
        top = 0.0
    else:
        tile_scores(q, keys, w, n, s, p, terms.rest)
        if absent:
            s[mine] = ABSENT
        if weighted:
            for j in range(n):
                s[j] = s[j] if weights[j] > 0 else s.dtype.type(ABSENT)
        least = least_of(s, n, p)
        top = min(top, double(least))
        shifted_terms(s, s.dtype.type(top), n, p)
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
def nearest_tile(queries, fit, count, w, low, high):
    """The tile that is nearest to the first fit row: the sooner tops are low, the more tiles are skipped."""
    if queries.shape[1] == 1:  # whose tops do not change
        return 0
    for r in range(count):
        if fit[r]:
            nearest, least = 0, np.inf
            for tile in range(len(low)):
                score = least_score(queries[r], w, low[tile], high[tile])
                if score < least:
                    nearest, least = tile, score
            return nearest
    return 0


@njit(**EXACT)
def sum_rows(about, given, start, count, block, exponent, room, pull, row_sums):
    """Fill the sums of the fit rows of a block, the first of which is `start`.

    With gradients there is one channel, <g, v> - level.
    """
    queries, fit, w, (bounds, buffer, terms) = block.queries, block.fit, block.w, room
    (gradients, levels), (sums, tops, offset_sums), low, high = pull, row_sums, bounds.low, bounds.high
    n, n_features, n_channels = about[N], about[D], about[C]
    weighted = about[WEIGHT] != 0
    through_gradients = len(gradients) > 0
    channels = 1 if through_gradients else n_channels
    buffer_free = n_features == 1 and n_channels == 1 and not (weighted or through_gradients or offset_sums)
    skip = 180.0 if queries.itemsize == 4 else 500.0
    size = min(n, TILE)
    keys, values, p = buffer.keys, buffer.values, terms.p
    projected = np.empty(size if through_gradients else 0, queries.dtype)
    sums[:] = 0.0
    tops[:] = 0.0 if n_features == 1 else np.inf
    tiles = (n + TILE - 1) // TILE
    nearest = nearest_tile(queries, fit, count, w, low, high)
    for turn in range(tiles):
        tile = (nearest + turn) % tiles
        first = tile * TILE
        size = min(TILE, n - first)
        packed = False
        for r in range(count):
            if not fit[r] or least_score(queries[r], w, low[tile], high[tile]) - tops[r] > skip:
                continue
            if not packed:
                pack(about, given, first, size, bounds.centre, exponent, buffer)
                packed = True
            q, row = queries[r], sums[r]
            mine = start + r - first if about[SELF] else -1
            if buffer_free and not 0 <= mine < size:
                total, product = unshifted_total_and_product(q[0], keys[0], w[0], values[0], size)
                row[0] += double(total)
                row[1] += double(product)
                continue
            top = terms_of_tile(q, w, buffer, size, mine, tops[r], terms)
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
                if offset_sums:
                    for f in range(n_features):
                        reference = min(max(q[f], low[tile, f]), high[tile, f])
                        by_u, by_uv, by_z, by_zv = tile_offset_sums(p, column, keys[f], q[f], reference, size)
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
    bounds, found, surveyed = bounds_for(example, about), no_survey(), -1
    n_features, n_channels = about[D], about[C]
    offset_sums = about[TANGENT_W] != 0 or about[TANGENT_Q] != 0
    count = min(QUERY_BLOCK, about[M])
    block = block_for(example, about, count)
    room = room_for(example, about, bounds)
    fit, w = block.fit, block.w
    sums, tops = np.empty((count, 1 + n_channels + (4 if offset_sums else 0))), np.empty(count)
    row_sums = RowSums(sums, tops, offset_sums)
    out, lse = pointer(about[OUT], example), pointer(about[LSE], example)
    state = pointer(about[STATE], double)
    tangent_w, tangent_q = pointer(about[TANGENT_W], example), pointer(about[TANGENT_Q], example)
    no_pull = Pull(np.empty((0, 0), example.dtype), np.empty(0, example.dtype))
    for unit in range(first, last):
        b, start, stop = block_of(unit, about[M], int64(QUERY_BLOCK))
        count, given = stop - start, inputs_of(example, about, b)
        if b != surveyed:
            found, surveyed = survey(example, about, given, bounds), b
        if found.ordinary:
            load_block(example, about, given, start, stop, block)
            sum_rows(about, given, start, count, block, found.exponent, room, no_pull, row_sums)
        for r in range(count):
            i = start + r
            row = b * about[M] + i
            if not (
                found.ordinary and fit[r] and row_trusted(sums[r], tops[r], n_features, example.itemsize == 4)
            ):
                far.forward_rows(example, about, b, i, i + 1)
                continue
            total = sums[r, 0]
            shift = tops[r] * HALF_LOG2E - found.exponent
            state[2 * row], state[2 * row + 1] = shift, total
            lse[row] = LN2 * (np.log2(total) - shift)
            for c in range(n_channels):
                out[row * n_channels + c] = double(bounds.centre[c]) + sums[r, 1 + c] / total
            if offset_sums:
                bandwidth, mean = double(w[0]), sums[r, 1] / total
                if about[TANGENT_W] != 0:
                    tangent_w[row] = -bandwidth * ((sums[r, 5] - mean * sums[r, 4]) / total)
                if about[TANGENT_Q] != 0:
                    tangent_q[row] = -bandwidth * (bandwidth * ((sums[r, 3] - mean * sums[r, 2]) / total))


@entry
def backward_rows(example, about, first, last):
    """Gradients of queries, each unit's sum for w, and what keys.py needs of each row."""
    bounds, found, surveyed = bounds_for(example, about), no_survey(), -1
    n_features, n_channels = about[D], about[C]
    is_float = example.itemsize == 4
    count = min(QUERY_BLOCK, about[M])
    offset_sums = about[GRAD_QUERY] != 0 or about[GRAD_W] != 0
    block = block_for(example, about, count)
    room = room_for(example, about, bounds)
    queries, fit, w = block.queries, block.fit, block.w
    gradients, levels = np.empty((count, n_channels), example.dtype), np.empty(count, example.dtype)
    pull = Pull(gradients, levels)
    grad_out = pointer(about[GRAD_OUT], example)
    state = pointer(about[STATE], double)
    grad_query, out = pointer(about[GRAD_QUERY], example), pointer(about[OUT], example)
    sums, tops = (
        np.empty((count if offset_sums else 0, 2 + 4 * n_features)),
        np.empty(count if offset_sums else 0),
    )
    row_sums = RowSums(sums, tops, offset_sums)
    rows, means = pointer(about[ROWS], double), pointer(about[MEANS], double)
    kinds = pointer(about[KINDS], np.int8)
    unit_sums, grad_w = pointer(about[GRAD_W], double), np.empty(n_features)
    for unit in range(first, last):
        b, start, stop = block_of(unit, about[M], int64(QUERY_BLOCK))
        count, given = stop - start, inputs_of(example, about, b)
        if b != surveyed:
            found, surveyed = survey(example, about, given, bounds), b
        grad_w[:] = 0.0
        load_block(example, about, given, start, stop, block)
        for r in range(count):
            row = b * about[M] + start + r
            top, total = effective_state(state[2 * row], state[2 * row + 1], found.exponent, n_features)
            near = found.ordinary and fit[r] and scores_trusted(top, total, n_features, is_float)
            level, most, silent = 0.0, 0.0, True
            for c in range(n_channels):
                g = double(grad_out[row * n_channels + c])
                gradients[r, c] = g
                level += g * (double(out[row * n_channels + c]) - double(bounds.centre[c]))
                most = max(most, abs(g))
                silent &= g == 0.0
            levels[r] = level  # any constant would do; this one leaves sums of few digits to lose
            near &= in_range(most, 1.0, 1.0, is_float)
            size = most * found.spread
            if about[GRAD_LSE] != 0:
                size += abs(lse_gradient(example, about, row))
                silent &= lse_gradient(example, about, row) == 0.0
            most_reach = found.reach
            for f in range(n_features):
                most_reach = max(most_reach, abs(double(queries[r, f])))
            near &= in_range(size, found.unit, most_reach, is_float)
            # Without a key, or if nothing depends on it, a row adds nothing, even if it is NaN.
            empty = silent or state[2 * row + 1] == 0.0
            kinds[row] = EMPTY if empty else (NEAR if near else FAR)
            fit[r] = near and not empty
        if offset_sums and found.ordinary:
            sum_rows(about, given, start, count, block, found.exponent, room, pull, row_sums)
        for r in range(count):
            i = start + r
            row = b * about[M] + i
            if offset_sums and fit[r] and not row_trusted(sums[r], tops[r], n_features, is_float):
                kinds[row] = FAR
            if kinds[row] == EMPTY:
                if about[GRAD_QUERY] != 0:
                    for f in range(n_features):
                        grad_query[row * n_features + f] = 0
            elif kinds[row] == FAR:
                far.query_side(example, about, b, i, i + 1, rows, means, grad_w)
            elif offset_sums:
                total = sums[r, 0]
                mean = sums[r, 1] / total
                through_lse = lse_gradient(example, about, row)
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
    state, sums = pointer(about[STATE], double), pointer(about[GRAD_W], double)
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
