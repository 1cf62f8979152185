"""Every semantic check on user input, once: turns the accepted shapes into the canonical form or raises.

The messages name the argument, what was expected and what came. Checks read shapes, dtypes and devices only, never
data: they cost no synchronisation and hold under torch.compile. They run at every call, so the common case asks
little; what exactly was wrong is found out only once something is.
"""

import inspect
import numbers
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor

from .backends import METHODS as BACKEND_METHODS
from .backends import batch_shape, is_captured

METHODS = ("dense", *sorted({m for methods in BACKEND_METHODS.values() for m in methods} - {"dense"}))
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
_HALF = (torch.float16, torch.bfloat16)
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_OF_PYTHON = (int, float, torch.SymInt, torch.SymFloat)
_NUMBERS = (*_OF_PYTHON, numbers.Real)

# What others call the bandwidth, and w in terms of it.
NAMES_OF_BANDWIDTH = {
    **{
        name: f"1 / {name}"
        for name in ("bandwidth", "bw", "h", "kernel_width", "length_scale", "lengthscale", "sigma")
    },
    "gamma": "(2 * gamma) ** 0.5",
}

_Function = TypeVar("_Function", bound=Callable)

# query, key, value (None if None was given), w, key_weight, and how many dimensions of size 1 the result has at its
# end that the caller did not give: 1 where value has no channel dimension, 2 where keys are per query as well.
Canonical = tuple[Tensor, Tensor, Any, Tensor, Tensor | None, int]


def canonical(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    w: float | Tensor,
    key_weight: Tensor | None,
    exclude_self: bool,
    without_value: bool = False,
) -> Canonical:
    """Check all inputs and bring them into the canonical form of `nwfast.backends`, with views alone.

    Under autocast half-precision inputs become float32 first: Gaussian scores in half precision mean nothing.

    Raises
    ------
    TypeError
        An argument is not a tensor, its dtype is not a supported floating dtype, or dtypes are mixed.
    ValueError
        Shapes that do not fit, mixed devices, no keys, or M != N with exclude_self.
    """
    if not _is_plain(query, key, value, w, key_weight):
        query, key, value, w, key_weight = _checked(query, key, value, w, key_weight, without_value)

    drop = 0
    query_ndim, key_ndim = query.ndim, key.ndim
    value_ndim = key_ndim if value is None else value.ndim
    if query_ndim == 1:
        if key_ndim == 1:
            if value_ndim == 1:
                drop = 1
                value = value if value is None else value.unsqueeze(-1)
            elif value_ndim != 2:
                raise _shape_error("value", "(N,) or (N, C)", query, key, value)
            query, key = query.unsqueeze(-1), key.unsqueeze(-1)
        elif key_ndim == 2:
            if key.shape[0] != query.shape[0]:
                raise _shape_error("key", "(N,), or (M, N) with one row of keys a query", query, key, value)
            if value is not None and value.shape != key.shape:
                raise _shape_error("value", "(M, N) as key", query, key, value)
            if exclude_self:
                raise ValueError(
                    "exclude_self needs keys that all queries share, key (N,), got one row of keys a query, key "
                    f"{tuple(key.shape)}: leave those keys out of the rows instead"
                )
            drop = 2
            query, key = query.view(-1, 1, 1), key.unsqueeze(-1)
            value = value if value is None else value.unsqueeze(-1)
        else:
            raise _shape_error("key", "(N,) or (M, N) with query (M,)", query, key, value)
    else:
        if query_ndim == 0:
            raise _shape_error("query", "(M,) or (..., M, D)", query, key, value)
        if key_ndim != query_ndim:
            raise _shape_error("key", "(..., N, D), of as many dimensions as query", query, key, value)
        if key.shape[-1] != query.shape[-1]:
            raise _shape_error(
                "key", f"(..., N, D) with D = {query.shape[-1]} features as query", query, key, value
            )
        if query.shape[-1] == 0:
            raise _shape_error("query", "(..., M, D) with D >= 1", query, key, value)
        if value_ndim == key_ndim - 1:
            drop = 1
            value = value if value is None else value.unsqueeze(-1)
        elif value_ndim != key_ndim:
            raise _shape_error("value", "(..., N, C) or (..., N)", query, key, value)

    n_keys = key.shape[-2]
    if value is not None:
        if value.shape[-2] != n_keys:
            raise ValueError(f"value must have one row a key, N = {n_keys}, got {value.shape[-2]} rows")
        if value.shape[-1] == 0:
            raise ValueError("value must have at least one channel, got C = 0")
    if n_keys == 0:
        raise ValueError("key must not be empty, got N = 0: the weighted average of no values is not defined")
    if exclude_self and query.shape[-2] != n_keys:
        raise ValueError(
            f"exclude_self leaves key i out for query i and needs M == N, got M = {query.shape[-2]}, N = {n_keys}"
        )
    if query_ndim > 2:
        _check_leading(query, key, value)
    if (
        isinstance(w, Tensor)
        and w.ndim == 1
        and w.dtype == query.dtype
        and w.shape[0] == 1
        and key_weight is None
    ):
        if w.device != query.device:
            raise _device_error("w", w, query)
        return query, key, value, w, None, drop
    batch = batch_shape(query, key, key if value is None else value)
    w = _canonical_w(w, query)
    whole = _broadcast("w", w, "D", (1, query.shape[-1]), batch)
    if key_weight is not None:
        key_weight = _canonical_key_weight(key_weight, query)
        whole = _broadcast("key_weight", key_weight, "N", (n_keys,), whole)
    if whole != batch:  # by views: results take their leading dimensions from these three
        query, key = (_with_leading(tensor, len(whole)) for tensor in (query, key))
        value = value if value is None else _with_leading(value, len(whole))
        query = query.expand(*whole, *query.shape[-2:])
    if key_weight is not None:
        key_weight = key_weight[(None,) * (len(whole) + 1 - key_weight.ndim)]
    return query, key, value, w, key_weight, drop


