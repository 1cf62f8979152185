"""The key side of the linear method: sums over rows of charges times exp(-(w d)^2 / 2), and their derivatives.

The transpose of the query side. Near rows are the sources of series here; far rows (`which`) give their terms to the
keys of their windows, or to the nodes of crowded boxes and from there to the keys. Tasks own keys, so nothing is added
by two threads.
"""

from typing import NamedTuple

import numpy as np
from numba import njit

from ..base import EXACT, HALF_LOG2E, LN2, entry, int64
from ..exp2 import MOST_EXPONENT, exp2_double
from .boxes import BLOCK, evaluate, lower_bound, to_marks
from .far_rows import CHUNK, DIRECT, box_after
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

MOST_ABOVE_TOTAL = (
    350.0 / LN2
)  # of exponents above the row's total: a key left out may be nearer than all others


class Senders(NamedTuple):
    """Far rows, which give their terms to the keys of their windows.

    lowest, highest: bounds of windows made monotone, to find the rows of some keys.
    """

    which: np.ndarray  # their places among the sorted rows
    nearest: np.ndarray
    place: np.ndarray  # (rows, 2): windows
    level: np.ndarray
    lowest: np.ndarray
    highest: np.ndarray
    charge: np.ndarray  # (columns, rows), relative to the nearest key


class Owned(NamedTuple):
    """Sorted keys, and the row that leaves each out, or -1; of length 0 where no row does."""

    key: np.ndarray
    owner: np.ndarray


class KeySums(NamedTuple):
    """Sums over rows for each key and column of charges: of the terms, and of w^2 (q - k) times the terms."""

    values: np.ndarray  # (columns, N)
    slopes: np.ndarray  # (columns, N)


class Nearest(NamedTuple):
    """Of far rows: k*, and the factor of their charges."""

    key: np.ndarray
    factor: np.ndarray


@entry
def near_keys(keys, x, charge, pieces, field, w, sums, first, last):
    """Fill the sums of keys from the series of the rows' boxes.

    pieces.box: the place of each piece among the series (box, column, term), those of order 1 after the others.
    Slopes are sums of their own: derivatives of the series lose digits at the ends of boxes.
    """
    box, start, stop, centre, group = pieces
    (key, owner), (scale, series, _), (values, slopes) = keys, field, sums
    columns, marks, moved = series.shape[1] // 2, np.empty(BLOCK), np.empty(BLOCK)
    by_mark = w * w / scale
    for unit in range(first, last):
        for piece in range(unit * group, min((unit + 1) * group, len(box))):
            for at in range(start[piece], stop[piece], BLOCK):
                n = min(BLOCK, stop[piece] - at)
                to_marks(key[at : at + n], centre[piece], scale, marks)
                for c in range(columns):
                    by_value, by_slope = values[c, at : at + n], slopes[c, at : at + n]
                    evaluate(series[box[piece], c], marks, n, by_value)
                    evaluate(series[box[piece], columns + c], marks, n, moved)
                    for i in range(n):
                        by_slope[i] = by_mark * (moved[i] - marks[i] * by_value[i])
                if len(owner) > 0:
                    for j in range(at, at + n):
                        r = owner[j]
                        if r >= 0:
                            d = np.float64(x[r]) - key[j]
                            term = exp2_double(-HALF_LOG2E * (w * d) * (w * d))
                            for c in range(columns):
                                values[c, j] -= term * charge[c, r]
                                slopes[c, j] -= term * charge[c, r] * (w * d) * w


@njit(**EXACT)
def total_relative_to(key, weight, w, row):
    """The sum of weights times exp(-w^2 z / 2) over all keys but the row's own."""
    total = 0.0
    for j in range(len(key)):
        if j != row.own:
            total += weight[j] * exp2_double(
                min(-HALF_LOG2E * w * w * score_of(row, key[j]), MOST_ABOVE_TOTAL)
            )
    return total


@njit(**EXACT)
def factor_to(key, weight, w, exponent, row, shift, total):
    """What brings a total relative to the saved shift to one relative to k*.

    Of a shift so large that a difference from it has no digits, the total is summed anew, unless both are those of
    this key.
    """
    distance = row.x - row.nearest
    here = HALF_LOG2E * (w * distance) * (w * distance) - exponent
    apart, unit = here - shift, 2.0**-52 * abs(here)
    if abs(apart) <= 8 * unit:
        return 1.0
    if unit < 1e-13:
        return exp2_double(min(apart, MOST_EXPONENT))
    return total_relative_to(key, weight, w, row) / total


@entry
def find_windows(which, x, own, sources, key, state, windows, found, first, last):
    """Find the window of each far row among all keys, k*, and the factor of its charges.

    sources: keys that have a weight, in order; key: all, also those of weight 0. state (2, rows): shifts and totals.
    """
    (nearest, factor), shift, total = found, state[0], state[1]
    weighted, weight, w, exponent = sources.key, sources.charge[0], sources.w, sources.exponent
    places, levels, log_span = windows.place, windows.level, sources.log_span
    for chunk in range(first, last):
        place, place_all, low, high = int64(0), int64(0), int64(0), int64(0)
        for index in range(chunk * CHUNK, min((chunk + 1) * CHUNK, len(which))):
            r = which[index]
            skip = own[r] if len(own) > 0 else -1
            place = first_at_least(weighted, place, x[r])
            star = nearest_key(weighted, place, x[r], skip)
            places[index, 0], places[index, 1] = 0, 0
            levels[index] = -1
            if star < 0:
                factor[index] = 0.0
                nearest[index] = 0.0
                continue
            row = row_at(x[r], skip, weighted[star])
            nearest[index] = row.nearest
            factor[index] = factor_to(weighted, weight, w, exponent, row, shift[index], total[index])
            margin = margin_of(weight[star])
            limit = limit_of(log_span, margin, w)
            place_all = first_at_least(key, place_all, row.x)
            low = window_start(key, place_all, low, row, limit)
            high = window_stop(key, place_all, high, row, limit)
            places[index, 0], places[index, 1] = low, high
            if high - low > DIRECT:
                levels[index] = level_of(row.x - row.nearest, w, margin)


