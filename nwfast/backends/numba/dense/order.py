"""Spatial orders of keys and rows, so that the dense kernels can leave out what is far away.

With several features the kernels skip a tile of keys for a row whose every weight there is negligible, by the tile's
bounding box (`least_score` in tiles.py). In the order in which data come a tile has keys from everywhere, and nothing
is skipped. Here keys are divided at medians (a k-d tree) down to tiles, and rows down to blocks. O(n log n), serial, in
NumPy: next to nothing beside the pairs of a call that is worth it.
"""

from typing import NamedTuple, overload

import numpy as np
import torch
from torch import Tensor

from .tiles import TILE

_LEAST_PAIRS = 4_000_000  # below, ordering costs more than it can save


class Order(NamedTuple):
    """Which row and which key come at each place."""

    rows: Tensor
    keys: Tensor


def pays(query: Tensor, key: Tensor, w: Tensor) -> bool:
    """Whether a call, in canonical form, is of one batch element, and large enough."""
    m, n, features = query.shape[-2], key.shape[-2], key.shape[-1]
    alone = query.numel() == m * features and key.numel() == n * features and w.numel() <= features
    return features > 1 and n > TILE and m * n >= _LEAST_PAIRS and alone


def order_of(query: Tensor, key: Tensor, w: Tensor, exclude_self: bool, row_block: int) -> Order | None:
    """The order in which to compute a call; None where it is to stay as it is."""
    if not pays(query, key, w):
        return None
    m, n, features = query.shape[-2], key.shape[-2], key.shape[-1]
    scale = w.reshape(-1).double().abs().numpy()
    keys = _divided(key.reshape(n, features).double().numpy() * scale, TILE)
    if keys is None:
        return None
    if exclude_self:  # a row and its own key have one number
        return Order(keys, keys)
    rows = _divided(query.reshape(m, features).double().numpy() * scale, row_block)
    return None if rows is None else Order(rows, keys)


def _divided(points: np.ndarray, leaf: int) -> Tensor | None:
    """The order of points (n, D) that leaves those of each aligned `leaf` together; None if some are not finite."""
    if not np.isfinite(points).all():
        return None
    order = np.arange(len(points))
    ranges = [(0, len(points))]
    while ranges:
        first, last = ranges.pop()
        leaves = -(-(last - first) // leaf)
        if leaves == 1:
            continue
        part = points[order[first:last]]
        along = part[:, np.argmax(np.ptp(part, axis=0))]
        middle = leaves // 2 * leaf
        order[first:last] = order[first:last][np.argpartition(along, middle)]
        ranges += [(first, first + middle), (first + middle, last)]
    return torch.from_numpy(order)


@overload
def ordered(tensor: Tensor, order: Tensor, dim: int) -> Tensor: ...


@overload
def ordered(tensor: Tensor | None, order: Tensor, dim: int) -> Tensor | None: ...


def ordered(tensor: Tensor | None, order: Tensor, dim: int) -> Tensor | None:
    """The tensor's parts along `dim` in this order."""
    return None if tensor is None else tensor.index_select(dim, order)


def restored(tensor: Tensor, order: Tensor, dim: int) -> Tensor:
    """Undo `ordered`; an empty result, not asked for, stays empty."""
    return torch.empty_like(tensor).index_copy_(dim, order, tensor) if tensor.numel() else tensor
