"""The Triton backend: dense kernels for NVIDIA and AMD GPUs.

Forward: forward.py, far.py, merge.py. Backward: saved_rows.py, queries.py, keys.py.

Nothing here waits for the device or reads its data on the host, so calls can be captured in a CUDA graph. Every sum
has one owner and a fixed order: no atomics. Kernels are compiled at the first call that needs them and cached on
disk. With TRITON_INTERPRET=1 in the environment, before torch imports Triton, the same kernels run on CPU tensors,
slowly.

Block sizes are functions of the shapes (launch.py), not triton.autotune's choice by timing: that would let the last
bits of a result differ between processes, time kernels at the first call of every new size, and fail while a graph is
captured. To time other sizes, replace `single_blocks` or `tiled_blocks` of this module before a call.
"""

import contextlib
from typing import Any

import torch
import triton
from torch import Tensor

from .. import NEEDS_KEY, NEEDS_KEY_WEIGHT, NEEDS_QUERY, NEEDS_VALUE, NEEDS_W
from .forward import single_forward, tiled_forward
from .keys import single_keys, tiled_keys
from .launch import (
    FAR_KEYS,
    LEAN,
    OPTIONS,
    Call,
    channel_block,
    feature_block,
    single_blocks,
    tiled_blocks,
    without_left_out,
)
from .merge import single_merge, tiled_merge
from .queries import query_side, tangent_products
from .saved_rows import FLAG_ROWS, describe_rows


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    w: Tensor,
    key_weight: Tensor | None,
    exclude_self: bool,
    tangent_w: bool,
    tangent_q: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """out, lse, state and tangents of canonical inputs: see `nwfast.backends`."""
    call = Call(query, *without_left_out(key, value, key_weight), w, key_weight)
    rows = (*call.batch, call.m)
    out = call.empty(True, *rows, call.c)
    lse = call.empty(True, *rows)
    state = call.empty(True, *rows, 2, dtype=torch.float64)
    by_w = call.empty(tangent_w, *rows, call.c)
    by_q = call.empty(tangent_q, *rows, call.c)
    results = out, lse, state, by_w, by_q
    if call.batches * call.m > 0:
        with _on(call.device):
            if call.d == call.c == 1:
                _single_forward(call, results, exclude_self, tangent_w, tangent_q)
            else:
                _tiled_forward(call, results, exclude_self)
    return results


