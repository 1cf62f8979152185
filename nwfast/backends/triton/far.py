"""The forward pass of far rows, and the ordered merge of sums over parts of the keys.

far_forward is called by a block that found far rows among its own: it takes them one by one, in float64, with a vector
of BLOCK_F keys: the nearest key, the largest score relative to it, the sums, and the tangents about that key.
"""

import triton
import triton.language as tl

from .terms import LN2, far_scores, far_top, nearest_key, own_score, scaled_offsets, unit_of


@triton.jit
def far_forward(
    far, i, row, query, query_m, query_d, key, key_n, key_d, value, value_n, value_c, w, w_d, key_weight, weight_n, n,
    chunk, out, lse, state, tangent_w, tangent_q,
    D: tl.constexpr, channels, WEIGHTED: tl.constexpr, SELF: tl.constexpr, BY_W: tl.constexpr, BY_Q: tl.constexpr,
    T: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Compute and write the rows marked in far [BLOCK_M], whose numbers are i and whose places in the result `row`."""
    for r in range(BLOCK_M):
        this = tl.arange(0, BLOCK_M) == r
        if tl.max((this & far).to(tl.int32), 0) > 0:
            own = tl.max(tl.where(this, i, 0), 0).to(tl.int64)
            place = tl.max(tl.where(this, row, 0), 0)
            far_row(
                own, place, query + own * query_m, query_d, key, key_n, key_d, value, value_n, value_c, w, w_d,
                key_weight, weight_n, n, chunk, out, lse, state, tangent_w, tangent_q,
                D, channels, WEIGHTED, SELF, BY_W, BY_Q, T, BLOCK_C, BLOCK_F,
            )  # fmt: skip


@triton.jit
def far_row(
    own, place, query, query_d, key, key_n, key_d, value, value_n, value_c, w, w_d, key_weight, weight_n, n,
    chunk, out, lse, state, tangent_w, tangent_q,
    D: tl.constexpr, channels, WEIGHTED: tl.constexpr, SELF: tl.constexpr, BY_W: tl.constexpr, BY_Q: tl.constexpr,
    T: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """One row, `query` being its pointer; the channels of `chunk`."""
    skip = own if SELF else tl.full([], -1, tl.int64)
    origin, invalid = nearest_key(
        query, query_d, key, key_n, key_d, w, w_d, key_weight, weight_n, n, skip, D, WEIGHTED, T, BLOCK_F
    )
    c = chunk * BLOCK_C + tl.arange(0, BLOCK_C)  # [BLOCK_C]
    has_channel = c < channels
    if origin < 0:
        nothing = tl.where(invalid, float("nan"), 0.0).to(tl.float64)  # also the derivatives of such a row
        tl.store(out + place * channels + c, tl.full([BLOCK_C], float("nan"), T), mask=has_channel)
        if chunk == 0:
            tl.store(lse + place, tl.where(invalid, float("nan"), float("-inf")).to(T))
            tl.store(state + 2 * place, nothing * 0.0)
            tl.store(state + 2 * place + 1, nothing)
            if BY_W:
                tl.store(tangent_w + place, nothing.to(T))
            if BY_Q:
                tl.store(tangent_q + place, nothing.to(T))
    else:
        top = far_top(
            query,
            query_d,
            key,
            key_n,
            key_d,
            w,
            w_d,
            key_weight,
            weight_n,
            n,
            skip,
            origin,
            D,
            WEIGHTED,
            T,
            BLOCK_F,
        )
        # Values relative to the nearest key's, which a row with all its weight there returns to the bit.
        centre = tl.load(value + origin * value_n + c.to(tl.int64) * value_c, mask=has_channel, other=0.0)
        centre = centre.to(T).to(tl.float64)
        centre = tl.where(tl.abs(centre) < float("inf"), centre, 0.0)
        total = tl.zeros([BLOCK_F], tl.float64)
        values = tl.zeros([BLOCK_C], tl.float64)
        for start in range(0, n, BLOCK_F):
            p = tl.exp2(
                far_scores(
                    query, query_d, key, key_n, key_d, w, w_d, key_weight, weight_n, n, skip, start, origin,
                    D, WEIGHTED, T, BLOCK_F,
                )
                - top
            )  # fmt: skip
            j = start + tl.arange(0, BLOCK_F).to(tl.int64)
            v = tl.load(
                value + j[:, None] * value_n + c.to(tl.int64)[None, :] * value_c,
                mask=(j < n)[:, None] & has_channel[None, :],
                other=0.0,
            ).to(T)  # [BLOCK_F, BLOCK_C]
            relative = tl.where(((j < n) & (j != skip))[:, None], v.to(tl.float64) - centre[None, :], 0.0)
            total += p
            values += tl.sum(p[:, None] * relative, 0)
        total = tl.sum(total, 0)
        mean = values / total
        tl.store(out + place * channels + c, (centre + mean).to(T), mask=has_channel)
        if chunk == 0:
            shift = own_score(query, query_d, key, origin * key_n, key_d, w, w_d, D, T) - top
            tl.store(lse + place, ((tl.log2(total) - shift) * LN2).to(T))
            tl.store(state + 2 * place, shift)
            tl.store(state + 2 * place + 1, total)
        if BY_W or BY_Q:
            far_tangents(
                place, query, key, key_n, value, value_n, w, key_weight, weight_n, n, skip, origin, top, total,
                tl.sum(centre, 0), tl.sum(mean, 0), tangent_w, tangent_q, WEIGHTED, BY_W, BY_Q, T, BLOCK_F,
            )  # fmt: skip


@triton.jit
def far_tangents(
    place, query, key, key_n, value, value_n, w, key_weight, weight_n, n, skip, origin, top, total, centre, mean,
    tangent_w, tangent_q, WEIGHTED: tl.constexpr, BY_W: tl.constexpr, BY_Q: tl.constexpr, T: tl.constexpr,
    BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Derivatives of out by w and by the query, for one feature and one channel, as moments about the nearest key."""
    q = tl.load(query).to(T).to(tl.float64)
    nearest = tl.load(key + origin * key_n).to(T).to(tl.float64)
    bandwidth = tl.load(w).to(tl.float64)
    unit = unit_of(bandwidth, tl.float64)
    by_w = tl.zeros([BLOCK_F], tl.float64)
    by_q = tl.zeros([BLOCK_F], tl.float64)
    for start in range(0, n, BLOCK_F):
        p = tl.exp2(
            far_scores(
                query,
                0,
                key,
                key_n,
                0,
                w,
                0,
                key_weight,
                weight_n,
                n,
                skip,
                start,
                origin,
                1,
                WEIGHTED,
                T,
                BLOCK_F,
            )
            - top
        )
        j = start + tl.arange(0, BLOCK_F).to(tl.int64)
        k = tl.load(key + j * key_n, mask=j < n, other=0.0).to(T).to(tl.float64)
        v = tl.load(value + j * value_n, mask=j < n, other=0.0).to(T).to(tl.float64)
        # Only keys with weight: an infinite offset is not one.
        part = tl.where(p > 0.0, p * ((v - centre) - mean) * scaled_offsets(nearest, k, unit), 0.0)
        by_q += part
        by_w += tl.where(p > 0.0, part * ((q - k) + (q - nearest)), 0.0)
    if BY_W:
        tl.store(tangent_w + place, (-(bandwidth / unit) * (tl.sum(by_w, 0) / total)).to(T))
    if BY_Q:
        tl.store(tangent_q + place, (-bandwidth * (bandwidth / unit * (tl.sum(by_q, 0) / total))).to(T))
