"""Every semantic check on user input, once: turns the accepted shapes into the canonical form or raises.

The messages name the argument, what was expected and what came. Checks read shapes, dtypes and devices only, never
data: they cost no synchronisation and hold under torch.compile.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .backends import batch_shape

METHODS = ("dense",)
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_HALF = (torch.float16, torch.bfloat16)


class Canonical(NamedTuple):
    """Inputs in the canonical form of `nwfast.backends`, and which dimensions of the result the caller did not give."""

    query: Tensor
    key: Tensor
    value: Tensor
    w: Tensor
    key_weight: Tensor | None
    drop_query_dim: bool  # per-query keys: out (M, 1, C), lse (M, 1)
    drop_channel_dim: bool  # the value had no channel dimension


def canonical(
    query: Tensor, key: Tensor, value: Tensor, w: float | Tensor, key_weight: Tensor | None, exclude_self: bool
) -> Canonical:
    """Check all inputs of the op and bring them into canonical form with views alone.

    Raises
    ------
    TypeError
        An argument is not a tensor, its dtype is not a supported floating dtype, or dtypes are mixed.
    ValueError
        Shapes that do not fit, mixed devices, no keys, or M != N with exclude_self.
    """
    _check_tensors(query=query, key=key, value=value)
    dtype, device = query.dtype, query.device
    if key.dtype != dtype or value.dtype != dtype:
        raise TypeError(
            f"query, key and value must have one dtype, got {dtype}, {key.dtype} and {value.dtype} (convert with .to())"
        )
    if key.device != device or value.device != device:
        raise ValueError(
            f"query, key and value must be on one device, got {device}, {key.device} and {value.device}"
        )

    drop_query_dim = drop_channel_dim = False
    query_ndim, key_ndim, value_ndim = query.ndim, key.ndim, value.ndim
    if query_ndim == 1:
        if key_ndim == 1:
            if value_ndim == 1:
                drop_channel_dim = True
                value = value.unsqueeze(-1)
            elif value_ndim != 2:
                raise _shape_error("value", "(N,) or (N, C)", query, key, value)
            query, key = query.unsqueeze(-1), key.unsqueeze(-1)
        elif key_ndim == 2:
            if key.shape[0] != query.shape[0]:
                raise _shape_error("key", "(M, N), one row of keys a query,", query, key, value)
            if value.shape != key.shape:
                raise _shape_error("value", "(M, N) as key", query, key, value)
            if exclude_self:
                raise ValueError(
                    "exclude_self needs keys shared by all queries, key (N,), got one row of keys a query, key "
                    f"{tuple(key.shape)}: use key_weight = 1 - torch.eye(N) instead"
                )
            drop_query_dim = drop_channel_dim = True
            query, key, value = query[:, None, None], key.unsqueeze(-1), value.unsqueeze(-1)
        else:
            raise _shape_error("key", "(N,) or (M, N) with query (M,)", query, key, value)
    else:
        if query_ndim == 0 or key_ndim != query_ndim:
            raise _shape_error("key", "(..., N, D) with query (..., M, D)", query, key, value)
        if key.shape[-1] != query.shape[-1]:
            raise _shape_error("key", f"(..., N, D) with D = {query.shape[-1]} as query", query, key, value)
        if query.shape[-1] == 0:
            raise _shape_error("query", "(..., M, D) with D >= 1", query, key, value)
        if value_ndim == key_ndim - 1:
            drop_channel_dim = True
            value = value.unsqueeze(-1)
        elif value_ndim != key_ndim:
            raise _shape_error("value", "(..., N, C) or (..., N)", query, key, value)

    n_keys = key.shape[-2]
    if value.shape[-2] != n_keys:
        raise ValueError(f"value must have one row a key, N = {n_keys}, got {value.shape[-2]} rows")
    if n_keys == 0:
        raise ValueError("key is empty (N = 0): the weighted average of no values is not defined")
    if value.shape[-1] == 0:
        raise ValueError("value must have at least one channel, got C = 0")
    if exclude_self and query.shape[-2] != n_keys:
        raise ValueError(
            f"exclude_self leaves key i out for query i and needs M == N, got M = {query.shape[-2]}, N = {n_keys}"
        )
    batch = _broadcast_leading(query, key, value)
    if key_weight is not None:
        key_weight = _canonical_key_weight(key_weight, query, n_keys, batch)
    w = _canonical_w(w, query, batch)
    return Canonical(query, key, value, w, key_weight, drop_query_dim, drop_channel_dim)


def check_method(method: str) -> None:
    """Raise ValueError unless `method` is "auto" or the name of a method."""
    if method != "auto" and method not in METHODS:
        raise ValueError(f"method must be 'auto' or one of {', '.join(map(repr, METHODS))}, got {method!r}")


def _check_tensors(**tensors: Tensor) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dtype not in _DTYPES:
            expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
            raise TypeError(f"{name} must have a floating dtype ({expected}), got {tensor.dtype}")
        if tensor.layout != torch.strided:
            raise TypeError(f"{name} must be a dense (strided) tensor, got layout {tensor.layout}")


def _shape_error(name: str, expected: str, query: Tensor, key: Tensor, value: Tensor) -> ValueError:
    return ValueError(
        f"{name} must have shape {expected}, got query {tuple(query.shape)}, key {tuple(key.shape)}, "
        f"value {tuple(value.shape)}"
    )


def _broadcast_leading(query: Tensor, key: Tensor, value: Tensor) -> tuple[int, ...]:
    if query.ndim == 2:
        return ()
    for dim in range(query.ndim - 2):
        sizes = {query.shape[dim], key.shape[dim], value.shape[dim]} - {1}
        if len(sizes) > 1:
            raise ValueError(
                f"leading dimensions must broadcast, dimension {dim} has sizes {query.shape[dim]} (query), "
                f"{key.shape[dim]} (key), {value.shape[dim]} (value)"
            )
    return batch_shape(query, key, value)


def _canonical_key_weight(key_weight: Tensor, query: Tensor, n_keys: int, batch: tuple[int, ...]) -> Tensor:
    _check_tensors(key_weight=key_weight)
    _check_companion("key_weight", key_weight, query, narrow_query_too=False)
    if key_weight.ndim == 1 and batch:
        key_weight = key_weight[(None,) * len(batch)]
    if (
        key_weight.ndim != len(batch) + 1
        or key_weight.shape[-1] != n_keys
        or not _fits(key_weight.shape[:-1], batch)
    ):
        raise ValueError(
            f"key_weight must have shape (N,) or (..., N) with N = {n_keys} and leading dimensions {batch}, "
            f"got {tuple(key_weight.shape)}"
        )
    return key_weight


def _canonical_w(w: float | Tensor, query: Tensor, batch: tuple[int, ...]) -> Tensor:
    if not isinstance(w, Tensor):
        if isinstance(w, bool) or not isinstance(w, (int, float)):
            raise TypeError(f"w must be a number or a torch.Tensor, got {type(w).__name__}")
        if not math.isfinite(w):
            raise ValueError(f"w must be finite, got {w}")
        dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        return torch.full((1,), w, dtype=dtype, device=query.device)
    _check_tensors(w=w)
    _check_companion("w", w, query, narrow_query_too=True)
    if w.ndim == 0:
        return w.unsqueeze(0)
    features = query.shape[-1]
    if w.ndim > len(batch) + 1 or w.shape[-1] not in (1, features) or not _fits(w.shape[:-1], batch):
        raise ValueError(
            f"w must be a scalar or have shape (1,), (D,) or (..., D) with D = {features} and leading dimensions "
            f"that broadcast to {batch}, got {tuple(w.shape)}"
        )
    return w


def _check_companion(name: str, tensor: Tensor, query: Tensor, narrow_query_too: bool) -> None:
    """Dtype and device as the query; w may be float32 beside half-precision data, where its gradient needs the bits."""
    if tensor.dtype != query.dtype and not (
        narrow_query_too and tensor.dtype == torch.float32 and query.dtype in _HALF
    ):
        raise TypeError(f"{name} must have the dtype of query, {query.dtype}, got {tensor.dtype}")
    if tensor.device != query.device:
        raise ValueError(f"{name} must be on the device of query, {query.device}, got {tensor.device}")


def _fits(leading: torch.Size, batch: tuple[int, ...]) -> bool:
    """Whether `leading` broadcasts to `batch` from the right without enlarging it."""
    if len(leading) > len(batch):
        return False
    return all(
        size in (1, batch_size)
        for size, batch_size in zip(reversed(leading), reversed(batch), strict=False)
    )