def _on(device: torch.device) -> contextlib.AbstractContextManager:
    """Triton launches on the current device: make it that of the tensors."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def _single_forward(call: Call, results: tuple, exclude_self: bool, tangent_w: bool, tangent_q: bool) -> None:
    registers = 2 if call.dtype == torch.float64 else 1  # of one number
    rows, columns, warps = single_blocks(call.m, call.n, 2 * registers * (1 + tangent_w + tangent_q))
    blocks = triton.cdiv(call.m, rows)
    splits, part = call.parts(call.batches * blocks, call.n, columns)
    partial = call.empty(splits > 1, splits, call.batches, call.m, 6, dtype=torch.float64)
    flags = {
        "WEIGHTED": call.weighted,
        "SELF": exclude_self,
        "TABLE": call.tabled,
        "CENTRED": call.centred,
        "BY_W": tangent_w,
        "BY_Q": tangent_q,
        "BLOCK_F": FAR_KEYS,
    }
    options = LEAN if registers == 1 and not (tangent_w or tangent_q or call.weighted) else OPTIONS
    single_forward[(call.batches * blocks * splits,)](
        *call.tensors, *call.ranges, *results, partial, call.table, call.m, call.n, call.batches, blocks, splits, part,
        *call.single_strides, **flags, SPLIT=splits > 1, BLOCK_M=rows, BLOCK_N=columns, num_warps=warps, **options,
    )  # fmt: skip
    if splits > 1:
        rows = min(rows, 16)
        blocks = triton.cdiv(call.m, rows)
        single_merge[(call.batches * blocks,)](
            *call.tensors, *call.ranges, *results, partial, call.table, call.m, call.n, call.batches, blocks, splits,
            *call.single_strides, **flags, BLOCK_M=rows, num_warps=4, **OPTIONS,
        )  # fmt: skip


def _tiled_forward(call: Call, results: tuple, exclude_self: bool) -> None:
    wide = call.dtype == torch.float64
    block_c = channel_block(call.c, call.half_dot)
    rows, columns, warps = tiled_blocks(call.m, call.n, block_c, wide, call.half_dot)
    blocks, chunks = triton.cdiv(call.m, rows), triton.cdiv(call.c, block_c)
    splits, part = call.parts(call.batches * blocks * chunks, call.n, columns)
    partial = call.empty(splits > 1, splits, call.batches, call.m, 2 + call.c, dtype=torch.float64)
    flags = {
        "D": call.d,
        "WEIGHTED": call.weighted,
        "SELF": exclude_self,
        "TABLE": call.tabled,
        "CENTRED": call.centred,
        "BY_W": False,
        "BY_Q": False,
        "BLOCK_C": block_c,
        "BLOCK_F": FAR_KEYS // 4 if block_c > 1 else FAR_KEYS,
    }
    tiled_forward[(call.batches * blocks * chunks * splits,)](
        *call.tensors, *call.ranges, *results, partial, call.table,
        call.m, call.n, call.c, call.batches, blocks, splits, part,
        *call.strides, **flags, HALF_DOT=call.half_dot, SPLIT=splits > 1, BLOCK_M=rows, BLOCK_N=columns,
        num_warps=warps, **OPTIONS,
    )  # fmt: skip
    if splits > 1:
        rows = min(rows, 16)
        blocks = triton.cdiv(call.m, rows)
        tiled_merge[(call.batches * blocks * chunks,)](
            *call.tensors, *call.ranges, *results, partial, call.table,
        call.m, call.n, call.c, call.batches, blocks, splits,
            *call.strides, **flags, BLOCK_M=rows, num_warps=4, **OPTIONS,
        )  # fmt: skip


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    w: Tensor,
    key_weight: Tensor | None,
    out: Tensor,
    state: Tensor,
    tangent_w: Tensor,
    tangent_q: Tensor,
    exclude_self: bool,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, w and key_weight: see `nwfast.backends`."""
    call = Call(query, key, value, w, key_weight)  # of the key side
    rows_call = (
        call if key_weight is None else Call(query, *without_left_out(key, value, key_weight), w, key_weight)
    )
    grad_query = call.empty(bool(needs & NEEDS_QUERY), *call.batch, call.m, call.d)
    grad_key = call.empty(bool(needs & NEEDS_KEY), *call.batch, call.n, call.d)
    grad_value = call.empty(bool(needs & NEEDS_VALUE), *call.batch, call.n, call.c)
    grad_weight = call.empty(bool(needs & NEEDS_KEY_WEIGHT), *call.batch, call.n)
    partial_w = None
    if call.batches * call.m == 0:
        grad_key.zero_(), grad_value.zero_(), grad_weight.zero_()
        if needs & NEEDS_W:
            partial_w = torch.zeros((call.batches, 1, call.d), dtype=torch.float64, device=call.device)
        return grad_query, grad_key, grad_value, _sum_for_w(call, partial_w, w), grad_weight
    by_products = (
        grad_lse is None
        and not (needs & NEEDS_QUERY and tangent_q.numel() == 0)
        and not (needs & NEEDS_W and tangent_w.numel() == 0)
    )
    grads = grad_out.contiguous(), grad_lse if grad_lse is None else grad_lse.contiguous()
    with _on(call.device):
        rows: Any = None
        if needs & (NEEDS_KEY | NEEDS_VALUE | NEEDS_KEY_WEIGHT) or not by_products:
            rows = _Rows(rows_call, grads, out.contiguous(), state.contiguous(), exclude_self)
        if needs & (NEEDS_QUERY | NEEDS_W):
            if by_products:
                saved = tangent_w, tangent_q, out.contiguous(), state.contiguous()
                partial_w = _tangent_products(rows_call, grads[0], saved, grad_query, exclude_self, needs)
            else:
                partial_w = _query_side(rows_call, rows, grad_query, exclude_self, needs)
        if needs & (NEEDS_KEY | NEEDS_VALUE | NEEDS_KEY_WEIGHT):
            if call.d == call.c == 1:
                _single_keys(call, rows, grad_key, grad_value, grad_weight, exclude_self, needs)
            else:
                _tiled_keys(call, rows, grad_key, grad_value, grad_weight, exclude_self, needs)
    if key_weight is not None:
        grad_key, grad_value, grad_weight = _of_left_out(call, grad_key, grad_value, grad_weight)
    return grad_query, grad_key, grad_value, _sum_for_w(call, partial_w, w), grad_weight


