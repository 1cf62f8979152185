"""Far rows, those that the tiled kernels decline, and their gradients: row by row in float64, for any input.

The terms of a row are those of scores.py. Parallel over blocks of rows (forward, query side) and blocks of keys (key
side).
"""

import math

import numpy as np
from numba import njit

from ..base import (
    EXACT,
    GRAD_KEY,
    GRAD_OUT,
    GRAD_QUERY,
    GRAD_W,
    GRAD_WEIGHT,
    KEY_D,
    KEY_N,
    LSE,
    OUT,
    QUERY_D,
    QUERY_M,
    ROOT,
    SELF,
    STATE,
    SUMS,
    TANGENT_Q,
    TANGENT_W,
    VALUE_C,
    VALUE_N,
    W_D,
    WEIGHT,
    WEIGHT_N,
    C,
    D,
    M,
    N,
    double,
    inputs_of,
    lse_gradient,
    pointer,
)  # fmt: skip
from ..exp2 import MOST_EXPONENT, exp2_double
from ..scores import both_distances, limited, lse_of, minus, offset, relative_score, row_terms

LEAST_EIGHTHS = 1e-290  # of coordinates below, an eighth may have fewer digits


@njit(**EXACT)
def centre_of(value, at, step, n):
    """The finite value nearest to 0 if all have one sign, else 0: to subtract it never costs a digit."""
    low, high = np.inf, -np.inf
    for j in range(n):
        v = double(value[at + j * step])
        if abs(v) < np.inf:
            low, high = min(low, v), max(high, v)
    if low > high:
        return 0.0
    return low if low > 0.0 else (high if high < 0.0 else 0.0)


@njit(**SUMS)
def row_mean(terms, total, value, at, step, n, skip):
    """sum_j terms_j v_j / total of one channel; the row's own key is left out whatever it holds."""
    centre, share = centre_of(value, at, step, n), 1.0 / total
    mean = 0.0
    for first in range(0, n, 1024):
        part = 0.0
        for j in range(first, min(first + 1024, n)):
            if j != skip:
                part += (terms[j] * share) * minus(double(value[at + j * step]), centre)
        mean += part
    return centre + mean


@njit(**EXACT)
def eighth(part, q, k, k0):
    """The part times both_distances / 8: that factor is a number for all coordinates."""
    if max(abs(q), max(abs(k), abs(k0))) < LEAST_EIGHTHS:
        return 0.125 * (part * both_distances(q, k, k0))
    return part * both_distances(0.125 * q, 0.125 * k, 0.125 * k0)


@njit(**EXACT)
def load_row(pointer_to, at, step, out):
    """Copy a strided row into out, as float64."""
    for f in range(len(out)):
        out[f] = double(pointer_to[at + f * step])


@njit(**EXACT)
def bandwidths(about, given):
    """The inverse bandwidths w of all features, and times ROOT, as float64."""
    plain, w = np.empty(about[D]), np.empty(about[D])
    load_row(given.w, given.at_w, about[W_D], plain)
    for f in range(about[D]):
        w[f] = plain[f] * ROOT
    return plain, w


@njit(**EXACT, inline="always")
def forward_rows(example, about, unit, first, last):
    """Rows first..last of batch element `unit`: out, lse, state and the tangents wanted."""
    n, n_features, n_channels = about[N], about[D], about[C]
    given = inputs_of(example, about, unit)
    value, at_value = given.value, given.at_value
    key, at_key = given.key, given.at_key
    out, lse = pointer(about[OUT], example), pointer(about[LSE], example)
    state = pointer(about[STATE], double)
    tangent_w, tangent_q = pointer(about[TANGENT_W], example), pointer(about[TANGENT_Q], example)
    q = np.empty(n_features)
    plain, w = bandwidths(about, given)
    plain_w = plain[0]
    terms = np.empty(n)
    for i in range(first, last):
        row = unit * about[M] + i
        load_row(given.query, given.at_query + i * about[QUERY_M], about[QUERY_D], q)
        skip = i if about[SELF] else -1
        origin, _, shift, total = row_terms(about, given, q, w, skip, terms)
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
            mean = row_mean(terms, total, value, at_value + c * about[VALUE_C], about[VALUE_N], n, skip)
            out[row * n_channels + c] = mean
            if about[TANGENT_W] != 0 or about[TANGENT_Q] != 0:
                k0 = double(key[at_key + origin * about[KEY_N]])
                by_q, by_w = 0.0, 0.0
                for j in range(n):
                    if terms[j] != 0.0 and j != skip:
                        k = double(key[at_key + j * about[KEY_N]])
                        part = (terms[j] / total) * (double(value[at_value + j * about[VALUE_N]]) - mean)
                        part *= offset(k0, k, plain_w)
                        by_q += part
                        by_w += eighth(part, q[0], k, k0)
                if about[TANGENT_W] != 0:
                    tangent_w[row] = -8.0 * by_w
                if about[TANGENT_Q] != 0:
                    tangent_q[row] = -plain_w * by_q


