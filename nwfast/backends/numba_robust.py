"""Row by row in float64, for any input: the path for the rows that the fast kernels decline, and for their gradients.

Scores are taken relative to a key k* near the query, feature by feature as

    d_j^2 - d*^2 = (k* - k_j) (2 q - k_j - k*)

which does not cancel: a query far from every key still tells its nearest keys apart, where q - k_j rounds to one
number for all of them. A row's terms are 2^(score - top) with `top` the largest score (the weight's power of 2
included), so the sum is at least 1/2, never 0/0. Parallel over blocks of rows (forward, query side) and blocks of keys
(key side).
"""

import math

import numpy as np
from numba import njit

from .numba_math import (
    EXACT,
    GRAD_KEY,
    GRAD_LSE,
    GRAD_OUT,
    GRAD_QUERY,
    GRAD_W,
    GRAD_WEIGHT,
    KEY,
    KEY_D,
    KEY_N,
    LN2,
    LSE,
    OUT,
    QUERY,
    QUERY_D,
    QUERY_M,
    ROOT,
    SELF,
    STATE,
    SUMS,
    TANGENT_Q,
    TANGENT_W,
    VALUE,
    VALUE_C,
    VALUE_N,
    W_D,
    WEIGHT,
    WEIGHT_N,
    C,
    D,
    M,
    N,
    W,
    exp2_double,
    offset,
    pointer,
)  # fmt: skip

CLAMP = 1000.0  # of exponents in base 2
MOST = 1.7976931348623157e308  # the largest finite number: what overflows is taken for this much
HUGE = 1e300  # scores beyond are as good as infinite
SMALL = 2.0**-520  # of its square all products of two finite numbers are finite
LEAST_DISTANCE = 4e307  # sums of four coordinates below stay finite


@njit(**EXACT)
def limited(x):
    """The nearest finite number, so that 0 * inf cannot occur."""
    return min(max(x, -MOST), MOST)


@njit(**EXACT)
def parts_of_score(q, k, k0, w):
    """-((q - k)^2 - (q - k0)^2) w^2 as two terms of a sum, the second times SMALL^2 where it is huge."""
    near, far = limited((k0 - k) * w), limited(((q - k) + (q - k0)) * w)
    product = near * far
    if abs(product) < HUGE:
        return -product, 0.0
    return 0.0, -(near * SMALL) * (far * SMALL)


@njit(**EXACT)
def sum_of_score(score, huge):
    """The sum of both terms over the features, at most HUGE."""
    if huge != 0.0:
        score += (huge / SMALL) / SMALL
    return min(max(score, -HUGE), HUGE)


@njit(**EXACT)
def relative_score(q, key, place, key_d, origin, w):
    """Base-2 score of the key at `place` minus that of the key at `origin`."""
    score, huge = 0.0, 0.0
    for f in range(len(q)):
        k, k0 = float(key[place + f * key_d]), float(key[origin + f * key_d])
        more, much_more = parts_of_score(q[f], k, k0, w[f])
        score += more
        huge += much_more
    return sum_of_score(score, huge)


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
def distances(q, k, x):
    """|q - k_j|."""
    for j in range(len(k)):
        x[j] = abs(q - k[j])


@njit(**EXACT)
def scores_of_one(q, k, origin, w, x):
    """As relative_score, for all keys of one feature."""
    k0 = k[origin]
    d0 = q - k0
    for j in range(len(k)):
        x[j] = -min(max(limited((k0 - k[j]) * w) * limited(((q - k[j]) + d0) * w), -HUGE), HUGE)


@njit(**EXACT)
def one_feature_terms(q, w, k, skip, terms, scratch):
    """row_terms for one feature and no weights, from the keys k as contiguous float64: vector code throughout."""
    n = len(k)
    distances(q, k, terms)
    if skip >= 0:
        terms[skip] = np.inf
    scratch[:] = terms
    best = fold(scratch, n, False)
    origin = 0
    while terms[origin] != best:
        origin += 1
    top = 1.0
    while top > 0.0:  # distances that round to one number: again from the key that is nearest in truth
        scores_of_one(q, k, origin, w, terms)
        if skip >= 0:
            terms[skip] = -np.inf
        scratch[:] = terms
        top = fold(scratch, n, True)
        if top > 0.0:
            before, origin = origin, 0
            while terms[origin] != top:
                origin += 1
            if origin == before:
                break
    for j in range(n):
        terms[j] = exp2_double(terms[j] - top)
    return origin, top, squared(q - k[origin], w) - top, blocked_sum(terms, n)


