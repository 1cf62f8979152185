"""The query side of the backward pass: gradients of query and w, from saved tangents or from sums over the keys.

With p_ij the weights and u_ij = p_ij (<g_i, v_j> - <g_i, out_i> + g_lse_i),

    grad_query_if = -w_f^2 sum_j u_ij (q_if - k_jf),     grad_w_f = -w_f sum_ij u_ij (q_if - k_jf)^2

A program owns BLOCK_M queries of one batch element, and BLOCK_D features, and walks over all keys. Its part of the
gradient of w goes to partial_w (batches, blocks, D), to be summed in order. Where the forward pass saved tangents, the
derivatives of out by query and w, the gradients are products with them.
"""

import triton
import triton.language as tl

from .terms import (
    MOST_DOUBLE,
    MOST_FLOAT,
    far_scores,
    inputs_of,
    lift_of,
    nearest_key,
    own_score,
    scaled_offsets,
    squared_distances,
    unit_of,
)


@triton.jit
def products_of_channels(
    left, left_c, rows, right, right_c, columns, channels, V: tl.constexpr, HALF_DOT: tl.constexpr, T: tl.constexpr,
    SHAPE_M: tl.constexpr, SHAPE_N: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Products left @ right^T over all channels, [SHAPE_M, SHAPE_N]: of values and gradients, for each pair.

    left [SHAPE_M, 1] and right [1, SHAPE_N] point at channel 0 of each row; rows and columns say which exist.
    """
    product = tl.zeros([SHAPE_M, SHAPE_N], T)
    for first in range(0, channels, BLOCK_C):
        c = first + tl.arange(0, BLOCK_C).to(tl.int64)  # [BLOCK_C]
        x = tl.load(left + c[None, :] * left_c, mask=rows & (c < channels)[None, :], other=0.0)
        y = tl.load(right + c[:, None] * right_c, mask=columns & (c < channels)[:, None], other=0.0)
        if HALF_DOT:
            product += tl.dot(x.to(V), y.to(V))
        else:
            product += tl.dot(x.to(T), y.to(T), input_precision="ieee", out_dtype=T)
    return product


@triton.jit
def query_side(
    query, key, value, w, key_weight, grad_out, grad_lse, out, state, shifts, inverses, pulls, origins, tops,
    grad_query, partial_w, table,
    m, n, channels, batches, blocks,
    query_b, query_m, query_d, key_b, key_n, key_d, value_b, value_n, value_c, w_b, w_d, weight_b, weight_n,
    D: tl.constexpr, WEIGHTED: tl.constexpr, SELF: tl.constexpr, TABLE: tl.constexpr, BY_LSE: tl.constexpr,
    BY_W: tl.constexpr, BY_Q: tl.constexpr, HALF_DOT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """BLOCK_C = 1 if C = 1."""
    T: tl.constexpr = out.dtype.element_ty
    chunks: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    pid = tl.program_id(0)
    block = pid % blocks
    chunk = pid // blocks % chunks
    b = (pid // blocks // chunks).to(tl.int64)
    query, key, value, w, key_weight = inputs_of(
        query, key, value, w, key_weight, b, query_b, key_b, value_b, w_b, weight_b, batches, table, WEIGHTED, TABLE
    )  # fmt: skip

    i = block * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    exists = i < m
    row = b * m + i  # [BLOCK_M], int64
    shift = tl.load(shifts + row, mask=exists, other=0.0)
    inverse = tl.load(inverses + row, mask=exists, other=0.0)
    pull = tl.load(pulls + row, mask=exists, other=0.0)
    near = exists & (inverse != 0.0)
    query_at = i.to(tl.int64)[:, None] * query_m  # [BLOCK_M, 1]
    f = chunk * BLOCK_D + tl.arange(0, BLOCK_D)  # [BLOCK_D]
    MOST: tl.constexpr = MOST_DOUBLE if T == tl.float64 else MOST_FLOAT  # noqa: SIM300
    firsts = tl.zeros([BLOCK_M, BLOCK_D], T)
    seconds = tl.zeros([BLOCK_M, BLOCK_D], T)
    if BLOCK_C == 1:
        g = tl.load(grad_out + row, mask=near, other=0.0).to(T)
        mean = tl.load(out + row, mask=near, other=0.0)
        through_lse = tl.zeros([BLOCK_M], T)
        if BY_LSE:
            through_lse = tl.load(grad_lse + row, mask=near, other=0.0).to(T)
    for start in range(0, n, BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        counts = j < n
        key_at = j.to(tl.int64)[None, :] * key_n  # [1, BLOCK_N]
        square = squared_distances(
            query, query_at, query_d, key, key_at, key_d, w, w_d, near[:, None], counts[None, :],
            D, T, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        score = shift[:, None] - square  # [BLOCK_M, BLOCK_N]
        if WEIGHTED:
            a = tl.load(key_weight + j.to(tl.int64) * weight_n, mask=counts, other=0.0).to(T)
            lift = lift_of(a, T)
            score -= lift[None, :]
        p = tl.exp2(tl.minimum(score, MOST)) * inverse[:, None]
        if WEIGHTED:
            p = p * (a * tl.exp2(lift))[None, :]
        keep = counts[None, :] & near[:, None]
        if SELF:
            keep = keep & (j[None, :] != i[:, None])
        if BLOCK_C == 1:
            v = tl.load(value + j.to(tl.int64) * value_n, mask=counts, other=0.0).to(T)
            u = p * tl.fma(
                g[:, None] + tl.zeros_like(p),
                v[None, :] - mean[:, None],
                through_lse[:, None] + tl.zeros_like(p),
            )
        else:
            product = products_of_channels(
                grad_out + row[:, None] * channels, 1, near[:, None],
                value + j.to(tl.int64)[None, :] * value_n, value_c, counts[None, :], channels,
                value.dtype.element_ty, HALF_DOT, T, BLOCK_M, BLOCK_N, BLOCK_C,
            )  # fmt: skip
            u = p * (product - pull[:, None])
        u = tl.where(keep, u, 0.0)
        for step in tl.static_range(BLOCK_D):
            if chunks > 1 or step < D:
                feature = chunk * BLOCK_D + step
                there = tl.full([1, 1], feature, tl.int32) < D
                q = tl.load(query + query_at + feature * query_d, mask=near[:, None] & there, other=0.0).to(T)
                k = tl.load(key + key_at + feature * key_d, mask=counts[None, :] & there, other=0.0).to(T)
                # Which may be infinite, or that of a key left out. One in bandwidths, so that the product is beyond T
                # only where the gradient is.
                unit = unit_of(
                    tl.load(w + feature * w_d + tl.zeros([1, 1], tl.int32), mask=there, other=1.0), T
                )
                offset = tl.where(u == 0.0, 0.0, 0.5 * q - 0.5 * k)
                moment = tl.where(u == 0.0, 0.0, u * scaled_offsets(q, k, unit))
                first = tl.sum(moment, 1)[:, None]  # [BLOCK_M, 1]
                second = tl.sum(moment * offset, 1)[:, None]
                here = (f == feature)[None, :]
                firsts += tl.where(here, first, 0.0)
                seconds += tl.where(here, second, 0.0)

    bandwidth = tl.load(w + f * w_d, mask=f < D, other=0.0).to(tl.float64)  # [BLOCK_D]
    by_unit = bandwidth / unit_of(bandwidth, T).to(tl.float64)
    if BY_Q:
        gradient = -bandwidth[None, :] * (by_unit[None, :] * firsts.to(tl.float64))
        tl.store(
            grad_query + row[:, None] * D + f[None, :],
            gradient.to(T),
            mask=exists[:, None] & (f < D)[None, :],
        )
    sums = tl.sum(seconds.to(tl.float64), 0)  # [BLOCK_D]
    origin = tl.load(origins + row, mask=exists, other=-1)
    if tl.max(origin, 0) >= 0:
        tl.debug_barrier()  # a far row's gradient, written as 0 above, is written again below
        for r in range(BLOCK_M):
            nearest = tl.max(tl.where(tl.arange(0, BLOCK_M) == r, origin, -1), 0)
            if nearest >= 0:
                own = (block * BLOCK_M + r).to(tl.int64)
                top = tl.load(tops + b * m + own)
                firsts_far, seconds_far = far_query(
                    own, b * m + own, nearest, top, query + own * query_m, query_d, key, key_n, key_d,
                    value, value_n, value_c, w, w_d, key_weight, weight_n, n, channels,
                    grad_out, grad_lse, out, state, f,
                    D, WEIGHTED, SELF, BY_LSE, T, BLOCK_D, BLOCK_F,
                )  # fmt: skip
                if BY_Q:
                    far_gradient = -bandwidth * (by_unit * firsts_far)
                    tl.store(grad_query + (b * m + own) * D + f, far_gradient.to(T), mask=f < D)
                sums += seconds_far
    if BY_W:
        tl.store(partial_w + (b * blocks + block) * D + f, -by_unit * (2.0 * sums), mask=f < D)


@triton.jit
def far_query(
    own, row, origin, top, query, query_d, key, key_n, key_d, value, value_n, value_c, w, w_d, key_weight, weight_n,
    n, channels, grad_out, grad_lse, out, state, f,
    D: tl.constexpr, WEIGHTED: tl.constexpr, SELF: tl.constexpr, BY_LSE: tl.constexpr, T: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Both sums over keys of one far row, [BLOCK_D], of offsets and half their squares times `unit_of`.

    What <g, v - out> weighs is taken relative to the nearest key, `origin`, as scores are; `top` is what the state's
    shift is in them.
    """
    skip = own if SELF else tl.full([], -1, tl.int64)
    total = tl.load(state + 2 * row + 1)
    through_lse = total * 0.0
    if BY_LSE:
        through_lse = tl.load(grad_lse + row).to(tl.float64)
    firsts = tl.zeros([BLOCK_D], tl.float64)
    seconds = tl.zeros([BLOCK_D], tl.float64)
    for start in range(0, n, BLOCK_F):
        p = tl.exp2(
            far_scores(
                query, query_d, key, key_n, key_d, w, w_d, key_weight, weight_n, n, skip, start, origin,
                D, WEIGHTED, T, BLOCK_F,
            )
            - top
        )  # fmt: skip
        p = p / total  # [BLOCK_F]
        j = start + tl.arange(0, BLOCK_F).to(tl.int64)
        pull = tl.zeros([BLOCK_F], tl.float64)
        for c in range(channels):
            g = tl.load(grad_out + row * channels + c).to(tl.float64)
            mean = tl.load(out + row * channels + c).to(tl.float64)
            v = tl.load(value + j * value_n + c * value_c, mask=(j < n) & (j != skip), other=0.0)
            pull += g * (v.to(T).to(tl.float64) - mean)
        for step in tl.static_range(BLOCK_D):
            feature = tl.min(f, 0) + step
            if feature < D:
                q = tl.load(query + feature * query_d).to(T).to(tl.float64)
                nearest = tl.load(key + origin * key_n + feature * key_d).to(T).to(tl.float64)
                k = tl.load(key + j * key_n + feature * key_d, mask=j < n, other=0.0).to(T).to(tl.float64)
                unit = unit_of(tl.load(w + feature * w_d), T).to(tl.float64)
                by_value = tl.where(pull == 0.0, 0.0, pull * scaled_offsets(nearest, k, unit))
                by_lse = tl.where(through_lse == 0.0, 0.0, through_lse * scaled_offsets(q, k, unit))
                first = tl.where(p > 0.0, p * (by_value + by_lse), 0.0)
                half, half_nearest = 0.5 * q - 0.5 * k, 0.5 * q - 0.5 * nearest
                second = tl.where(
                    p > 0.0, p * (by_value * half + by_value * half_nearest + by_lse * half), 0.0
                )
                firsts += tl.where(f == feature, tl.sum(first, 0), 0.0)
                seconds += tl.where(f == feature, tl.sum(second, 0), 0.0)
    return firsts, seconds


@triton.jit
def tangent_products(
    query, key, value, w, key_weight, grad_out, tangent_w, tangent_q, out, state, grad_query, partial_w, table,
    m, n, batches, blocks,
    query_b, query_m, key_b, key_n, value_b, value_n, w_b, weight_b, weight_n,
    WEIGHTED: tl.constexpr, SELF: tl.constexpr, TABLE: tl.constexpr, BY_W: tl.constexpr, BY_Q: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Gradients of query and w for D = C = 1: products with the tangents; partial_w (batches, blocks).

    A tangent may be beyond all numbers where its product with the cotangent is not: such rows are summed as far ones.
    """
    T: tl.constexpr = out.dtype.element_ty
    pid = tl.program_id(0)
    block = pid % blocks
    b = (pid // blocks).to(tl.int64)
    i = block * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    exists = i < m
    row = b * m + i
    total = tl.load(state + 2 * row + 1, mask=exists, other=0.0)
    # A row without keys is NaN, and what comes back to it may be.
    g = tl.load(grad_out + row, mask=exists & (total != 0.0), other=0.0)
    beyond = tl.zeros([BLOCK_M], tl.int1)
    if BY_Q:
        by_query = tl.load(tangent_q + row, mask=exists & (g != 0.0), other=0.0)
        beyond = tl.abs(by_query) == float("inf")
        tl.store(grad_query + row, g.to(T) * by_query, mask=exists)
    sum_w = tl.zeros([], tl.float64)
    if BY_W:
        by_w = tl.load(tangent_w + row, mask=exists & (g != 0.0), other=0.0)
        beyond = beyond | (tl.abs(by_w) == float("inf"))
        sum_w = tl.sum(tl.where(beyond, 0.0, g.to(tl.float64) * by_w.to(tl.float64)), 0)
    if tl.max(beyond.to(tl.int32), 0) > 0:
        tl.debug_barrier()  # what was written above is written again below
        query, key, value, w, key_weight = inputs_of(
            query, key, value, w, key_weight, b, query_b, key_b, value_b, w_b, weight_b, batches, table, WEIGHTED, TABLE
        )  # fmt: skip
        bandwidth = tl.load(w).to(tl.float64)
        by_unit = bandwidth / unit_of(bandwidth, T).to(tl.float64)
        f = tl.arange(0, 1)
        for r in range(BLOCK_M):
            if tl.max(((tl.arange(0, BLOCK_M) == r) & beyond).to(tl.int32), 0) > 0:
                own = (block * BLOCK_M + r).to(tl.int64)
                skip = own if SELF else tl.full([], -1, tl.int64)
                at = query + own * query_m
                origin, _invalid = nearest_key(
                    at, 0, key, key_n, 0, w, 0, key_weight, weight_n, n, skip, 1, WEIGHTED, T, BLOCK_F
                )
                origin = tl.maximum(origin, 0)
                top = own_score(at, 0, key, origin * key_n, 0, w, 0, 1, T) - tl.load(
                    state + 2 * (b * m + own)
                )
                firsts, seconds = far_query(
                    own, b * m + own, origin, top, at, 0, key, key_n, 0, value, value_n, 0, w, 0, key_weight, weight_n,
                    n, 1, grad_out, grad_out, out, state, f,
                    1, WEIGHTED, SELF, False, T, 1, BLOCK_F,
                )  # fmt: skip
                if BY_Q:
                    gradient = -bandwidth * (by_unit * tl.sum(firsts, 0))
                    tl.store(grad_query + b * m + own, gradient.to(T))
                sum_w += -by_unit * (2.0 * tl.sum(seconds, 0))
    if BY_W:
        tl.store(partial_w + pid, sum_w)
