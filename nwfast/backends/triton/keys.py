"""The key side of the backward pass: gradients of key, value and key_weight in one transposed pass.

With p_ij = exp(s_ij) / sum_l a_l exp(s_il), recomputed from the saved state, and
u_ij = p_ij (<g_i, v_j> - <g_i, out_i> + g_lse_i),

    grad_value_j = a_j sum_i p_ij g_i,   grad_key_jf = a_j w_f^2 sum_i u_ij (q_if - k_jf),   grad_weight_j = sum_i u_ij

A program owns BLOCK_K keys of one batch element and walks over all queries, or over one of `splits` parts of them: then
results have a leading dimension of parts, to be summed in order. Near rows in tiles, far rows after them, one by one.
"""

import triton
import triton.language as tl

from .queries import products_of_channels
from .saved_rows import FLAG_ROWS
from .terms import (
    HALF_LOG2E,
    MOST_DOUBLE,
    MOST_FLOAT,
    SAFE_DOUBLE,
    SAFE_FLOAT,
    centre_of_values,
    inputs_of,
    lift_of,
    relative_scores,
    scaled_offsets,
    squared_distances,
    unit_of,
)

# What stands for infinite keys, and for those so far out: in bandwidths, beyond all near rows.
HUGE_FLOAT, HUGE_DOUBLE = tl.constexpr(2.0**126), tl.constexpr(2.0**1000)
LARGEST_FLOAT, LARGEST_DOUBLE = tl.constexpr(3.4028234663852886e38), tl.constexpr(1.7976931348623157e308)
# Terms of the gradients of weights may overflow, of either sign: they are added up a second time, over 2^top.
NEAR_TOP, NEAR_SCALE = (
    tl.constexpr(512.0),
    tl.constexpr(2.0**-512),
)  # of near rows, whose powers end at 2^1024


@triton.jit
def weight_gradient(total, scaled, top, lift, a, T: tl.constexpr):
    """The sum of terms, from scaled 2^top where a part of it is beyond all numbers; finite if the key's weight is 0."""
    largest: tl.constexpr = LARGEST_DOUBLE if T == tl.float64 else LARGEST_FLOAT  # noqa: SIM300
    beyond = scaled
    for part in tl.static_range(4):  # of 2^top: more is beyond all numbers for any sum
        beyond *= tl.exp2(tl.minimum(tl.maximum(top - 512.0 * part, 0.0), 512.0))
    gradient = tl.where(tl.abs(total) < float("inf"), total, beyond) * tl.exp2(lift)
    limited = tl.minimum(tl.maximum(gradient, -largest), largest)
    return tl.where((a == 0.0) & (gradient == gradient), limited, gradient).to(T)


