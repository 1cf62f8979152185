"""What the backward kernels need to know of each row.

A row is one query of one batch element, numbered b * m + i. For each: the shift of its scores and the inverse of its
total, both in the arithmetic dtype; the inverse is 0 where the row adds nothing to any near sum: it has no keys, or it
is far. For one feature and one channel also the query times `unit_of`, and slope and intercept of u / p, which is
linear in the value: all 0 where the row adds nothing. For a far row also its nearest key and the score of its heaviest
relative to it, and per FLAG_ROWS rows whether any is far, so that the other kernels need not look.
"""

import triton
import triton.language as tl

from .forward import FAR_DOUBLE, FAR_FLOAT, MOST_TOTAL
from .terms import centre_of_values, element, far_top, nearest_key, own_score, unit_of

FLAG_ROWS = tl.constexpr(64)
SMALLEST_TOTAL = tl.constexpr(2.0**-60)
# Of one feature and channel, where keys have weights: powers of 2 of a left-out key in a near row stay finite.
FAR_SINGLE = tl.constexpr(64.0)
# Of one feature and channel also: queries further out, in bandwidths, are too near to what stands for infinite keys.
FAR_OUT_FLOAT, FAR_OUT_DOUBLE = tl.constexpr(2.0**100), tl.constexpr(2.0**900)


@triton.jit
def describe_rows(
    query, key, value, w, key_weight, low, high, grad_out, grad_lse, out, state,
    shifts, inverses, pulls, queries, slopes, intercepts, origins, tops, flags, table, m, n, channels, batches,
    query_b, query_m, query_d, key_b, key_n, key_d, w_b, w_d, weight_b, weight_n,
    D: tl.constexpr, WEIGHTED: tl.constexpr, SELF: tl.constexpr, TABLE: tl.constexpr, BY_LSE: tl.constexpr,
    SINGLE: tl.constexpr, CENTRED: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """pulls: <grad_out, out> - grad_lse of each row, what the pull of a value is counted from."""
    T: tl.constexpr = out.dtype.element_ty
    FAR: tl.constexpr = (
        FAR_SINGLE if SINGLE and WEIGHTED else FAR_DOUBLE if T == tl.float64 else FAR_FLOAT  # noqa: SIM300
    )
    first = tl.program_id(0).to(tl.int64) * FLAG_ROWS
    row = first + tl.arange(0, FLAG_ROWS)  # [FLAG_ROWS]
    exists = row < batches * m
    shift = tl.load(state + 2 * row, mask=exists, other=0.0)
    total = tl.load(state + 2 * row + 1, mask=exists, other=0.0)
    ordinary = (tl.abs(shift) <= FAR) & (total >= SMALLEST_TOTAL) & (total <= MOST_TOTAL)
    if SINGLE:
        of_row = tl.where(exists, row // m, 0)
        unit = unit_of(tl.load(w + element(table, of_row, w_b, 3, batches, TABLE)), T)
        at = element(table, of_row, query_b, 0, batches, TABLE) + row % m * query_m
        q = tl.load(query + at, mask=exists, other=0.0).to(T) * unit
        ordinary = ordinary & (tl.abs(q) <= (FAR_OUT_DOUBLE if T == tl.float64 else FAR_OUT_FLOAT))  # noqa: SIM300
    far = (total > 0.0) & (total < float("inf")) & (ordinary == 0)
    # A row that nothing comes back to adds nothing, not even where it is NaN.
    used = exists & (exists == 0)
    for c in range(channels):
        used = used | (tl.load(grad_out + row * channels + c, mask=exists, other=0.0).to(T) != 0.0)
    if BY_LSE:
        used = used | (tl.load(grad_lse + row, mask=exists, other=0.0).to(T) != 0.0)
    far = far & used
    sums = (total != 0.0) & (far == 0) & used  # also the NaN of a NaN row, which its gradients inherit
    inverse = tl.where(sums, 1.0 / tl.where(sums, total, 1.0), 0.0)
    tl.store(shifts + row, tl.where(sums, shift, 0.0).to(T), mask=exists)
    tl.store(inverses + row, inverse.to(T), mask=exists)
    pull = tl.zeros([FLAG_ROWS], T)
    for c in range(channels):
        g = tl.load(grad_out + row * channels + c, mask=exists & sums, other=0.0).to(T)
        mean = tl.load(out + row * channels + c, mask=exists & sums, other=0.0)
        pull = tl.fma(g, mean, pull)
    if BY_LSE:
        pull -= tl.load(grad_lse + row, mask=exists & sums, other=0.0).to(T)
    tl.store(pulls + row, pull, mask=exists)
    if SINGLE:
        slope = tl.load(grad_out + row, mask=exists & sums, other=0.0).to(T) * inverse.to(T)
        mean = tl.load(out + row, mask=exists & sums, other=0.0)
        if CENTRED:
            mean -= centre_of_values(low, high, of_row, exists)
        intercept = -slope * mean
        if BY_LSE:
            intercept += tl.load(grad_lse + row, mask=exists & sums, other=0.0).to(T) * inverse.to(T)
        tl.store(queries + row, tl.where(sums, q, 0.0), mask=exists)
        tl.store(slopes + row, slope, mask=exists)
        tl.store(intercepts + row, intercept, mask=exists)
    any_far = tl.max(far.to(tl.int32), 0)
    tl.store(flags + tl.program_id(0), any_far)
    tl.store(origins + row, tl.full([FLAG_ROWS], -1, tl.int64), mask=exists & (far == 0))
    if any_far > 0:
        for r in range(FLAG_ROWS):
            if tl.max(((tl.arange(0, FLAG_ROWS) == r) & far).to(tl.int32), 0) > 0:
                b = (first + r) // m
                own = (first + r) % m
                query_at = query + element(table, b, query_b, 0, batches, TABLE) + own * query_m
                key_at = key + element(table, b, key_b, 1, batches, TABLE)
                w_at = w + element(table, b, w_b, 3, batches, TABLE)
                weight_at = key_weight
                if WEIGHTED:
                    weight_at = key_weight + element(table, b, weight_b, 4, batches, TABLE)
                skip = own if SELF else tl.full([], -1, tl.int64)
                origin, _invalid = nearest_key(
                    query_at, query_d, key_at, key_n, key_d, w_at, w_d, weight_at, weight_n, n, skip,
                    D, WEIGHTED, T, BLOCK_F,
                )  # fmt: skip
                top = far_top(
                    query_at, query_d, key_at, key_n, key_d, w_at, w_d, weight_at, weight_n, n, skip,
                    tl.maximum(origin, 0), D, WEIGHTED, T, BLOCK_F,
                )  # fmt: skip
                if SINGLE:  # a row that was near in the forward pass: its total is not relative to the top
                    own_shift = tl.load(state + 2 * (first + r))
                    square = own_score(
                        query_at, query_d, key_at, tl.maximum(origin, 0) * key_n, key_d, w_at, w_d, D, T
                    )
                    top = tl.where(own_shift == 0.0, square, top)
                tl.store(origins + first + r, origin)
                tl.store(tops + first + r, top)
