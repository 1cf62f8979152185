"""Compiled entry points: each runs the units first..last of one call, a unit being a block of one batch element's rows.

They choose, block by block, between the fast kernels and the robust ones.
"""

import numpy as np
from numba import njit

from . import numba_robust as robust
from .numba_math import (
    C, D, EXACT, GRAD_KEY, GRAD_VALUE, GRAD_W, GRAD_WEIGHT, M, MEANS, N, ROWS, pointer,
)  # fmt: skip

QUERY_BLOCK = 256
KEY_BLOCK = 256


@njit(**EXACT)
def forward(example, about, first, last):
    """out, lse, state, tangents."""
    blocks = (about[M] + QUERY_BLOCK - 1) // QUERY_BLOCK
    for unit in range(first, last):
        b = unit // blocks
        start = (unit % blocks) * QUERY_BLOCK
        stop = min(start + QUERY_BLOCK, about[M])
        robust.forward_rows(example, about, b, start, stop)


@njit(**EXACT)
def backward_rows(example, about, first, last):
    """grad_query, the sum for w of each unit, and what backward_keys needs of each row."""
    blocks = (about[M] + QUERY_BLOCK - 1) // QUERY_BLOCK
    rows, means = pointer(about[ROWS], np.empty(0)), pointer(about[MEANS], np.empty(0))
    sums = pointer(about[GRAD_W], np.empty(0))
    grad_w = np.empty(about[D])
    for unit in range(first, last):
        b = unit // blocks
        start = (unit % blocks) * QUERY_BLOCK
        stop = min(start + QUERY_BLOCK, about[M])
        grad_w[:] = 0.0
        robust.query_side(example, about, b, start, stop, rows, means, grad_w)
        if about[GRAD_W] != 0:
            for f in range(about[D]):
                sums[unit * about[D] + f] = grad_w[f]


@njit(**EXACT)
def backward_keys(example, about, first, last):
    """grad_key, grad_value, grad_key_weight."""
    n, n_features, n_channels = about[N], about[D], about[C]
    blocks = (n + KEY_BLOCK - 1) // KEY_BLOCK
    rows, means = pointer(about[ROWS], np.empty(0)), pointer(about[MEANS], np.empty(0))
    grad_key, grad_value = pointer(about[GRAD_KEY], example), pointer(about[GRAD_VALUE], example)
    grad_weight = pointer(about[GRAD_WEIGHT], example)
    far = np.arange(about[M])
    for unit in range(first, last):
        b = unit // blocks
        start = (unit % blocks) * KEY_BLOCK
        stop = min(start + KEY_BLOCK, n)
        by_key, by_value, by_weight = robust.key_side(example, about, b, start, stop, rows, means, far)
        for j in range(start, stop):
            if about[GRAD_KEY] != 0:
                for f in range(n_features):
                    grad_key[(b * n + j) * n_features + f] = by_key[j - start, f]
            if about[GRAD_VALUE] != 0:
                for c in range(n_channels):
                    grad_value[(b * n + j) * n_channels + c] = by_value[j - start, c]
            if about[GRAD_WEIGHT] != 0:
                grad_weight[b * n + j] = by_weight[j - start]