@njit(**EXACT, inline="always")
def query_side(example, about, unit, first, last, rows, means, grad_w):
    """Gradients of the rows first..last for query and w (added to grad_w), and what key_side needs of each row.

    For each row of the batch: rows holds (index of k*, top, total), means its out in float64.
    """
    n, n_features, n_channels = about[N], about[D], about[C]
    given = inputs_of(example, about, unit)
    value, at_value = given.value, given.at_value
    key, at_key = given.key, given.at_key
    grad_out = pointer(about[GRAD_OUT], example)
    grad_query = pointer(about[GRAD_QUERY], example)
    q = np.empty(n_features)
    plain_w, w = bandwidths(about, given)
    terms, pull = np.empty(n), np.empty(n)
    for i in range(first, last):
        row = unit * about[M] + i
        load_row(given.query, given.at_query + i * about[QUERY_M], about[QUERY_D], q)
        skip = i if about[SELF] else -1
        origin, top, _, total = row_terms(about, given, q, w, skip, terms)
        rows[3 * row], rows[3 * row + 1], rows[3 * row + 2] = origin, top, total
        pull[:] = 0.0
        for c in range(n_channels):
            means[row * n_channels + c] = np.nan
            if origin >= 0:
                at = at_value + c * about[VALUE_C]
                means[row * n_channels + c] = row_mean(terms, total, value, at, about[VALUE_N], n, skip)
                g = double(grad_out[row * n_channels + c])
                for j in range(n):
                    pull[j] += g * (double(value[at + j * about[VALUE_N]]) - means[row * n_channels + c])
        if about[GRAD_QUERY] == 0 and about[GRAD_W] == 0:
            continue
        through_lse = lse_gradient(example, about, row)
        for f in range(n_features):
            if origin < 0:
                by_q = by_w = 0.0 if total == 0.0 else np.nan
            else:
                # Relative to k*: sum_j p_j (<g, v_j - out> + g_lse) = g_lse.
                k0 = double(key[at_key + origin * about[KEY_N] + f * about[KEY_D]])
                by_q = through_lse * offset(q[f], k0, plain_w[f])
                by_w = 0.5 * eighth(by_q, q[f], k0, k0)
                for j in range(n):
                    if terms[j] != 0.0 and j != skip:
                        k = double(key[at_key + j * about[KEY_N] + f * about[KEY_D]])
                        part = terms[j] / total * (pull[j] + through_lse) * offset(k0, k, plain_w[f])
                        by_q += part
                        by_w += eighth(part, q[f], k, k0)
            if about[GRAD_QUERY] != 0:
                grad_query[row * n_features + f] = -plain_w[f] * by_q
            grad_w[f] -= 8.0 * by_w


@njit(**EXACT, inline="always")
def key_side(example, about, unit, first, last, rows, means, far, gradients):
    """Add the gradients of the keys first..last from the rows listed in `far`.

    gradients, all float64: key (D, last - first), value (C, last - first) and weight (last - first,).
    """
    grad_key, grad_value, grad_weight = gradients
    n_features, n_channels = about[D], about[C]
    given = inputs_of(example, about, unit)
    value, at_value = given.value, given.at_value
    key, at_key = given.key, given.at_key
    grad_out = pointer(about[GRAD_OUT], example)
    wanted = about[GRAD_KEY] != 0 or about[GRAD_WEIGHT] != 0
    q, by_key = np.empty(n_features), np.empty(n_features)
    plain_w, w = bandwidths(about, given)
    for j in range(first, last):
        by_key[:] = 0.0
        place = at_key + j * about[KEY_N]
        a, mantissa, exponent = 1.0, 1.0, 0.0
        if about[WEIGHT] != 0:
            a = double(given.weight[given.at_weight + j * about[WEIGHT_N]])
            mantissa, exponent = math.frexp(a)
        for i in far:
            row = unit * about[M] + i
            total = rows[3 * row + 2]
            if total == 0.0 or (about[SELF] and i == j):
                continue
            load_row(given.query, given.at_query + i * about[QUERY_M], about[QUERY_D], q)
            p = score = np.nan
            if rows[3 * row] >= 0:
                origin_at = at_key + int(rows[3 * row]) * about[KEY_N]
                by_d = about[KEY_D]
                score = relative_score(q, key, place, by_d, key, origin_at, by_d, w) - rows[3 * row + 1]
                p = mantissa * exp2_double(min(score + exponent, MOST_EXPONENT)) / total
            pull = lse_gradient(example, about, row)
            for c in range(n_channels):
                g = double(grad_out[row * n_channels + c])
                grad_value[c, j - first] += p * g
                if wanted:
                    pull += g * (
                        double(value[at_value + j * about[VALUE_N] + c * about[VALUE_C]])
                        - means[row * n_channels + c]
                    )
            if wanted:
                # Of a key that is near and of little weight the second is exact where the first overflows.
                by_weight = exp2_double(score) / total * pull if score < MOST_EXPONENT else p * pull / a
                grad_weight[j - first] += limited(by_weight)
                if p != 0.0:
                    for f in range(n_features):
                        d = offset(q[f], double(key[place + f * about[KEY_D]]), plain_w[f])
                        by_key[f] += d * (p * pull)
        for f in range(n_features):  # by the other w last: before, terms may overflow whose sum does not
            grad_key[f, j - first] += by_key[f] * plain_w[f]
