"""Far rows of the linear method: summed key by key over their window, relative to their nearest key.

Scores and windows are those of windows.py. Where the window holds many keys, boxes of half width 2^-level bandwidths,
level = log2 of the distance / 2, that hold more than CROWD keys are replaced by charges at Chebyshev nodes: each row
keeps its relative accuracy, since a source box changes its scores by a few units at most.
"""

from typing import NamedTuple

import numpy as np
from numba import njit

from ..base import EXACT, HALF_LOG2E, SUMS, entry, int64
from ..exp2 import MOST_EXPONENT, exp2_double
from .boxes import BLOCK, box_of, end_of_box
from .near_rows import finish_rows
from .windows import (
    first_at_least,
    level_of,
    limit_of,
    margin_of,
    nearest_key,
    row_at,
    score_of,
    window_start,
    window_stop,
)

CHUNK = 1024  # rows of a task
DIRECT = 384  # keys that a row visits one by one in any case
CROWD = 48  # keys from which on a box is replaced by its nodes
STRIP = 128  # keys at once
LEAST_LEFT = 0.02  # share of a total that is left without the own key: with less the digits are gone


class Crowds(NamedTuple):
    """Boxes of many keys in the windows of far rows, sorted by level; by_level (levels + 1) or empty."""

    start: np.ndarray
    stop: np.ndarray
    centre: np.ndarray
    half: np.ndarray
    by_level: np.ndarray
    node: np.ndarray
    charge: np.ndarray  # (boxes, columns, nodes), or empty


class Strip(NamedTuple):
    """Of the keys, or nodes, that one row takes at once: exp(-w^2 z / 2), k* - k and z."""

    term: np.ndarray
    offset: np.ndarray
    score: np.ndarray


@njit(**EXACT)
def terms_of_keys(key, at, n, row, factor, term, offset, score):
    """Fill a strip from n keys from `at`; factor: -w^2 log2(e) / 2."""
    for j in range(n):
        k = key[at + j]
        z = score_of(row, k)
        offset[j] = row.nearest - k
        score[j] = z
        term[j] = exp2_double(min(z * factor, MOST_EXPONENT))


@njit(**EXACT)
def terms_of_nodes(nodes, half, centre, row, factor, term, offset, score):
    """The same for the nodes of a box, in which an own key may be much nearer than k*."""
    a, b = row.nearest - centre, (row.number - centre) + row.rest
    for j in range(len(nodes)):
        y = half * nodes[j]
        near = a - y
        z = near * (b - y)
        offset[j] = near
        score[j] = z
        term[j] = exp2_double(min(z * factor, MOST_EXPONENT))


@njit(**SUMS)
def add_sums(term, offset, score, charge, c, at, n, orders, sums, i):
    """Add the sums of one column over a strip of n charges from `at` to those of row i."""
    total, by_offset, by_score = 0.0, 0.0, 0.0
    if orders == 0:
        for j in range(n):
            total += term[j] * charge[c, at + j]
    else:
        for j in range(n):
            part = term[j] * charge[c, at + j]
            total += part
            by_offset += part * offset[j]
            by_score += part * score[j]
        sums[1, c, i] += by_offset
        sums[2, c, i] += by_score
    sums[0, c, i] += total


@njit(**EXACT)
def term_of(k, row, factor):
    """exp(-w^2 z / 2) of one key."""
    return exp2_double(min(score_of(row, k) * factor, MOST_EXPONENT))


@njit(**SUMS)
def sum_pair(key, charge, start, stop, row, factor, sums, i):
    """sum_keys for two columns and no distances: in groups of 8 keys, which is one vector loop without a rest."""
    total, product = 0.0, 0.0
    last = min(stop, len(key) - 7)
    at = start
    while at < last:
        by, by_value = 0.0, 0.0
        for j in range(8):
            term = term_of(key[at + j], row, factor)
            term = term if at + j < stop else 0.0
            term = term if at + j != row.own else 0.0
            by += term * charge[0, at + j]
            by_value += term * charge[1, at + j]
        total += by
        product += by_value
        at += 8
    for j in range(at, stop):
        term = term_of(key[j], row, factor)
        term = term if j != row.own else 0.0
        total += term * charge[0, j]
        product += term * charge[1, j]
    sums[0, 0, i] += total
    sums[0, 1, i] += product


