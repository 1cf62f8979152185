"""What all Triton kernels share: where a batch element lies, scores of a tile, and the exact scores of far rows.

Two arithmetics serve two kinds of rows. A row is *near* when float32 scores -(w d)^2 tell its keys apart: those are
computed in the arithmetic dtype, in tiles of queries against keys. All other rows, *far* ones (the nearest key many
bandwidths away, overflowing scores, weights of extreme size, NaN), are computed one at a time in float64 with a vector
of keys, relative to the nearest key k* feature by feature as

    d_j^2 - d*^2 = (k* - k_j) (2 q - k_j - k*)

which does not cancel; 2 q - k* is taken with the rest that it rounds off. Which rows are far is decided on the device,
so nothing waits for it. The kernels are compiled without contraction of products and sums (enable_fp_fusion=False),
since fused terms of these differences would not cancel where they must; products to be fused are written as tl.fma.
"""

import triton
import triton.language as tl

from ... import constants

ROOT = tl.constexpr(constants.ROOT)  # base-2 scores are -(ROOT w d)^2
# Near scores are -HALF_LOG2E (w d)^2: w itself is exact, where the rounding of ROOT w would bias every score alike.
HALF_LOG2E = tl.constexpr(constants.HALF_LOG2E)
LN2 = tl.constexpr(constants.LN2)
ROUNDED_SCORE = tl.constexpr(2.0**30)  # from here on the rounding of a squared distance may tell keys apart
MOST_STEPS = tl.constexpr(8)  # from a key to a nearer one: each is exact to the rounding of the step before
WIDE = tl.constexpr(2.0**1000)  # of scores beyond only the order counts
MOST_SCORE = tl.constexpr(2.0**1013)
# The largest power of 2 that near rows make; what lies beyond is that of a left-out key much nearer than all others.
MOST_FLOAT, MOST_DOUBLE = tl.constexpr(126.0), tl.constexpr(1022.0)
# Up to here the terms of a weight's gradient are finite, whatever they are multiplied with within reason.
SAFE_FLOAT, SAFE_DOUBLE = tl.constexpr(96.0), tl.constexpr(900.0)


@triton.jit
def element(table, b, stride, which: tl.constexpr, batches, TABLE: tl.constexpr):
    """Offset of batch element b (int64) in tensor number `which`: by one stride, or from a table (5, batches)."""
    if TABLE:
        return tl.load(table + which * batches + b)
    else:
        return b * stride


@triton.jit
def inputs_of(
    query, key, value, w, key_weight, b, query_b, key_b, value_b, w_b, weight_b, batches, table,
    WEIGHTED: tl.constexpr, TABLE: tl.constexpr,
):  # fmt: skip
    """The pointers of all inputs at batch element b (int64)."""
    query += element(table, b, query_b, 0, batches, TABLE)
    key += element(table, b, key_b, 1, batches, TABLE)
    value += element(table, b, value_b, 2, batches, TABLE)
    w += element(table, b, w_b, 3, batches, TABLE)
    if WEIGHTED:
        key_weight += element(table, b, weight_b, 4, batches, TABLE)
    return query, key, value, w, key_weight


@triton.jit
def unit_of(w, T: tl.constexpr):
    """The power of 2 next below |w|, in T: offsets times that are in bandwidths but for a factor below 2, and exact.

    Sums of such offsets neither overflow nor underflow where the coordinates are extreme and their scores are not.
    """
    size = tl.abs(w.to(T))
    if T == tl.float64:  # noqa: SIM300
        size = tl.minimum(tl.maximum(size, 2.0**-1022), 2.0**1022)
        return (size.to(tl.int64, bitcast=True) & 0x7FF0000000000000).to(tl.float64, bitcast=True)
    else:
        size = tl.minimum(tl.maximum(size, 2.0**-126), 2.0**126)
        return (size.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)


@triton.jit
def scaled_offsets(q, k, unit):
    """(q - k) unit, also where the difference or a product alone is beyond all numbers."""
    shrink = tl.minimum(unit, 1.0)
    return (q * shrink - k * shrink) * tl.maximum(unit, 1.0)


