"""Boxes of the linear method: where sorted points are cut, moments of boxes, translation, power series.

All arithmetic is in float64, in vector loops over a block of points or over a group of boxes. `mark` in the names of
coordinates means the local one, (x - centre) * 2 / width, which lies in [-1, 1].
"""

from typing import NamedTuple

import numpy as np
from numba import njit

from ..base import EXACT, SUMS, entry

BLOCK = 256  # points at once, so that what is held of them stays in the first cache
PAD = 16  # vector loops have no rest where their lengths are multiples of this
HELD_POINTS = 1024  # points whose charges are loaded at once
PIECE = 4096  # points of one box that one task takes at most
GROUP = 32  # boxes that are translated at once: a constant, so that loops over them have no rests
NEGLIGIBLE = 0.1  # share of the accepted error for boxes that are left out
UNIT = 8192  # points of one task, about


class Charges(NamedTuple):
    """Columns of charges (1 + C, N): the weights, and the weights times the centred values; or any that are ready."""

    value: np.ndarray  # (N, C)
    weight: np.ndarray  # (N), or of length 0 where all are 1
    middle: np.ndarray  # (C): what is subtracted from the values
    scale: float  # of the weights
    ready: np.ndarray  # (columns, N), or of length 0


class Boxes(NamedTuple):
    """Occupied boxes: their numbers, and where their points start (one more)."""

    number: np.ndarray
    start: np.ndarray


class Errors(NamedTuple):
    """What the plan says of boxes by how far they are apart, of all beyond its reach, and what error to accept."""

    error: np.ndarray  # relative to the mass of a box
    least_kernel: np.ndarray
    largest_kernel: np.ndarray
    tail: float
    accept: float


class Choice(NamedTuple):
    """Which boxes of rows get a series, which boxes of keys they need, and the reach and the error of each."""

    chosen: np.ndarray  # (boxes of rows)
    needed: np.ndarray  # (boxes of keys)
    reaches: np.ndarray  # (boxes of rows): how many boxes away sources count
    bound: np.ndarray  # (boxes of rows): of the error of a total


class Series(NamedTuple):
    """Power series of some boxes, and the totals from which on they serve a row."""

    scale: float  # of marks: 2 / width
    series: np.ndarray  # (boxes, columns, terms)
    least: np.ndarray  # (boxes), or of length 0


class Pieces(NamedTuple):
    """Parts of boxes that one task takes."""

    box: np.ndarray
    start: np.ndarray
    stop: np.ndarray
    centre: np.ndarray
    group: int  # pieces of a task


@njit(**EXACT)
def box_of(x, inverse):
    """The number of the box [b width, (b + 1) width) that holds x."""
    return np.int64(np.floor(x * inverse))


@njit(**EXACT)
def end_of_box(x, start, stop, b, inverse):
    """The first index after start whose point lies in a later box than b."""
    low, step = start, 1
    while low + step < stop and box_of(x[low + step], inverse) <= b:
        low += step
        step *= 2
    high = min(stop, low + step)
    while high - low > 1:
        middle = (low + high) // 2
        if box_of(x[middle], inverse) <= b:
            low = middle
        else:
            high = middle
    return high


@njit(**EXACT)
def lower_bound(numbers, bound):
    """The first place of an ascending array that is at or above the bound."""
    low, high = 0, len(numbers)
    while low < high:
        middle = (low + high) // 2
        if numbers[middle] < bound:
            low = middle + 1
        else:
            high = middle
    return low


@entry
def cut_points(x, inverse, number, start):
    """Cut sorted points: the numbers of the occupied boxes and where their points start; return how many they are.

    Stops, with -1, when there are more than the arrays hold.
    """
    count, place, n = 0, 0, len(x)
    while place < n:
        if count == len(number):
            return -1
        b = box_of(x[place], inverse)
        number[count] = b
        start[count] = place
        count += 1
        place = end_of_box(x, place, n, b, inverse)
    start[count] = n
    return count


