"""Far rows of the linear method: summed key by key over their window, relative to their nearest key.

With k* the nearest key (but the row's own, where that is left out), scores are

    z_j = d_j^2 - d*^2 = (k* - k_j) ((2 x - k*) - k_j),

which does not cancel however far x is; 2 x - k* comes as a number and the rest that it rounds off. Keys with w^2 z_j /
2 beyond log(N / eps) - log(a*) do not count. Where the window holds many keys, boxes of half width 2^-level bandwidths,
level = log2 of the distance / 2, that hold more than CROWD keys are replaced by charges at Chebyshev nodes: each row
keeps its relative accuracy, since a source box changes its scores by a few units at most.
"""

import numpy as np
from numba import njit

from ..base import EXACT, HALF_LOG2E, SUMS, entry
from ..exp2 import exp2_double
from ..scores import mirrored
from .boxes import BLOCK, box_of, end_of_box
from .near_rows import finish_rows

CHUNK = 1024  # rows of a task
DIRECT = 384  # keys that a row visits one by one in any case
CROWD = 48  # keys from which on a box is replaced by its nodes
STRIP = 128  # keys at once
MOST_LEVELS = 64
LARGEST = 1000.0  # of exponents in base 2: an own key in a crowded box may be much nearer than k*


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
def counts(k, nearest, x, limit):
    """Whether the key's score exceeds that of k* by no more than the limit."""
    number, rest = mirrored(x, nearest)
    return not (nearest - k) * ((number - k) + rest) > limit


@njit(**EXACT)
def window_start(key, place, guess, nearest, x, limit):
    """The first key that counts, where those from `place` on lie above x."""
    inside, outside, step = place, -1, 1  # key[inside] counts, or inside == place
    at = min(guess, place - 1)
    while at >= 0:
        if counts(key[at], nearest, x, limit):
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
        if counts(key[at], nearest, x, limit):
            inside = at
            break
        outside = at
        step *= 2
    while inside - outside > 1:
        middle = (inside + outside) // 2
        if counts(key[middle], nearest, x, limit):
            inside = middle
        else:
            outside = middle
    return inside


@njit(**EXACT)
def window_stop(key, place, guess, nearest, x, limit):
    """One past the last key that counts, where those before `place` lie below x."""
    n = len(key)
    inside, outside, step = place - 1, n, 1
    at = max(guess - 1, place)
    while at < n:
        if counts(key[at], nearest, x, limit):
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
        if counts(key[at], nearest, x, limit):
            inside = at
            break
        outside = at
        step *= 2
    while outside - inside > 1:
        middle = (inside + outside) // 2
        if counts(key[middle], nearest, x, limit):
            inside = middle
        else:
            outside = middle
    return inside + 1


@njit(**EXACT)
def terms_of_keys(key, at, n, nearest, x, factor, term, offset, score):
    """exp(-w^2 z / 2), k* - k and z of a strip of n keys from `at`."""
    number, rest = mirrored(x, nearest)
    for j in range(n):
        k = key[at + j]
        near = nearest - k
        z = near * ((number - k) + rest)
        offset[j] = near
        score[j] = z
        term[j] = exp2_double(min(z * factor, LARGEST))


@njit(**EXACT)
def terms_of_nodes(nodes, half, centre, nearest, x, factor, term, offset, score):
    """The same for the nodes of a box."""
    number, rest = mirrored(x, nearest)
    a, b = nearest - centre, (number - centre) + rest
    for j in range(len(nodes)):
        y = half * nodes[j]
        near = a - y
        z = near * (b - y)
        offset[j] = near
        score[j] = z
        term[j] = exp2_double(min(z * factor, LARGEST))


@njit(**SUMS)
def add_sums(term, offset, score, charge, c, at, n, orders, sums, i):
    """Add the sums of one column over a strip of n charges from `at` to those of row i."""
    total, by_offset, by_score = 0.0, 0.0, 0.0
    if orders == 0:
        for j in range(n):
            total += term[j] * charge[c, at + j]
    else:
        for j in range(n):
            part = term[j] * charge[c, at + j]
            total += part
            by_offset += part * offset[j]
            by_score += part * score[j]
        sums[1, c, i] += by_offset
        sums[2, c, i] += by_score
    sums[0, c, i] += total


