"""Keys that a weight of 0 leaves out: as if they were not there, whatever they hold.

The kernels get copies in which such a key stands where one that counts does, with its value: then it is nowhere nearer
than all others, and nothing of what it held reaches a result. Its gradients are exactly 0 but for that of its weight,

    d a_j = sum_i exp(s_ij - lse_i) (<g_i, v_j - out_i> + grad_lse_i),

which is summed here, in float64 and relative to the largest exponent, since the key may be nearer than all that count.
"""

from typing import NamedTuple

import numpy as np
import torch
from numba import njit
from torch import Tensor

from .base import EXACT, ROOT, entry
from .exp2 import MOST_EXPONENT, exp2_double
from .scores import limited, relative_score

HELD_EXPONENTS = 1024  # whose exponents are held at once


class Givers(NamedTuple):
    """Givers that may give to keys left out. Their exponents are those relative to `reference`, plus base."""

    query: np.ndarray  # (M, D)
    reference: np.ndarray  # (M, D)
    base: np.ndarray  # (M)
    grad_out: np.ndarray  # (M, C)
    pull: np.ndarray  # (M): what comes through lse
    out: np.ndarray  # (M, C)
    w: np.ndarray  # (D), times ROOT


def places(key_weight: Tensor | None) -> Tensor | None:
    """Which keys are left out (*B, N); None if none is."""
    if key_weight is None:
        return None
    left_out = key_weight == 0
    return left_out if left_out.any() else None


def anchored(key: Tensor, value: Tensor, left_out: Tensor | None) -> tuple[Tensor, Tensor]:
    """Keys and values with copies of one that counts in place of those left out; of 0 where none is finite."""
    if left_out is None:
        return key, value
    counts = ~left_out & finite(key, value)
    first = counts.to(torch.uint8).argmax(-1)[..., None, None]
    some = counts.any(-1)[..., None, None]
    return _replaced(key, left_out, first, some), _replaced(value, left_out, first, some)


def _replaced(tensor: Tensor, left_out: Tensor, first: Tensor, some: Tensor) -> Tensor:
    batch, sizes = first.shape[:-2], tensor.shape[-2:]
    anchor = tensor.expand(*batch, *sizes).gather(-2, first.expand(*batch, 1, sizes[-1]))
    return torch.where(left_out[..., None], torch.where(some, anchor, 0), tensor)


def finite(key: Tensor, value: Tensor) -> Tensor:
    """Which keys (*B, N) have finite coordinates and values."""
    return key.isfinite().all(-1) & value.isfinite().all(-1)


@njit(**EXACT)
def scaled(x, exponent):
    """X 2^exponent, at most the largest finite number."""
    while exponent > 0.0 and x != 0.0 and abs(x) < np.inf:
        step = min(exponent, MOST_EXPONENT)
        x *= exp2_double(step)
        exponent -= step
    return limited(x) if exponent > 0.0 else limited(x * exp2_double(exponent))


@entry
def weights(rows, key, value, own, result, first, last):
    """Fill result (keys first .. last); own (keys): the row that leaves the key out, or -1."""
    query, reference, base, grad_out, pull, out, w = rows
    exponents = np.empty(HELD_EXPONENTS)
    count, channels = len(query), grad_out.shape[1]
    for j in range(first, last):
        total, top = 0.0, -np.inf
        for begin in range(0, count, HELD_EXPONENTS):
            end, here = min(begin + HELD_EXPONENTS, count), -np.inf
            for i in range(begin, end):
                exponent = relative_score(query[i], key[j], 0, 1, reference[i], 0, 1, w) + base[i]
                exponents[i - begin] = exponent
                if i != own[j]:
                    here = max(here, exponent)
            if here == -np.inf:
                continue
            part = 0.0
            for i in range(begin, end):
                if i != own[j]:
                    by = pull[i]
                    for c in range(channels):
                        by += grad_out[i, c] * (value[j, c] - out[i, c])
                    part = limited(part + exp2_double(exponents[i - begin] - here) * limited(by))
            if here > top:
                total *= exp2_double(top - here)
                top = here
            total = limited(total + part * exp2_double(here - top))
        result[j] = scaled(total, top) if top > -np.inf else 0.0


def rows_of(
    query: np.ndarray, reference: np.ndarray, base: np.ndarray, grad_out: np.ndarray, grad_lse: np.ndarray | None,
    out: np.ndarray, w: np.ndarray
) -> Givers:  # fmt: skip
    """The rows as `weights` takes them; w as the caller has it."""
    pull = np.zeros(len(query)) if grad_lse is None else grad_lse
    parts = query, reference, base, grad_out, pull, out, w * ROOT
    return Givers(*(np.ascontiguousarray(part, dtype=np.float64) for part in parts))
