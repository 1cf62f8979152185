"""The linear method in Numba: nadaraya_watson in one feature in O(M + N) time, to rounding at any bandwidth.

The same contract as `nwfast.backends.numba.dense.call`, for D = 1. Boxes of keys have Chebyshev moments, matrices
translate them to power series in boxes of queries, and each near row gets the series of its box. An error bound tells
the far rows, for which that is not good enough, since keys nearby are few: they are summed relative to their nearest
key, so that each keeps its full relative accuracy, however far from the data it is. What the dense kernels alone can do
(numbers that are not finite, weights of more than 260 orders of magnitude) is handed to them.

All arithmetic is in float64, whatever the dtype of the data. Tasks have fixed sizes, so no bit depends on the number
of threads.
"""

import numpy as np
import torch
from torch import Tensor

from ... import NEEDS_KEY, NEEDS_KEY_WEIGHT, NEEDS_QUERY, NEEDS_VALUE, NEEDS_W, batch_shape
from ..dense import call as dense
from ..zero_weights import anchored, places
from . import zero_weights
from .data import Data
from .key_side import Targets, key_side
from .near_rows import Rows
from .plan import DOUBLE, FLOAT, make_plan
from .prepared import compress, predict
from .query_side import query_side

__all__ = ["backward", "compress", "forward", "output", "predict"]

_NONE, _NO_ROWS, _NO_ORDER = np.empty(0), np.empty((0, 0)), np.empty(0, np.int64)


class _Batch:
    """The batch elements of canonical inputs, one after the other."""

    def __init__(self, query: Tensor, key: Tensor, value: Tensor, w: Tensor, key_weight: Tensor | None):
        if query.shape[-1] != 1:
            raise ValueError(f"the fast Gauss transform takes D = 1 feature, got D = {query.shape[-1]}")
        self.shape = batch_shape(query, key, value)
        self.dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        self.accuracy = DOUBLE if query.dtype == torch.float64 else FLOAT
        self.m, self.n, self.c = query.shape[-2], key.shape[-2], value.shape[-1]
        self.inputs = query[..., 0], key[..., 0], value, w.expand(*w.shape[:-1], 1)[..., 0], key_weight

    def __iter__(self):
        ranks = 1, 1, 2, 0, 1
        for place in np.ndindex(*self.shape):
            parts = []
            for tensor, rank in zip(self.inputs, ranks, strict=True):
                if tensor is not None:
                    sizes = tensor.shape[: tensor.ndim - rank]
                    index = place[len(place) - len(sizes) :]
                    tensor = tensor[
                        tuple(0 if size == 1 else i for i, size in zip(index, sizes, strict=True))
                    ]
                    if tensor.dtype in (torch.float16, torch.bfloat16):
                        tensor = tensor.float()
                parts.append(tensor)
            yield place, parts


def _prepare(parts: list, exclude_self: bool) -> Data | None:
    query, key, value, w, key_weight = parts
    data = Data(key, value, key_weight, float(w))
    return data if data.usable and data.read_queries(query, exclude_self) else None


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
    batch = _Batch(query, *anchored(key, value, places(key_weight)), w, key_weight)
    return _run(batch, exclude_self, True, True, tangent_w, tangent_q)


