"""Near rows of the linear method: those whose box holds enough of them to take the translated series.

Tasks are groups of pieces of query boxes. A row is finished here if the error bound of its box is small against its
total; otherwise it stays marked as a far row (far_rows.py).
"""

from typing import NamedTuple

import numpy as np
from numba import njit

from ..base import EXACT, HALF_LOG2E, LN2, entry, int64
from ..exp2 import ROUND, exp2_double
from .boxes import PAD, evaluate, padded, to_marks

HELD_ROWS = 512  # rows of some boxes that get their results together
LEAST_NORMAL = 2.3e-308  # a normal number


class Sources(NamedTuple):
    """Sorted keys, their charges (columns, N), and what tells how they count."""

    key: np.ndarray
    charge: np.ndarray
    w: float
    exponent: float  # weights have been scaled by 2^-exponent
    log_span: float  # keys count whose score is at most so much below the largest


class Rows(NamedTuple):
    """What a row reads and writes beside its sums; arrays of length 0 are absent. Sorted row r is row order[r]."""

    order: np.ndarray  # (M)
    own: np.ndarray  # (M) the key that sorted row r leaves out, or -1
    centre: np.ndarray  # (3, C): what was subtracted from the values, their minima and maxima
    out: np.ndarray  # (M * C)
    lse: np.ndarray  # (M)
    state: np.ndarray  # (M * 2)
    tangent_w: np.ndarray  # (M)
    tangent_q: np.ndarray  # (M)
    grad_out: np.ndarray  # (M, C)
    grad_lse: np.ndarray  # (M)
    grad_query: np.ndarray  # (M)
    grad_w: np.ndarray  # (M) the share of each row


@njit(**EXACT)
def put(values, place, n, whole, to, step, at):
    """Write a block of results to places of (M, step), column `at`."""
    if whole and step == 1:
        part = to[place[0] : place[0] + n]
        for i in range(n):
            part[i] = values[i]
    else:
        for i in range(n):
            if place[i] >= 0:
                to[place[i] * step + at] = values[i]


@njit(**EXACT)
def log2_of(x, n, result):
    """log2 of positive normal numbers, by vector code: x = 2^e m, log2 m = 2 atanh((m - 1) / (m + 1)) / ln 2."""
    for i in range(n):
        bits = np.float64(x[i]).view(np.int64)
        exponent = (bits - 0x3FE6A09E667F3BCD) >> 52
        m = np.int64(bits - (exponent << 52)).view(np.float64)
        whole = np.int64(exponent + 0x4338000000000000).view(np.float64) - ROUND
        z = (m - 1.0) / (m + 1.0)
        y = z * z
        p = 1 / 23
        p = p * y + 1 / 21
        p = p * y + 1 / 19
        p = p * y + 1 / 17
        p = p * y + 1 / 15
        p = p * y + 1 / 13
        p = p * y + 1 / 11
        p = p * y + 1 / 9
        p = p * y + 1 / 7
        p = p * y + 1 / 5
        p = p * y + 1 / 3
        result[i] = whole + (z * y * p + z) * 2.88539008177792681472


@njit(**EXACT)
def finish_rows(rows, place, n, whole, w, exponent, distance, logarithm, sums):
    """Write the results of a block of rows, those whose place is not -1; whole: their places are consecutive.

    logarithm: scratch. Lse and state are written where there are arrays for them.

    sums (3, columns, BLOCK): of charges times exp(-(w^2 / 2) z) with z = d^2 - distance^2, and the same times
    (d - distance) and z; d = x - key. Column 0 is the denominator. Charges have been scaled by 2^-exponent. All
    of these are overwritten.
    """
    channels, order, centre = rows.centre.shape[1], rows.order, rows.centre
    if len(order) > 0:
        whole = False
        for i in range(n):
            if place[i] >= 0:
                place[i] = order[place[i]]
    if len(rows.out) == 0:
        finish_gradients(rows, place, n, w, distance, sums)
        return
    total = sums[0, 0]
    for c in range(channels):
        mean = sums[0, 1 + c]
        for i in range(n):
            mean[i] /= total[i]
        if len(rows.tangent_w) > 0:
            tangent = sums[2, 1]
            for i in range(n):
                tangent[i] = -w * ((tangent[i] - mean[i] * sums[2, 0, i]) / total[i])
            put(tangent, place, n, whole, rows.tangent_w, 1, 0)
        if len(rows.tangent_q) > 0:
            tangent = sums[1, 1]
            for i in range(n):
                tangent[i] = -w * (w * ((tangent[i] - mean[i] * sums[1, 0, i]) / total[i]))
            put(tangent, place, n, whole, rows.tangent_q, 1, 0)
        middle, least, most = centre[0, c], centre[1, c], centre[2, c]
        for i in range(n):
            mean[i] = min(max(middle + mean[i], least), most)
        put(mean, place, n, whole, rows.out, channels, c)
    if len(rows.lse) == 0:
        return
    log2_of(total, n, logarithm)
    for i in range(n):
        distance[i] = HALF_LOG2E * (w * distance[i]) * (w * distance[i]) - exponent
    for i in range(n):
        logarithm[i] = LN2 * (logarithm[i] - distance[i])
    put(logarithm, place, n, whole, rows.lse, 1, 0)
    if len(rows.state) > 0:
        put(distance, place, n, whole, rows.state, 2, 0)
        put(total, place, n, whole, rows.state, 2, 1)