def _of_left_out(call: Call, grad_key: Tensor, grad_value: Tensor, grad_weight: Tensor) -> tuple:
    """Gradients with those of keys of weight 0 put right: no product with a weight of 0 is exact where they overflow.

    By such a key and its value 0; by its weight the derivative, saturated, and 0 where the key itself is not finite.
    """
    _, key, value, _, key_weight = call.tensors
    left_out = key_weight == 0
    if grad_key.numel():
        grad_key = torch.where(left_out.unsqueeze(-1), 0.0, grad_key)
    if grad_value.numel():
        grad_value = torch.where(left_out.unsqueeze(-1), 0.0, grad_value)
    if grad_weight.numel():
        finite = key.isfinite().all(-1) & value.isfinite().all(-1)
        own = torch.where(finite, grad_weight.nan_to_num(), 0.0)
        grad_weight = torch.where(left_out, own, grad_weight)
    return grad_key, grad_value, grad_weight


def _sum_for_w(call: Call, partial: Tensor | None, w: Tensor) -> Tensor:
    """Bring partial (batches, blocks, D) to the shape and dtype of w, over the dimensions in which w was broadcast."""
    if partial is None:
        return call.empty(False)
    gradient = (partial.squeeze(1) if partial.shape[1] == 1 else partial.sum(1)).view(*call.batch, call.d)
    if gradient.shape != w.shape:
        gradient = gradient.sum_to_size(w.shape)
    return gradient.to(w.dtype)


class _Rows:
    """What describe_rows finds, in the order in which kernels take it."""

    def __init__(self, call: Call, grads: tuple, out: Tensor, state: Tensor, exclude_self: bool):
        count = call.batches * call.m
        grad_out, grad_lse = grads
        self.by_lse = grad_lse is not None
        given = grad_out, grad_lse if grad_lse is not None else grad_out, out, state
        single = call.d == call.c == 1
        aligned = triton.cdiv(count, 4) * 4  # so that each begins where a vector can
        shifts, inverses, pulls, *prepared = call.empty(True, 6 if single else 3, aligned)
        queries, slopes, intercepts = prepared or (shifts,) * 3
        self.ranges = call.ranges if single else call.tensors[2:4]
        origins = call.empty(True, count, dtype=torch.int64)
        tops = call.empty(True, count, dtype=torch.float64)
        flags = call.empty(True, triton.cdiv(count, FLAG_ROWS.value), dtype=torch.int32)
        query_b, key_b, _, w_b, weight_b = call.batch_strides
        describe_rows[(flags.numel(),)](
            *call.tensors, *self.ranges, *given, shifts, inverses, pulls, queries, slopes, intercepts,
            origins, tops, flags, call.table, call.m, call.n, call.c, call.batches,
            query_b, call.query_m, call.query_d, key_b, call.key_n, call.key_d, w_b, call.w_d, weight_b, call.weight_n,
            D=call.d, WEIGHTED=call.weighted, SELF=exclude_self, TABLE=call.tabled, BY_LSE=self.by_lse,
            SINGLE=single, CENTRED=call.centred, BLOCK_F=FAR_KEYS, num_warps=2, **OPTIONS,
        )  # fmt: skip
        self.of_single = *self.ranges, *given, queries, shifts, slopes, intercepts, origins, tops, flags
        self.of_tiled = *given, shifts, inverses, pulls, origins, tops, flags


def _tangent_products(
    call: Call, grad_out, saved: tuple, grad_query, exclude_self: bool, needs: int
) -> Tensor | None:
    block = 1024 if call.m > 128 else 128
    blocks = triton.cdiv(call.m, block)
    by_w, by_q = bool(needs & NEEDS_W), bool(needs & NEEDS_QUERY)
    partial = call.empty(by_w, call.batches, blocks, 1, dtype=torch.float64)
    tangent_products[(call.batches * blocks,)](
        *call.tensors, grad_out, *saved, grad_query, partial, call.table, call.m, call.n, call.batches, blocks,
        *call.single_strides, WEIGHTED=call.weighted, SELF=exclude_self, TABLE=call.tabled, BY_W=by_w, BY_Q=by_q,
        BLOCK_M=block, BLOCK_F=FAR_KEYS, num_warps=4 if block > 128 else 1, **OPTIONS,
    )  # fmt: skip
    return partial if by_w else None


def _query_side(call: Call, rows: _Rows, grad_query: Tensor, exclude_self: bool, needs: int) -> Tensor | None:
    wide = call.dtype == torch.float64
    block_c, block_d = channel_block(call.c, call.half_dot), feature_block(call.d, wide)
    block_m, block_n, warps = tiled_blocks(call.m, call.n, block_c, wide, call.half_dot)
    blocks, chunks = triton.cdiv(call.m, block_m), triton.cdiv(call.d, block_d)
    by_w = bool(needs & NEEDS_W)
    partial = call.empty(by_w, call.batches, blocks, call.d, dtype=torch.float64)
    query_side[(call.batches * blocks * chunks,)](
        *call.tensors, *rows.of_tiled[:-1], grad_query, partial, call.table,
        call.m, call.n, call.c, call.batches, blocks, *call.strides,
        D=call.d, WEIGHTED=call.weighted, SELF=exclude_self, TABLE=call.tabled, BY_LSE=rows.by_lse,
        BY_W=by_w, BY_Q=bool(needs & NEEDS_QUERY), HALF_DOT=call.half_dot,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_C=block_c, BLOCK_D=block_d, BLOCK_F=FAR_KEYS,
        num_warps=warps, **OPTIONS,
    )  # fmt: skip
    return partial if by_w else None


