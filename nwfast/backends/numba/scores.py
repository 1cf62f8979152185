"""Scores and terms of one row in float64, for any input: no difference cancels and no product is 0 times infinity.

Scores are taken relative to a key k* near the query, feature by feature as

    d_j^2 - d*^2 = (k* - k_j) (2 q - k_j - k*)

which does not cancel: a query far from every key still tells its nearest keys apart, where q - k_j rounds to one number
for all of them; and so it tells those at its other side apart that are as far away as k*, since 2 q - k* is taken with
the rest that it rounds off. A row's terms are 2^(score - top) with `top` the largest score (the weight's power of 2
included), so the sum is at least 1/2, never 0/0.
"""

import math

import numpy as np
from numba import njit

from .base import EXACT, KEY_D, KEY_N, LN2, SUMS, WEIGHT, WEIGHT_N, N, double, int64
from .exp2 import exp2_double

MOST = 1.7976931348623157e308  # the largest finite number: what overflows is taken for this much
HUGE = 2.0**1000  # of scores beyond only the order counts
LEAST_DISTANCE = 4e307  # sums of four coordinates below stay finite


@njit(**EXACT)
def minus(x, y):
    """Return x - y, kept out of the reach of reassociation."""
    return x - y


@njit(**EXACT)
def limited(x):
    """The nearest finite number, so that 0 * inf cannot occur."""
    return min(max(x, -MOST), MOST)


@njit(**EXACT)
def mirrored(q, k):
    """2 q - k, and the rest of it that this number rounds off."""
    twice = q + q
    number = twice - k
    back = number - twice
    return number, (twice - (number - back)) - (k + back)


@njit(**EXACT)
def both_distances(q, k, k0):
    """(q - k) + (q - k0) to its own rounding, however small it is beside the two."""
    scale = 1.0 if max(abs(q), max(abs(k), abs(k0))) < LEAST_DISTANCE else 0.125
    number, rest = mirrored(scale * q, scale * k0)
    return ((number - scale * k) + rest) / scale


@njit(**EXACT)
def offset(q, k, w):
    """(q - k) w, limited, also where the difference alone is beyond all numbers."""
    difference = q - k
    if abs(difference) < np.inf:
        return limited(difference * w)
    return limited((0.5 * q - 0.5 * k) * w * 2.0)


@njit(**EXACT)
def part_of_score(q, k, k0, w):
    """-((q - k)^2 - (q - k0)^2) w^2 where that is a number."""
    return -(((k0 - k) * w) * (both_distances(q, k, k0) * w))


@njit(**EXACT)
def add_wide_part(score, exponent, q, k, k0, w):
    """Score 2^exponent plus part_of_score, whatever size that has, in the same form."""
    scale = 0.25 if max(abs(k), abs(k0)) >= HUGE else 1.0
    scale_of_both = 0.25 if max(abs(q), max(abs(k), abs(k0))) >= HUGE else 1.0
    near, by_near = math.frexp(k0 * scale - k * scale)
    both, by_both = math.frexp(both_distances(q * scale_of_both, k * scale_of_both, k0 * scale_of_both))
    unit, by_unit = math.frexp(w)
    part = -(near * both * (unit * unit))
    by = by_near + by_both + 2 * by_unit + (2 if scale < 1.0 else 0) + (2 if scale_of_both < 1.0 else 0)
    if part == 0.0:
        return score, exponent
    if score == 0.0 or by > exponent:
        return math.ldexp(score, exponent - by) + part, by
    return score + math.ldexp(part, by - exponent), exponent


@njit(**EXACT)
def in_order(score, exponent):
    """A finite number that goes up with score 2^exponent: itself up to HUGE, and from there not as fast."""
    part, by = math.frexp(score)
    by += exponent - 1000
    if by <= 0:
        return math.ldexp(part, by + 1000)
    return limited(math.copysign(HUGE * (by - 1 + 2.0 * abs(part)), part))


@njit(**EXACT)
def relative_score(q, key, place, key_d, reference, origin, reference_d, w):
    """Base-2 score of the key at `place` minus that of the one at `origin` of `reference`; beyond HUGE, in_order."""
    score = 0.0
    for f in range(len(q)):
        k, k0 = double(key[place + f * key_d]), double(reference[origin + f * reference_d])
        score += part_of_score(q[f], k, k0, w[f])
    if abs(score) < HUGE:
        return score
    score, exponent = 0.0, int64(0)
    for f in range(len(q)):
        k, k0 = double(key[place + f * key_d]), double(reference[origin + f * reference_d])
        score, exponent = add_wide_part(score, exponent, q[f], k, k0, w[f])
    return in_order(score, exponent)


@njit(**EXACT)
def fold(x, n, largest):
    """Maximum or minimum of x[:n] by halving, which vectorises; overwrites x."""
    while n > 1:
        half = (n + 1) // 2
        if largest:
            for j in range(n - half):
                x[j] = max(x[j], x[half + j])
        else:
            for j in range(n - half):
                x[j] = min(x[j], x[half + j])
        n = half
    return x[0]


@njit(**EXACT)
def copy(x, to):
    """to[:] = x, without the code that compares shapes, which takes a second to compile."""
    for j in range(len(x)):
        to[j] = x[j]


@njit(**EXACT)
def distances(q, k, x):
    """|q - k_j|."""
    for j in range(len(k)):
        x[j] = abs(q - k[j])