@njit(**EXACT)
def sum_keys(key, charge, start, stop, row, factor, orders, strip, sums, i):
    """Add the keys start .. stop, but the row's own, to the sums of row i of a block."""
    own = row.own
    if orders == 0 and len(charge) == 2:
        sum_pair(key, charge, start, stop, row, factor, sums, i)
        return
    term, offset, score = strip
    for at in range(start, stop, STRIP):
        n = min(STRIP, stop - at)
        terms_of_keys(key, at, n, row, factor, term, offset, score)
        if at <= own < at + n:
            term[own - at] = 0.0
        for c in range(len(charge)):
            add_sums(term, offset, score, charge, c, at, n, orders, sums, i)


@njit(**EXACT)
def sum_crowded(key, charge, crowds, window, row, factor, orders, strip, sums, i):
    """Add the keys of a window, those in crowded boxes through the nodes; whether the own key was added with them.

    window: the first key, one past the last, the level of boxes.
    """
    box_start, box_stop, box_centre, box_half, by_level, node, box_charge = crowds
    low, high, level = window
    term, offset, score = strip
    box, end = by_level[level], by_level[level + 1]
    box = box_after(box_stop, box, end, low)
    at, with_own = low, False
    while box < end and box_start[box] < high:
        if box_start[box] > at:
            sum_keys(key, charge, at, box_start[box], row, factor, orders, strip, sums, i)
        with_own |= box_start[box] <= row.own < box_stop[box]
        terms_of_nodes(node, box_half[box], box_centre[box], row, factor, term, offset, score)
        for c in range(len(charge)):
            add_sums(term, offset, score, box_charge[box], c, 0, len(node), orders, sums, i)
        at = box_stop[box]
        box += 1
    if at < high:
        sum_keys(key, charge, at, high, row, factor, orders, strip, sums, i)
    return with_own


@njit(**EXACT)
def subtract_own(key, charge, row, factor, sums, i):
    """Take the own key off the sums of row i; whether enough is left."""
    before, k = sums[0, 0, i], key[row.own]
    near, z = row.nearest - k, score_of(row, k)
    part = exp2_double(min(z * factor, MOST_EXPONENT))
    for c in range(len(charge)):
        sums[0, c, i] -= part * charge[c, row.own]
        sums[1, c, i] -= part * charge[c, row.own] * near
        sums[2, c, i] -= part * charge[c, row.own] * z
    return sums[0, 0, i] > LEAST_LEFT * before


@njit(**EXACT)
def sum_window(key, charge, crowds, window, row, factor, orders, strip, sums, i):
    """Set the sums of row i of a block, which are 0, to those over its crowded window."""
    with_own = sum_crowded(key, charge, crowds, window, row, factor, orders, strip, sums, i)
    if with_own and not subtract_own(key, charge, row, factor, sums, i):
        clear(sums, i)
        low, high, _ = window
        sum_keys(key, charge, low, high, row, factor, orders, strip, sums, i)


@njit(**EXACT)
def clear(sums, i):
    """Set the sums of row i of a block to 0."""
    for order in range(sums.shape[0]):
        for c in range(sums.shape[1]):
            sums[order, c, i] = 0.0


@njit(**EXACT)
def box_after(stop, first, last, start):
    """The first of the boxes first .. last that ends after `start`."""
    while first < last:
        middle = (first + last) // 2
        if stop[middle] <= start:
            first = middle + 1
        else:
            last = middle
    return first


