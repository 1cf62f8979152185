"""The Numba backend: the kernels of rows.py and keys.py, run over a pool of threads.

Work is cut into units of a fixed size: a batch element and a block of its rows (queries forwards, keys backwards). A
unit is computed by one thread and sums are taken in the order of units, so no bit depends on the number of threads.
The kernels are serial and release the GIL: Numba's own threading layers break fork or abort on concurrent calls.

Kernels are compiled at the first call that needs them and cached on disk.
"""

import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ... import NEEDS_KEY, NEEDS_KEY_WEIGHT, NEEDS_QUERY, NEEDS_VALUE, NEEDS_W, batch_shape
from .. import base as place
from .. import zero_weights
from .keys import backward_keys
from .order import order_of, ordered, pays, restored
from .rows import EMPTY, FAR, QUERY_BLOCK, backward_rows, backward_tangents, forward_rows
from .tiles import TILE

_EXAMPLE: dict[torch.dtype, np.ndarray] = {
    torch.float32: np.empty(0, np.float32),
    torch.float64: np.empty(0, np.float64),
}
_SERIAL = 60_000  # pairs below which a hand-over to other threads costs more than it saves

_pool: tuple[int, int, ThreadPoolExecutor] | None = None  # process, workers, pool


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
    return _forward(query, key, value, w, key_weight, exclude_self, True, True, tangent_w, tangent_q)