@njit(**EXACT)
def term_of(k, nearest, number, rest, factor):
    """exp(-w^2 z / 2) of one key; number and rest: 2 x - nearest."""
    return exp2_double(min((nearest - k) * ((number - k) + rest) * factor, LARGEST))


@njit(**SUMS)
def sum_pair(key, charge, start, stop, own, nearest, x, factor, sums, i):
    """sum_keys for two columns and no distances: in groups of 8 keys, which is one vector loop without a rest."""
    total, product = 0.0, 0.0
    number, rest = mirrored(x, nearest)
    last = min(stop, len(key) - 7)
    at = start
    while at < last:
        by, by_value = 0.0, 0.0
        for j in range(8):
            term = term_of(key[at + j], nearest, number, rest, factor)
            term = term if at + j < stop else 0.0
            term = term if at + j != own else 0.0
            by += term * charge[0, at + j]
            by_value += term * charge[1, at + j]
        total += by
        product += by_value
        at += 8
    for j in range(at, stop):
        term = term_of(key[j], nearest, number, rest, factor)
        term = term if j != own else 0.0
        total += term * charge[0, j]
        product += term * charge[1, j]
    sums[0, 0, i] += total
    sums[0, 1, i] += product


@njit(**EXACT)
def sum_keys(key, charge, start, stop, own, nearest, x, factor, orders, term, offset, score, sums, i):
    """Add the keys start .. stop, but `own`, to the sums of row i of a block."""
    if orders == 0 and len(charge) == 2:
        sum_pair(key, charge, start, stop, own, nearest, x, factor, sums, i)
        return
    for at in range(start, stop, STRIP):
        n = min(STRIP, stop - at)
        terms_of_keys(key, at, n, nearest, x, factor, term, offset, score)
        if at <= own < at + n:
            term[own - at] = 0.0
        for c in range(len(charge)):
            add_sums(term, offset, score, charge, c, at, n, orders, sums, i)


@njit(**EXACT)
def clear(sums, i):
    """Set the sums of row i of a block to 0."""
    for order in range(sums.shape[0]):
        for c in range(sums.shape[1]):
            sums[order, c, i] = 0.0


@njit(**EXACT)
def level_of(distance, w, margin):
    """The level of boxes for rows at this distance from k*; margin: 2 log of the largest weight over that of k*."""
    delta = np.sqrt((w * distance) * (w * distance) + margin)
    if not delta > 2:
        return 0
    return min(np.int64(np.ceil(np.log2(delta / 2))), MOST_LEVELS - 1)


@njit(**EXACT)
def box_after(stop, first, last, start):
    """The first of the boxes first .. last that ends after `start`."""
    while first < last:
        middle = (first + last) // 2
        if stop[middle] <= start:
            first = middle + 1
        else:
            last = middle
    return first


@njit(**EXACT)
def empty_row(rows, r):
    """Write the results of a row without keys; its gradients are 0 already."""
    row, channels = rows.order[r] if len(rows.order) > 0 else r, rows.centre.shape[1]
    if len(rows.lse) > 0:
        rows.lse[row] = -np.inf
    if len(rows.state) > 0:
        rows.state[2 * row] = rows.state[2 * row + 1] = 0.0
    if len(rows.out) > 0:
        rows.out[row * channels : (row + 1) * channels] = np.nan
    if len(rows.tangent_w) > 0:
        rows.tangent_w[row] = 0.0
    if len(rows.tangent_q) > 0:
        rows.tangent_q[row] = 0.0