@entry
def choose_boxes(queries, keys, mass, terms, columns, errors, choice):
    """Mark boxes of rows that are worth a series and boxes of keys that they need; bound the errors of their totals.

    What lies beyond the reach of a box of rows is negligible beside the least total that a row of it can have, and part
    of the bound.

    By a count of nanoseconds: a pair costs about one, a far row some more beside, a
    translation an eighth for each entry of its matrix.
    """
    rows, row_start, number, start = queries.number, queries.start, keys.number, keys.start
    error, least_kernel, largest_kernel, tail, accept = errors
    chosen, needed, reaches, bound = choice
    reach = len(error) // 2
    low = 0
    for box in range(len(rows)):
        here = rows[box]
        while low < len(number) and number[low] < here - reach:
            low += 1
        high, bound[box], least = low, tail, 0.0
        while high < len(number) and number[high] <= here + reach:
            apart = here - number[high] + reach
            bound[box] += error[apart] * mass[high]
            least += least_kernel[apart] * mass[high]
            high += 1
        count, pairs = row_start[box + 1] - row_start[box], start[high] - start[low]
        direct = count * (80.0 + pairs * (0.8 + 0.2 * columns))
        series = 300.0 + 10.0 * reach + (high - low) * columns * terms * (0.12 * terms + 1.0)
        series += count * (10.0 + 0.25 * terms * columns)
        chosen[box] = direct > series
        if not chosen[box]:
            continue
        first, last, left_out, apart = low, high - 1, 0.0, reach
        while apart > 0:
            below = first <= last and number[first] == here - apart
            above = first <= last and number[last] == here + apart
            more = (mass[first] if below else 0.0) + (mass[last] if above else 0.0)
            more *= largest_kernel[reach + apart]
            if left_out + more > NEGLIGIBLE * accept * least:
                break
            left_out += more
            first += below
            last -= above
            apart -= 1
        reaches[box] = apart
        bound[box] += left_out
        for place in range(first, last + 1):
            needed[place] = True


@njit(**SUMS)
def moments_of_two(double, p, q, u, v, n, to_u, to_v, k):
    """Add 4 moments of two columns of charges; p and q move on from the polynomials T_k, T_k+1 to T_k+4, T_k+5."""
    u0, u1, u2, u3, v0, v1, v2, v3 = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    for i in range(n):
        a, b, t = p[i], q[i], double[i]
        c = t * b - a
        d = t * c - b
        f, g = u[i], v[i]
        u0 += a * f
        v0 += a * g
        u1 += b * f
        v1 += b * g
        u2 += c * f
        v2 += c * g
        u3 += d * f
        v3 += d * g
        e = t * d - c
        p[i] = e
        q[i] = t * e - d
    to_u[k] += u0
    to_u[k + 1] += u1
    to_u[k + 2] += u2
    to_u[k + 3] += u3
    to_v[k] += v0
    to_v[k + 1] += v1
    to_v[k + 2] += v2
    to_v[k + 3] += v3


@njit(**SUMS)
def moments_of_one(double, p, q, u, n, to_u, k):
    """As moments_of_two, for one column."""
    u0, u1, u2, u3 = 0.0, 0.0, 0.0, 0.0
    for i in range(n):
        a, b, t = p[i], q[i], double[i]
        c = t * b - a
        d = t * c - b
        f = u[i]
        u0 += a * f
        u1 += b * f
        u2 += c * f
        u3 += d * f
        e = t * d - c
        p[i] = e
        q[i] = t * e - d
    to_u[k] += u0
    to_u[k + 1] += u1
    to_u[k + 2] += u2
    to_u[k + 3] += u3


@njit(**EXACT)
def padded(n):
    """The next multiple of PAD."""
    return (n + PAD - 1) // PAD * PAD


@njit(**EXACT)
def to_marks(x, centre, scale, marks):
    """Local coordinates of points."""
    for i in range(len(x)):
        marks[i] = (x[i] - centre) * scale


@njit(**EXACT, inline="always")
def load_charges(charges, at, n, loaded):
    """Charges (columns, points) of n points from `at` on."""
    value, weight = charges.value, charges.weight
    if len(charges.ready) > 0:
        for c in range(len(loaded)):
            for i in range(n):
                loaded[c, i] = charges.ready[c, at + i]
        return
    if len(weight) > 0:
        for i in range(n):
            loaded[0, i] = weight[at + i] * charges.scale
    else:
        loaded[0, :n] = 1.0
    if value.shape[1] == 1:  # which is contiguous
        column, middle = value.ravel()[at:], charges.middle[0]
        for i in range(n):
            loaded[1, i] = (column[i] - middle) * loaded[0, i]
        return
    for c in range(value.shape[1]):
        middle = charges.middle[c]
        for i in range(n):
            loaded[1 + c, i] = (value[at + i, c] - middle) * loaded[0, i]