@njit(**EXACT)
def empty_row(rows, r):
    """Write the results of a row without keys; its gradients are 0 already."""
    row, channels = rows.order[r] if len(rows.order) > 0 else r, rows.centre.shape[1]
    if len(rows.lse) > 0:
        rows.lse[row] = -np.inf
    if len(rows.state) > 0:
        rows.state[2 * row] = rows.state[2 * row + 1] = 0.0
    if len(rows.out) > 0:
        rows.out[row * channels : (row + 1) * channels] = np.nan
    if len(rows.tangent_w) > 0:
        rows.tangent_w[row] = 0.0
    if len(rows.tangent_q) > 0:
        rows.tangent_q[row] = 0.0


@entry
def far_rows(rows, x, which, sources, orders, windows, crowds, first, last):
    """Finish chunks of the rows `which` and fill their windows, if they have keys.

    Rows of crowded windows get a level, others -1; without crowds these rows are left.
    """
    key, charge, w = sources.key, sources.charge, sources.w
    factor, log_span, with_crowds = -HALF_LOG2E * w * w, sources.log_span, len(crowds.by_level) > 0
    # Taken here: an array that is taken from a tuple is counted, which costs time for each row.
    own_of, excluding, places, levels = rows.own, len(rows.own) > 0, windows.place, windows.level
    strip = Strip(np.empty(STRIP), np.empty(STRIP), np.empty(STRIP))
    sums, logarithm = np.zeros((3, len(charge), BLOCK)), np.empty(BLOCK)
    place_of, distance, whole = np.empty(BLOCK, np.int64), np.zeros(BLOCK), np.bool_(False)
    for chunk in range(first, last):
        place, low, high = int64(0), int64(0), int64(0)
        for begin in range(chunk * CHUNK, min((chunk + 1) * CHUNK, len(which)), BLOCK):
            n = min(BLOCK, len(which) - begin)
            for i in range(n):
                index, r = begin + i, which[begin + i]
                own = own_of[r] if excluding else -1
                clear(sums, i)
                sums[0, 0, i] = 1.0  # of a row that is not finished here, which must not divide by 0
                levels[index] = place_of[i] = -1
                place = first_at_least(key, place, x[r])
                star = nearest_key(key, place, x[r], own)
                if star < 0:
                    empty_row(rows, r)
                    continue
                row, margin = row_at(x[r], own, key[star]), margin_of(charge[0, star])
                distance[i] = row.x - row.nearest
                limit = limit_of(log_span, margin, w)
                low = window_start(key, place, low, row, limit)
                high = window_stop(key, place, high, row, limit)
                low, high = min(low, star), max(high, star + 1)
                places[index, 0], places[index, 1] = low, high
                if high - low > DIRECT:
                    levels[index] = level_of(distance[i], w, margin)
                    if not with_crowds:
                        continue
                place_of[i] = r
                sums[0, 0, i] = 0.0
                if (
                    levels[index] < 0
                ):  # not in a function of both: most windows are small, and a call would show
                    sum_keys(key, charge, low, high, row, factor, orders, strip, sums, i)
                else:
                    window = low, high, levels[index]
                    sum_window(key, charge, crowds, window, row, factor, orders, strip, sums, i)
            finish_rows(rows, place_of, n, whole, w, sources.exponent, distance, logarithm, sums)


@entry
def find_crowds(key, windows, inverse, level, start, stop, number, count):
    """Append the crowded boxes of the windows of rows (of one level, in order); return how many there are then, or -1.

    inverse: of the width of this level's boxes. A box that a row needs and that is missing is visited key by key,
    so rows out of order cost time alone.
    """
    done, levels, places = 0, windows.level, windows.place  # keys below `done` are cut
    for index in range(len(levels)):
        if levels[index] != level:
            continue
        at, high = places[index, 0], places[index, 1]
        while at < high:
            b = box_of(key[at], inverse)
            if at < done:
                at = done
                continue
            while at > done and box_of(key[at - 1], inverse) == b:  # a box that reaches below the window
                at -= 1
            end = end_of_box(key, at, len(key), b, inverse)
            if end - at >= CROWD:
                if count == len(start):
                    return -1
                start[count], stop[count], number[count] = at, end, b
                count += 1
            at = done = end
    return count