@njit(**EXACT)
def finish_gradients(rows, place, n, w, distance, sums):
    """The gradients of a block of rows, and their shares of that of w."""
    channels, grad_out, grad_lse = rows.centre.shape[1], rows.grad_out, rows.grad_lse
    grad_query, grad_w = rows.grad_query, rows.grad_w
    for i in range(n):
        row = place[i]
        if row < 0:
            continue
        total = sums[0, 0, i]
        by_d, by_z = 0.0, 0.0
        for c in range(channels):
            mean, g = sums[0, 1 + c, i] / total, grad_out[row, c] / total
            by_d += g * (sums[1, 1 + c, i] - mean * sums[1, 0, i])
            by_z += g * (sums[2, 1 + c, i] - mean * sums[2, 0, i])
        if len(grad_lse) > 0:
            g = grad_lse[row]
            by_d += g * (sums[1, 0, i] / total + distance[i])
            by_z += g * (sums[2, 0, i] / total + distance[i] * distance[i])
        if len(grad_query) > 0:
            grad_query[row] = -w * (w * by_d)
        if len(grad_w) > 0:
            grad_w[row] = -w * by_z


@njit(**EXACT)
def subtract_own(x, start, n, own, key, charge, w, orders, sums, held):
    """Take the keys that n rows leave out off their sums, from place `held` on, which are relative to distance 0."""
    for i in range(n):
        j = own[start + i]
        if j < 0:
            continue
        d = np.float64(x[start + i]) - key[j]
        term = exp2_double(-HALF_LOG2E * (w * d) * (w * d))
        for c in range(len(charge)):
            part = term * charge[c, j]
            sums[0, c, held + i] -= part
            if orders > 0:
                sums[1, c, held + i] -= part * d
            if orders > 1:
                sums[2, c, held + i] -= part * (d * d)


@njit(**EXACT)
def from_marks(n, scale, marks, orders, values, sums, held):
    """The sums of n rows with factors d and d^2, from those with the keys' marks t and t^2: d = (s - t) / scale.

    Derivatives of one series would give them too, but lose digits where the bandwidth is wide.
    """
    columns, by_d, by_z = sums.shape[1], 1.0 / scale, 1.0 / (scale * scale)
    for c in range(columns):
        totals, offsets, scores = sums[0, c, held:], sums[1, c, held:], sums[2, c, held:]
        for i in range(n):
            s, value, first = marks[i], values[c, i], values[columns + c, i]
            totals[i] = value
            offsets[i] = (s * value - first) * by_d
        if orders > 1:
            for i in range(n):
                s, value, first = marks[i], values[c, i], values[columns + c, i]
                scores[i] = (s * (s * value - 2 * first) + values[2 * columns + c, i]) * by_z


@njit(**EXACT)
def finish_held(rows, place, least, n, far, w, exponent, distance, logarithm, sums):
    """Write the results of rows whose totals are as large as they must be, and mark them as not far."""
    if n == 0:
        return
    first, total = place[0], sums[0, 0]
    whole, left = place[n - 1] - first == n - 1, 0
    for i in range(n):
        left += not total[i] >= least[i]
    if whole and left == 0:
        far[first : first + n] = False
    else:
        whole = False
        for i in range(n):
            if total[i] >= least[i]:
                far[place[i]] = False
            else:
                place[i] = -1
    distance[:n] = 0.0
    finish_rows(rows, place, n, whole, w, exponent, distance, logarithm, sums)


@entry
def near_rows(rows, x, sources, pieces, field, orders, far, first, last):
    """Finish the rows of groups of pieces as far as the series serve them, and mark these as not far.

    pieces.box: the place of each piece among the series. Sources are read where rows leave their own keys out.
    """
    box, start, stop, centre, group = pieces
    (scale, series, least_total), (key, charge, w, exponent, _) = field, sources
    count, columns, size = series.shape[1], series.shape[1] // (orders + 1), HELD_ROWS + PAD
    sums, values = np.zeros((3, columns, size)), np.empty((count, size))
    marks, logarithm, least = np.empty(size), np.empty(size), np.empty(size)
    place, distance = np.empty(size, np.int64), np.empty(size)
    for unit in range(first, last):
        held = int64(0)
        for piece in range(unit * group, min((unit + 1) * group, len(box))):
            own_series, own_least = series[box[piece]], max(least_total[box[piece]], LEAST_NORMAL)
            for at in range(start[piece], stop[piece], HELD_ROWS):
                n = min(HELD_ROWS, stop[piece] - at)
                if held + n > HELD_ROWS:
                    finish_held(rows, place, least, held, far, w, exponent, distance, logarithm, sums)
                    held = int64(0)
                most = min(padded(n), len(x) - at)
                to_marks(x[at : at + most], centre[piece], scale, marks)
                for c in range(count):
                    evaluate(own_series[c], marks, most, values[c] if orders > 0 else sums[0, c, held:])
                if orders > 0:
                    from_marks(most, scale, marks, orders, values, sums, held)
                if len(rows.own) > 0:
                    subtract_own(x, at, n, rows.own, key, charge, w, orders, sums, held)
                place_here, least_here = place[held:], least[held:]
                for i in range(most):
                    place_here[i] = at + i
                    least_here[i] = own_least
                held += n
        finish_held(rows, place, least, held, far, w, exponent, distance, logarithm, sums)
