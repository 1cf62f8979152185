"""Derivatives that have no kernel, by differentiating the reference: second derivatives and forward mode.

They build (M, N) matrices, several at a time: `require_memory` refuses what would not fit.
"""

import math
import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import backends
from ..backends import reference
from ..backends.reference import arithmetic_dtype

# The flags in the order of the differentiable inputs: query, key, value, w, key_weight.
NEEDS = (
    backends.NEEDS_QUERY,
    backends.NEEDS_KEY,
    backends.NEEDS_VALUE,
    backends.NEEDS_W,
    backends.NEEDS_KEY_WEIGHT,
)
# Float64 matrices (M, N) alive at the peak: so many, and so many more for each feature (measured, see the test), of
# float64 data; others take somewhat less.
_MATRICES = {"second derivative": (13, 15), "forward-mode derivative": (3, 8)}


def gradients(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    w: Tensor,
    key_weight: Tensor | None,
    exclude_self: bool,
    needs: int,
) -> tuple[Tensor, ...]:
    """What the backward operator returns, as a plain differentiable function."""
    batch = backends.batch_shape(query, key, value)
    dtype = arithmetic_dtype(query.dtype)

    def full(tensor: Tensor) -> Tensor:
        return tensor.to(dtype).expand(*batch, *tensor.shape[len(batch) :])

    inputs = [full(query), full(key), full(value), w]
    if key_weight is not None:
        inputs.append(full(key_weight))

    def outputs(query, key, value, w, key_weight=None):
        out, lse = reference.forward(query, key, value, w, key_weight, exclude_self)
        return out if grad_lse is None else (out, lse)

    cotangents = grad_out if grad_lse is None else (grad_out.to(dtype), grad_lse.to(dtype))
    pullback = torch.func.vjp(outputs, *inputs)[1]
    found = pullback(cotangents)
    return tuple(
        found[place] if needs & flag else query.new_empty(0, dtype=dtype) for place, flag in enumerate(NEEDS)
    )


def pull_back(
    function: Callable, inputs: Sequence[Tensor | None], cotangents: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Vector-Jacobian product of a function of tensors and Nones; a cotangent of None stands for zero."""
    places = [place for place, tensor in enumerate(inputs) if tensor is not None]

    def of_present(*present):
        arguments: list[Tensor | None] = [None] * len(inputs)
        for place, tensor in zip(places, present, strict=True):
            arguments[place] = tensor
        return function(*arguments)

    outputs, pullback, *_ = torch.func.vjp(of_present, *(inputs[place] for place in places))
    found = pullback(
        tuple(
            torch.zeros_like(output) if cotangent is None else cotangent
            for output, cotangent in zip(outputs, cotangents, strict=True)
        )
    )
    result: list[Tensor | None] = [None] * len(inputs)
    for place, gradient in zip(places, found, strict=True):
        result[place] = gradient
    return result


def require_memory(what: str, query: Tensor, key: Tensor, value: Tensor) -> None:
    """Raise RuntimeError if the matrices that derivative `what` builds do not fit the free memory."""
    free = _free_memory(query.device)
    if free is None:
        return
    matrices, per_feature = _MATRICES[what]
    pairs = math.prod(backends.batch_shape(query, key, value)) * query.shape[-2] * key.shape[-2]
    needed = 8 * pairs * (matrices + per_feature * query.shape[-1])
    if needed > free:
        raise RuntimeError(
            f"the {what} of nadaraya_watson builds (M, N) matrices: M = {query.shape[-2]}, N = {key.shape[-2]} need "
            f"about {needed / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free; use fewer queries at a time"
        )


def _free_memory(device: torch.device) -> int | None:
    """Bytes free on the device; None where nobody tells."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    if device.type != "cpu" or not os.path.exists("/proc/meminfo"):
        return None
    with open("/proc/meminfo") as lines:
        free = next((1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")), None)
    # A container may be allowed less than the machine has.
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            with open(path) as file:
                limit = file.read().strip()
        except OSError:
            continue
        if limit.isdigit() and free is not None:
            free = min(free, int(limit))
    return free
