"""Backends: where a kernel runs. All have the same two or three functions, which only compute.

Those of the C++ extensions are registered by importing these (`extension`); Numba, Triton and the reference have them
in Python, in modules of their own (`load`).

Canonical form (what `nwfast.validation` hands on; every tensor has the same number of leading dimensions, each of
size 1 or that of the batch *B, so nothing is ever expanded in memory):

    query (*B, M, D), key (*B, N, D), value (*B, N, C), key_weight (*B, N) or None
    w: at least one dimension, broadcasts from the right to (*B, D)

    forward(query, key, value, w, key_weight, exclude_self, tangent_w, tangent_q)
        -> out (*B, M, C), lse (*B, M), state, tangent_w (*B, M, C), tangent_q (*B, M, C)
    output(query, key, value, w, key_weight, exclude_self, lse, tangent_w, tangent_q)
        -> out, lse, tangent_w, tangent_q        (native and numba alone: without the state)
    backward(grad_out, grad_lse, query, key, value, w, key_weight, out, state, tangent_w, tangent_q, exclude_self,
             needs)
        -> grad_query (*B, M, D), grad_key (*B, N, D), grad_value (*B, N, C), grad_w (the shape of w),
           grad_key_weight (*B, N)

* Results have the arithmetic dtype: float64 for float64 inputs, float32 for float32, float16 and bfloat16 (gradient
  of w: its own dtype).
* state (*B, M, 2) float64 is what the backward pass needs to know of each row's normaliser, as
  (shift, total): lse = ln 2 * (log2(total) - shift). Apart, since a single lse of 1e8 cannot hold both.
* tangents: d out / d w and d out / d query, for one feature and one channel (D = C = 1), where asked for; they make
  the backward pass for w and query a product. Not asked for: an empty tensor of shape (0,). Where the native linear
  method serves, it gives d out / d query, (*B, M, D * C), for any number of channels, and with two and three features
  d out / d w, (*B, M, D), for one; where it does not, both are of shape (0,).
* grad_lse may be None. needs is a sum of NEEDS flags; a gradient not asked for is an empty tensor of shape (0,).
  backward uses the tangents it is given unless grad_lse is not None, which they do not cover.
* linear kernels (see `operators`) take up to FGT_FEATURES features.
* The native operators also take the one-feature forms of the public function as they are (`nwfast.op.call.short_way`).
* Rows without any key left (all weights 0) give out NaN, lse -inf, and add nothing to any gradient.
"""

import functools
import importlib.util
import os
from types import ModuleType

import torch
from torch import Tensor, device

from . import compiling, extension, messages

NAMES = ("native", "cuda", "numba", "triton", "reference")
NEEDS_QUERY, NEEDS_KEY, NEEDS_VALUE, NEEDS_W, NEEDS_KEY_WEIGHT = 1, 2, 4, 8, 16

# What each backend can do beside the reference, which serves every device with the dense formula.
METHODS = {"native": ("dense", "fgt"), "cuda": ("dense",), "numba": ("dense", "fgt"), "triton": ("dense",)}
# How many features the fast Gauss transform of a backend takes at most.
FGT_FEATURES = {"native": 3, "numba": 1}
# Triton's interpreter runs its kernels on CPU tensors, for tests: only what is asked for by name gets it.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_DEVICES = {
    "native": ("cpu",),
    "cuda": ("cuda",),
    "numba": ("cpu",),
    "triton": ("cpu", "cuda") if _INTERPRETED else ("cuda",),
}
# The order in which "auto" takes the backends on each type of device; the reference comes last everywhere.
_ORDER = {"cpu": ("native", "numba"), "cuda": ("cuda", "triton")}


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


# Why a backend cannot run in this process, empty if it can; found out once. Triton's answer waits until it is asked
# for: looking for GPUs at import would start CUDA in processes that never use it.
_REASONS = {
    "native": extension.NATIVE_WHY_NOT,
    "cuda": extension.CUDA_WHY_NOT,
    "numba": "" if importlib.util.find_spec("numba") else "the package numba is not installed",
    "reference": "",
}