@njit(**EXACT)
def first_polynomials(x, centre, scale, n, doubled, p, q):
    """Twice the marks of n points, T_0 and T_1; zeros in the padding, which then adds nothing to any moment."""
    for i in range(min(len(x), padded(n))):
        t = (x[i] - centre) * scale
        doubled[i] = t + t
        p[i] = 1.0
        q[i] = t
    for i in range(n, padded(n)):
        doubled[i] = p[i] = q[i] = 0.0


@entry
def piece_moments(x, charges, pieces, scale, result, first, last):
    """Chebyshev moments, sum_j charge_j T_n(mark_j), of pieces, by tasks of a group of them."""
    start, stop, centre, group = pieces.start, pieces.stop, pieces.centre, pieces.group
    columns, terms = result.shape[1], result.shape[2]
    doubled, p, q = np.empty(BLOCK), np.empty(BLOCK), np.empty(BLOCK)
    charge = np.zeros((columns, HELD_POINTS + PAD))
    for unit in range(first, last):
        begin, end = unit * group, min((unit + 1) * group, len(start))
        held, held_stop = 0, 0  # points whose charges are loaded
        for piece in range(begin, end):
            result[piece] = 0.0
            for at in range(start[piece], stop[piece], BLOCK):
                n = min(BLOCK, stop[piece] - at)
                if held_stop < at + n:
                    held, held_stop = at, min(at + HELD_POINTS, stop[end - 1])
                    load_charges(charges, held, held_stop - held, charge)
                size = padded(n)
                for column in range(0, columns, 2):
                    first_polynomials(x[at:], centre[piece], scale, n, doubled, p, q)
                    u = charge[column, at - held :]
                    to_u = result[piece, column]
                    for k in range(0, terms, 4):
                        if column + 1 < columns:
                            v = charge[column + 1, at - held :]
                            moments_of_two(doubled, p, q, u, v, size, to_u, result[piece, column + 1], k)
                        else:
                            moments_of_one(doubled, p, q, u, size, to_u, k)


@njit(**EXACT, inline="always")
def collect(moments, c, number, first, base, orders, given, present):
    """Moments of column c of the boxes from number base on, (order, term, lane), zeros where there is no box.

    For orders 1 and 2 also those with the charges times the marks and their squares, by t T_n = (T_n+1 + T_|n-1|) / 2.
    """
    terms = given.shape[1]
    given[:] = 0.0
    present[:] = False
    place = first
    while place < len(number) and number[place] < base + len(present):
        i = number[place] - base
        present[i] = True
        for n in range(terms):
            m0 = moments[place, c, n]
            given[0, n, i] = m0
            if orders > 0:
                given[1, n, i] = 0.5 * (moments[place, c, n + 1] + moments[place, c, abs(n - 1)])
            if orders > 1:
                given[2, n, i] = 0.25 * (moments[place, c, n + 2] + 2 * m0 + moments[place, c, abs(n - 2)])
        place += 1


@njit(**EXACT, inline="always")
def fold(given, order, o, reach, even, odd):
    """What the even and the odd powers of target boxes take from the sources o boxes lower and higher.

    The matrix K of the lower box serves both: that of the higher one is (-1)^(n + m) K[n, m]. Marks of the sources
    become those in the target box, t - 2 o and t + 2 o.
    """
    low, high, shift = reach - o, reach + o, 2.0 * o
    for n in range(given.shape[1]):
        sign = 0.0 if o == 0 else 1.0 - 2.0 * (n & 1)
        below, above = given[0, n, low:], given[0, n, high:]
        if order == 0:
            for i in range(GROUP):
                a, b = below[i], sign * above[i]
                even[n, i] = a + b
                odd[n, i] = a - b
            continue
        below_1, above_1 = given[1, n, low:], given[1, n, high:]
        if order == 1:
            for i in range(GROUP):
                a = below_1[i] - shift * below[i]
                b = sign * (above_1[i] + shift * above[i])
                even[n, i] = a + b
                odd[n, i] = a - b
            continue
        below_2, above_2 = given[2, n, low:], given[2, n, high:]
        for i in range(GROUP):
            a = below_2[i] - shift * (2 * below_1[i] - shift * below[i])
            b = sign * (above_2[i] + shift * (2 * above_1[i] + shift * above[i]))
            even[n, i] = a + b
            odd[n, i] = a - b