def _parts_of(gradient: Tensor, splits: int) -> Tensor:
    """Where the parts of a gradient go: the gradient itself, or a buffer with a leading dimension."""
    return gradient if splits == 1 else gradient.new_empty((splits, *gradient.shape))


def _single_keys(
    call: Call, rows: _Rows, grad_key, grad_value, grad_weight, exclude_self: bool, needs: int
) -> None:
    block_k, block_m, warps = single_blocks(call.n, call.m, 8 if call.dtype == torch.float64 else 3)
    blocks = triton.cdiv(call.n, block_k)
    splits, part = call.parts(call.batches * blocks, call.m, block_m)
    gradients = grad_key, grad_value, grad_weight
    parts = [_parts_of(gradient, splits) for gradient in gradients]
    single_keys[(call.batches * blocks * splits,)](
        *call.tensors, *rows.of_single, *parts, call.table,
        call.m, call.n, call.batches, blocks, splits, part, *call.single_strides,
        WEIGHTED=call.weighted, SELF=exclude_self, TABLE=call.tabled, BY_LSE=rows.by_lse,
        CENTRED=call.centred, BY_KEY=bool(needs & NEEDS_KEY), BY_VALUE=bool(needs & NEEDS_VALUE),
        BY_WEIGHT=bool(needs & NEEDS_KEY_WEIGHT), BLOCK_K=block_k, BLOCK_M=block_m, num_warps=warps, **OPTIONS,
    )  # fmt: skip
    if splits > 1:
        for part_sums, gradient in zip(parts, gradients, strict=True):
            torch.sum(part_sums, 0, out=gradient)


def _tiled_keys(
    call: Call, rows: _Rows, grad_key, grad_value, grad_weight, exclude_self: bool, needs: int
) -> None:
    wide = call.dtype == torch.float64
    block_c, block_d = channel_block(call.c, call.half_dot), feature_block(call.d, wide)
    block_k, block_m, warps = tiled_blocks(call.n, call.m, block_c, wide, call.half_dot, both=True)
    blocks = triton.cdiv(call.n, block_k)
    channel_chunks, feature_chunks = triton.cdiv(call.c, block_c), triton.cdiv(call.d, block_d)
    by_value, by_others = needs & NEEDS_VALUE, needs & (NEEDS_KEY | NEEDS_KEY_WEIGHT)
    kinds = [(needs, 1)]  # needs and chunks of each launch
    if channel_chunks > 1 or feature_chunks > 1:
        kinds = [(by_value, channel_chunks), (by_others, feature_chunks if needs & NEEDS_KEY else 1)]
    gradients = grad_key, grad_value, grad_weight
    for own, chunks in kinds:
        if not own & (NEEDS_KEY | NEEDS_VALUE | NEEDS_KEY_WEIGHT):
            continue
        splits, part = call.parts(call.batches * blocks * chunks, call.m, block_m)
        flags = [bool(own & flag) for flag in (NEEDS_KEY, NEEDS_VALUE, NEEDS_KEY_WEIGHT)]
        parts = [_parts_of(g, splits) if flag else g for g, flag in zip(gradients, flags, strict=True)]
        tiled_keys[(call.batches * blocks * chunks * splits,)](
            *call.tensors, *rows.of_tiled, *parts, call.table,
            call.m, call.n, call.c, call.batches, blocks, splits, part, chunks, *call.strides,
            D=call.d, WEIGHTED=call.weighted, SELF=exclude_self, TABLE=call.tabled, BY_LSE=rows.by_lse,
            BY_KEY=flags[0], BY_VALUE=flags[1], BY_WEIGHT=flags[2], HALF_DOT=call.half_dot,
            BLOCK_K=block_k, BLOCK_M=block_m, BLOCK_C=block_c, BLOCK_D=block_d, num_warps=warps, **OPTIONS,
        )  # fmt: skip
        if splits > 1:
            for part_sums, gradient, flag in zip(parts, gradients, flags, strict=True):
                if flag:
                    torch.sum(part_sums, 0, out=gradient)
