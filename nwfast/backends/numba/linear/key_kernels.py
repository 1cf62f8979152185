"""The key side of the linear method: sums over rows of charges times exp(-(w d)^2 / 2), and their derivatives.

The transpose of the query side. Near rows are the sources of series here; far rows (`which`) give their terms to the
keys of their windows, or to the nodes of crowded boxes and from there to the keys. Tasks own keys, so nothing is added
by two threads.
"""

import numpy as np
from numba import njit

from ..base import EXACT, HALF_LOG2E, LN2, entry
from ..exp2 import exp2_double
from ..scores import mirrored
from .boxes import BLOCK, evaluate, lower_bound, to_marks
from .far_rows import (
    CHUNK,
    DIRECT,
    box_after,
    first_at_least,
    level_of,
    nearest_key,
    window_start,
    window_stop,
)

LARGEST = 350.0 / LN2  # of exponents above the row's total: a key left out may be nearer than all others


@entry
def near_keys(
    key,
    owner,
    x,
    charge,
    box,
    start,
    stop,
    centre,
    scale,
    group,
    series,
    w,
    values,
    slopes,
    first,
    last,
):
    """Fill values and slopes (columns, keys) from the series of the rows' boxes.

    box: of each piece, its place among the series (box, column, term), those of order 1 after the others.
    Slopes are sums of w^2 (q - k) times the terms: derivatives of the series lose digits at the ends of boxes.
    """
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
def total_relative_to(key, weight, star, own, q, w):
    """The sum of weights times exp(-w^2 (d^2 - d*^2) / 2) over all keys but `own`."""
    total = 0.0
    number, rest = mirrored(q, key[star])
    for j in range(len(key)):
        if j != own:
            z = (key[star] - key[j]) * ((number - key[j]) + rest)
            total += weight[j] * exp2_double(min(-HALF_LOG2E * w * w * z, LARGEST))
    return total


@entry
def find_windows(
    which,
    x,
    own,
    weighted,
    weight,
    key,
    w,
    exponent,
    log_span,
    shift,
    total,
    windows,
    nearest,
    factor,
    levels,
    first,
    last,
):
    """Find the window of each far row among all keys, k*, and the scale of its charges.

    weighted, weight: keys that have a weight, in order; key: all, also those of weight 0.
    factor: brings totals relative to the saved shift to totals relative to k*. Of a shift so large that a
    difference from it has no digits, the total is summed anew, unless both are those of this key.
    """
    for chunk in range(first, last):
        place, place_all, low, high = 0, 0, 0, 0
        for index in range(chunk * CHUNK, min((chunk + 1) * CHUNK, len(which))):
            r = which[index]
            q = x[r]
            place = first_at_least(weighted, place, q)
            star = nearest_key(weighted, place, q, own[r] if len(own) > 0 else -1)
            windows[index, 0], windows[index, 1] = 0, 0
            levels[index] = -1
            if star < 0:
                factor[index] = 0.0
                nearest[index] = 0.0
                continue
            nearest[index] = weighted[star]
            distance = q - weighted[star]
            here = HALF_LOG2E * (w * distance) * (w * distance) - exponent
            apart, unit = here - shift[index], 2.0**-52 * abs(here)
            if abs(apart) <= 8 * unit:
                factor[index] = 1.0
            elif unit < 1e-13:
                factor[index] = exp2_double(min(apart, 1000.0))
            else:
                skip = own[r] if len(own) > 0 else -1
                factor[index] = total_relative_to(weighted, weight, star, skip, q, w) / total[index]
            margin = -2 * np.log(weight[star])
            limit = (2 * log_span + margin) / (w * w)
            place_all = first_at_least(key, place_all, q)
            low = window_start(key, place_all, low, weighted[star], q, limit)
            high = window_stop(key, place_all, high, weighted[star], q, limit)
            windows[index, 0], windows[index, 1] = low, high
            if high - low > DIRECT:
                levels[index] = level_of(distance, w, margin)


