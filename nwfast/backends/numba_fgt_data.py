"""One batch element of the fast Gauss transform: sorted float64 coordinates, charges, and the way back to its order."""

import math

import numpy as np
import torch
from torch import Tensor

LARGEST = 1e100  # of coordinates, values and w: products of three stay finite
MOST_SPAN = 600.0  # of the logarithms of weights: ratios stay normal numbers


class Data:
    """Sorted keys, queries and charges (1 + C, N): the weights, and the weights times the centred values.

    Attributes
    ----------
    key, charge : np.ndarray
        Of the keys that have a weight.
    query : np.ndarray
        The finite queries.
    row_order, key_order : np.ndarray
        The caller's place of each sorted row and key; of length 0 where nothing moved.
    own : np.ndarray
        The sorted key that each sorted row leaves out, or -1; of length 0 where none is.
    exponent : int
        Weights have been scaled by 2^-exponent.
    centre : np.ndarray
        (3, C): what was subtracted from values, their minima and maxima.
    nan_rows, infinite_rows : np.ndarray
        The caller's places of queries that are not finite.
    """

    key: np.ndarray
    charge: np.ndarray
    key_order: np.ndarray
    query: np.ndarray
    row_order: np.ndarray
    own: np.ndarray
    nan_rows: np.ndarray
    infinite_rows: np.ndarray
    exponent = 0

    def __init__(self, key: Tensor, value: Tensor, key_weight: Tensor | None, w: float):
        self.w = w
        self.count = len(key)
        self.usable = self._read_keys(key, value, key_weight)

    def _read_keys(self, key: Tensor, value: Tensor, key_weight: Tensor | None) -> bool:
        """False where the dense kernels have to serve: numbers that are not finite, or too large."""
        low, high = (float(bound) for bound in torch.aminmax(key))
        if not (abs(self.w) < LARGEST and low > -LARGEST and high < LARGEST):
            return False
        lows, highs = torch.aminmax(value, dim=0)
        bounds = torch.stack((lows, highs)).double()
        if not bool((bounds.abs() < LARGEST).all()):
            return False
        positive = None
        if key_weight is not None:
            least, most = (float(bound) for bound in torch.aminmax(key_weight))
            if not (least >= 0 and most < LARGEST):
                return False
            if least == 0:
                positive = key_weight > 0
                least = float(key_weight[positive].min()) if most > 0 else 1.0
            if most > 0:
                if math.log(most) - math.log(least) > MOST_SPAN:
                    return False
                self.exponent = math.frexp(most)[1]
        # A median, since the mean of an outlier and the rest would cost the rest their digits. torch (2.13) leaves the
        # median of an expanded tensor unwritten: of a copy.
        some = value[:: max(1, len(value) // 255)].clone(memory_format=torch.contiguous_format)
        middle = some.median(0).values.double()
        self.centre = torch.cat((middle[None], bounds)).numpy()
        self.key_order = np.empty(0, np.int64)
        kept = None if positive is None else positive.nonzero()[:, 0].numpy()
        if len(key) > 1 and not bool((key[1:] >= key[:-1]).all()):
            order = places_in_order(key.contiguous().numpy())
            self.key_order = order if positive is None else order[positive.numpy()[order]]
        elif kept is not None:
            self.key_order = kept
        moved = len(self.key_order) > 0 or kept is not None
        self.key = self.sorted_keys(key) if moved else _double(key)
        n, channels = len(self.key), value.shape[1]
        self.charge = np.ones((1 + channels, n))
        charge = torch.from_numpy(self.charge)
        place = torch.from_numpy(self.key_order)
        if key_weight is not None:
            weight = key_weight[place] if moved else key_weight
            charge[0].copy_(weight)
            charge[0].mul_(2.0**-self.exponent)
        for channel in range(channels):
            column = value[:, channel]
            charge[1 + channel].copy_(column[place] if moved else column)
            charge[1 + channel].sub_(middle[channel])
            if key_weight is not None:
                charge[1 + channel].mul_(charge[0])
        return True

    def sorted_keys(self, key: Tensor) -> np.ndarray:
        """In float64 and in order."""
        return _double(key[torch.from_numpy(self.key_order)])

    def read_queries(self, query: Tensor, exclude_self: bool) -> bool:
        """Sort the queries; False where the dense kernels have to serve."""
        self.row_order = np.empty(0, np.int64)
        self.nan_rows = self.infinite_rows = np.empty(0, np.int64)
        self.own = np.empty(0, np.int64)
        if len(query):
            low, high = (float(bound) for bound in torch.aminmax(query))
            if not (-math.inf < low and high < math.inf):
                good = query.isfinite()
                self.row_order = good.nonzero()[:, 0].numpy()
                self.nan_rows = query.isnan().nonzero()[:, 0].numpy()
                self.infinite_rows = query.isinf().nonzero()[:, 0].numpy()
                query = query[good]
                low, high = (float(bound) for bound in torch.aminmax(query)) if len(query) else (0.0, 0.0)
            if not (low > -LARGEST and high < LARGEST):
                return False
        if len(query) > 1 and not bool((query[1:] >= query[:-1]).all()):
            order = places_in_order(query.contiguous().numpy())
            query = query[torch.from_numpy(order)]
            self.row_order = self.row_order[order] if len(self.row_order) else order
        self.query = _double(query)
        if exclude_self:
            rows = self.row_order if len(self.row_order) or not len(query) else np.arange(len(query))
            if len(self.key_order) or len(self.key) != self.count:
                place = np.full(self.count, -1)
                place[self.key_order] = np.arange(len(self.key))
                self.own = place[rows]
            else:
                self.own = rows.copy()
        return True


def _double(x: Tensor) -> np.ndarray:
    return x.double().contiguous().numpy()


def places_in_order(x: np.ndarray) -> np.ndarray:
    """The places of numbers in ascending order."""
    return np.argsort(x)