@njit(**EXACT)
def scores_of_one(q, k, origin, w, x):
    """As relative_score, for all keys of one feature."""
    k0 = k[origin]
    number, rest = mirrored(q, k0)
    for j in range(len(k)):
        x[j] = -min(max(((k0 - k[j]) * w) * (((number - k[j]) + rest) * w), -HUGE), HUGE)


@njit(**EXACT)
def one_feature_terms(q, w, k, skip, terms, scratch):
    """row_terms for one feature and no weights, from the keys k as contiguous float64: vector code throughout."""
    n = len(k)
    distances(q, k, terms)
    if skip >= 0:
        terms[skip] = np.inf
    copy(terms, scratch)
    best = fold(scratch, n, np.bool_(False))
    origin = 0
    while terms[origin] != best:
        origin += 1
    top = 1.0
    while top > 0.0:  # distances that round to one number: again from the key that is nearest in truth
        scores_of_one(q, k, origin, w, terms)
        if skip >= 0:
            terms[skip] = -np.inf
        copy(terms, scratch)
        top = fold(scratch, n, np.bool_(True))
        if top > 0.0:
            before, origin = origin, 0
            while terms[origin] != top:
                origin += 1
            if origin == before:
                break
    for j in range(n):
        terms[j] = exp2_double(terms[j] - top)
    return origin, top, squared(q, k[origin], w) - top, blocked_sum(terms, n)


@njit(**EXACT)
def squared(q, k, w):
    """((q - k) w)^2, at most MOST."""
    t = offset(q, k, w)
    return min(t * t, MOST)


@njit(**SUMS)
def blocked_sum(x, n):
    """Sum of x[:n] in blocks."""
    total = 0.0
    for first in range(0, n, 1024):
        part = 0.0
        for j in range(first, min(first + 1024, n)):
            part += x[j]
        total += part
    return total


@njit(**EXACT)
def row_terms(about, given, q, w, skip, terms):
    """Fill terms of all keys but `skip` with a_j 2^(score_j - top); return (index of k*, top, shift, total).

    k* is the nearest key, told by comparisons that do not round two distances to one. total is 0 for a row without
    keys, or infinitely far from all, and NaN where there is a number that makes the row NaN; then k* is -1.
    """
    n, n_features, weighted = about[N], len(q), about[WEIGHT] != 0
    key, at, key_n, key_d = given.key, given.at_key, about[KEY_N], about[KEY_D]
    weight, weight_at, weight_n = given.weight, given.at_weight, about[WEIGHT_N]
    valid, infinite = True, False
    for f in range(n_features):
        valid &= abs(w[f]) < np.inf and q[f] == q[f]
        infinite |= abs(q[f]) == np.inf
    # Below it neither differences overflow, nor they in bandwidths.
    most = LEAST_DISTANCE / max(abs(w[0]), 1.0)
    if n_features == 1 and not weighted and valid and abs(q[0]) < most and n - (skip >= 0) > 0:
        keys, finite = np.empty(n), True
        for j in range(n):
            keys[j] = q[0] if j == skip else double(key[at + j * key_n])
            finite = finite and abs(keys[j]) < most
        if finite:
            return one_feature_terms(q[0], w[0], keys, skip, terms, np.empty(n))
    origin, kept = -1, 0
    for j in range(n):
        if j == skip:
            continue
        if weighted:
            a = double(weight[weight_at + j * weight_n])
            if a == 0.0:
                continue
            valid &= a > 0.0
        kept += 1
        place, reached = at + j * key_n, not infinite
        for f in range(n_features):
            k = double(key[place + f * key_d])
            reached &= abs(k) < np.inf
            # A feature without a bandwidth knows no infinite distance.
            valid &= k == k and (infinite or abs(k) < np.inf or w[f] != 0.0)
        if reached and (
            origin < 0 or relative_score(q, key, place, key_d, key, at + origin * key_n, key_d, w) > 0.0
        ):
            origin = j
    if kept == 0:
        return -1, 0.0, 0.0, 0.0 if valid else np.nan
    if not valid or origin < 0:
        return -1, 0.0, 0.0, 0.0 if valid else np.nan

    top = -np.inf
    origin_at = at + origin * key_n
    for j in range(n):
        score, kept_j = -np.inf, j != skip
        if weighted and kept_j:
            kept_j = double(weight[weight_at + j * weight_n]) > 0.0
        if kept_j:
            score = relative_score(q, key, at + j * key_n, key_d, key, origin_at, key_d, w)
            if weighted:
                score += double(math.frexp(double(weight[weight_at + j * weight_n]))[1])
        terms[j] = score
        top = max(top, score)
    total = 0.0
    for first in range(0, n, 256):
        part = 0.0
        for j in range(first, min(first + 256, n)):
            terms[j] = exp2_double(terms[j] - top)
            if weighted:
                terms[j] *= math.frexp(double(weight[weight_at + j * weight_n]))[0]
            part += terms[j]
        total += part
    square = 0.0
    for first in range(0, n_features, 16):  # few roundings are as large as the whole
        part = 0.0
        for f in range(first, min(first + 16, n_features)):
            part += squared(q[f], double(key[origin_at + f * key_d]), w[f])
        square += part
    return origin, top, min(square - top, MOST), total


@njit(**EXACT)
def lse_of(total, shift):
    """The log of the sum, ln 2 (log2(total) - shift); -inf where the shift is as large as it can be."""
    return LN2 * (np.log2(total) - shift) if shift < MOST else -np.inf