@njit(**EXACT)
def squared(distance, w):
    """(distance w)^2, at most MOST."""
    t = limited(distance * w)
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
def row_terms(q, w, key, at, key_n, key_d, n, weight, weight_at, weight_n, weighted, skip, terms):
    """Fill terms with a_j 2^(score_j - top); return (index of k*, top, shift, total).

    k* is the nearest key, told by comparisons that do not round two distances to one. total is 0 for a row without
    keys, or infinitely far from all, and NaN where there is a number that makes the row NaN; then k* is -1.
    """
    n_features = len(q)
    valid, infinite = True, False
    for f in range(n_features):
        valid &= abs(w[f]) < np.inf and q[f] == q[f]
        infinite |= abs(q[f]) == np.inf
    if n_features == 1 and not weighted and valid and abs(q[0]) < LEAST_DISTANCE and n - (skip >= 0) > 0:
        keys, finite = np.empty(n), True
        for j in range(n):
            keys[j] = q[0] if j == skip else float(key[at + j * key_n])
            finite = finite and abs(keys[j]) < LEAST_DISTANCE
        if finite:
            return one_feature_terms(q[0], w[0], keys, skip, terms, np.empty(n))
    origin, kept = -1, 0
    for j in range(n):
        if j == skip:
            continue
        if weighted:
            a = float(weight[weight_at + j * weight_n])
            if a == 0.0:
                continue
            valid &= a > 0.0
        kept += 1
        place, reached = at + j * key_n, not infinite
        for f in range(n_features):
            k = float(key[place + f * key_d])
            reached &= abs(k) < np.inf
            # A feature without a bandwidth knows no infinite distance.
            valid &= k == k and (infinite or abs(k) < np.inf or w[f] != 0.0)
        if reached and (origin < 0 or relative_score(q, key, place, key_d, at + origin * key_n, w) > 0.0):
            origin = j
    if kept == 0:
        return -1, 0.0, 0.0, 0.0
    if not valid or origin < 0:
        return -1, 0.0, 0.0, 0.0 if valid else np.nan

    top = -np.inf
    origin_at = at + origin * key_n
    for j in range(n):
        score, kept_j = -np.inf, j != skip
        if weighted and kept_j:
            kept_j = float(weight[weight_at + j * weight_n]) > 0.0
        if kept_j:
            score = relative_score(q, key, at + j * key_n, key_d, origin_at, w)
            if weighted:
                score += float(math.frexp(float(weight[weight_at + j * weight_n]))[1])
        terms[j] = score
        top = max(top, score)
    total = 0.0
    for first in range(0, n, 256):
        part = 0.0
        for j in range(first, min(first + 256, n)):
            terms[j] = exp2_double(terms[j] - top)
            if weighted:
                terms[j] *= math.frexp(float(weight[weight_at + j * weight_n]))[0]
            part += terms[j]
        total += part
    shift = -top
    for f in range(n_features):
        shift += squared(q[f] - float(key[origin_at + f * key_d]), w[f])
    return origin, top, min(shift, MOST), total


@njit(**EXACT)
def lse_of(total, shift):
    """The log of the sum, ln 2 (log2(total) - shift); -inf where the shift is as large as it can be."""
    return LN2 * (np.log2(total) - shift) if shift < MOST else -np.inf


@njit(**EXACT)
def centre_of(value, at, step, n):
    """The finite value nearest to 0 if all have one sign, else 0: to subtract it never costs a digit."""
    low, high = np.inf, -np.inf
    for j in range(n):
        v = float(value[at + j * step])
        if abs(v) < np.inf:
            low, high = min(low, v), max(high, v)
    if low > high:
        return 0.0
    return low if low > 0.0 else (high if high < 0.0 else 0.0)


@njit(**EXACT)
def minus(x, y):
    """Return x - y, kept out of the reach of reassociation."""
    return x - y


@njit(**SUMS)
def row_mean(terms, total, value, at, step, n, skip):
    """sum_j terms_j v_j / total of one channel; the row's own key is left out whatever it holds."""
    centre, share = centre_of(value, at, step, n), 1.0 / total
    mean = 0.0
    for first in range(0, n, 1024):
        part = 0.0
        for j in range(first, min(first + 1024, n)):
            if j != skip:
                part += (terms[j] * share) * minus(float(value[at + j * step]), centre)
        mean += part
    return centre + mean


@njit(**EXACT)
def load_row(pointer_to, at, step, out):
    """Copy a strided row into out, as float64."""
    for f in range(len(out)):
        out[f] = float(pointer_to[at + f * step])