def as_declared(function: _Function) -> _Function:
    """Leave `unknown` out of the signature that a function shows: it is there for `unexpected` alone.

    Catching all keyword arguments takes some hundredths of a microsecond. For type checkers it is not there either:
    they read the overloads, or its annotation, which no argument fits.
    """
    shown = inspect.signature(function)
    kept = [parameter for name, parameter in shown.parameters.items() if name != "unknown"]
    function.__signature__ = shown.replace(parameters=kept)  # type: ignore[attr-defined]
    return function


def unexpected(function: str, unknown: Iterable[str]) -> TypeError:
    """The error for keyword arguments that there are not, which says what w is where they mean the bandwidth."""
    name = next(iter(unknown))
    message = f"{function}() got an unexpected keyword argument {name!r}"
    if name in NAMES_OF_BANDWIDTH:
        message += f": it takes the inverse of the bandwidth, w = {NAMES_OF_BANDWIDTH[name]}"
    return TypeError(message)


def check_kind(name: str, tensor: object) -> None:
    """Raise TypeError unless `tensor` is one; for arrays and lists the message says what makes one of them."""
    if not isinstance(tensor, Tensor):
        hint = _as_tensor(name, tensor)
        if hint:
            hint += "; arrays are what nwfast.NadarayaWatsonRegressor takes"
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}{hint}")


def _as_tensor(name: str, data: object) -> str:
    """What makes a tensor of arrays, lists and columns of tables, as the end of a message."""
    if type(data).__name__ == "ndarray":
        return f": torch.from_numpy({name}) makes it one"
    if hasattr(data, "__array__"):
        return f": torch.tensor(numpy.asarray({name})) makes it one"
    return f": torch.as_tensor({name}) makes it one" if isinstance(data, list | tuple) else ""


def check_method(method: str) -> None:
    """Raise ValueError unless `method` is "auto" or the name of a method."""
    if method != "auto" and method not in METHODS:
        raise ValueError(f"method must be 'auto' or one of {', '.join(map(repr, METHODS))}, got {method!r}")


def _is_plain(query: Any, key: Any, value: Any, w: Any, key_weight: Any) -> bool:
    """The common case, in which `_checked` would find nothing to refuse or convert: one wide dtype, one device."""
    if not (isinstance(query, Tensor) and isinstance(key, Tensor) and isinstance(value, Tensor)):
        return False
    dtype, device = query.dtype, query.device
    return (
        (dtype == torch.float32 or dtype == torch.float64)
        and key.dtype == dtype
        and value.dtype == dtype
        and key.device == device
        and value.device == device
        and (not isinstance(w, Tensor) or w.dtype == dtype)
        and key_weight is None
        and query.layout == key.layout == value.layout == torch.strided
    )


def _checked(
    query: Any, key: Any, value: Any, w: Any, key_weight: Any, without_value: bool
) -> tuple[Tensor, Tensor, Any, Any, Any]:
    """The arguments, converted under autocast; TypeError or ValueError where kinds, dtypes or devices do not fit."""
    _check_tensor("query", query)
    _check_tensor("key", key)
    if not without_value:
        _check_tensor("value", value)
    device_type = query.device.type
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        query, key, value, w, key_weight = map(_widen, (query, key, value, w, key_weight))
    _check_companion("key", key, query)
    if value is not None:
        _check_companion("value", value, query)
    return query, key, value, w, key_weight


def _check_tensor(name: str, tensor: Any) -> None:
    check_kind(name, tensor)
    if tensor.dtype not in _DTYPES:
        expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        raise TypeError(f"{name} must have a floating dtype ({expected}), got {tensor.dtype}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name} must be a dense (strided) tensor, got layout {tensor.layout}")


def _check_companion(name: str, tensor: Tensor, query: Tensor) -> None:
    if tensor.dtype != query.dtype:
        raise TypeError(f"{name} must have the dtype of query, {query.dtype}, got {tensor.dtype}")
    if tensor.device != query.device:
        raise _device_error(name, tensor, query)