@njit(**EXACT)
def give(key, start, stop, own, q, nearest, square, charge, index, values, slopes, shift, term, pull):
    """Add one row's terms to the keys start .. stop; values and slopes start at key `shift`."""
    if stop <= start:
        return
    number, rest = mirrored(q, nearest)
    for j in range(start, stop):
        z = (nearest - key[j]) * ((number - key[j]) + rest)
        term[j - start] = exp2_double(min(-HALF_LOG2E * square * z, LARGEST))
        pull[j - start] = square * (q - key[j])
    if start <= own < stop:
        term[own - start] = 0.0
    for c in range(len(charge)):
        b = charge[c, index]
        if b == 0.0:
            continue
        to, slope = values[c], slopes[c]
        for j in range(start, stop):
            part = term[j - start] * b
            to[j - shift] += part
            slope[j - shift] += part * pull[j - start]


@entry
def far_keys(
    key, x, own, which, nearest, windows, lowest, highest, levels, box_start, box_stop, by_level, charge, w,
    size, values, slopes, first, last
):  # fmt: skip
    """Add the far rows' terms to chunks of keys, but those of crowded boxes.

    charge (columns, far rows). lowest, highest: windows made monotone, to find the rows of a chunk.
    """
    n, square = len(key), w * w
    with_boxes = len(by_level) > 0
    term, pull = np.empty(size), np.empty(size)
    for chunk in range(first, last):
        begin, end = chunk * size, min((chunk + 1) * size, n)
        row = lower_bound(highest, begin + 1)
        stop_row = lower_bound(lowest, end)
        for index in range(row, stop_row):
            at, high = max(windows[index, 0], begin), min(windows[index, 1], end)
            if at >= high:
                continue
            r = which[index]
            q, skip = x[r], own[r] if len(own) > 0 else -1
            if levels[index] >= 0 and with_boxes:
                box, last_box = by_level[levels[index]], by_level[levels[index] + 1]
                box = box_after(box_stop, box, last_box, at)
                while box < last_box and box_start[box] < high:
                    give(
                        key, at, box_start[box], skip, q, nearest[index], square, charge, index, values, slopes,
                        0, term, pull
                    )  # fmt: skip
                    at = box_stop[box]
                    box += 1
            give(
                key,
                at,
                high,
                skip,
                q,
                nearest[index],
                square,
                charge,
                index,
                values,
                slopes,
                0,
                term,
                pull,
            )


@entry
def crowd_keys(
    key, owner, x, rows, nearest, windows, lowest, highest, charge, index_of, box_start, box_stop, box_centre,
    box_half, node, node_charge, w, values, slopes, first, last
):  # fmt: skip
    """Add the terms of far rows of one level to the keys of its crowded boxes.

    rows, nearest, windows, lowest, highest, charge: of the rows of this level, in order.
    index_of (sorted rows): the place of a row among these, or -1: an own row is taken off again. Two charges at
    nodes for each column: of the rows, and times their distances from the box's centre, for the slopes.
    """
    columns, terms = len(charge), len(node)
    factor = -HALF_LOG2E * w * w
    at_nodes, series = np.empty((2 * columns, terms)), np.empty((2 * columns, terms))
    term = np.empty(terms)
    for box in range(first, last):
        begin, end = box_start[box], box_stop[box]
        for c in range(2 * columns):
            for k in range(terms):
                at_nodes[c, k] = 0.0
        half, middle = box_half[box], box_centre[box]
        for index in range(lower_bound(highest, begin + 1), lower_bound(lowest, end)):
            if windows[index, 1] <= begin or windows[index, 0] >= end:
                continue
            q = x[rows[index]]
            number, rest = mirrored(q, nearest[index])
            a, b = nearest[index] - middle, (number - middle) + rest
            for k in range(terms):
                y = half * node[k]
                term[k] = exp2_double(min((a - y) * (b - y) * factor, LARGEST))
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
                number, rest = mirrored(x[owner[j]], nearest[index])
                z = (nearest[index] - key[j]) * ((number - key[j]) + rest)
                own = exp2_double(min(z * factor, LARGEST))
                for c in range(columns):
                    values[c, j] -= own * charge[c, index]
                    slopes[c, j] -= own * charge[c, index] * (w * d) * w