@triton.jit
def centre_of_values(low, high, at, exists):
    """What to subtract from the values of the channels at the offsets `at`, whose ranges are low..high.

    Numbers within a factor of two of each other have no rounding error in their difference, so it costs nothing; sums
    of what is left keep the digits that a common offset would take, and a constant comes back to the bit.
    """
    least = tl.load(low + at, mask=exists, other=0.0)
    most = tl.load(high + at, mask=exists, other=0.0)
    small = tl.minimum(tl.abs(least), tl.abs(most))
    large = tl.maximum(tl.abs(least), tl.abs(most))
    one_sign = ((least > 0.0) & (most > 0.0)) | ((least < 0.0) & (most < 0.0))  # false where NaN
    narrow = one_sign & (3.0 * small >= large) & (large < float("inf"))
    return tl.where(narrow, 0.5 * least + 0.5 * most, 0.0)


@triton.jit
def squared_distances(
    query, query_at, query_d, key, key_at, key_d, w, w_d, rows, keys, D: tl.constexpr, T: tl.constexpr,
    SHAPE_M: tl.constexpr, SHAPE_N: tl.constexpr,
):  # fmt: skip
    """Squared distances in units of the base-2 score, [SHAPE_M, SHAPE_N].

    query_at [SHAPE_M, 1] or [1, SHAPE_N] and key_at the other way hold the offsets of the rows, `rows` and `keys`
    (of the same shapes) which of them exist.
    """
    square = tl.zeros([SHAPE_M, SHAPE_N], T)
    if D <= 4:
        for f in tl.static_range(D):
            scale = tl.load(w + f * w_d).to(T)
            q = tl.load(query + query_at + f * query_d, mask=rows, other=0.0).to(T)
            k = tl.load(key + key_at + f * key_d, mask=keys, other=0.0).to(T)
            offset = (q - k) * scale
            square = tl.fma(offset, offset, square)
    else:
        # In blocks of about the root of all features, so that few roundings are as large as the whole.
        BLOCK: tl.constexpr = 16 if D <= 256 else 32 if D <= 1024 else 64
        for first in range(0, D, BLOCK):
            part = tl.zeros([SHAPE_M, SHAPE_N], T)
            for f in range(first, tl.minimum(first + BLOCK, D)):
                scale = tl.load(w + f * w_d).to(T)
                q = tl.load(query + query_at + f * query_d, mask=rows, other=0.0).to(T)
                k = tl.load(key + key_at + f * key_d, mask=keys, other=0.0).to(T)
                offset = (q - k) * scale
                part = tl.fma(offset, offset, part)
            square += part
    return square * HALF_LOG2E


