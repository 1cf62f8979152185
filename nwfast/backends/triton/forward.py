"""The forward kernels: out, lse, state and tangents of blocks of queries against tiles of keys.

A program owns BLOCK_M queries of one batch element (and up to BLOCK_C channels) and walks over the keys, or over one
of `splits` parts of them, whose sums `merge.py` adds in order. Near rows first, then those that turn out to be far.

* single_forward: one feature, one channel. No shift and no running maximum: the sums themselves tell whether a row
  was near enough for 2^-(w d)^2 as it stands. Sums of a tile stay apart in registers and are added across keys, in
  float64, once every FLUSH tiles: a pair costs seven instructions, one of them the exponential; twelve with tangents.
* tiled_forward: any number of both. Online softmax: the running maximum starts at a finite floor, and a tile that
  raises it rescales the sums (Milakov and Gimelshein 2018, Dao et al. 2022). Channels by tl.dot.
"""

import triton
import triton.language as tl

from .far import far_forward
from .terms import HALF_LOG2E, LN2, centre_of_values, inputs_of, squared_distances

# Near rows of the single kernel: what underflows (below 2^-126) is then below the rounding of the sum.
LEAST_TOTAL = tl.constexpr(2.0**-40)
MOST_TOTAL = tl.constexpr(2.0**100)
MOST_WEIGHT = tl.constexpr(2.0**30)
# The unit of moments of offsets is 1/w, or this where w is next to 0, so that squares do not underflow.
LEAST_SCALE = tl.constexpr(2.0**-50)
# Below all scores, and finite, so that a row without keys never computes inf - inf.
FLOOR = tl.constexpr(-(2.0**120))
FLUSH = tl.constexpr(128)
# The squared distance to a far row's nearest key, in units of the base-2 score: so many roundings a near row may cost.
FAR_FLOAT, FAR_DOUBLE = tl.constexpr(256.0), tl.constexpr(96.0)


