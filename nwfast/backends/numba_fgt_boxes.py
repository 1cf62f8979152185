"""Boxes of the fast Gauss transform: where sorted points are cut, moments of boxes, translation, power series.

All arithmetic is in float64, in vector loops over a block of points or over a group of boxes. `mark` in the names of
coordinates means the local one, (x - centre) * 2 / width, which lies in [-1, 1].
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numba import njit

from .numba_math import EXACT, SUMS

BLOCK = 256  # points at once, so that what is held of them stays in the first cache
PIECE = 4096  # points of one box that one task takes at most
GROUP = 32  # boxes that are translated at once
UNIT = 8192  # points of one task, about


class Charges(NamedTuple):
    """Columns of charges (1 + C, N): the weights, and the weights times the centred values; or any that are ready."""

    value: np.ndarray  # (N, C)
    weight: np.ndarray  # (N), or of length 0 where all are 1
    middle: np.ndarray  # (C): what is subtracted from the values
    scale: float  # of the weights
    ready: np.ndarray  # (columns, N), or of length 0


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


def compile_cut(digest: str) -> Callable:
    """The entry point that cuts sorted points into boxes."""

    @njit(cache=True, **EXACT)
    def cut(x, inverse, number, start):
        """Fill the numbers of the occupied boxes and where their points start; return how many they are.

        Stops, with -1, when there are more than the arrays hold.
        """
        digest  # noqa: B018
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

    return cut


def compile_choose(digest: str) -> Callable:
    """The entry point that chooses the boxes of queries that are worth a series."""

    @njit(cache=True, **EXACT)
    def choose(rows, row_start, number, start, mass, terms, columns, error, tail, chosen, needed, bound):
        """Mark the chosen boxes of rows and the boxes of keys that they need; bound the errors of their totals.

        By a count of nanoseconds: a pair costs about one, a row that is summed with care some more beside, a
        translation an eighth for each entry of its matrix.
        """
        digest  # noqa: B018
        reach = len(error) // 2
        low = 0
        for box in range(len(rows)):
            while low < len(number) and number[low] < rows[box] - reach:
                low += 1
            high, bound[box] = low, tail
            while high < len(number) and number[high] <= rows[box] + reach:
                bound[box] += error[rows[box] - number[high] + reach] * mass[high]
                high += 1
            count, pairs = row_start[box + 1] - row_start[box], start[high] - start[low]
            direct = count * (80.0 + pairs * (0.8 + 0.2 * columns))
            series = 300.0 + 10.0 * reach + (high - low) * columns * terms * (0.12 * terms + 1.0)
            series += count * (10.0 + 0.25 * terms * columns)
            chosen[box] = direct > series
            if chosen[box]:
                for place in range(low, high):
                    needed[place] = True

    return choose


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
def to_marks(x, centre, scale, n, marks, doubled):
    """Local coordinates of a block, and twice them."""
    for i in range(n):
        t = (x[i] - centre) * scale
        marks[i] = t
        doubled[i] = t + t


@njit(**EXACT)
def load_charges(charges, at, n, loaded):
    """Charges (columns, BLOCK) of a block of points."""
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
    for c in range(value.shape[1]):
        middle = charges.middle[c]
        for i in range(n):
            loaded[1 + c, i] = (value[at + i, c] - middle) * loaded[0, i]


def compile_moments(digest: str) -> Callable:
    """The entry point for Chebyshev moments, sum_j charge_j T_n(mark_j), of pieces of boxes."""

    @njit(cache=True, **EXACT)
    def moments(x, charges, start, stop, centre, scale, result, first, last):
        digest  # noqa: B018
        columns, terms = result.shape[1], result.shape[2]
        marks, doubled, charge = np.empty(BLOCK), np.empty(BLOCK), np.empty((columns, BLOCK))
        p, q = np.empty(BLOCK), np.empty(BLOCK)
        for piece in range(first, last):
            for c in range(columns):
                for k in range(terms):
                    result[piece, c, k] = 0.0
            for at in range(start[piece], stop[piece], BLOCK):
                n = min(BLOCK, stop[piece] - at)
                to_marks(x[at : at + n], centre[piece], scale, n, marks, doubled)
                load_charges(charges, at, n, charge)
                for column in range(0, columns, 2):
                    for i in range(n):
                        p[i], q[i] = 1.0, marks[i]
                    two = column + 1 < columns
                    for k in range(0, terms, 4):
                        if two:
                            moments_of_two(
                                doubled,
                                p,
                                q,
                                charge[column],
                                charge[column + 1],
                                n,
                                result[piece, column],
                                result[piece, column + 1],
                                k,
                            )
                        else:
                            moments_of_one(doubled, p, q, charge[column], n, result[piece, column], k)

    return moments


@njit(**EXACT)
def add_four(matrix, n, m, moments, c, series, count):
    """Add the moments n .. n + 3 of column c of a group of boxes, times their matrix entries, to the power m."""
    a0, a1, a2, a3 = matrix[n, m], matrix[n + 1, m], matrix[n + 2, m], matrix[n + 3, m]
    for i in range(count):
        series[c, m, i] += (a0 * moments[c, n, i] + a1 * moments[c, n + 1, i]) + (
            a2 * moments[c, n + 2, i] + a3 * moments[c, n + 3, i]
        )


@njit(**EXACT)
def gather(moments, place, o, orders, gathered, i):
    """The moments of a source box o boxes lower, into place i of a group.

    For orders 1 and 2 also those with the charges times the sources' marks in the target box, t - 2 o, and times its
    square, by t T_n = (T_n+1 + T_|n-1|) / 2.
    """
    columns, terms = moments.shape[1], gathered.shape[1]
    shift = 2.0 * o
    for c in range(columns):
        for n in range(terms):
            m0 = moments[place, c, n]
            gathered[c, n, i] = m0
            if orders > 0:
                m1 = 0.5 * (moments[place, c, n + 1] + moments[place, c, abs(n - 1)])
                gathered[columns + c, n, i] = m1 - shift * m0
                if orders > 1:
                    m2 = 0.25 * (moments[place, c, n + 2] + 2 * m0 + moments[place, c, abs(n - 2)])
                    gathered[2 * columns + c, n, i] = m2 - 2 * shift * m1 + shift * shift * m0


@njit(**EXACT)
def translate(boxes, number, moments, matrices, orders, series):
    """Power series (column, term, box) of a group of target boxes, from the moments of the source boxes around them.

    matrices (2 reach + 1, T, T): from the n-th moment of a box that lies o boxes lower to the m-th power.
    """
    columns, terms = series.shape[0], series.shape[1]
    reach, count = len(matrices) // 2, len(boxes)
    gathered = np.empty((columns, terms, count))
    places = np.empty(count, np.int64)
    for i in range(count):
        places[i] = lower_bound(number, boxes[i] - reach)
    for o in range(reach, -reach - 1, -1):
        some = 0
        for i in range(count):
            place = places[i]
            if place < len(number) and number[place] == boxes[i] - o:
                gather(moments, place, o, orders, gathered, i)
                places[i] += 1
                some += 1
            else:
                for c in range(columns):
                    for n in range(terms):
                        gathered[c, n, i] = 0.0
        if some == 0:
            continue
        matrix = matrices[o + reach]
        for c in range(columns):
            for m in range(terms):
                for n in range(0, terms, 4):
                    add_four(matrix, n, m, gathered, c, series, count)


@njit(**EXACT)
def evaluate(series, s, n, values):
    """Power series at the marks s of a block."""
    top = len(series) - 4
    d, c, b, a = series[top + 3], series[top + 2], series[top + 1], series[top]
    for i in range(n):
        x = s[i]
        values[i] = ((d * x + c) * x + b) * x + a
    for m in range(top - 4, -1, -4):
        d, c, b, a = series[m + 3], series[m + 2], series[m + 1], series[m]
        for i in range(n):
            x = s[i]
            values[i] = (((values[i] * x + d) * x + c) * x + b) * x + a


@njit(**EXACT)
def evaluate_slopes(series, s, n, values, slopes):
    """Power series and their derivatives."""
    for i in range(n):
        values[i], slopes[i] = 0.0, 0.0
    for m in range(len(series) - 2, -1, -2):
        b, a = series[m + 1], series[m]
        for i in range(n):
            x, value = s[i], values[i]
            slope = slopes[i] * x + value
            value = value * x + b
            slopes[i] = slope * x + value
            values[i] = value * x + a