@njit(**EXACT)
def give(key, part, row, square, charge, index, values, slopes, term, pull):
    """Add one row's terms to a part of the keys, (start, stop); term, pull: scratch."""
    start, stop = part
    if stop <= start:
        return
    for j in range(start, stop):
        term[j - start] = exp2_double(min(-HALF_LOG2E * square * score_of(row, key[j]), MOST_ABOVE_TOTAL))
        pull[j - start] = square * (row.x - key[j])
    if start <= row.own < stop:
        term[row.own - start] = 0.0
    for c in range(len(charge)):
        b = charge[c, index]
        if b == 0.0:
            continue
        to, slope = values[c], slopes[c]
        for j in range(start, stop):
            by = term[j - start] * b
            to[j] += by
            slope[j] += by * pull[j - start]


@entry
def far_keys(key, x, own, senders, crowds, w, size, sums, first, last):
    """Add the terms of far rows to chunks of `size` keys, but those of crowded boxes."""
    windows, levels, charge, (values, slopes) = senders.place, senders.level, senders.charge, sums
    which, nearest, lowest, highest = senders.which, senders.nearest, senders.lowest, senders.highest
    by_level, box_start, box_stop = crowds.by_level, crowds.start, crowds.stop
    square, with_crowds = w * w, len(by_level) > 0
    term, pull = np.empty(size), np.empty(size)
    for chunk in range(first, last):
        begin, end = chunk * size, min((chunk + 1) * size, len(key))
        for index in range(lower_bound(highest, begin + 1), lower_bound(lowest, end)):
            at, high = max(windows[index, 0], begin), min(windows[index, 1], end)
            if at >= high:
                continue
            r = which[index]
            row = row_at(x[r], own[r] if len(own) > 0 else -1, nearest[index])
            if levels[index] >= 0 and with_crowds:
                box, last_box = by_level[levels[index]], by_level[levels[index] + 1]
                box = box_after(box_stop, box, last_box, at)
                while box < last_box and box_start[box] < high:
                    give(key, (at, box_start[box]), row, square, charge, index, values, slopes, term, pull)
                    at = box_stop[box]
                    box += 1
            give(key, (at, high), row, square, charge, index, values, slopes, term, pull)


@entry
def crowd_keys(keys, x, senders, index_of, crowds, node_charge, w, sums, first, last):
    """Add the terms of far rows, all of one level, to the keys of its crowded boxes.

    index_of (sorted rows): the place of a row among these, or -1: an own row is taken off again. Two charges at
    nodes for each column: of the rows, and times their distances from the box's centre, for the slopes.
    """
    (key, owner), (values, slopes) = keys, sums
    windows, charge, node = senders.place, senders.charge, crowds.node
    which, nearest = senders.which, senders.nearest
    columns, terms = len(charge), len(node)
    factor = -HALF_LOG2E * w * w
    at_nodes, series = np.empty((2 * columns, terms)), np.empty((2 * columns, terms))
    term = np.empty(terms)
    for box in range(first, last):
        begin, end = crowds.start[box], crowds.stop[box]
        for c in range(2 * columns):
            for k in range(terms):
                at_nodes[c, k] = 0.0
        half, middle = crowds.half[box], crowds.centre[box]
        for index in range(lower_bound(senders.highest, begin + 1), lower_bound(senders.lowest, end)):
            if windows[index, 1] <= begin or windows[index, 0] >= end:
                continue
            q = x[which[index]]
            row = row_at(q, -1, nearest[index])
            a, b = row.nearest - middle, (row.number - middle) + row.rest
            for k in range(terms):
                y = half * node[k]
                term[k] = exp2_double(min((a - y) * (b - y) * factor, MOST_ABOVE_TOTAL))
            for c in range(columns):
                moved = charge[c, index] * (q - middle)
                for k in range(terms):
                    at_nodes[c, k] += term[k] * charge[c, index]
                    at_nodes[columns + c, k] += term[k] * moved
        for c in range(2 * columns):
            for n in range(terms):
                total = 0.0
                for k in range(terms):
                    total += at_nodes[c, k] * node_charge[k, n]
                series[c, n] = total
        for j in range(begin, end):
            offset = key[j] - middle
            t = offset / half
            for c in range(columns):
                value, moved, p, q = 0.0, 0.0, 1.0, t
                for n in range(terms):  # T_n by recurrence
                    value += series[c, n] * p
                    moved += series[columns + c, n] * p
                    p, q = q, 2 * t * q - p
                values[c, j] += value
                slopes[c, j] += (moved - offset * value) * w * w
            if len(owner) > 0 and owner[j] >= 0 and index_of[owner[j]] >= 0:
                index = index_of[owner[j]]
                if windows[index, 1] <= begin or windows[index, 0] >= end:
                    continue
                d = x[owner[j]] - key[j]
                row = row_at(x[owner[j]], -1, nearest[index])
                own = exp2_double(min(score_of(row, key[j]) * factor, MOST_ABOVE_TOTAL))
                for c in range(columns):
                    values[c, j] -= own * charge[c, index]
                    slopes[c, j] -= own * charge[c, index] * (w * d) * w
