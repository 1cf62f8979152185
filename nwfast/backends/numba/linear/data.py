"""One batch element of the linear method: sorted coordinates, charges, and the way back to its order.

Coordinates keep their dtype, since float64 copies of them would cost more time than the series: kernels take float64
differences from float64 centres. Far rows take differences of coordinates, in float64 (`as_double`).
"""

import functools
import math

import numpy as np
from torch import Tensor

from .boxes import Charges

LARGEST_NUMBER = 1e100  # of coordinates, values and w: products of three stay finite
MOST_BANDWIDTHS = 1e145  # of coordinates: their squares are finite
EVEN = 1e4  # values so many times as far from the middle as others elsewhere are no cause for care
GROUP_OF_VALUES = 8
LEAST_WEIGHT = 2.0**-1000  # of the largest weight: the factor that makes it 1 is finite
MOST_SPAN = 600.0  # of the logarithms of weights: ratios stay normal numbers


class Data:
    """Sorted keys and queries, and the charges of keys.

    Attributes
    ----------
    key, charges : np.ndarray, Charges
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
    uneven, unevenness : list of int, float
        Channels with values so much larger than others that errors relative to them would drown these, and by how much.
    """

    key: np.ndarray
    charges: Charges
    key_order: np.ndarray
    query: np.ndarray
    row_order: np.ndarray
    own: np.ndarray
    nan_rows: np.ndarray
    infinite_rows: np.ndarray
    uneven: list[int]
    unevenness: float
    exponent = 0

    def __init__(self, key: Tensor, value: Tensor, key_weight: Tensor | None, w: float):
        self.w = w
        self.count = len(key)
        self.usable = self._read_keys(key, value, key_weight)

    def _read_keys(self, key: Tensor, value: Tensor, key_weight: Tensor | None) -> bool:
        """False where the dense kernels have to serve: numbers that are not finite, or too large."""
        x, values = _array(key), _array(value)
        ordered, low, high = _order_and_bounds(x)
        if not (abs(self.w) < LARGEST_NUMBER and self._within(low, high)):
            return False
        self.channels = values.shape[1]
        # By channel: along the rows of a matrix with one column numpy is slow.
        columns = [values[:, channel] for channel in range(self.channels)]
        bounds = np.array([[column.min() for column in columns], [column.max() for column in columns]], float)
        if not (np.abs(bounds) < LARGEST_NUMBER).all():
            return False
        weight, kept = x[:0], None
        if key_weight is not None:
            weight = _array(key_weight)
            least, most = float(weight.min()), float(weight.max())
            if not (least >= 0 and most < LARGEST_NUMBER):
                return False
            if least == 0:
                kept = weight > 0
                least = float(weight[kept].min()) if most > 0 else 1.0
            if most > 0:
                if math.log(most) - math.log(least) > MOST_SPAN or most < LEAST_WEIGHT:
                    return False
                self.exponent = math.frexp(most)[1]
        # The value nearest to 0 if all have one sign, else 0: to subtract it costs no value its digits.
        middle = np.where(bounds[0] > 0, bounds[0], np.minimum(bounds[1], 0.0))
        self.centre = np.concatenate((middle[None], bounds))
        self.key_order = np.empty(0, np.int64)
        if not ordered:
            order = places_in_order(x)
            self.key_order = order if kept is None else order[kept[order]]
        elif kept is not None:
            self.key_order = kept.nonzero()[0]
        if len(self.key_order) or kept is not None:
            x, values = x[self.key_order], values[self.key_order]
            weight = weight[self.key_order] if len(weight) else weight
        self.key = x
        self._compare_sizes(values, middle, bounds)
        self.charges = Charges(values, weight, middle, 2.0**-self.exponent, np.empty((0, 0)))
        return True

    def _within(self, low: float, high: float) -> bool:
        """Whether coordinates are small enough for sums and products of them."""
        largest = max(-low, high)
        return largest < LARGEST_NUMBER and largest * abs(self.w) < MOST_BANDWIDTHS

    def _compare_sizes(self, values: np.ndarray, middle: np.ndarray, bounds: np.ndarray) -> None:
        """Find channels whose largest values would drown others elsewhere: sizes of some neighbours, by groups."""
        self.uneven, self.unevenness = [], 1.0
        if not len(values):
            return
        some = np.abs(values[:: max(1, len(values) // 2048)] - middle)
        groups = np.add.reduceat(some, np.arange(0, len(some), GROUP_OF_VALUES if len(some) > 256 else 1))
        least = np.where(groups > 0, groups, np.inf).min(0)
        ratio = np.maximum(np.abs(bounds - middle).max(0) / least, 1.0)
        self.uneven = (ratio > EVEN).nonzero()[0].tolist()
        if self.uneven:
            self.unevenness = float(ratio.max())

    @functools.cached_property
    def charge(self) -> np.ndarray:
        """All charges, (1 + C, N) in float64."""
        charge = np.empty((1 + self.channels, len(self.key)))
        value, weight, middle, scale, _ = self.charges
        charge[0] = 1.0
        np.subtract(value.T, middle[:, None], out=charge[1:])
        if len(weight):
            np.multiply(weight, scale, out=charge[0], dtype=np.float64)
            charge[1:] *= charge[0]
        return charge

    @property
    def rows(self) -> np.ndarray:
        """The caller's place of each sorted row."""
        return self.row_order if len(self.row_order) else np.arange(len(self.query))

    def mass(self, start: np.ndarray) -> np.ndarray:
        """The weight of the keys from each of these places (the last: N) up to the next."""
        if not len(self.charges.weight):
            return np.diff(start).astype(np.float64)
        sums = np.add.reduceat(self.charges.weight, start[:-1], dtype=np.float64)
        return sums * self.charges.scale

    def read_queries(self, query: Tensor, exclude_self: bool) -> bool:
        """Sort the queries; False where the dense kernels have to serve."""
        self.row_order = np.empty(0, np.int64)
        self.nan_rows = self.infinite_rows = np.empty(0, np.int64)
        self.own = np.empty(0, np.int64)
        x = _array(query)
        ordered, low, high = _order_and_bounds(x)
        if not (-math.inf < low and high < math.inf):
            good = np.isfinite(x)
            self.row_order = good.nonzero()[0]
            self.nan_rows, self.infinite_rows = np.isnan(x).nonzero()[0], np.isinf(x).nonzero()[0]
            x = x[good]
            ordered, low, high = _order_and_bounds(x)
        if not self._within(low, high):
            return False
        if not ordered:
            order = places_in_order(x)
            x = x[order]
            self.row_order = self.row_order[order] if len(self.row_order) else order
        self.query = x
        if exclude_self:
            if len(self.key_order) or len(self.key) != self.count:
                self.own = places_among(self.key_order, self.count)[self.rows]
            else:
                self.own = self.rows.copy()
        # To take an own key off again costs the digits of its value.
        return not (exclude_self and self.uneven)


def ready(charge: np.ndarray, dtype: np.dtype) -> Charges:
    """Charges (columns, N) that are not made from values of this dtype."""
    none = np.empty(0, dtype)
    return Charges(none[None], none, np.empty(0), 1.0, charge)


def as_double(x: np.ndarray) -> np.ndarray:
    """In float64: a copy, unless it is so already."""
    return x.astype(np.float64, copy=False)


def places_in_order(x: np.ndarray) -> np.ndarray:
    """The places of numbers in ascending order."""
    return np.argsort(x)


def places_among(order: np.ndarray, count: int) -> np.ndarray:
    """Where each of 0 .. count stands in `order`, -1 for those that do not."""
    place = np.full(count, -1)
    place[order] = np.arange(len(order))
    return place


def _array(x: Tensor) -> np.ndarray:
    return x.contiguous().numpy()


def _order_and_bounds(x: np.ndarray) -> tuple[bool, float, float]:
    """Whether numbers ascend, their minimum and maximum; NaN where there is one, zeros where there are none."""
    if not len(x):
        return True, 0.0, 0.0
    if (x[:-1] <= x[1:]).all():
        return True, float(x[0]), float(x[-1])
    return False, float(x.min()), float(x.max())