@entry
def far_rows(
    rows,
    which,
    x,
    key,
    charge,
    w,
    exponent,
    log_span,
    orders,
    windows,
    levels,
    box_start,
    box_stop,
    box_centre,
    box_half,
    by_level,
    node,
    charges,
    first,
    last,
):
    """Finish chunks of the rows `which`; without boxes, those of crowded windows are left, with their level (else -1).

    windows (rows, 2) gets the first key and one past the last that counts, if it has rows.
    """
    columns, factor = len(charge), -HALF_LOG2E * w * w
    with_boxes = len(by_level) > 0
    excluding, own_of = len(rows.own) > 0, rows.own
    term, offset, score = np.empty(STRIP), np.empty(STRIP), np.empty(STRIP)
    sums, logarithm = np.zeros((3, columns, BLOCK)), np.empty(BLOCK)
    rows_of, distances = np.empty(BLOCK, np.int64), np.zeros(BLOCK)
    for chunk in range(first, last):
        place, low, high = 0, 0, 0
        for begin in range(chunk * CHUNK, min((chunk + 1) * CHUNK, len(which)), BLOCK):
            n = min(BLOCK, len(which) - begin)
            for i in range(n):
                index = begin + i
                r = which[index]
                q, own = x[r], own_of[r] if excluding else -1
                clear(sums, i)
                sums[0, 0, i] = 1.0
                levels[index] = rows_of[i] = -1
                place = first_at_least(key, place, q)
                star = nearest_key(key, place, q, own)
                if star < 0:
                    empty_row(rows, r)
                    continue
                nearest = key[star]
                distance = distances[i] = q - nearest
                margin = 0.0 if charge[0, star] == 1.0 else -2 * np.log(charge[0, star])
                limit = (2 * log_span + margin) / (w * w)
                low = window_start(key, place, low, nearest, q, limit)
                high = window_stop(key, place, high, nearest, q, limit)
                low, high = min(low, star), max(high, star + 1)
                windows[index, 0], windows[index, 1] = low, high
                if high - low <= DIRECT:
                    rows_of[i] = r
                    sums[0, 0, i] = 0.0
                    sum_keys(
                        key,
                        charge,
                        low,
                        high,
                        own,
                        nearest,
                        q,
                        factor,
                        orders,
                        term,
                        offset,
                        score,
                        sums,
                        i,
                    )
                    continue
                level = level_of(distance, w, margin)
                levels[index] = level
                if not with_boxes:
                    continue
                rows_of[i] = r
                sums[0, 0, i] = 0.0
                in_box, at = False, low
                box, end = by_level[level], by_level[level + 1]
                box = box_after(box_stop, box, end, low)
                while box < end and box_start[box] < high:
                    if box_start[box] > at:
                        sum_keys(
                            key, charge, at, box_start[box], own, nearest, q, factor, orders, term, offset, score,
                            sums, i
                        )  # fmt: skip
                    in_box |= box_start[box] <= own < box_stop[box]
                    terms_of_nodes(
                        node, box_half[box], box_centre[box], nearest, q, factor, term, offset, score
                    )
                    for c in range(columns):
                        add_sums(term, offset, score, charges[box], c, 0, len(node), orders, sums, i)
                    at = box_stop[box]
                    box += 1
                if at < high:
                    sum_keys(
                        key,
                        charge,
                        at,
                        high,
                        own,
                        nearest,
                        q,
                        factor,
                        orders,
                        term,
                        offset,
                        score,
                        sums,
                        i,
                    )
                if in_box:
                    before = sums[0, 0, i]
                    near = nearest - key[own]
                    number, rest = mirrored(q, nearest)
                    z = near * ((number - key[own]) + rest)
                    part = exp2_double(min(z * factor, LARGEST))
                    for c in range(columns):
                        sums[0, c, i] -= part * charge[c, own]
                        sums[1, c, i] -= part * charge[c, own] * near
                        sums[2, c, i] -= part * charge[c, own] * z
                    if not sums[0, 0, i] > 0.02 * before:
                        clear(sums, i)
                        sum_keys(
                            key,
                            charge,
                            low,
                            high,
                            own,
                            nearest,
                            q,
                            factor,
                            orders,
                            term,
                            offset,
                            score,
                            sums,
                            i,
                        )
            finish_rows(rows, rows_of, n, False, w, exponent, distances, logarithm, sums)


@entry
def find_crowds(key, windows, levels, inverse, level, start, stop, number, count):
    """Append the crowded boxes of the windows of rows (of one level, in order); return how many there are then, or -1.

    inverse: of the width of this level's boxes. A box that a row needs and that is missing is visited key by key,
    so rows out of order cost time alone.
    """
    done = 0  # keys below are cut
    for index in range(len(levels)):
        if levels[index] != level:
            continue
        at, high = windows[index, 0], windows[index, 1]
        while at < high:
            b = box_of(key[at], inverse)
            if at < done:
                at = done
                continue
            while at > done and box_of(key[at - 1], inverse) == b:  # a box that reaches below the window
                at -= 1
            end = end_of_box(key, at, len(key), b, inverse)
            if end - at >= CROWD:
                if count == len(start):
                    return -1
                start[count], stop[count], number[count] = at, end, b
                count += 1
            at = done = end
    return count
