"""Compiled entry points: each runs the units first..last of one call, a unit being a block of one batch element's rows.

Only these are cached on disk, everything else is compiled into them. Numba's cache looks at the file of the entry point
alone; the digest of all sources in the closure makes a changed kernel in another file a new entry.
"""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numba import njit

from .numba_fast import TILE, survey
from .numba_keys import key_block
from .numba_math import (
    BATCH, C, D, EXACT, GRAD_OUT, GRAD_QUERY, GRAD_W, KINDS, M, MEANS, N, ROWS, STATE, TANGENT_Q, TANGENT_W, pointer,
)  # fmt: skip
from .numba_rows import backward_block, forward_block

QUERY_BLOCK = 256
KEY_BLOCK = TILE


def _compile(digest: str) -> tuple[Callable, ...]:
    @njit(cache=True, **EXACT)
    def forward(example, about, first, last):
        """out, lse, state, tangents."""
        digest  # noqa: B018
        tiles = (about[N] + TILE - 1) // TILE
        blocks = (about[M] + QUERY_BLOCK - 1) // QUERY_BLOCK
        centre = np.empty(about[C], example.dtype)
        low, high = np.empty((tiles, about[D]), example.dtype), np.empty((tiles, about[D]), example.dtype)
        surveyed, ordinary, exponent = -1, False, 0.0
        for unit in range(first, last):
            b = unit // blocks
            if b != surveyed:
                ordinary, exponent = survey(example, about, b, centre, low, high)
                surveyed = b
            start = (unit % blocks) * QUERY_BLOCK
            stop = min(start + QUERY_BLOCK, about[M])
            forward_block(example, about, b, start, stop, ordinary, exponent, centre, low, high)

    @njit(cache=True, **EXACT)
    def backward_rows(example, about, first, last):
        """grad_query, the sum for w of each unit, and what backward_keys needs of each row."""
        digest  # noqa: B018
        tiles = (about[N] + TILE - 1) // TILE
        blocks = (about[M] + QUERY_BLOCK - 1) // QUERY_BLOCK
        centre = np.empty(about[C], example.dtype)
        low, high = np.empty((tiles, about[D]), example.dtype), np.empty((tiles, about[D]), example.dtype)
        rows, means = pointer(about[ROWS], np.empty(0)), pointer(about[MEANS], np.empty(0))
        kinds = pointer(about[KINDS], np.empty(0, np.int8))
        sums, grad_w = pointer(about[GRAD_W], np.empty(0)), np.empty(about[D])
        surveyed, ordinary, exponent = -1, False, 0.0
        for unit in range(first, last):
            b = unit // blocks
            if b != surveyed:
                ordinary, exponent = survey(example, about, b, centre, low, high)
                surveyed = b
            start = (unit % blocks) * QUERY_BLOCK
            stop = min(start + QUERY_BLOCK, about[M])
            grad_w[:] = 0.0
            backward_block(
                example, about, b, start, stop, ordinary, exponent, centre, low, high, kinds, rows, means, grad_w
            )
            if about[GRAD_W] != 0:
                for f in range(about[D]):
                    sums[unit * about[D] + f] = grad_w[f]

    @njit(cache=True, **EXACT)
    def backward_keys(example, about, first, last):
        """grad_key, grad_value, grad_key_weight."""
        digest  # noqa: B018
        tiles = (about[N] + TILE - 1) // TILE
        centre = np.empty(about[C], example.dtype)
        low, high = np.empty((tiles, about[D]), example.dtype), np.empty((tiles, about[D]), example.dtype)
        rows, means = pointer(about[ROWS], np.empty(0)), pointer(about[MEANS], np.empty(0))
        kinds = pointer(about[KINDS], np.empty(0, np.int8))
        surveyed, ordinary, exponent = -1, False, 0.0
        for unit in range(first, last):
            b = unit // tiles
            if b != surveyed:
                ordinary, exponent = survey(example, about, b, centre, low, high)
                surveyed = b
            start = (unit % tiles) * KEY_BLOCK
            stop = min(start + KEY_BLOCK, about[N])
            key_block(example, about, b, start, stop, ordinary, exponent, centre, low, high, kinds, rows, means)

    @njit(cache=True, **EXACT)
    def backward_tangents(example, about):
        """grad_query and the sum for w of each batch element, as products with the tangents (D = C = 1)."""
        digest  # noqa: B018
        grad_out, grad_query = pointer(about[GRAD_OUT], example), pointer(about[GRAD_QUERY], example)
        tangent_w, tangent_q = pointer(about[TANGENT_W], example), pointer(about[TANGENT_Q], example)
        state, sums = pointer(about[STATE], np.empty(0)), pointer(about[GRAD_W], np.empty(0))
        for b in range(about[BATCH]):
            by_w = 0.0
            for row in range(b * about[M], (b + 1) * about[M]):
                empty = state[2 * row + 1] == 0.0
                if about[GRAD_QUERY] != 0:
                    grad_query[row] = example.dtype.type(0) if empty else grad_out[row] * tangent_q[row]
                if about[GRAD_W] != 0 and not empty:
                    by_w += float(grad_out[row]) * float(tangent_w[row])
            if about[GRAD_W] != 0:
                sums[b] = by_w

    return forward, backward_rows, backward_keys, backward_tangents


def _digest() -> str:
    sources = sorted(Path(__file__).parent.glob("numba*.py"))
    return hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()


forward, backward_rows, backward_keys, backward_tangents = _compile(_digest())