@njit(**EXACT)
def forward_rows(example, about, unit, first, last):
    """Rows first..last of batch element `unit`: out, lse, state and the tangents wanted."""
    n, n_features, n_channels = about[N], about[D], about[C]
    query, key, value = (
        pointer(about[QUERY], example),
        pointer(about[KEY], example),
        pointer(about[VALUE], example),
    )
    weight, bandwidth = pointer(about[WEIGHT], example), pointer(about[W], example)
    weighted = about[WEIGHT] != 0
    at_q, at_k, at_v = offset(about, unit, 0), offset(about, unit, 1), offset(about, unit, 2)
    at_a, at_w = offset(about, unit, 3), offset(about, unit, 4)
    out, lse = pointer(about[OUT], example), pointer(about[LSE], example)
    state = pointer(about[STATE], np.empty(0))
    tangent_w, tangent_q = pointer(about[TANGENT_W], example), pointer(about[TANGENT_Q], example)
    q, w = np.empty(n_features), np.empty(n_features)
    load_row(bandwidth, at_w, about[W_D], w)
    plain_w = w[0]
    for f in range(n_features):
        w[f] *= ROOT
    terms = np.empty(n)
    for i in range(first, last):
        row = unit * about[M] + i
        load_row(query, at_q + i * about[QUERY_M], about[QUERY_D], q)
        skip = i if about[SELF] else -1
        origin, _, shift, total = row_terms(
            q,
            w,
            key,
            at_k,
            about[KEY_N],
            about[KEY_D],
            n,
            weight,
            at_a,
            about[WEIGHT_N],
            weighted,
            skip,
            terms,
        )
        state[2 * row], state[2 * row + 1] = shift, total
        lse[row] = lse_of(total, shift)
        if origin < 0:
            for c in range(n_channels):
                out[row * n_channels + c] = np.nan
            spread = 0.0 if total == 0.0 else np.nan
            if about[TANGENT_W] != 0:
                tangent_w[row] = spread
            if about[TANGENT_Q] != 0:
                tangent_q[row] = spread
            continue
        for c in range(n_channels):
            mean = row_mean(terms, total, value, at_v + c * about[VALUE_C], about[VALUE_N], n, skip)
            out[row * n_channels + c] = mean
            if about[TANGENT_W] != 0 or about[TANGENT_Q] != 0:
                k0 = float(key[at_k + origin * about[KEY_N]])
                by_q, by_w = 0.0, 0.0
                for j in range(n):
                    if terms[j] != 0.0 and j != skip:
                        k = float(key[at_k + j * about[KEY_N]])
                        part = (terms[j] / total) * (float(value[at_v + j * about[VALUE_N]]) - mean)
                        part *= limited((k0 - k) * plain_w)
                        by_q += part
                        by_w += part * limited((q[0] - k) + (q[0] - k0))
                if about[TANGENT_W] != 0:
                    tangent_w[row] = -by_w
                if about[TANGENT_Q] != 0:
                    tangent_q[row] = -plain_w * by_q


@njit(**EXACT)
def query_side(example, about, unit, first, last, rows, means, grad_w):
    """Gradients of the rows first..last for query and w (added to grad_w), and what key_side needs of each row.

    For each row of the batch: rows holds (index of k*, top, total), means its out in float64.
    """
    n, n_features, n_channels = about[N], about[D], about[C]
    query, key, value = (
        pointer(about[QUERY], example),
        pointer(about[KEY], example),
        pointer(about[VALUE], example),
    )
    weight, bandwidth = pointer(about[WEIGHT], example), pointer(about[W], example)
    weighted = about[WEIGHT] != 0
    at_q, at_k, at_v = offset(about, unit, 0), offset(about, unit, 1), offset(about, unit, 2)
    at_a, at_w = offset(about, unit, 3), offset(about, unit, 4)
    grad_out, grad_lse = pointer(about[GRAD_OUT], example), pointer(about[GRAD_LSE], example)
    grad_query = pointer(about[GRAD_QUERY], example)
    q, w, plain_w = np.empty(n_features), np.empty(n_features), np.empty(n_features)
    load_row(bandwidth, at_w, about[W_D], plain_w)
    for f in range(n_features):
        w[f] = plain_w[f] * ROOT
    terms, pull = np.empty(n), np.empty(n)
    for i in range(first, last):
        row = unit * about[M] + i
        load_row(query, at_q + i * about[QUERY_M], about[QUERY_D], q)
        skip = i if about[SELF] else -1
        origin, top, _, total = row_terms(
            q,
            w,
            key,
            at_k,
            about[KEY_N],
            about[KEY_D],
            n,
            weight,
            at_a,
            about[WEIGHT_N],
            weighted,
            skip,
            terms,
        )
        rows[3 * row], rows[3 * row + 1], rows[3 * row + 2] = origin, top, total
        pull[:] = 0.0
        for c in range(n_channels):
            means[row * n_channels + c] = np.nan
            if origin >= 0:
                at = at_v + c * about[VALUE_C]
                means[row * n_channels + c] = row_mean(terms, total, value, at, about[VALUE_N], n, skip)
                g = float(grad_out[row * n_channels + c])
                for j in range(n):
                    pull[j] += g * (float(value[at + j * about[VALUE_N]]) - means[row * n_channels + c])
        if about[GRAD_QUERY] == 0 and about[GRAD_W] == 0:
            continue
        through_lse = float(grad_lse[row]) if about[GRAD_LSE] != 0 else 0.0
        for f in range(n_features):
            if origin < 0:
                by_q = by_w = 0.0 if total == 0.0 else np.nan
            else:
                k0 = float(key[at_k + origin * about[KEY_N] + f * about[KEY_D]])
                by_q = by_w = 0.0
                for j in range(n):
                    if terms[j] != 0.0 and j != skip:
                        k = float(key[at_k + j * about[KEY_N] + f * about[KEY_D]])
                        p, d = terms[j] / total, limited(q[f] - k)
                        # sum_j p_j <g, v_j - out> = 0: that part may be taken relative to k*.
                        part = p * pull[j] * limited((k0 - k) * plain_w[f])
                        rest = p * through_lse * limited(d * plain_w[f])
                        by_q += part + rest
                        by_w += part * limited(d + (q[f] - k0)) + rest * d
            if about[GRAD_QUERY] != 0:
                grad_query[row * n_features + f] = -plain_w[f] * by_q
            grad_w[f] -= by_w