@triton.jit
def single_keys_tile(
    k, v, own, queries, shifts, slopes, intercepts, scale, start, end, value_sum, offset_sum, weight_sum,
    WEIGHTED: tl.constexpr, SELF: tl.constexpr, MASKED: tl.constexpr, BY_KEY: tl.constexpr,
    BY_VALUE: tl.constexpr, BY_WEIGHT: tl.constexpr, T: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Add a tile of queries to the sums, all [BLOCK_K, BLOCK_M]; rows from the pointers of one batch element."""
    i = start + tl.arange(0, BLOCK_M)[None, :]  # [1, BLOCK_M]
    if MASKED:
        q = tl.load(queries + i, mask=i < end, other=0.0)
        shift = tl.load(shifts + i, mask=i < end, other=0.0)
        slope = tl.load(slopes + i, mask=i < end, other=0.0)
        intercept = tl.load(intercepts + i, mask=i < end, other=0.0)
    else:
        q = tl.load(queries + i)
        shift = tl.load(shifts + i)
        slope = tl.load(slopes + i)
        intercept = tl.load(intercepts + i)
    offset = q - k  # [BLOCK_K, BLOCK_M]
    scaled = offset * scale
    score = tl.fma(scaled * scaled, tl.full(scaled.shape, -HALF_LOG2E, T), shift + tl.zeros_like(scaled))
    if WEIGHTED or SELF:
        score = tl.minimum(score, MOST_FLOAT)  # a key that does not count may lie nearer than all that do
    p = tl.exp2(score)
    if SELF:
        p = tl.where(i == own, 0.0, p)
    if BY_VALUE:
        value_sum = tl.fma(p, slope + tl.zeros_like(p), value_sum)
    if BY_KEY or BY_WEIGHT:
        u = p * tl.fma(v + tl.zeros_like(p), slope + tl.zeros_like(p), intercept + tl.zeros_like(p))
        if BY_KEY:
            offset_sum = tl.fma(u, offset, offset_sum)
        if BY_WEIGHT:
            weight_sum += u
    return value_sum, offset_sum, weight_sum


@triton.jit
def single_keys(
    query, key, value, w, key_weight, low, high, grad_out, grad_lse, out, state,
    queries, shifts, slopes, intercepts, origins, tops, flags, grad_key, grad_value, grad_weight, table,
    m, n, batches, blocks, splits, part,
    query_b, query_m, key_b, key_n, value_b, value_n, w_b, weight_b, weight_n,
    WEIGHTED: tl.constexpr, SELF: tl.constexpr, TABLE: tl.constexpr, BY_LSE: tl.constexpr,
    CENTRED: tl.constexpr, BY_KEY: tl.constexpr, BY_VALUE: tl.constexpr, BY_WEIGHT: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """D = C = 1. Sums of a tile stay apart in registers and are added up, in float64, once every 128 tiles.

    A pair costs nine instructions: the rows have been prepared, and hold zeros where they do not count.
    """
    T: tl.constexpr = out.dtype.element_ty
    FLUSH: tl.constexpr = 128 * BLOCK_M
    pid = tl.program_id(0)
    block = pid % blocks
    b = (pid // blocks // splits).to(tl.int64)
    split = pid // blocks % splits
    query, key, value, w, key_weight = inputs_of(
        query, key, value, w, key_weight, b, query_b, key_b, value_b, w_b, weight_b, batches, table, WEIGHTED, TABLE
    )  # fmt: skip

    j = block * BLOCK_K + tl.arange(0, BLOCK_K)  # [BLOCK_K]
    counts = j < n
    k = tl.load(key + j.to(tl.int64) * key_n, mask=counts, other=0.0).to(T)
    # Where a key is infinite, so are its offsets, but not what stands for them: 0 times those is 0. So it must be for
    # what is no number in rows that nobody uses; where others use it, it is in their means.
    bandwidth = tl.load(w).to(T)
    unit = unit_of(bandwidth, T)
    HUGE: tl.constexpr = HUGE_DOUBLE if T == tl.float64 else HUGE_FLOAT  # noqa: SIM300
    k = tl.minimum(tl.maximum(tl.where(k == k, k, 0.0) * unit, -HUGE), HUGE)
    v = tl.load(value + j.to(tl.int64) * value_n, mask=counts, other=0.0).to(T)
    v = tl.where(tl.abs(v) < float("inf"), v, 0.0)
    if CENTRED:
        v -= centre_of_values(low, high, b, True)
    scale = bandwidth / unit
    value64 = tl.zeros([BLOCK_K], tl.float64)
    offset64 = tl.zeros([BLOCK_K], tl.float64)
    weight64 = tl.zeros([BLOCK_K], tl.float64)
    row = b * m
    begin = split * part
    end = tl.minimum(begin + part, m)
    whole = begin + (end - begin) // BLOCK_M * BLOCK_M
    for first in range(begin, end, FLUSH):
        value_sum = tl.zeros([BLOCK_K, BLOCK_M], T)
        offset_sum = tl.zeros([BLOCK_K, BLOCK_M], T)
        weight_sum = tl.zeros([BLOCK_K, BLOCK_M], T)
        for start in range(first, tl.minimum(first + FLUSH, whole), BLOCK_M):
            value_sum, offset_sum, weight_sum = single_keys_tile(
                k[:, None], v[:, None], j[:, None], queries + row, shifts + row, slopes + row, intercepts + row,
                scale, start, end, value_sum, offset_sum, weight_sum,
                WEIGHTED, SELF, False, BY_KEY, BY_VALUE, BY_WEIGHT, T, BLOCK_M,
            )  # fmt: skip
        if first + FLUSH >= end:  # noqa: SIM102
            if whole < end:
                value_sum, offset_sum, weight_sum = single_keys_tile(
                    k[:, None], v[:, None], j[:, None], queries + row, shifts + row, slopes + row, intercepts + row,
                    scale, whole, end, value_sum, offset_sum, weight_sum,
                    WEIGHTED, SELF, True, BY_KEY, BY_VALUE, BY_WEIGHT, T, BLOCK_M,
                )  # fmt: skip
        if BY_VALUE:
            value64 += tl.sum(value_sum.to(tl.float64), 1)
        if BY_KEY:
            offset64 += tl.sum(offset_sum.to(tl.float64), 1)
        if BY_WEIGHT:
            weight64 += tl.sum(weight_sum.to(tl.float64), 1)

    a = tl.full([BLOCK_K], 1.0, tl.float64)
    lift = tl.zeros([BLOCK_K], tl.float64)
    if WEIGHTED:
        a = tl.load(key_weight + j.to(tl.int64) * weight_n, mask=counts, other=0.0).to(T).to(tl.float64)
        lift = lift_of(a, tl.float64)
        lower = tl.exp2(-lift)
        value64, offset64, weight64 = value64 * lower, offset64 * lower, weight64 * lower
        a = a * tl.exp2(lift)
    c = tl.zeros([1], tl.int64)
    value_far, offset_far, weight_far, scaled_far, top_far = far_keys(
        j, lift, row + begin, row + end, row, query, query_m, 0, key, key_n, 0, value, value_n, 0, w, 0,
        key_weight, weight_n, n, 1, c, c, grad_out, grad_lse, out, state, origins, tops, flags,
        value64[:, None], offset64[:, None], weight64, weight64 * NEAR_SCALE,
        1, WEIGHTED, SELF, BY_LSE, BY_KEY or BY_WEIGHT, T, BLOCK_K, 1, 1,
    )  # fmt: skip
    at = (split * batches + b) * n + j  # [BLOCK_K], int64
    if BY_VALUE:
        tl.store(grad_value + at, (tl.sum(value_far, 1) * a).to(T), mask=counts)
    if BY_KEY:
        gradient = bandwidth.to(tl.float64) * (scale.to(tl.float64) * (tl.sum(offset_far, 1) * a))
        tl.store(grad_key + at, gradient.to(T), mask=counts)
    if BY_WEIGHT:
        tl.store(grad_weight + at, weight_gradient(weight_far, scaled_far, top_far, lift, a, T), mask=counts)


@triton.jit
def tiled_keys(
    query, key, value, w, key_weight, grad_out, grad_lse, out, state, shifts, inverses, pulls, origins, tops, flags,
    grad_key, grad_value, grad_weight, table,
    m, n, channels, batches, blocks, splits, part, chunks,
    query_b, query_m, query_d, key_b, key_n, key_d, value_b, value_n, value_c, w_b, w_d, weight_b, weight_n,
    D: tl.constexpr, WEIGHTED: tl.constexpr, SELF: tl.constexpr, TABLE: tl.constexpr, BY_LSE: tl.constexpr,
    BY_KEY: tl.constexpr, BY_VALUE: tl.constexpr, BY_WEIGHT: tl.constexpr, HALF_DOT: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Any D and C; BLOCK_C = 1 if C = 1. A program owns the channels and the features of its chunk.

    Where there are several chunks, of either, the caller asks for one kind of gradient at a time.
    """
    T: tl.constexpr = out.dtype.element_ty
    pid = tl.program_id(0)
    block = pid % blocks
    rest = pid // blocks
    chunk = rest % chunks
    split = rest // chunks % splits
    b = (rest // chunks // splits).to(tl.int64)
    query, key, value, w, key_weight = inputs_of(
        query, key, value, w, key_weight, b, query_b, key_b, value_b, w_b, weight_b, batches, table, WEIGHTED, TABLE
    )  # fmt: skip

    j = block * BLOCK_K + tl.arange(0, BLOCK_K)  # [BLOCK_K]
    counts = j < n
    key_at = j.to(tl.int64)[:, None] * key_n  # [BLOCK_K, 1]
    c = chunk * BLOCK_C + tl.arange(0, BLOCK_C).to(tl.int64)  # [BLOCK_C]
    f = chunk * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
    value_sum = tl.zeros([BLOCK_K, BLOCK_C], T)
    offset_sum = tl.zeros([BLOCK_K, BLOCK_D], T)
    weight_sum = tl.zeros([BLOCK_K], tl.float64)
    scaled_sum = tl.zeros([BLOCK_K], tl.float64)
    MOST: tl.constexpr = MOST_DOUBLE if T == tl.float64 else MOST_FLOAT  # noqa: SIM300
    SAFE: tl.constexpr = SAFE_DOUBLE if T == tl.float64 else SAFE_FLOAT  # noqa: SIM300
    a = tl.full([BLOCK_K], 1.0, tl.float64)
    lift = tl.zeros([BLOCK_K], T)
    if WEIGHTED:
        weight = tl.load(key_weight + j.to(tl.int64) * weight_n, mask=counts, other=0.0).to(T)
        lift = lift_of(weight, T)
        a = weight.to(tl.float64) * tl.exp2(lift).to(tl.float64)
    if BLOCK_C == 1:
        v = tl.load(value + j.to(tl.int64) * value_n, mask=counts, other=0.0).to(T)
    first_row = b * m
    begin = split * part
    end = tl.minimum(begin + part, m)
    for start in range(begin, end, BLOCK_M):
        i = start + tl.arange(0, BLOCK_M)  # [BLOCK_M]
        row = first_row + i
        inverse = tl.load(inverses + row, mask=i < end, other=0.0)
        near = inverse != 0.0
        shift = tl.load(shifts + row, mask=near, other=0.0)
        query_at = i.to(tl.int64)[None, :] * query_m  # [1, BLOCK_M]
        square = squared_distances(
            query, query_at, query_d, key, key_at, key_d, w, w_d, near[None, :], counts[:, None],
            D, T, BLOCK_K, BLOCK_M,
        )  # fmt: skip
        score = shift[None, :] - square  # [BLOCK_K, BLOCK_M]
        if WEIGHTED:
            score -= lift[:, None]
        p = tl.exp2(tl.minimum(score, MOST)) * inverse[None, :]
        keep = near[None, :] & counts[:, None]
        if SELF:
            keep = keep & (i[None, :] != j[:, None])
        p = tl.where(keep, p, 0.0)
        if BLOCK_C == 1:
            g = tl.load(grad_out + row, mask=near, other=0.0).to(T)
            if BY_VALUE:
                value_sum += tl.sum(p * g[None, :], 1)[:, None]
            if BY_KEY or BY_WEIGHT:
                mean = tl.load(out + row, mask=near, other=0.0)
                u = (v[:, None] - mean[None, :]) * g[None, :]
                if BY_LSE:
                    u += tl.load(grad_lse + row, mask=near, other=0.0).to(T)[None, :]
        else:
            if BY_VALUE:
                g = tl.load(
                    grad_out + row[:, None] * channels + c[None, :],
                    mask=near[:, None] & (c < channels)[None, :],
                    other=0.0,
                )  # [BLOCK_M, BLOCK_C]
                if HALF_DOT:
                    value_sum += tl.dot(p.to(value.dtype.element_ty), g.to(value.dtype.element_ty))
                else:
                    value_sum += tl.dot(p, g.to(T), input_precision="ieee", out_dtype=T)
            if BY_KEY or BY_WEIGHT:
                pull = tl.load(pulls + row, mask=near, other=0.0)
                product = products_of_channels(
                    value + j.to(tl.int64)[:, None] * value_n, value_c, counts[:, None],
                    grad_out + row[None, :] * channels, 1, near[None, :], channels,
                    value.dtype.element_ty, HALF_DOT, T, BLOCK_K, BLOCK_M, BLOCK_C,
                )  # fmt: skip
                u = product - pull[None, :]
        if BY_KEY or BY_WEIGHT:
            if BY_WEIGHT:
                if WEIGHTED and tl.max(shift, 0) > SAFE:
                    # Left-out keys may be so much nearer than others that their terms are beyond T.
                    lower = tl.where(keep, tl.exp2(tl.minimum(score, 0.0)) * inverse[None, :] * u, 0.0)
                    higher = tl.exp2(tl.maximum(score, 0.0).to(tl.float64))
                    wide = lower.to(tl.float64)
                    weight_sum += tl.sum(tl.where(lower == 0.0, 0.0, wide * higher), 1)
                    scaled_sum += tl.sum(tl.where(lower == 0.0, 0.0, wide * NEAR_SCALE * higher), 1)
                else:
                    terms = tl.sum(tl.where(keep, p * u, 0.0), 1).to(tl.float64)
                    weight_sum += terms
                    scaled_sum += terms * NEAR_SCALE
            u = tl.where(keep, p * u, 0.0)  # [BLOCK_K, BLOCK_M]
            if BY_KEY:
                for step in tl.static_range(BLOCK_D):
                    if D > BLOCK_D or step < D:
                        feature = chunk * BLOCK_D + step
                        there = tl.full([1, 1], feature, tl.int32) < D
                        q = tl.load(
                            query + query_at + feature * query_d, mask=near[None, :] & there, other=0.0
                        ).to(T)
                        k = tl.load(
                            key + key_at + feature * key_d, mask=counts[:, None] & there, other=0.0
                        ).to(T)
                        unit = unit_of(
                            tl.load(w + feature * w_d + tl.zeros([1, 1], tl.int32), mask=there, other=1.0), T
                        )
                        offset = tl.where(u == 0.0, 0.0, scaled_offsets(q, k, unit))  # which may be infinite
                        moment = tl.sum(u * offset, 1)[:, None]  # [BLOCK_K, 1]
                        offset_sum += tl.where((f == feature)[None, :], moment, 0.0)

    value_far, offset_far, weight_far, scaled_far, top_far = far_keys(
        j, lift.to(tl.float64), first_row + begin, first_row + end, first_row,
        query, query_m, query_d, key, key_n, key_d,
        value, value_n, value_c, w, w_d, key_weight, weight_n, n, channels, c, f,
        grad_out, grad_lse, out, state, origins, tops, flags, value_sum, offset_sum, weight_sum, scaled_sum,
        D, WEIGHTED, SELF, BY_LSE, BY_KEY or BY_WEIGHT, T, BLOCK_K, BLOCK_C, BLOCK_D,
    )  # fmt: skip
    at = (split * batches + b) * n + j  # [BLOCK_K], int64
    if BY_VALUE:
        tl.store(
            grad_value + at[:, None] * channels + c[None, :],
            (value_far * a[:, None]).to(T),
            mask=counts[:, None] & (c < channels)[None, :],
        )
    if BY_KEY:
        bandwidth = tl.load(w + f * w_d, mask=f < D, other=0.0).to(tl.float64)[None, :]  # [1, BLOCK_D]
        by_unit = bandwidth / unit_of(bandwidth, T).to(tl.float64)
        gradient = bandwidth * (by_unit * (offset_far * a[:, None]))
        tl.store(
            grad_key + at[:, None] * D + f[None, :], gradient.to(T), mask=counts[:, None] & (f < D)[None, :]
        )
    if BY_WEIGHT:  # noqa: SIM102
        if chunk == 0:
            by_weight = weight_gradient(weight_far, scaled_far, top_far, lift.to(tl.float64), a, T)
            tl.store(grad_weight + at, by_weight, mask=counts)


@triton.jit
def far_keys(
    j, lift, first, last, first_row, query, query_m, query_d, key, key_n, key_d, value, value_n, value_c, w, w_d,
    key_weight, weight_n, n, channels, c, f, grad_out, grad_lse, out, state, origins, tops, flags,
    value_sum, offset_sum, weight_sum, scaled_sum,
    D: tl.constexpr, WEIGHTED: tl.constexpr, SELF: tl.constexpr, BY_LSE: tl.constexpr, BY_U: tl.constexpr,
    T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The sums with what the far ones of the rows first..last add: (BLOCK_K, BLOCK_C), (BLOCK_K, BLOCK_D), (BLOCK_K,).

    And that of weights over 2^top, with top, which is NEAR_TOP in what is given. Sums are those of weights that are
    2^lift times as large, of offsets times `unit_of`. Flags of FLAG_ROWS rows each are looked at 256 at once.
    """
    top_sum = tl.zeros_like(scaled_sum) + NEAR_TOP
    last_flag = (last - 1) // FLAG_ROWS
    for flag in range(first // FLAG_ROWS, last_flag + 1, 256):
        many = flag + tl.arange(0, 256)
        if tl.max(tl.load(flags + many, mask=many <= last_flag, other=0), 0) > 0:
            for here in range(flag, tl.minimum(flag + 256, last_flag + 1)):
                if tl.load(flags + here) > 0:
                    for row in range(
                        tl.maximum(here * FLAG_ROWS, first), tl.minimum(here * FLAG_ROWS + FLAG_ROWS, last)
                    ):
                        origin = tl.load(origins + row)
                        if origin >= 0:
                            p, u, pull, exponent = far_weights(
                                j, lift, row, row - first_row, origin, query + (row - first_row) * query_m, query_d,
                                key, key_n, key_d, value, value_n, value_c, w, w_d, key_weight, weight_n, n, channels,
                                grad_out, grad_lse, out, state, tops,
                                D, WEIGHTED, SELF, BY_LSE, BY_U, T, BLOCK_K,
                            )  # fmt: skip
                            kind: tl.constexpr = value_sum.dtype
                            g = tl.load(grad_out + row * channels + c, mask=c < channels, other=0.0)
                            value_sum += (p[:, None] * g.to(tl.float64)[None, :]).to(kind)
                            weight_sum += u
                            higher = tl.maximum(top_sum, tl.where(pull == 0.0, top_sum, exponent))
                            term = tl.where(pull == 0.0, 0.0, pull * tl.exp2(exponent - higher))
                            scaled_sum = scaled_sum * tl.exp2(top_sum - higher) + term
                            top_sum = higher
                            q = tl.load(
                                query + (row - first_row) * query_m + f * query_d, mask=f < D, other=0.0
                            ).to(T).to(tl.float64)  # fmt: skip
                            k = tl.load(
                                key + j.to(tl.int64)[:, None] * key_n + f[None, :] * key_d,
                                mask=(j < n)[:, None] & (f < D)[None, :],
                                other=0.0,
                            ).to(T)
                            unit = unit_of(tl.load(w + f * w_d, mask=f < D, other=1.0), T).to(tl.float64)
                            moment = u[:, None] * scaled_offsets(q[None, :], k.to(tl.float64), unit[None, :])
                            offset_sum += tl.where(u[:, None] == 0.0, 0.0, moment).to(kind)
    return value_sum, offset_sum, weight_sum, scaled_sum, top_sum


@triton.jit
def far_weights(
    j, lift, row, own, origin, query, query_d, key, key_n, key_d, value, value_n, value_c, w, w_d,
    key_weight, weight_n, n, channels, grad_out, grad_lse, out, state, tops,
    D: tl.constexpr, WEIGHTED: tl.constexpr, SELF: tl.constexpr, BY_LSE: tl.constexpr, BY_U: tl.constexpr,
    T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Weights p and terms u of one far row for the keys j, [BLOCK_K], without the keys' own weights, by 2^-lift.

    And what u is but for a power of 2, with its exponent.
    """
    counts = j < n
    if SELF:
        counts = counts & (j != own)
    at = j.to(tl.int64)
    score = relative_scores(
        query, query_d, key, at * key_n, origin * key_n, key_d, w, w_d, counts, D, T, BLOCK_K
    )
    # The top has the log-weights in it that these scores lack.
    exponent = score - tl.load(tops + row) - lift
    # In two factors: a left-out key's may overflow where its product with a small pull does not.
    root = tl.where(counts, tl.exp2(0.5 * tl.minimum(exponent, 3.0 * MOST_DOUBLE)), 0.0)
    inverse = 1.0 / tl.load(state + 2 * row + 1)
    p = root * root * inverse
    u = tl.zeros([BLOCK_K], tl.float64)
    pull = tl.zeros([BLOCK_K], tl.float64)
    if BY_U:
        for c in range(channels):
            g = tl.load(grad_out + row * channels + c).to(tl.float64)
            mean = tl.load(out + row * channels + c).to(tl.float64)
            v = tl.load(value + at * value_n + c * value_c, mask=counts, other=0.0).to(T).to(tl.float64)
            u += g * (v - mean)
        if BY_LSE:
            u += tl.load(grad_lse + row).to(tl.float64)
        there = (p > 0.0) & (u != 0.0)
        pull = tl.where(there, inverse * u, 0.0)
        u = tl.where(there, root * inverse * u * root, 0.0)
    return p, u, pull, exponent
