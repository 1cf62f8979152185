"""The ordered merge of forward sums over parts of the keys, where queries are too few to fill the device.

A program owns BLOCK_M queries and adds the parts in their order, so the result does not depend on which part was done
first. A part is (total, values, four moments) of single_forward, or (top, total, values) of tiled_forward.
"""

import triton
import triton.language as tl

from .far import far_forward
from .forward import FLOOR, single_store, tiled_store
from .terms import centre_of_values, inputs_of


@triton.jit
def single_merge(
    query, key, value, w, key_weight, low, high, out, lse, state, tangent_w, tangent_q, partial, table,
    m, n, batches, blocks, splits,
    query_b, query_m, key_b, key_n, value_b, value_n, w_b, weight_b, weight_n,
    WEIGHTED: tl.constexpr, SELF: tl.constexpr, TABLE: tl.constexpr, CENTRED: tl.constexpr,
    BY_W: tl.constexpr, BY_Q: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Results of single_forward's parts, partial (splits, batches, m, 6)."""
    T: tl.constexpr = out.dtype.element_ty
    pid = tl.program_id(0)
    block = pid % blocks
    b = (pid // blocks).to(tl.int64)
    i = block * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    exists = i < m
    row = b * m + i
    total = tl.zeros([BLOCK_M], tl.float64)
    values = tl.zeros([BLOCK_M], tl.float64)
    offsets = tl.zeros([BLOCK_M], tl.float64)
    value_offsets = tl.zeros([BLOCK_M], tl.float64)
    squares = tl.zeros([BLOCK_M], tl.float64)
    value_squares = tl.zeros([BLOCK_M], tl.float64)
    for split in range(splits):
        at = partial + (split * batches * m + row) * 6
        total += tl.load(at, mask=exists, other=0.0)
        values += tl.load(at + 1, mask=exists, other=0.0)
        offsets += tl.load(at + 2, mask=exists, other=0.0)
        value_offsets += tl.load(at + 3, mask=exists, other=0.0)
        squares += tl.load(at + 4, mask=exists, other=0.0)
        value_squares += tl.load(at + 5, mask=exists, other=0.0)
    query, key, value, w, key_weight = inputs_of(
        query, key, value, w, key_weight, b, query_b, key_b, value_b, w_b, weight_b, batches, table, WEIGHTED, TABLE
    )  # fmt: skip
    far = single_store(
        total, values, offsets, value_offsets, squares, value_squares, row, exists, w, low + b, high + b,
        out, lse, state, tangent_w, tangent_q, CENTRED, BY_W, BY_Q, T,
    )  # fmt: skip
    if tl.max(far.to(tl.int32), 0) > 0:
        far_forward(
            far, i, row, query, query_m, 0, key, key_n, 0, value, value_n, 0, w, 0, key_weight, weight_n, n,
            0, out, lse, state, tangent_w, tangent_q,
            1, 1, WEIGHTED, SELF, BY_W, BY_Q, T, BLOCK_M, 1, BLOCK_F,
        )  # fmt: skip


@triton.jit
def tiled_merge(
    query, key, value, w, key_weight, low, high, out, lse, state, tangent_w, tangent_q, partial, table,
    m, n, channels, batches, blocks, splits,
    query_b, query_m, query_d, key_b, key_n, key_d, value_b, value_n, value_c, w_b, w_d, weight_b, weight_n,
    D: tl.constexpr, WEIGHTED: tl.constexpr, SELF: tl.constexpr, TABLE: tl.constexpr,
    CENTRED: tl.constexpr, BY_W: tl.constexpr, BY_Q: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """Results of tiled_forward's parts, partial (splits, batches, m, 2 + channels)."""
    T: tl.constexpr = out.dtype.element_ty
    chunks = (channels + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    block = pid % blocks
    chunk = pid // blocks % chunks
    b = (pid // blocks // chunks).to(tl.int64)
    i = block * BLOCK_M + tl.arange(0, BLOCK_M)  # [BLOCK_M]
    exists = i < m
    row = b * m + i
    c = chunk * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]  # [1, BLOCK_C]
    top = tl.full([BLOCK_M], FLOOR, tl.float64)
    total = tl.zeros([BLOCK_M], tl.float64)
    values = tl.zeros([BLOCK_M, BLOCK_C], tl.float64)
    for split in range(splits):
        at = partial + (split * batches * m + row) * (2 + channels)
        part_top = tl.load(at, mask=exists, other=0.0)
        part_total = tl.load(at + 1, mask=exists, other=0.0)
        part_values = tl.load(at[:, None] + 2 + c, mask=exists[:, None] & (c < channels), other=0.0)
        higher = tl.maximum(top, part_top)
        factor, part_factor = tl.exp2(top - higher), tl.exp2(part_top - higher)
        top = higher
        total = total * factor + part_total * part_factor
        values = values * factor[:, None] + part_values * part_factor[:, None]
    centre = tl.zeros([1, BLOCK_C], T)
    if CENTRED:
        centre += centre_of_values(low, high, b * channels + c, c < channels)
    far = tiled_store(top, total, values.to(T), centre, row, exists, c, chunk, channels, out, lse, state, T)
    if tl.max(far.to(tl.int32), 0) > 0:
        query, key, value, w, key_weight = inputs_of(
            query, key, value, w, key_weight, b, query_b, key_b, value_b, w_b, weight_b, batches, table, WEIGHTED, TABLE
        )  # fmt: skip
        far_forward(
            far, i, row, query, query_m, query_d, key, key_n, key_d, value, value_n, value_c, w, w_d,
            key_weight, weight_n, n, chunk, out, lse, state, tangent_w, tangent_q,
            D, channels, WEIGHTED, SELF, BY_W, BY_Q, T, BLOCK_M, BLOCK_C, BLOCK_F,
        )  # fmt: skip