def _device_error(name: str, tensor: Tensor, query: Tensor) -> ValueError:
    return ValueError(f"{name} must be on the device of query, {query.device}, got {tensor.device}")


def _widen(argument):
    if isinstance(argument, Tensor) and argument.dtype in _HALF:
        return argument.float()
    return argument


def _shape_error(name: str, expected: str, query: Tensor, key: Tensor, value: Tensor | None) -> ValueError:
    given = f"query {tuple(query.shape)}, key {tuple(key.shape)}"
    if value is not None:
        given += f", value {tuple(value.shape)}"
    return ValueError(f"{name} must have shape {expected}, got {given}")


def _check_leading(query: Tensor, key: Tensor, value: Tensor | None) -> None:
    named = {"query": query, "key": key} if value is None else {"query": query, "key": key, "value": value}
    for dim in range(query.ndim - 2):
        common = 1
        for tensor in named.values():
            size = tensor.shape[dim]
            if size != 1 and size != common:
                if common != 1:
                    sizes = ", ".join(f"{tensor.shape[dim]} ({name})" for name, tensor in named.items())
                    raise ValueError(f"leading dimensions must broadcast, dimension {dim} has sizes {sizes}")
                common = size


def _canonical_w(w: Any, query: Tensor) -> Tensor:
    """The inverse bandwidth with a dimension at least, in the dtype of query, or in float32 beside half precision."""
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    if not isinstance(w, Tensor):
        if not isinstance(w, _OF_PYTHON) and getattr(w, "shape", None) == () and hasattr(w, "item"):
            w = w.item()  # of numpy
        if isinstance(w, bool) or not isinstance(w, _NUMBERS):
            raise TypeError(
                f"w must be a number or a torch.Tensor, got {type(w).__name__}{_as_tensor('w', w)}"
            )
        number: Any = w
        if is_captured():  # a comparison, or a constant, would make a program for this one number
            return torch.ones(1, dtype=dtype, device=query.device) * number
        largest = torch.finfo(dtype).max
        if not -largest <= number <= largest:
            raise ValueError(f"w must be finite in {dtype}, got {w}")
        return torch.full((1,), number, dtype=dtype, device=query.device)
    if w.dtype in _INTEGERS or (w.ndim == 0 and w.dtype in _DTYPES and w.dtype != query.dtype):
        # As torch promotes: integers, and tensors without dimensions, take the floating dtype of the others.
        w = w if w.dtype == torch.float32 and query.dtype in _HALF else w.to(dtype)
    _check_tensor("w", w)
    # A float32 w may stand beside half-precision data: its gradient needs the bits.
    if not (w.dtype == torch.float32 and query.dtype in _HALF):
        _check_companion("w", w, query)
    elif w.device != query.device:
        raise _device_error("w", w, query)
    return w.unsqueeze(0) if w.ndim == 0 else w


def _canonical_key_weight(key_weight: Any, query: Tensor) -> Tensor:
    """Masks and counts, too, in the dtype of query."""
    if isinstance(key_weight, Tensor) and (key_weight.dtype in _INTEGERS or key_weight.dtype == torch.bool):
        key_weight = key_weight.to(query.dtype)
    _check_tensor("key_weight", key_weight)
    _check_companion("key_weight", key_weight, query)
    return key_weight


def _broadcast(
    name: str, tensor: Tensor, last: str, sizes: tuple[int, ...], batch: tuple[int, ...]
) -> tuple[int, ...]:
    """The leading dimensions of the result: those of the others, `batch`, with those of w or key_weight."""
    if tensor.ndim > 0 and tensor.shape[-1] in sizes:
        leading = tensor.shape[:-1]
        if _fits(leading, batch):
            return batch
        if _fits_both(leading, batch):
            return tuple(torch.broadcast_shapes(leading, batch))
    own = f"be a scalar or have shape (1,), ({last},)" if name == "w" else f"have shape ({last},)"
    raise ValueError(
        f"{name} must {own} or (..., {last}) with {last} = {sizes[-1]} and leading dimensions that broadcast with "
        f"{tuple(batch)}, got {tuple(tensor.shape)}"
    )


def _with_leading(tensor: Tensor, rank: int) -> Tensor:
    return tensor[(None,) * (rank + 2 - tensor.ndim)]


def _fits(leading: torch.Size, batch: tuple[int, ...]) -> bool:
    """Whether `leading` broadcasts to `batch` from the right without enlarging it."""
    if len(leading) > len(batch):
        return False
    pairs = zip(reversed(leading), reversed(batch), strict=False)
    return all(size == 1 or size == batch_size for size, batch_size in pairs)


def _fits_both(leading: torch.Size, batch: tuple[int, ...]) -> bool:
    pairs = zip(reversed(leading), reversed(batch), strict=False)
    return all(size == 1 or batch_size == 1 or size == batch_size for size, batch_size in pairs)