@functools.cache
def _why_not_triton() -> str:
    if not importlib.util.find_spec("triton"):
        return "the package triton is not installed"
    if _INTERPRETED or torch.cuda.is_available():
        return ""
    return "torch finds no GPU"


def _why_not(name: str) -> str:
    return _why_not_triton() if name == "triton" else _REASONS[name]


def resolve(backend: str, where: device, method: str = "auto") -> str:
    """The name of the backend to run on: `backend` itself, or the first that can serve the call for "auto".

    Raises
    ------
    ValueError
        The name is unknown, or the named backend serves neither tensors on this device nor this method.
    RuntimeError
        The named backend cannot run here; the message gives the reason.
    """
    if backend == "auto":
        name = _resolve_auto(where, method)
        if name != "native" and where.type == "cpu" and not is_captured():
            say_fallback(name)
        return name
    if backend not in NAMES:
        raise ValueError(f"backend must be 'auto' or one of {', '.join(map(repr, NAMES))}, got {backend!r}")
    reason = _why_not(backend)
    if reason:
        raise RuntimeError(f"backend={backend!r} cannot run: {reason}")
    devices = _DEVICES.get(backend)
    if devices is not None and where.type not in devices and where.type != "meta":
        raise ValueError(
            f"backend={backend!r} serves tensors on {' or '.join(devices)}, got tensors on {where}"
        )
    methods = METHODS.get(backend, ("dense",))
    if method != "auto" and method not in methods:
        raise ValueError(
            f"backend={backend!r} has no method {method!r}, only {', '.join(map(repr, methods))}"
        )
    return backend


def _resolve_auto(where: device, method: str) -> str:
    for name in _ORDER.get(where.type, ()):
        if not _why_not(name) and (method == "auto" or method in METHODS[name]):
            return name
    if method == "auto" or method == "dense":
        return "reference"
    able = [name for name, methods in METHODS.items() if method in methods]
    raise ValueError(
        f"method={method!r} has no backend for tensors on {where} here; it is in the backends "
        + ", ".join(
            f"{name} ({' and '.join(_DEVICES[name])}: {_why_not(name) or 'available'})" for name in able
        )
    )


@functools.cache
def say_fallback(name: str) -> None:
    """Say, once a process, that a slower backend serves the CPU and why, unless the user asked for that."""
    if extension.NATIVE_WHY_NOT and not extension.is_unwanted():
        messages.warn(f'backend="auto" takes {name!r}: {extension.NATIVE_WHY_NOT}')


def operators() -> list[str]:
    """The names of all kernels, each a pair of operators `nwfast::<name>_forward` and `nwfast::<name>_backward`.

    A backend's own name is its dense method. Where it has another, <backend>_fgt is that and <backend>_auto takes the
    faster of the two.
    """
    names = []
    for backend, methods in METHODS.items():
        names.append(backend)
        if "fgt" in methods:
            names += [f"{backend}_fgt", f"{backend}_auto"]
    return names


# The modules of kernels in Python, by the kernels' names.
_MODULES = {
    "numba": "numba.dense.call",
    "numba_fgt": "numba.linear.call",
    "numba_auto": "numba.choose",
    "triton": "triton.call",
}


def load(name: str) -> ModuleType:
    """The module of a kernel (or one of this package), imported on first use: Numba and Triton load slowly."""
    module = importlib.import_module(f"{__name__}.{_MODULES.get(name, name)}")
    if name.startswith("numba"):
        compiling.watch()
    return module


def is_captured() -> bool:
    """Whether the call is written down as a program for other data: by torch.compile, export or torch.jit.trace."""
    return torch.compiler.is_compiling() or torch._C._is_tracing()


def batch_shape(query: Tensor, key: Tensor, value: Tensor) -> tuple[int, ...]:
    """The leading dimensions *B of the result, for tensors in canonical form."""
    if query.ndim == 2:
        return ()
    if query.ndim == 3:  # spelt out: this runs at every call
        sizes = query.shape[0], key.shape[0], value.shape[0]
        return (next((size for size in sizes if size != 1), 1),)
    return tuple(torch.broadcast_shapes(query.shape[:-2], key.shape[:-2], value.shape[:-2]))
