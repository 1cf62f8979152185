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

# Products of two numbers clamped to this stay finite, so that 0 * inf cannot occur.
HUGE = 1e150
# The largest score above the row's top that a masked key may have (its gradient is finite then); as in the reference.
CLAMP = 350.0 / LN2


@njit(**EXACT)
def clamp(x):
    """Limit x to -HUGE .. HUGE."""
    return min(max(x, -HUGE), HUGE)


@njit(**EXACT)
def relative_score(q, key, place, key_d, origin, w):
    """Base-2 score of the key at `place` minus that of the key at `origin`."""
    score = 0.0
    for f in range(len(q)):
        k, k0 = float(key[place + f * key_d]), float(key[origin + f * key_d])
        score -= clamp((k0 - k) * w[f]) * clamp(((q[f] - k) + (q[f] - k0)) * w[f])
    return score


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
        x[j] = -clamp((k0 - k[j]) * w) * clamp(((q - k[j]) + d0) * w)


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
    scores_of_one(q, k, origin, w, terms)
    if skip >= 0:
        terms[skip] = -np.inf
    scratch[:] = terms
    top = fold(scratch, n, True)
    for j in range(n):
        terms[j] = exp2_double(terms[j] - top)
    t = clamp((q - k[origin]) * w)
    return origin, top, t * t - top, blocked_sum(terms, n)


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

    total is 0 for a row without keys and NaN where the reference gives NaN; then k* is -1.
    """
    n_features = len(q)
    if n_features == 1 and not weighted and abs(q[0]) < HUGE and abs(w[0]) < np.inf and n - (skip >= 0) > 0:
        k, finite = np.empty(n), True
        for j in range(n):
            k[j] = float(key[at + j * key_n])
            finite &= abs(k[j]) < HUGE
        if finite:
            return one_feature_terms(q[0], w[0], k, skip, terms, np.empty(n))
    unit = 0.0
    for f in range(n_features):
        unit = max(unit, abs(w[f]))
    unit = 1.0 / unit if unit > 0.0 else 1.0
    origin, best, invalid, kept = -1, np.inf, False, 0
    for j in range(n):
        if j == skip:
            continue
        square = 0.0
        for f in range(n_features):
            t = (q[f] - float(key[at + j * key_n + f * key_d])) * (w[f] * unit)
            square += t * t
        invalid |= square != square
        if weighted:
            a = float(weight[weight_at + j * weight_n])
            invalid |= not a >= 0.0
            if a == 0.0:
                continue
        kept += 1
        if square < best:
            origin, best = j, square
    if kept == 0:
        return -1, 0.0, 0.0, 0.0
    if invalid or origin < 0:
        return -1, 0.0, 0.0, np.nan if invalid else 0.0

    top = -np.inf
    origin_at = at + origin * key_n
    for j in range(n):
        score = relative_score(q, key, at + j * key_n, key_d, origin_at, w)
        kept_j = j != skip
        if weighted:
            a = float(weight[weight_at + j * weight_n])
            kept_j &= a > 0.0
            score += float(math.frexp(a)[1]) if kept_j else 0.0
        terms[j] = score if kept_j else -np.inf
        top = max(top, terms[j])
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
        t = clamp((q[f] - float(key[origin_at + f * key_d])) * w[f])
        shift += t * t
    return origin, top, shift, total


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
def row_mean(terms, total, value, at, step, n):
    """sum_j terms_j v_j / total of one channel."""
    centre = centre_of(value, at, step, n)
    mean = 0.0
    for first in range(0, n, 1024):
        part = 0.0
        for j in range(first, min(first + 1024, n)):
            part += terms[j] * minus(float(value[at + j * step]), centre)
        mean += part
    return centre + mean / total


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
        lse[row] = LN2 * (np.log2(total) - shift)
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
            mean = row_mean(terms, total, value, at_v + c * about[VALUE_C], about[VALUE_N], n)
            out[row * n_channels + c] = mean
            if about[TANGENT_W] != 0 or about[TANGENT_Q] != 0:
                k0 = float(key[at_k + origin * about[KEY_N]])
                by_q, by_w = 0.0, 0.0
                for j in range(n):
                    if terms[j] != 0.0:
                        k = float(key[at_k + j * about[KEY_N]])
                        part = terms[j] * (float(value[at_v + j * about[VALUE_N]]) - mean) * (k0 - k)
                        by_q += part
                        by_w += part * ((q[0] - k) + (q[0] - k0))
                if about[TANGENT_W] != 0:
                    tangent_w[row] = -plain_w * (by_w / total)
                if about[TANGENT_Q] != 0:
                    tangent_q[row] = -plain_w * (plain_w * (by_q / total))


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
                means[row * n_channels + c] = row_mean(terms, total, value, at, about[VALUE_N], n)
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
                    if terms[j] != 0.0:
                        k = float(key[at_k + j * about[KEY_N] + f * about[KEY_D]])
                        d = q[f] - k
                        # sum_j p_j <g, v_j - out> = 0: that part may be taken relative to k*.
                        by_q += terms[j] * (pull[j] * (k0 - k) + through_lse * d)
                        by_w += terms[j] * (pull[j] * (k0 - k) * (d + (q[f] - k0)) + through_lse * d * d)
                by_q, by_w = by_q / total, by_w / total
            if about[GRAD_QUERY] != 0:
                grad_query[row * n_features + f] = -plain_w[f] * (plain_w[f] * by_q)
            grad_w[f] -= plain_w[f] * by_w


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
        a, exponent = 1.0, 0.0
        mantissa = 1.0
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
                by_weight = exp2_double(min(score, CLAMP)) / total
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
                grad_weight[j - first] += by_weight * pull
                if p != 0.0:
                    for f in range(n_features):
                        d = q[f] - float(key[place + f * about[KEY_D]])
                        grad_key[f, j - first] += p * pull * d * plain_w[f] * plain_w[f]