@njit(**EXACT)
def multiply(matrix, parity, folded, local):
    """Add the moments of a group of boxes, times their matrix entries, to the even or the odd powers."""
    for m in range(parity, len(matrix), 4):
        for n in range(0, len(matrix), 4):
            a0, a1, a2, a3 = matrix[n, m], matrix[n + 1, m], matrix[n + 2, m], matrix[n + 3, m]
            m2 = m + 2
            b0, b1, b2, b3 = matrix[n, m2], matrix[n + 1, m2], matrix[n + 2, m2], matrix[n + 3, m2]
            for i in range(GROUP):
                p, q, r, s = folded[n, i], folded[n + 1, i], folded[n + 2, i], folded[n + 3, i]
                local[m, i] += (a0 * p + a1 * q) + (a2 * r + a3 * s)
                local[m2, i] += (b0 * p + b1 * q) + (b2 * r + b3 * s)


@njit(**EXACT, inline="always")
def translate(boxes, reaches, number, moments, matrices, orders, series):
    """Power series (target, column, term) of ascending boxes, from the moments of the source boxes around them.

    matrices (2 reach + 1, T, T): from the n-th moment of a box that lies o boxes lower to the m-th power. Columns are
    those of moments, then the same for each order. Sources beyond the reaches of all targets nearby are left out.
    """
    columns, terms = moments.shape[1], series.shape[2]
    middle, begin = len(matrices) // 2, 0
    given = np.empty((orders + 1, terms, GROUP + 2 * middle))
    present = np.empty(GROUP + 2 * middle, np.bool_)
    even, odd, local = np.empty((terms, GROUP)), np.empty((terms, GROUP)), np.empty((terms, GROUP))
    while begin < len(boxes):
        end, reach = begin, 0
        while end < len(boxes) and boxes[end] - boxes[begin] < GROUP:
            reach = max(reach, reaches[end])
            end += 1
        first = lower_bound(number, boxes[begin] - middle)
        for c in range(columns):
            collect(moments, c, number, first, boxes[begin] - middle, orders, given, present)
            for order in range(orders + 1):
                local[:] = 0.0
                for o in range(reach, -1, -1):
                    low, high = middle - o, middle + o
                    if present[low : low + GROUP].any() or present[high : high + GROUP].any():
                        fold(given, order, o, middle, even, odd)
                        multiply(matrices[middle + o], 0, even, local)
                        multiply(matrices[middle + o], 1, odd, local)
                for target in range(begin, end):
                    for m in range(terms):
                        series[target, order * columns + c, m] = local[m, boxes[target] - boxes[begin]]
        begin = end


@entry
def box_series(boxes, reaches, number, moments, matrices, orders, series, first, last):
    """Power series of target boxes, see `translate`; tasks take GROUP boxes each."""
    begin, end = first * GROUP, min(last * GROUP, len(boxes))
    for at in range(begin, end, GROUP):
        stop = min(at + GROUP, end)
        translate(boxes[at:stop], reaches[at:stop], number, moments, matrices, orders, series[at:stop])


@njit(**EXACT)
def evaluate(series, s, n, values):
    """Power series at the marks s of a block."""
    top = len(series) - 4
    d, c, b, a = series[top + 3], series[top + 2], series[top + 1], series[top]
    for i in range(n):
        x = s[i]
        values[i] = ((d * x + c) * x + b) * x + a
    if top % 8 == 4:
        top -= 4
        d, c, b, a = series[top + 3], series[top + 2], series[top + 1], series[top]
        for i in range(n):
            x = s[i]
            values[i] = (((values[i] * x + d) * x + c) * x + b) * x + a
    for m in range(top - 8, -1, -8):
        h, g, f, e = series[m + 7], series[m + 6], series[m + 5], series[m + 4]
        d, c, b, a = series[m + 3], series[m + 2], series[m + 1], series[m]
        for i in range(n):
            x = s[i]
            upper = (((values[i] * x + h) * x + g) * x + f) * x + e
            values[i] = (((upper * x + d) * x + c) * x + b) * x + a