@njit(**EXACT)
def key_side(example, about, unit, first, last, rows, means, far, grad_key, grad_value, grad_weight):
    """Add the gradients of the keys first..last from the rows listed in `far`.

    Into grad_key (D, last - first), grad_value (C, last - first) and grad_weight (last - first,), all float64.
    """
    n_features, n_channels = about[D], about[C]
    query, key, value = (
        pointer(about[QUERY], example),
        pointer(about[KEY], example),
        pointer(about[VALUE], example),
    )
    weight, bandwidth = pointer(about[WEIGHT], example), pointer(about[W], example)
    at_q, at_k, at_v = offset(about, unit, 0), offset(about, unit, 1), offset(about, unit, 2)
    at_a, at_w = offset(about, unit, 3), offset(about, unit, 4)
    grad_out, grad_lse = pointer(about[GRAD_OUT], example), pointer(about[GRAD_LSE], example)
    wanted = about[GRAD_KEY] != 0 or about[GRAD_WEIGHT] != 0
    q, w, plain_w = np.empty(n_features), np.empty(n_features), np.empty(n_features)
    load_row(bandwidth, at_w, about[W_D], plain_w)
    for f in range(n_features):
        w[f] = plain_w[f] * ROOT
    for j in range(first, last):
        place = at_k + j * about[KEY_N]
        a, mantissa, exponent = 1.0, 1.0, 0.0
        if about[WEIGHT] != 0:
            a = float(weight[at_a + j * about[WEIGHT_N]])
            mantissa, exponent = math.frexp(a)
        for i in far:
            row = unit * about[M] + i
            total = rows[3 * row + 2]
            if total == 0.0 or (about[SELF] and i == j):
                continue
            load_row(query, at_q + i * about[QUERY_M], about[QUERY_D], q)
            by_weight = np.nan
            if rows[3 * row] >= 0:
                origin_at = at_k + int(rows[3 * row]) * about[KEY_N]
                score = relative_score(q, key, place, about[KEY_D], origin_at, w) - rows[3 * row + 1]
                p = mantissa * exp2_double(min(score + exponent, CLAMP)) / total
                # Of a key that is near and of little weight the second is exact where the first overflows.
                by_weight = exp2_double(score) / total if score < CLAMP else p / a
            else:
                p = np.nan
            pull = float(grad_lse[row]) if about[GRAD_LSE] != 0 else 0.0
            for c in range(n_channels):
                g = float(grad_out[row * n_channels + c])
                grad_value[c, j - first] += p * g
                if wanted:
                    pull += g * (
                        float(value[at_v + j * about[VALUE_N] + c * about[VALUE_C]])
                        - means[row * n_channels + c]
                    )
            if wanted:
                grad_weight[j - first] += limited(by_weight * pull)
                if p != 0.0:
                    for f in range(n_features):
                        d = limited((q[f] - float(key[place + f * about[KEY_D]])) * plain_w[f])
                        grad_key[f, j - first] += d * (p * pull) * plain_w[f]
