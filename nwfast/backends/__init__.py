"""Backends: where a kernel runs. One module a backend, all with the same two functions, which only compute.

Canonical form (what `nwfast.validation` hands on; every tensor has the same number of leading dimensions, each of
size 1 or that of the batch *B, so nothing is ever expanded in memory):

    query (*B, M, D), key (*B, N, D), value (*B, N, C), key_weight (*B, N) or None
    w: at least one dimension, broadcasts from the right to (*B, D)

    forward(query, key, value, w, key_weight, exclude_self, tangent_w, tangent_q)
        -> out (*B, M, C), lse (*B, M), state, tangent_w (*B, M, C), tangent_q (*B, M, C)
    backward(grad_out, grad_lse, query, key, value, w, key_weight, out, state, tangent_w, tangent_q, exclude_self,
             needs)
        -> grad_query (*B, M, D), grad_key (*B, N, D), grad_value (*B, N, C), grad_w (the shape of w),
           grad_key_weight (*B, N)

* Results have the arithmetic dtype: float64 for float64 inputs, float32 for float32, float16 and bfloat16 (gradient
  of w: its own dtype).
* state (*B, M, 2) float64 is what the backward pass needs to know of each row's normaliser, as
  (shift, total): lse = ln 2 * (log2(total) - shift). Apart, since a single lse of 1e8 cannot hold both.
* tangents: d out / d w and d out / d query, for one feature and one channel (D = C = 1), where asked for; they make
  the backward pass for w and query a product. Not asked for: an empty tensor of shape (0,).
* grad_lse may be None. needs is a sum of NEEDS flags; a gradient not asked for is an empty tensor of shape (0,).
  backward uses the tangents it is given unless grad_lse is not None, which they do not cover.
* The native operators also take the one-feature forms of the public function as they are (`nwfast.ops.direct`).
* Rows without any key left (all weights 0) give out NaN, lse -inf, and add nothing to any gradient.
"""

import importlib.util
from types import ModuleType

import torch
from torch import Tensor, device

from . import native

NAMES = ("native", "numba", "reference")
NEEDS_QUERY, NEEDS_KEY, NEEDS_VALUE, NEEDS_W, NEEDS_KEY_WEIGHT = 1, 2, 4, 8, 16


def available() -> dict[str, bool | str]:
    """Which backends can run here.

    Returns
    -------
    dict
        ``{name: True}`` for each backend that works, ``{name: "reason why not"}`` for each that does not.

    Examples
    --------
    >>> import nwfast
    >>> nwfast.backends.available()["reference"]
    True
    """
    return {name: reason or True for name in NAMES for reason in [_why_not(name)]}


# Found out once, at import: the reason why a backend cannot run in this process, empty if it can.
_REASONS = {
    "native": native.why_not,
    "numba": "" if importlib.util.find_spec("numba") else "the package numba is not installed",
    "reference": "",
}


def _why_not(name: str) -> str:
    return _REASONS[name]


# Which device types a backend's kernels serve, in the order in which "auto" prefers the backends.
_DEVICES = {"native": ("cpu",), "numba": ("cpu",), "reference": None}


def resolve(backend: str, where: device) -> str:
    """The name of the backend to run on: `backend` itself, or the first that can serve the device for "auto".

    Raises
    ------
    ValueError
        The name is unknown, or the named backend does not serve tensors on this device.
    RuntimeError
        The named backend cannot run here; the message gives the reason.
    """
    if backend == "auto":
        return _resolve_auto(where.type)
    if backend not in NAMES:
        raise ValueError(f"backend must be 'auto' or one of {', '.join(map(repr, NAMES))}, got {backend!r}")
    reason = _why_not(backend)
    if reason:
        raise RuntimeError(f"backend={backend!r} cannot run: {reason}")
    devices = _DEVICES[backend]
    if devices is not None and where.type not in devices and where.type != "meta":
        raise ValueError(
            f"backend={backend!r} serves tensors on {' or '.join(devices)}, got tensors on {where}"
        )
    return backend


def _resolve_auto(device_type: str) -> str:
    for name, devices in _DEVICES.items():
        if not _why_not(name) and (devices is None or device_type in devices):
            return name
    raise AssertionError("unreachable: the reference serves every device")


def load(name: str) -> ModuleType:
    """The module of a backend, imported on first use."""
    return importlib.import_module(f"{__name__}.{name}")


def batch_shape(query: Tensor, key: Tensor, value: Tensor) -> tuple[int, ...]:
    """The leading dimensions *B of the result, for tensors in canonical form."""
    if query.ndim == 2:
        return ()
    if query.ndim == 3:  # spelt out: this runs at every call
        sizes = query.shape[0], key.shape[0], value.shape[0]
        return (next((size for size in sizes if size != 1), 1),)
    return tuple(torch.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2]))