@triton.jit
def single_tile(
    q, skip, key, key_n, value, value_n, key_weight, weight_n, scale, by_square, centre, start, n,
    total, values, offsets, value_offsets, squares, value_squares, heaviest,
    WEIGHTED: tl.constexpr, SELF: tl.constexpr, MASKED: tl.constexpr, BY_W: tl.constexpr, BY_Q: tl.constexpr,
    T: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Add a tile of keys to the sums, all [BLOCK_M, BLOCK_N]."""
    j = start + tl.arange(0, BLOCK_N)[None, :]  # [1, BLOCK_N]
    at = j.to(tl.int64)
    if MASKED:
        k = tl.load(key + at * key_n, mask=j < n, other=0.0).to(T)
        v = tl.load(value + at * value_n, mask=j < n, other=0.0).to(T) - centre
    else:
        k = tl.load(key + at * key_n).to(T)  # [1, BLOCK_N]
        v = tl.load(value + at * value_n).to(T) - centre
    scaled = (q - k) * scale  # [BLOCK_M, BLOCK_N]
    square = scaled * scaled
    p = tl.exp2(square * by_square)
    if MASKED:
        p = tl.where(j < n, p, 0.0)
    if SELF:
        p = tl.where(j == skip, 0.0, p)
    if WEIGHTED:
        if MASKED:
            a = tl.load(key_weight + at * weight_n, mask=j < n, other=0.0).to(T)
        else:
            a = tl.load(key_weight + at * weight_n).to(T)
        a = tl.where(a >= 0.0, a, float("nan"))
        heaviest = tl.maximum(heaviest, a)
        p = p * a
    total += p
    if BY_W or BY_Q:
        part = p * v
        values += part
        if BY_Q:
            offsets = tl.fma(p, scaled, offsets)
            value_offsets = tl.fma(part, scaled, value_offsets)
        if BY_W:
            # A square that overflows makes this NaN, and the row far.
            squares = tl.fma(p, square, squares)
            value_squares = tl.fma(part, square, value_squares)
    else:
        values = tl.fma(p, v + tl.zeros_like(p), values)
    return total, values, offsets, value_offsets, squares, value_squares, heaviest


@triton.jit
def single_forward(
    query, key, value, w, key_weight, low, high, out, lse, state, tangent_w, tangent_q, partial, table,
    m, n, batches, blocks, splits, part,
    query_b, query_m, key_b, key_n, value_b, value_n, w_b, weight_b, weight_n,
    WEIGHTED: tl.constexpr, SELF: tl.constexpr, TABLE: tl.constexpr, SPLIT: tl.constexpr,
    CENTRED: tl.constexpr, BY_W: tl.constexpr, BY_Q: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_F: tl.constexpr,
):  # fmt: skip
    """D = C = 1. `part` keys (a multiple of BLOCK_N) a split."""
    T: tl.constexpr = out.dtype.element_ty
    pid = tl.program_id(0)
    block = pid % blocks
    b = (pid // blocks // splits).to(tl.int64)
    split = pid // blocks % splits
    query, key, value, w, key_weight = inputs_of(
        query, key, value, w, key_weight, b, query_b, key_b, value_b, w_b, weight_b, batches, table, WEIGHTED, TABLE
    )  # fmt: skip

    i = block * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    exists = i < m
    q = tl.load(query + i.to(tl.int64) * query_m, mask=exists, other=0.0).to(T)[:, None]  # [BLOCK_M, 1]
    own = i[:, None]
    scale = tl.load(w).to(T)
    by_square = tl.full([1, 1], -HALF_LOG2E, T)
    if BY_W or BY_Q:
        # Offsets in the unit of their moments; where that is not 1/w, the score makes up for it.
        ratio = tl.where(tl.abs(scale) >= LEAST_SCALE, 1.0, scale / LEAST_SCALE)
        scale = tl.maximum(tl.abs(scale), LEAST_SCALE)
        by_square = by_square * (ratio * ratio)
    centre = tl.zeros([1, 1], T)
    if CENTRED:
        centre += centre_of_values(low, high, b, True)

    total64 = tl.zeros([BLOCK_M], tl.float64)
    values64 = tl.zeros([BLOCK_M], tl.float64)
    offsets64 = tl.zeros([BLOCK_M], tl.float64)
    value_offsets64 = tl.zeros([BLOCK_M], tl.float64)
    squares64 = tl.zeros([BLOCK_M], tl.float64)
    value_squares64 = tl.zeros([BLOCK_M], tl.float64)
    heaviest = tl.zeros([1, BLOCK_N], T)
    begin = split * part
    end = tl.minimum(begin + part, n)
    whole = begin + (end - begin) // BLOCK_N * BLOCK_N
    for first in range(begin, end, FLUSH * BLOCK_N):
        total = tl.zeros([BLOCK_M, BLOCK_N], T)
        values = tl.zeros([BLOCK_M, BLOCK_N], T)
        offsets = tl.zeros([BLOCK_M, BLOCK_N], T)
        value_offsets = tl.zeros([BLOCK_M, BLOCK_N], T)
        squares = tl.zeros([BLOCK_M, BLOCK_N], T)
        value_squares = tl.zeros([BLOCK_M, BLOCK_N], T)
        for start in range(first, tl.minimum(first + FLUSH * BLOCK_N, whole), BLOCK_N):
            total, values, offsets, value_offsets, squares, value_squares, heaviest = single_tile(
                q, own, key, key_n, value, value_n, key_weight, weight_n, scale, by_square, centre, start, n,
                total, values, offsets, value_offsets, squares, value_squares, heaviest,
                WEIGHTED, SELF, False, BY_W, BY_Q, T, BLOCK_N,
            )  # fmt: skip
        if first + FLUSH * BLOCK_N >= end:  # noqa: SIM102
            if whole < end:
                total, values, offsets, value_offsets, squares, value_squares, heaviest = single_tile(
                    q, own, key, key_n, value, value_n, key_weight, weight_n, scale, by_square, centre, whole, n,
                    total, values, offsets, value_offsets, squares, value_squares, heaviest,
                    WEIGHTED, SELF, True, BY_W, BY_Q, T, BLOCK_N,
                )  # fmt: skip
        # Over the columns in float32, for want of registers: six more roundings, each of a sum of many terms.
        total64 += tl.sum(total, 1).to(tl.float64)
        values64 += tl.sum(values, 1).to(tl.float64)
        if BY_Q:
            offsets64 += tl.sum(offsets, 1).to(tl.float64)
            value_offsets64 += tl.sum(value_offsets, 1).to(tl.float64)
        if BY_W:
            squares64 += tl.sum(squares, 1).to(tl.float64)
            value_squares64 += tl.sum(value_squares, 1).to(tl.float64)
    if WEIGHTED:
        # Too heavy a key would lift what underflowed: such rows are far.
        total64 = tl.where(tl.max(heaviest, 1) <= MOST_WEIGHT, total64, float("nan"))

    row = b * m + i  # [BLOCK_M], int64
    if SPLIT:
        to = partial + (split * batches * m + row) * 6
        tl.store(to, total64, mask=exists)
        tl.store(to + 1, values64, mask=exists)
        tl.store(to + 2, offsets64, mask=exists)
        tl.store(to + 3, value_offsets64, mask=exists)
        tl.store(to + 4, squares64, mask=exists)
        tl.store(to + 5, value_squares64, mask=exists)
    else:
        far = single_store(
            total64, values64, offsets64, value_offsets64, squares64, value_squares64, row, exists, w,
            low + b, high + b, out, lse, state, tangent_w, tangent_q, CENTRED, BY_W, BY_Q, T,
        )  # fmt: skip
        if tl.max(far.to(tl.int32), 0) > 0:
            far_forward(
                far, i, row, query, query_m, 0, key, key_n, 0, value, value_n, 0, w, 0, key_weight, weight_n, n,
                0, out, lse, state, tangent_w, tangent_q,
                1, 1, WEIGHTED, SELF, BY_W, BY_Q, T, BLOCK_M, 1, BLOCK_F,
            )  # fmt: skip


@triton.jit
def single_store(
    total, values, offsets, value_offsets, squares, value_squares, row, exists, w, low, high,
    out, lse, state, tangent_w, tangent_q,
    CENTRED: tl.constexpr, BY_W: tl.constexpr, BY_Q: tl.constexpr, T: tl.constexpr,
):  # fmt: skip
    """Write the results of near rows from their sums, all [BLOCK_M]; return which rows are far."""
    finite = (
        tl.abs(values) + tl.abs(offsets) + tl.abs(value_offsets) + tl.abs(squares) + tl.abs(value_squares)
    )
    near = (total >= LEAST_TOTAL) & (total <= MOST_TOTAL) & (finite <= MOST_TOTAL)  # false where NaN
    total = tl.where(near, total, 1.0)
    mean = values / total
    write = exists & near
    whole = mean
    if CENTRED:
        whole += centre_of_values(low, high, 0, True).to(tl.float64)
    tl.store(out + row, whole.to(T), mask=write)
    tl.store(lse + row, (tl.log2(total) * LN2).to(T), mask=write)
    tl.store(state + 2 * row, total * 0.0, mask=write)
    tl.store(state + 2 * row + 1, total, mask=write)
    if BY_W or BY_Q:
        bandwidth = tl.load(w).to(tl.float64)
        unit = tl.maximum(tl.abs(bandwidth.to(T)), LEAST_SCALE).to(tl.float64)
        if BY_Q:
            slope = (value_offsets - mean * offsets) / total
            tl.store(tangent_q + row, (-bandwidth * (bandwidth / unit * slope)).to(T), mask=write)
        if BY_W:
            slope = (value_squares - mean * squares) / total / unit
            tl.store(tangent_w + row, (-(bandwidth / unit) * slope).to(T), mask=write)
    return exists & (near == 0)


@triton.jit
def tiled_forward(
    query, key, value, w, key_weight, low, high, out, lse, state, tangent_w, tangent_q, partial, table,
    m, n, channels, batches, blocks, splits, part,
    query_b, query_m, query_d, key_b, key_n, key_d, value_b, value_n, value_c, w_b, w_d, weight_b, weight_n,
    D: tl.constexpr, WEIGHTED: tl.constexpr, SELF: tl.constexpr, TABLE: tl.constexpr, SPLIT: tl.constexpr,
    CENTRED: tl.constexpr, BY_W: tl.constexpr, BY_Q: tl.constexpr, HALF_DOT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Any D and C; BLOCK_C = 1 if C = 1. Tangents are for D = C = 1, which single_forward serves."""
    T: tl.constexpr = out.dtype.element_ty
    chunks = (channels + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    block = pid % blocks
    rest = pid // blocks
    chunk = rest % chunks
    split = rest // chunks % splits
    b = (rest // chunks // splits).to(tl.int64)
    query, key, value, w, key_weight = inputs_of(
        query, key, value, w, key_weight, b, query_b, key_b, value_b, w_b, weight_b, batches, table, WEIGHTED, TABLE
    )  # fmt: skip

    i = block * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    exists = i < m
    c = chunk * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]  # [1, BLOCK_C]
    query_at = i.to(tl.int64)[:, None] * query_m  # [BLOCK_M, 1]
    centre = tl.zeros([1, BLOCK_C], T)
    if CENTRED:
        centre += centre_of_values(low, high, b * channels + c, c < channels)
    top = tl.full([BLOCK_M], FLOOR, T)
    total = tl.zeros([BLOCK_M], T)
    rounded_total = tl.zeros([BLOCK_M], T)
    values = tl.zeros([BLOCK_M, BLOCK_C], T)
    begin = split * part
    for start in range(begin, tl.minimum(begin + part, n), BLOCK_N):
        j = start + tl.arange(0, BLOCK_N)  # [BLOCK_N]
        counts = j < n
        key_at = j.to(tl.int64)[None, :] * key_n  # [1, BLOCK_N]
        score = -squared_distances(
            query, query_at, query_d, key, key_at, key_d, w, w_d, exists[:, None], counts[None, :],
            D, T, BLOCK_M, BLOCK_N,
        )  # fmt: skip
        if WEIGHTED:
            a = tl.load(key_weight + j.to(tl.int64) * weight_n, mask=counts, other=0.0).to(T)
            log_weight = tl.where(a > 0.0, tl.log2(tl.where(a > 0.0, a, 1.0)), float("-inf"))
            score += tl.where(a >= 0.0, log_weight, float("nan"))[None, :]
        keep = counts[None, :]
        if SELF:
            keep = keep & (j[None, :] != i[:, None])
        score = tl.where(keep, score, float("-inf"))  # [BLOCK_M, BLOCK_N]
        higher = tl.maximum(top, tl.max(score, 1))  # [BLOCK_M], finite
        p = tl.exp2(score - higher[:, None])
        factor = tl.exp2(top - higher)
        top = higher
        if BLOCK_C == 1:
            v = tl.load(value + j.to(tl.int64) * value_n, mask=counts, other=0.0).to(T) - tl.sum(centre, 1)
            added = tl.sum(p * v[None, :], 1)[:, None]  # [BLOCK_M, 1]
        else:
            v = tl.load(
                value + j.to(tl.int64)[:, None] * value_n + c.to(tl.int64) * value_c,
                mask=counts[:, None] & (c < channels),
                other=0.0,
            )  # [BLOCK_N, BLOCK_C]
            if HALF_DOT:
                rounded = p.to(v.dtype)
                rounded_total = tl.fma(rounded_total, factor, tl.sum(rounded.to(T), 1))
                added = tl.dot(rounded, v)  # [BLOCK_M, BLOCK_C]
            else:
                added = tl.dot(p, v.to(T) - centre, input_precision="ieee", out_dtype=T)
        total = tl.fma(total, factor, tl.sum(p, 1))
        values = values * factor[:, None] + added
    if HALF_DOT:  # noqa: SIM102
        if BLOCK_C > 1:
            # Weights that were rounded one by one have another total: that of the mean.
            values = values * tl.where(rounded_total > 0.0, total / rounded_total, 1.0)[:, None]

    row = b * m + i  # [BLOCK_M], int64
    if SPLIT:
        to = partial + (split * batches * m + row) * (2 + channels)
        if chunk == 0:
            tl.store(to, top.to(tl.float64), mask=exists)
            tl.store(to + 1, total.to(tl.float64), mask=exists)
        tl.store(to[:, None] + 2 + c, values.to(tl.float64), mask=exists[:, None] & (c < channels))
    else:
        far = tiled_store(
            top.to(tl.float64),
            total.to(tl.float64),
            values,
            centre,
            row,
            exists,
            c,
            chunk,
            channels,
            out,
            lse,
            state,
            T,
        )
        if tl.max(far.to(tl.int32), 0) > 0:
            far_forward(
                far, i, row, query, query_m, query_d, key, key_n, key_d, value, value_n, value_c, w, w_d,
                key_weight, weight_n, n, chunk, out, lse, state, tangent_w, tangent_q,
                D, channels, WEIGHTED, SELF, BY_W, BY_Q, T, BLOCK_M, BLOCK_C, BLOCK_F,
            )  # fmt: skip


@triton.jit
def tiled_store(
    top, total, values, centre, row, exists, c, chunk, channels, out, lse, state, T: tl.constexpr
):
    """Write the results of near rows from top, total [BLOCK_M] and values less centre."""
    FAR: tl.constexpr = FAR_DOUBLE if T == tl.float64 else FAR_FLOAT  # noqa: SIM300
    near = (total >= LEAST_TOTAL) & (total <= MOST_TOTAL) & (tl.abs(top) <= FAR)  # false where NaN
    # A row whose own key is left out does not see what that holds: it is computed alone.
    near = near & (tl.sum(tl.abs(values), 1) < float("inf"))
    total = tl.where(near, total, 1.0)
    write = exists & near
    mean = values / total.to(T)[:, None] + centre  # [BLOCK_M, BLOCK_C]
    tl.store(out + row[:, None] * channels + c, mean, mask=write[:, None] & (c < channels))
    if chunk == 0:
        tl.store(lse + row, ((tl.log2(total) + top) * LN2).to(T), mask=write)
        tl.store(state + 2 * row, -top, mask=write)
        tl.store(state + 2 * row + 1, total, mask=write)
    return exists & (near == 0)