def output(*inputs_and_wanted: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Out and, if asked for, lse and tangents: see `nwfast.backends`."""
    wanted = inputs_and_wanted[6], False, *inputs_and_wanted[7:]
    out, lse, _, by_w, by_q = _forward(*inputs_and_wanted[:6], *wanted)
    return out, lse, by_w, by_q


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    w: Tensor,
    key_weight: Tensor | None,
    exclude_self: bool,
    with_lse: bool,
    with_state: bool,
    tangent_w: bool,
    tangent_q: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """All results; of shape (0,) where they are not wanted."""
    key, value = zero_weights.anchored(key, value, zero_weights.places(key_weight))
    order = order_of(query, key, w, exclude_self, QUERY_BLOCK)
    if order is not None:
        query = ordered(query, order.rows, -2)
        key, value = ordered(key, order.keys, -2), ordered(value, order.keys, -2)
        key_weight = ordered(key_weight, order.keys, -1)
    call = _Call(query, key, value, w, key_weight, exclude_self)
    rows, about = (*call.batch, call.m), call.about

    def result(name: int, shape: tuple, wanted: bool, dtype: torch.dtype = call.dtype) -> Tensor:
        if not wanted:
            return torch.empty(0, dtype=dtype)  # one each: results of an operator are not the same tensor
        tensor = torch.empty(shape, dtype=dtype)
        about[name] = tensor.data_ptr()
        return tensor

    out = result(place.OUT, (*rows, call.c), True)
    by_w = result(place.TANGENT_W, (*rows, call.c), tangent_w)
    by_q = result(place.TANGENT_Q, (*rows, call.c), tangent_q)
    lse = result(place.LSE, rows, with_lse)
    state = result(place.STATE, (*rows, 2), with_state, torch.float64)
    # The kernels write these, wanted or not.
    unwanted = np.empty((3, call.size * call.m))
    if not with_lse:
        about[place.LSE] = address(unwanted)
    if not with_state:
        about[place.STATE] = address(unwanted[1:])
    call.run(forward_rows, call.m, QUERY_BLOCK)
    if order is not None:  # several features: without tangents
        at = len(call.batch)
        out = restored(out, order.rows, at)
        lse = restored(lse, order.rows, at) if with_lse else lse
        state = restored(state, order.rows, at) if with_state else state
    return out, lse, state, by_w, by_q


def address(array: np.ndarray) -> int:
    """Where an array begins; `ctypes.data` takes three times as long."""
    return array.__array_interface__["data"][0]


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
    if not needs & ~(NEEDS_QUERY | NEEDS_W) and grad_lse is None:
        products = _tangent_products(grad_out, out, state, tangent_w, tangent_q, w, needs)
        if products is not None:
            by_key, by_value, by_weight = (torch.empty(0, dtype=out.dtype) for _ in range(3))
            return products[0], by_key, by_value, products[1], by_weight
    order = None
    if pays(query, key, w):
        anchored, _ = zero_weights.anchored(key, value, zero_weights.places(key_weight))
        order = order_of(query, anchored, w, exclude_self, QUERY_BLOCK)
    if order is None:
        return _backward(
            grad_out, grad_lse, query, key, value, w, key_weight, out, state, tangent_w, tangent_q,
            exclude_self, needs,
        )  # fmt: skip
    rows, keys = order
    at = out.ndim - 2  # the dimension of rows, and of keys: results have all leading dimensions
    grad_query, grad_key, grad_value, grad_w, grad_weight = _backward(
        ordered(grad_out, rows, at),
        ordered(grad_lse, rows, at),
        ordered(query, rows, -2),
        ordered(key, keys, -2),
        ordered(value, keys, -2),
        w,
        ordered(key_weight, keys, -1),
        ordered(out, rows, at),
        ordered(state, rows, at),
        tangent_w,
        tangent_q,
        exclude_self,
        needs,
    )
    return (
        restored(grad_query, rows, at),
        restored(grad_key, keys, at),
        restored(grad_value, keys, at),
        grad_w,
        restored(grad_weight, keys, at),
    )


def _backward(
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
    """Of inputs in the order in which they are to be computed."""
    left_out = zero_weights.places(key_weight)
    held = key, value
    key, value = zero_weights.anchored(key, value, left_out)
    call = _Call(query, key, value, w, key_weight, exclude_self)
    about, dtype = call.about, call.dtype

    def wanted(flag: int, *shape: int) -> Tensor:
        return torch.empty(shape if needs & flag else (0,), dtype=dtype)

    grad_query = wanted(NEEDS_QUERY, *call.batch, call.m, call.d)
    grad_key = wanted(NEEDS_KEY, *call.batch, call.n, call.d)
    grad_value = wanted(NEEDS_VALUE, *call.batch, call.n, call.c)
    grad_weight = wanted(NEEDS_KEY_WEIGHT, *call.batch, call.n)
    grad_w = torch.empty(0, dtype=dtype)
    inputs = [grad_out.to(dtype).contiguous(), out.contiguous(), state.contiguous()]
    about[place.GRAD_OUT], about[place.OUT], about[place.STATE] = [tensor.data_ptr() for tensor in inputs]
    if grad_lse is not None:
        inputs.append(grad_lse.to(dtype).contiguous())
        about[place.GRAD_LSE] = inputs[-1].data_ptr()
    keys_wanted = bool(needs & (NEEDS_KEY | NEEDS_VALUE | NEEDS_KEY_WEIGHT))
    products = None
    if needs & (NEEDS_QUERY | NEEDS_W) and grad_lse is None:
        products = _tangent_products(inputs[0], out, state, tangent_w, tangent_q, w, needs)
    sums = np.zeros((call.size, -(-call.m // QUERY_BLOCK), call.d))
    if products is not None:
        grad_query, grad_w = products
    else:
        if needs & NEEDS_QUERY:
            about[place.GRAD_QUERY] = grad_query.data_ptr()
        if needs & NEEDS_W:
            about[place.GRAD_W] = address(sums)
    if keys_wanted or products is None:
        rows, means = np.empty((call.size * call.m, 3)), np.empty((call.size * call.m, call.c))
        kinds = np.empty(call.size * call.m, np.int8)
        about[place.ROWS], about[place.MEANS] = address(rows), address(means)
        about[place.KINDS] = address(kinds)
        call.run(backward_rows, call.m, QUERY_BLOCK)
    if needs & NEEDS_W and products is None:
        grad_w = _sum_for_w(sums.sum(1), call.batch, w)
    if keys_wanted:
        if needs & NEEDS_KEY:
            about[place.GRAD_KEY] = grad_key.data_ptr()
        if needs & NEEDS_VALUE:
            about[place.GRAD_VALUE] = grad_value.data_ptr()
        if needs & NEEDS_KEY_WEIGHT:
            about[place.GRAD_WEIGHT] = grad_weight.data_ptr()
        call.run(backward_keys, call.n, TILE)
    if keys_wanted and left_out is not None:
        for gradient in (grad_key, grad_value):
            if gradient.numel():
                gradient.masked_fill_(left_out[..., None], 0)
        if needs & NEEDS_KEY_WEIGHT:
            computed = grad_out, grad_lse, out, state, rows, means, kinds
            _fill_left_out(grad_weight, left_out, query, key, *held, w, exclude_self, computed)
    return grad_query, grad_key, grad_value, grad_w, grad_weight


def _tangent_products(
    grad_out: Tensor, out: Tensor, state: Tensor, tangent_w: Tensor, tangent_q: Tensor, w: Tensor, needs: int
) -> tuple[Tensor, Tensor] | None:
    """Gradients of query and w from saved tangents; None where there are none, or they do not hold the derivatives.

    A tangent may be beyond all numbers where its product with the cotangent is not.
    """
    by_q, by_w = bool(needs & NEEDS_QUERY), bool(needs & NEEDS_W)
    if (by_q and not tangent_q.numel()) or (by_w and not tangent_w.numel()):
        return None
    dtype, batch = out.dtype, tuple(out.shape[:-2])
    size, m = math.prod(batch), out.shape[-2]
    grad_query = torch.empty(out.shape if by_q else (0,), dtype=dtype)
    sums = np.zeros((size, 1))
    if grad_out.dtype != dtype:
        grad_out = grad_out.to(dtype)
    inputs = [x.contiguous() for x in (grad_out, state, tangent_w, tangent_q)]
    about = np.zeros(place.BATCHES, np.int64)
    about[place.BATCH], about[place.M] = size, m
    about[place.GRAD_OUT], about[place.STATE] = inputs[0].data_ptr(), inputs[1].data_ptr()
    if by_q:
        about[place.TANGENT_Q], about[place.GRAD_QUERY] = inputs[3].data_ptr(), grad_query.data_ptr()
    if by_w:
        about[place.TANGENT_W], about[place.GRAD_W] = inputs[2].data_ptr(), address(sums)
    backward_tangents(_EXAMPLE[dtype], about)
    finite = math.isfinite(sums[0, 0]) if size == 1 else np.isfinite(sums).all()
    if not finite or (by_q and not np.isfinite(grad_query.numpy()).all()):
        return None
    return grad_query, _sum_for_w(sums, batch, w) if by_w else torch.empty(0, dtype=dtype)


def _fill_left_out(
    grad_weight: Tensor,
    left_out: Tensor,
    query: Tensor,
    anchored: Tensor,
    key: Tensor,
    value: Tensor,
    w: Tensor,
    exclude_self: bool,
    computed: tuple,
) -> None:
    """Fill the gradients of weights (*B, N) of 0 from what `backward_rows` found of each row."""
    *batch, n = grad_weight.shape
    m, d, c = query.shape[-2], query.shape[-1], value.shape[-1]

    def whole(tensor: Tensor, *sizes: int) -> Tensor:
        return tensor.expand(*batch, *sizes)

    grad_out, grad_lse, out, state, rows, means, kinds = computed
    rows, means, kinds = rows.reshape(*batch, m, 3), means.reshape(*batch, m, c), kinds.reshape(*batch, m)
    left_out, finite = whole(left_out, n), whole(zero_weights.finite(key, value), n)
    key, value, anchored = whole(key, n, d), whole(value, n, c), whole(anchored, n, d)
    query, w = whole(query, m, d), whole(w, d)
    most = torch.finfo(grad_weight.dtype).max
    for at in np.ndindex(*batch):
        which = (left_out[at] & finite[at]).nonzero()[:, 0]
        grad_weight[at].masked_fill_(left_out[at], 0)
        active = (kinds[at] != EMPTY).nonzero()[0]
        if not len(which) or not len(active):
            continue
        x, mean = query[at].double().numpy()[active], out[at].double().numpy()[active]
        shift, total = state[at].numpy()[active].T
        # Scores of rows that are near their keys are absolute; of others, relative to the key that the kernel chose.
        reference, base = x.copy(), shift - np.log2(total)
        far = (kinds[at][active] == FAR).nonzero()[0]
        if len(far):
            origin, top, total = rows[at][active[far]].T
            reference[far] = anchored[at].double().numpy()[origin.astype(np.int64)]
            base[far] = np.where(origin >= 0, -top - np.log2(total), np.nan)
            mean[far] = means[at][active[far]]
        through_lse = None if grad_lse is None else grad_lse[at].double().numpy()[active]
        active_rows = zero_weights.rows_of(
            x,
            reference,
            base,
            grad_out[at].double().numpy()[active],
            through_lse,
            mean,
            w[at].double().numpy(),
        )
        own = np.full(len(which), -1)
        if exclude_self:
            place = np.full(n, -1)
            place[active] = np.arange(len(active))
            own = place[which.numpy()]
        result = np.empty(len(which))
        keys = key[at][which].double().numpy(), value[at][which].double().numpy()

        def run(first: int, last: int, given=active_rows, keys=keys, own=own, result=result) -> None:
            zero_weights.weights(given, *keys, own, result, first, last)

        run_units(run, len(which), len(which) * len(active) * d < _SERIAL)
        grad_weight[at][which] = torch.from_numpy(result).clamp(-most, most).to(grad_weight.dtype)


def _sum_for_w(gradient: np.ndarray, batch: tuple[int, ...], w: Tensor) -> Tensor:
    """Bring the sums (B, D) to the shape and dtype of w, over the dimensions in which w was broadcast."""
    if gradient.size == 1 and w.dtype in _EXAMPLE:  # in a small call every conversion counts
        with np.errstate(over="ignore"):  # beyond its dtype a gradient is infinite
            return torch.from_numpy(gradient.reshape(w.shape).astype(_EXAMPLE[w.dtype].dtype))
    if gradient.shape != w.shape:
        gradient = gradient.reshape(*batch, gradient.shape[-1])
        gradient = gradient.sum(tuple(range(gradient.ndim - w.ndim)))
        for dim, size in enumerate(w.shape):
            if size == 1:
                gradient = gradient.sum(dim, keepdims=True)
    return torch.from_numpy(np.ascontiguousarray(gradient)).to(w.dtype)


class _Call:
    """The description of one call for the kernels (the array `about`, see base.py), and its sizes."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        w: Tensor,
        key_weight: Tensor | None,
        exclude_self: bool,
    ):
        self.batch = batch = batch_shape(query, key, value)
        self.dtype = dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        if query.dtype != dtype:
            query, key, value = _widen(query), _widen(key), _widen(value)
            key_weight = None if key_weight is None else _widen(key_weight)
        if w.dtype != dtype:
            w = w.to(dtype)
        self.keep_alive = query, key, value, w, key_weight
        self.m, self.d = query.shape[-2:]
        self.n, self.c = value.shape[-2:]
        about = [0] * place.BATCHES
        self.size = 1
        query_strides, key_strides, value_strides, w_strides = (
            query.stride(),
            key.stride(),
            value.stride(),
            w.stride(),
        )
        weight_strides = (0,) if key_weight is None else key_weight.stride()
        for dim in range(1, len(batch) + 1):  # from the last
            size = batch[-dim]
            self.size *= size
            about += (
                size,
                query_strides[-2 - dim] if query.shape[-2 - dim] != 1 else 0,
                key_strides[-2 - dim] if key.shape[-2 - dim] != 1 else 0,
                value_strides[-2 - dim] if value.shape[-2 - dim] != 1 else 0,
                weight_strides[-1 - dim] if key_weight is not None and key_weight.shape[-1 - dim] != 1 else 0,
                w_strides[-1 - dim] if w.ndim > dim and w.shape[-1 - dim] != 1 else 0,
            )
        about[place.BATCH], about[place.BATCH_DIMS] = self.size, len(batch)
        about[place.M], about[place.N], about[place.D], about[place.C] = self.m, self.n, self.d, self.c
        about[place.SELF] = exclude_self
        about[place.QUERY], about[place.KEY], about[place.VALUE] = (
            query.data_ptr(),
            key.data_ptr(),
            value.data_ptr(),
        )
        about[place.W] = w.data_ptr()
        about[place.QUERY_M], about[place.QUERY_D] = query_strides[-2:]
        about[place.KEY_N], about[place.KEY_D] = key_strides[-2:]
        about[place.VALUE_N], about[place.VALUE_C] = value_strides[-2:]
        about[place.W_D] = w_strides[-1] if w.shape[-1] != 1 else 0
        if key_weight is not None:
            about[place.WEIGHT], about[place.WEIGHT_N] = key_weight.data_ptr(), weight_strides[-1]
        self.about = about

    def run(self, kernel: Callable, length: int, block: int) -> None:
        """Run the kernel over all units (blocks of `length` rows of each batch element) on torch's threads."""
        count = self.size * -(-length // block)
        if count == 0:
            return
        example, about = _EXAMPLE[self.dtype], np.array(self.about, dtype=np.int64)
        serial = self.size * self.m * self.n * (self.d + self.c) < _SERIAL
        run_units(lambda first, last: kernel(example, about, first, last), count, serial)


def run_units(kernel: Callable[[int, int], None], count: int, serial: bool = False) -> None:
    """Run kernel(first, last) over the units 0 .. count on torch's threads, or in this one."""
    workers = min(torch.get_num_threads(), count)
    if count == 0:
        return
    if workers == 1 or serial:
        kernel(0, count)
        return
    step = max(1, count // (8 * workers))
    starts = iter(range(0, count, step))  # shared: a thread that is done takes the next

    def work() -> None:
        for start in starts:
            kernel(start, min(start + step, count))

    others = [_executor(workers - 1).submit(work) for _ in range(workers - 1)]
    try:
        work()
    finally:  # the kernels write to memory of this call: never leave before they are done
        for other in others:
            other.exception()
    for other in others:
        other.result()


def _widen(tensor: Tensor) -> Tensor:
    """To float32, without materialising leading dimensions that were expanded."""
    shape = tensor.shape
    for dim in range(tensor.ndim - 2):
        if tensor.stride(dim) == 0 and shape[dim] > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor.float().expand(shape)


def _executor(workers: int) -> ThreadPoolExecutor:
    """A pool of at least so many workers in this process: threads do not survive a fork, a child makes its own."""
    global _pool
    pool = _pool
    if pool is None or pool[0] != os.getpid() or pool[1] < workers:
        pool = _pool = (os.getpid(), workers, ThreadPoolExecutor(workers, "nwfast-numba"))
    return pool[2]
