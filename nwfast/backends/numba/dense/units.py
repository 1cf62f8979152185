"""Compiled entry points: each runs the units first..last of one call, a unit being a block of one batch element's rows.

Only these are cached on disk, everything else is compiled into them.
"""

from collections.abc import Callable

import numpy as np

from ..base import (
    BATCH,
    DIGEST,
    GRAD_OUT,
    GRAD_QUERY,
    GRAD_W,
    STATE,
    TANGENT_Q,
    TANGENT_W,
    M,
    double,
    entry,
    pointer,
)
from . import keys, rows
from .rows import QUERY_BLOCK
from .tiles import TILE

__all__ = ["QUERY_BLOCK", "TILE", "backward_keys", "backward_rows", "backward_tangents", "forward"]


def _compile_tangents(digest: str) -> Callable:
    @entry
    def backward_tangents(example, about):
        """grad_query and the sum for w of each batch element, as products with the tangents (D = C = 1)."""
        digest  # noqa: B018
        grad_out, grad_query = pointer(about[GRAD_OUT], example), pointer(about[GRAD_QUERY], example)
        tangent_w, tangent_q = pointer(about[TANGENT_W], example), pointer(about[TANGENT_Q], example)
        state, sums = pointer(about[STATE], np.empty(0)), pointer(about[GRAD_W], np.empty(0))
        for b in range(about[BATCH]):
            by_w = 0.0
            for row in range(b * about[M], (b + 1) * about[M]):
                empty = grad_out[row] == 0 or state[2 * row + 1] == 0.0  # 0 times NaN adds nothing
                if about[GRAD_QUERY] != 0:
                    grad_query[row] = example.dtype.type(0) if empty else grad_out[row] * tangent_q[row]
                if about[GRAD_W] != 0 and not empty:
                    by_w += double(grad_out[row]) * double(tangent_w[row])
            if about[GRAD_W] != 0:
                sums[b] = by_w

    return backward_tangents


forward = rows.compile_forward(DIGEST)
backward_rows = rows.compile_backward(DIGEST)
backward_keys = keys.compile_backward(DIGEST)
backward_tangents = _compile_tangents(DIGEST)
