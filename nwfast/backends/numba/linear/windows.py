"""The windows of far rows: which of the sorted keys count for a row, by a search from where the row before had its own.

Scores are relative to k*, the nearest key but the row's own, where that is left out:

    z_j = d_j^2 - d*^2 = (k* - k_j) ((2 x - k*) - k_j),

which does not cancel however far x is; 2 x - k* comes as a number and the rest that it rounds off. Keys with w^2 z_j /
2 beyond log(N / eps) - log(a*) do not count.
"""

from typing import NamedTuple

import numpy as np
from numba import njit

from ..base import EXACT
from ..scores import mirrored

MOST_LEVELS = 64


class Row(NamedTuple):
    """A far row: where it is, the key that it leaves out (or -1), k*, and 2 x - k* in two parts."""

    x: float
    own: int
    nearest: float
    number: float
    rest: float


class Windows(NamedTuple):
    """Of some rows: the first key that counts and one past the last, (rows, 2), and the level of boxes, or -1."""

    place: np.ndarray
    level: np.ndarray


def windows_for(count: int) -> Windows:
    """Room for the windows of so many rows."""
    return Windows(np.empty((count, 2), np.int64), np.empty(count, np.int64))


@njit(**EXACT)
def row_at(x, own, nearest):
    """The row at x with this nearest key."""
    number, rest = mirrored(x, nearest)
    return Row(x, own, nearest, number, rest)


@njit(**EXACT)
def score_of(row, k):
    """Z of one key."""
    return (row.nearest - k) * ((row.number - k) + row.rest)


@njit(**EXACT)
def nearest_key(key, place, x, own):
    """The nearest key but `own`, or -1; place: the first key at or above x."""
    left, right = place - 1, place
    left -= left == own
    right += right == own
    if left < 0:
        return right if right < len(key) else -1
    if right >= len(key):
        return left
    number, rest = mirrored(x, key[left])
    return left if (number - key[right]) + rest <= 0.0 else right


@njit(**EXACT)
def first_at_least(key, place, x):
    """The first index with key >= x, found from a guess."""
    n = len(key)
    low, high, step = place, place, 1
    while low > 0 and key[low - 1] >= x:
        high = low - 1
        low = max(0, low - step)
        step *= 2
    # all before low are below x, or low is a first guess that may be too low
    step = 1
    if high < low:
        high = low
    while high < n and key[high] < x:
        low = high + 1
        high = min(n, high + step)
        step *= 2
    while low < high:
        middle = (low + high) // 2
        if key[middle] < x:
            low = middle + 1
        else:
            high = middle
    return low


@njit(**EXACT)
def counts(k, row, limit):
    """Whether the key's score exceeds that of k* by no more than the limit."""
    return not score_of(row, k) > limit


@njit(**EXACT)
def window_start(key, place, guess, row, limit):
    """The first key that counts, where those from `place` on lie above x."""
    inside, outside, step = place, -1, 1  # key[inside] counts, or inside == place
    at = min(guess, place - 1)
    while at >= 0:
        if counts(key[at], row, limit):
            inside = at
            if at == 0:
                break
            at = max(0, at - step)
        else:
            outside = at
            break
        step *= 2
    step = 1
    while inside - outside > 1 and step < inside - outside:  # from a guess below the window
        at = outside + step
        if counts(key[at], row, limit):
            inside = at
            break
        outside = at
        step *= 2
    while inside - outside > 1:
        middle = (inside + outside) // 2
        if counts(key[middle], row, limit):
            inside = middle
        else:
            outside = middle
    return inside


@njit(**EXACT)
def window_stop(key, place, guess, row, limit):
    """One past the last key that counts, where those before `place` lie below x."""
    n = len(key)
    inside, outside, step = place - 1, n, 1
    at = max(guess - 1, place)
    while at < n:
        if counts(key[at], row, limit):
            inside = at
            if at == n - 1:
                break
            at = min(n - 1, at + step)
        else:
            outside = at
            break
        step *= 2
    step = 1
    while outside - inside > 1 and step < outside - inside:
        at = outside - step
        if counts(key[at], row, limit):
            inside = at
            break
        outside = at
        step *= 2
    while outside - inside > 1:
        middle = (inside + outside) // 2
        if counts(key[middle], row, limit):
            inside = middle
        else:
            outside = middle
    return inside + 1


@njit(**EXACT)
def margin_of(weight):
    """2 log of the largest weight, which is at most 1, over that of k*."""
    return 0.0 if weight == 1.0 else -2 * np.log(weight)


@njit(**EXACT)
def limit_of(log_span, margin, w):
    """The largest z that counts."""
    return (2 * log_span + margin) / (w * w)


@njit(**EXACT)
def level_of(distance, w, margin):
    """The level of boxes for rows at this distance from k*."""
    delta = np.sqrt((w * distance) * (w * distance) + margin)
    if not delta > 2:
        return 0
    return min(np.int64(np.ceil(np.log2(delta / 2))), MOST_LEVELS - 1)