@triton.jit
def nearest_key(
    query, query_d, key, key_n, key_d, w, w_d, key_weight, weight_n, n, skip,
    D: tl.constexpr, WEIGHTED: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(place of the nearest key that counts, or -1; whether the row is NaN) for one query.

    All pointers are at the row's batch element, `query` at the row itself. `skip` is the key left out, or -1.
    """
    best = tl.full([BLOCK], float("inf"), tl.float64)
    place = tl.zeros([BLOCK], tl.int64)
    invalid = tl.zeros([BLOCK], tl.int32)
    for attempt in range(3):  # squares that overflow are compared at smaller scales
        if attempt == 0 or tl.min(best, 0) == float("inf"):
            # Halves, since differences of coordinates may overflow where they are not many bandwidths.
            shrink = tl.where(attempt == 0, 0.5, tl.where(attempt == 1, 2.0**-350, 2.0**-768)).to(tl.float64)
            again = tl.where(attempt == 0, 1.0, shrink).to(tl.float64)
            for start in range(0, n, BLOCK):
                j = start + tl.arange(0, BLOCK).to(tl.int64)  # [BLOCK]
                counts = (j < n) & (j != skip)
                square = tl.zeros([BLOCK], tl.float64)
                for f in range(D):
                    q = tl.load(query + f * query_d).to(T).to(tl.float64)
                    k = tl.load(key + j * key_n + f * key_d, mask=counts, other=0.0).to(T).to(tl.float64)
                    offset = (q * shrink - k * shrink) * (tl.load(w + f * w_d).to(tl.float64) * again)
                    square += offset * offset
                invalid = tl.where(counts & (square != square), 1, invalid)
                if WEIGHTED:
                    a = tl.load(key_weight + j * weight_n, mask=counts, other=0.0).to(T)
                    invalid = tl.where(a >= 0.0, invalid, 1)
                    counts = counts & (a > 0.0)
                nearer = counts & (square < best)
                best = tl.where(nearer, square, best)
                place = tl.where(nearer, j, place)
    least = tl.min(best, 0)
    origin = tl.min(tl.where((best == least) & (best < float("inf")), place, n), 0)
    wrong = tl.max(invalid, 0) > 0
    origin = tl.where(wrong | (origin >= n), -1, origin)
    # Squared distances so large that others may round to the same: from key to nearer key by differences of squares.
    moving = (origin >= 0).to(tl.int32)
    if moving > 0 and own_score(query, query_d, key, origin * key_n, key_d, w, w_d, D, T) < ROUNDED_SCORE:
        moving = moving * 0
    for _step in range(MOST_STEPS):
        if moving > 0:
            top = tl.zeros([BLOCK], tl.float64)
            for start in range(0, n, BLOCK):
                j = start + tl.arange(0, BLOCK).to(tl.int64)
                counts = (j < n) & (j != skip)
                if WEIGHTED:
                    counts = counts & (tl.load(key_weight + j * weight_n, mask=counts, other=0.0).to(T) > 0.0)
                score = relative_scores(
                    query, query_d, key, j * key_n, origin * key_n, key_d, w, w_d, counts, D, T, BLOCK
                )
                nearer = counts & (score > top)
                top = tl.where(nearer, score, top)
                place = tl.where(nearer, j, place)
            most = tl.max(top, 0)
            moving = (most > 0.0).to(tl.int32)
            nearest = tl.min(tl.where((top == most) & (top > 0.0), place, n), 0)
            origin = tl.where(most > 0.0, nearest, origin)
    return origin, wrong


@triton.jit
def relative_scores(
    query, query_d, key, key_at, origin, key_d, w, w_d, exists, D: tl.constexpr, T: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Base-2 scores of the keys at the offsets key_at minus that of the key at the offset origin, [BLOCK].

    Beyond WIDE they are what `in_order` makes of them.
    """
    score = tl.zeros([BLOCK], tl.float64)
    finite = exists
    for f in range(D):
        q = tl.load(query + f * query_d).to(T).to(tl.float64)
        nearest = tl.load(key + origin + f * key_d).to(T).to(tl.float64)
        scale = tl.load(w + f * w_d).to(tl.float64)
        k = tl.load(key + key_at + f * key_d, mask=exists, other=0.0).to(T).to(tl.float64)
        score -= ((nearest - k) * scale) * (both_distances(q, k, nearest) * scale)
        finite = finite & (tl.abs(k) < float("inf"))
    if T == tl.float64:  # noqa: SIM300
        beyond = finite & ((score == score) == (tl.abs(score) >= WIDE))  # NaN too
        if tl.max(beyond.to(tl.int32), 0) > 0:
            wide = wide_scores(query, query_d, key, key_at, origin, key_d, w, w_d, exists, D, T, BLOCK)
            score = tl.where(beyond, wide, score)
    return tl.maximum(score * HALF_LOG2E, -MOST_SCORE)


@triton.jit
def both_distances(q, k, nearest):
    """(q - k) + (q - nearest), as 2 q - k* and its rest less k: keys across a gap from k*, as far, are told apart."""
    twice = 2.0 * q
    number = twice - nearest
    back = number - twice
    both = (number - k) + ((twice - (number - back)) - (nearest + back))
    return tl.where(tl.abs(both) < float("inf"), both, (q - k) + (q - nearest))  # twice may overflow


@triton.jit
def wide_scores(
    query, query_d, key, key_at, origin, key_d, w, w_d, exists, D: tl.constexpr, T: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """relative_scores / HALF_LOG2E of any size, summed with an exponent of their own."""
    total = tl.zeros([BLOCK], tl.float64)
    top = tl.zeros([BLOCK], tl.int64)
    for f in range(D):
        q = tl.load(query + f * query_d).to(T).to(tl.float64)
        nearest = tl.load(key + origin + f * key_d).to(T).to(tl.float64)
        scale, by_scale = split(tl.load(w + f * w_d).to(tl.float64))
        k = tl.load(key + key_at + f * key_d, mask=exists, other=0.0).to(T).to(tl.float64)
        # Sums of four quarters do not overflow.
        size = tl.maximum(tl.abs(k), tl.abs(nearest))
        large, large_both = size >= WIDE, tl.maximum(size, tl.abs(q)) >= WIDE
        shrink = tl.where(large, 0.25, 1.0).to(tl.float64)
        near, by_near = split(nearest * shrink - k * shrink)
        shrink = tl.where(large_both, 0.25, 1.0).to(tl.float64)
        both, by_both = split(both_distances(q * shrink, k * shrink, nearest * shrink))
        part = -(near * both * (scale * scale))
        by = by_near + by_both + 2 * by_scale + tl.where(large, 2, 0) + tl.where(large_both, 2, 0)
        higher = tl.where(part == 0.0, top, tl.where(total == 0.0, by, tl.maximum(top, by)))
        total = total * power_of_2(top - higher) + part * power_of_2(by - higher)
        top = higher
    return in_order(total, top)


@triton.jit
def split(x):
    """(y, e) with x = y 2^e and 1 <= |y| < 2, y = 0 for 0; float64 to (float64, int64)."""
    small = tl.abs(x) < 2.0**-1022
    bits = tl.where(small, tl.abs(x) * 2.0**54, tl.abs(x)).to(tl.int64, bitcast=True)
    y = ((bits & 0xFFFFFFFFFFFFF) + 0x3FF0000000000000).to(tl.float64, bitcast=True)
    exponent = (bits >> 52) - tl.where(small, 1077, 1023)
    return tl.where(x == 0.0, 0.0, tl.where(x < 0.0, -y, y)), exponent


@triton.jit
def power_of_2(exponent):
    """2^exponent of int64, within the normal numbers."""
    exponent = tl.minimum(tl.maximum(exponent, -1022), 1023)
    return ((exponent + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def in_order(x, exponent):
    """A finite number that goes up with x 2^exponent: itself up to WIDE = 2^1000, and from there not as fast."""
    y, by = split(x)
    by += exponent
    beyond = WIDE * ((by - 1000).to(tl.float64) + tl.abs(y))
    return tl.where(by < 1000, y * power_of_2(by), tl.where(y < 0.0, -beyond, beyond))


@triton.jit
def lift_of(a, T: tl.constexpr):
    """By which power of 2 to take weights of keys as larger, and what they are multiplied with as smaller.

    Relative to the sum over keys of tiny weight, 1 / a is as large as what float32, or float64, ends at.
    """
    least: tl.constexpr = 2.0**-500 if T == tl.float64 else 2.0**-60  # noqa: SIM300
    lift: tl.constexpr = 512.0 if T == tl.float64 else 64.0  # noqa: SIM300
    return tl.where((a > 0.0) & (a < least), lift, 0.0).to(T)


@triton.jit
def log_weights(key_weight, at, counts, T: tl.constexpr):
    """Base-2 logarithms of the weights of one row's keys; -inf for those of weight 0 and those that do not count."""
    a = tl.load(key_weight + at, mask=counts, other=0.0).to(T).to(tl.float64)
    return tl.where(a > 0.0, tl.log2(tl.where(a > 0.0, a, 1.0)), float("-inf"))


@triton.jit
def far_scores(
    query, query_d, key, key_n, key_d, w, w_d, key_weight, weight_n, n, skip, start, origin,
    D: tl.constexpr, WEIGHTED: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Scores relative to the key `origin`, log-weights included, of the keys start..start + BLOCK; -inf where none."""
    j = start + tl.arange(0, BLOCK).to(tl.int64)  # [BLOCK]
    counts = (j < n) & (j != skip)
    score = relative_scores(
        query, query_d, key, j * key_n, origin * key_n, key_d, w, w_d, counts, D, T, BLOCK
    )
    if WEIGHTED:
        score += log_weights(key_weight, j * weight_n, counts, T)
    return tl.where(counts, score, float("-inf"))


@triton.jit
def far_top(
    query, query_d, key, key_n, key_d, w, w_d, key_weight, weight_n, n, skip, origin,
    D: tl.constexpr, WEIGHTED: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The largest of far_scores over all keys."""
    top = tl.full([BLOCK], float("-inf"), tl.float64)
    for start in range(0, n, BLOCK):
        score = far_scores(
            query, query_d, key, key_n, key_d, w, w_d, key_weight, weight_n, n, skip, start, origin,
            D, WEIGHTED, T, BLOCK,
        )  # fmt: skip
        top = tl.maximum(top, score)
    return tl.max(top, 0)


@triton.jit
def own_score(query, query_d, key, origin, key_d, w, w_d, D: tl.constexpr, T: tl.constexpr):
    """The squared distance to the key at the offset origin, in units of the base-2 score."""
    square = tl.load(w).to(tl.float64) * 0.0
    for f in range(D):
        q = tl.load(query + f * query_d).to(T).to(tl.float64)
        nearest = tl.load(key + origin + f * key_d).to(T).to(tl.float64)
        scale = tl.load(w + f * w_d).to(tl.float64) * ROOT
        offset = (q - nearest) * scale
        if T == tl.float64:  # noqa: SIM300
            offset = tl.where(
                tl.abs(q - nearest) < float("inf"), offset, (0.5 * q - 0.5 * nearest) * scale * 2.0
            )
        square += offset * offset
    return square