def output(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    w: Tensor,
    key_weight: Tensor | None,
    exclude_self: bool,
    lse: bool,
    tangent_w: bool,
    tangent_q: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Out and, if asked for, lse and tangents of canonical inputs: see `nwfast.backends`."""
    batch = _Batch(query, *anchored(key, value, places(key_weight)), w, key_weight)
    out, found_lse, _, by_w, by_q = _run(batch, exclude_self, lse, False, tangent_w, tangent_q)
    return out, found_lse, by_w, by_q


def _run(
    batch: _Batch, exclude_self: bool, with_lse: bool, with_state: bool, tangent_w: bool, tangent_q: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `forward`; what is not asked for is an empty tensor."""
    shape, m, c, dtype = batch.shape, batch.m, batch.c, batch.dtype

    def wanted(flag: bool, *sizes: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty((*shape, *sizes) if flag else (0,), dtype=dtype)

    wholes = (
        wanted(True, m, c),
        wanted(with_lse, m),
        wanted(with_state, m, 2, dtype=torch.float64),
        wanted(tangent_w, m, c),
        wanted(tangent_q, m, c),
    )
    orders = 2 if tangent_w else 1 if tangent_q else 0
    for place, parts in batch:
        data = _prepare(parts, exclude_self)
        results = [whole[place] if whole.numel() else whole for whole in wholes]
        if data is not None:
            _forward(data, batch, [part.numpy().reshape(-1) for part in results], orders)
            continue
        parts = dense.forward(*_canonical(parts), exclude_self, tangent_w, tangent_q)
        for result, part in zip(results, parts, strict=True):
            if result.numel():
                result.copy_(part.reshape(result.shape))
    return wholes


def _canonical(parts: list) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    query, key, value, w, key_weight = parts
    return query[:, None], key[:, None], value, w[None], key_weight


def _forward(data: Data, batch: _Batch, results: list[np.ndarray], orders: int) -> None:
    """Fill out (M C), lse (M), state (M 2), tangents (M)."""
    if len(data.key):
        out, lse, state, by_w, by_q = results
        rows = Rows(
            data.row_order, data.own, data.centre, out, lse, state, by_w, by_q, _NO_ROWS, _NONE, _NONE, _NONE
        )
        plan = make_plan(batch.accuracy, abs(data.w), data.key, data.query, unevenness=data.unevenness)
        query_side(data, plan, batch.accuracy, rows, orders)
    for missing, fill in (
        (data.infinite_rows if len(data.key) else slice(None), (np.nan, -np.inf, 0.0, 0.0, 0.0)),
        (data.nan_rows, (np.nan, np.nan, (0.0, np.nan), np.nan, np.nan)),
    ):
        for part, number in zip(results, fill, strict=True):
            if len(part):
                part.reshape(batch.m, -1)[missing] = number


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
    left_out = places(key_weight)
    held = key, value
    key, value = anchored(key, value, left_out)
    batch = _Batch(query, key, value, w, key_weight)
    shape, m, n, c, dtype = batch.shape, batch.m, batch.n, batch.c, batch.dtype
    keys_needed = needs & (NEEDS_KEY | NEEDS_VALUE | NEEDS_KEY_WEIGHT)
    rows_needed = needs & (NEEDS_QUERY | NEEDS_W)
    products = (
        rows_needed
        and grad_lse is None
        and not (
            (needs & NEEDS_QUERY and not tangent_q.numel()) or (needs & NEEDS_W and not tangent_w.numel())
        )
    )
    by_product = [torch.empty(0, dtype=dtype) for _ in range(5)]
    if products:
        computed = grad_out, grad_lse, query, key, value, w, key_weight, out, state, tangent_w, tangent_q
        by_product = list(dense.backward(*computed, exclude_self, rows_needed))
        if not keys_needed:
            return tuple(by_product)  # type: ignore[return-value]

    def wanted(flag: int, *sizes: int) -> Tensor:
        return torch.empty((*shape, *sizes) if needs & flag else (0,), dtype=dtype)

    grad_query = by_product[0] if products else wanted(NEEDS_QUERY, m, 1)
    grad_key, grad_value = wanted(NEEDS_KEY, n, 1), wanted(NEEDS_VALUE, n, c)
    grad_weight, grad_w = wanted(NEEDS_KEY_WEIGHT, n), by_product[3]
    sums = np.zeros((max(1, int(np.prod(shape))), 1))
    needs = keys_needed | (0 if products else rows_needed)
    keys_held = _Batch(query, *held, w, key_weight)
    for index, ((place, parts), (_, parts_held)) in enumerate(zip(batch, keys_held, strict=True)):
        saved = grad_out[place], None if grad_lse is None else grad_lse[place], out[place], state[place]
        data = _prepare(parts, exclude_self)
        if data is None:
            full = dense.backward(
                saved[0],
                saved[1],
                *_canonical(parts_held),
                *saved[2:],
                torch.empty(0),
                torch.empty(0),
                exclude_self,
                needs,
            )
        else:
            full = _backward(data, parts, parts_held, batch, saved, exclude_self, needs)
        for whole, part in zip(
            (grad_query, grad_key, grad_value, grad_weight), (*full[:3], full[4]), strict=True
        ):
            if part.numel():
                whole[place] = part.reshape(whole[place].shape)
        sums[index] = float(full[3]) if full[3].numel() else 0.0
    if needs & NEEDS_W:
        grad_w = dense._sum_for_w(sums, shape, w)
    return grad_query, grad_key, grad_value, grad_w, grad_weight


def _has_gradient(grad_out: np.ndarray, grad_lse: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Which of these rows get a gradient that is not 0."""
    found = (grad_out[rows] != 0).any(1)
    return found | (grad_lse[rows] != 0) if len(grad_lse) else found


def _backward(
    data: Data,
    parts: list,
    parts_held: list,
    batch: _Batch,
    saved: tuple,
    exclude_self: bool,
    needs: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `backward`, for one batch element; the gradient of w is its sum over the rows."""
    grad_out, grad_lse = saved[0].double().contiguous().numpy(), _NONE
    if saved[1] is not None:
        grad_lse = saved[1].double().contiguous().numpy()
    by_query = np.zeros(batch.m if needs & NEEDS_QUERY else 0)
    by_w = np.zeros(batch.m if needs & NEEDS_W else 0)
    keys_needed = bool(needs & (NEEDS_KEY | NEEDS_VALUE | NEEDS_KEY_WEIGHT))
    by_key, by_value, by_weight = _NONE, _NO_ROWS, _NONE
    if keys_needed:
        by_key, by_value, by_weight = np.zeros(batch.n), np.zeros((batch.n, batch.c)), np.zeros(batch.n)
    if len(data.key) and len(data.query):
        plan = make_plan(batch.accuracy, abs(data.w), data.key, data.query, unevenness=data.unevenness)
        if needs & (NEEDS_QUERY | NEEDS_W):
            # Of the dtypes of the forward pass, or the kernels would be compiled anew.
            none = torch.empty(0, dtype=batch.dtype).numpy()
            results = none, none, _NONE, none, none
            rows = Rows(data.row_order, data.own, data.centre, *results, grad_out, grad_lse, by_query, by_w)
            query_side(data, plan, batch.accuracy, rows, 2 if needs & NEEDS_W else 1)
        if keys_needed:
            saved_rows = grad_out, grad_lse, saved[2].double().numpy(), saved[3].numpy()
            by_key, by_value, by_weight = key_side(
                data,
                plan,
                batch.accuracy,
                Targets(data, exclude_self),
                saved_rows,
                parts[2],
                parts[4],
                bool(needs & ~NEEDS_VALUE),
            )
            if needs & NEEDS_KEY_WEIGHT and len(data.key) < batch.n:
                zero_weights.fill(by_weight, data, batch.accuracy, parts_held, saved_rows, exclude_self)
    spoilt = data.nan_rows[_has_gradient(grad_out, grad_lse, data.nan_rows)]
    if len(spoilt) and len(data.key):
        by_query[spoilt if len(by_query) else _NO_ORDER] = np.nan
        by_w += np.nan
        counts = slice(None) if parts[4] is None else (parts[4] != 0).numpy()
        for part in (by_key, by_value, by_weight):
            part[counts if len(part) else _NO_ORDER] = np.nan
    return tuple(
        torch.from_numpy(np.asarray(part)) if needs & flag else torch.empty(0)
        for part, flag in (
            (by_query, NEEDS_QUERY),
            (by_key, NEEDS_KEY),
            (by_value, NEEDS_VALUE),
            (by_w.sum(), NEEDS_W),
            (by_weight, NEEDS_KEY_WEIGHT),
        )
    )  # type: ignore[return-value]
