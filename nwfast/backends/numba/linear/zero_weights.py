"""Gradients of the weights of keys that a weight of 0 leaves out, by the linear method: see ../zero_weights.py.

These keys are targets of a key side of their own, with a grid of boxes that holds them too. What it cannot hold, and
what may overflow (a key that is much nearer to some query than all that count), is summed over all rows.
"""

import math

import numpy as np
import torch

from .. import zero_weights
from ..base import HALF_LOG2E
from ..dense.call import run_units
from ..scores import mirrored
from .data import LARGEST_NUMBER, MOST_BANDWIDTHS, Data, as_double, places_among
from .key_side import Targets, key_side
from .plan import Accuracy, make_plan

OUTSIDE = 60.0  # bandwidths from all other data: no series reaches so far
STEEP = 300.0  # from such exponents in base 2 on a key's pairs are steep: the key side may overflow


def fill(
    by_weight: np.ndarray, data: Data, accuracy: Accuracy, parts: list, saved: tuple, exclude_self: bool
) -> None:
    """Fill the gradients of weights of 0; parts hold these keys as the caller gave them."""
    _, key, value, _, key_weight = parts
    which = ((key_weight == 0) & zero_weights.finite(key[:, None], value)).numpy().nonzero()[0]
    x = as_double(key.numpy()[which])
    large = ~(np.abs(x) < min(LARGEST_NUMBER, MOST_BANDWIDTHS / abs(data.w) if data.w else LARGEST_NUMBER))
    large |= ~(value[which].abs().amax(1).double().numpy() < LARGEST_NUMBER)
    alone = large | (_largest_exponent(data, x) > STEEP)
    for some, sums in ((which[~alone], _by_key_side), (which[alone], _by_rows)):
        if len(some):
            by_weight[some] = sums(data, accuracy, parts, saved, exclude_self, some)[some]
    most = torch.finfo(key.dtype).max
    np.clip(by_weight, -most, most, out=by_weight)


def _largest_exponent(data: Data, x: np.ndarray) -> np.ndarray:
    """A bound of the exponents of keys at x relative to the nearest key that counts, in base 2.

    Where x is nearer to a query than all keys that count, the query lies in the gap between two of them that holds x.
    The exponent is largest in the middle of the gap, or at the outermost query.
    """
    key, more = as_double(data.key), int(len(data.own) > 0)  # a row may leave out one side of the gap
    place = np.searchsorted(key, x)
    low, high = place - 1 - more, place + more
    below = np.where(low >= 0, key[np.maximum(low, 0)], -np.inf)
    above = np.where(high < len(key), key[np.minimum(high, len(key) - 1)], np.inf)
    first, last = float(data.query[0]), float(data.query[-1])
    with np.errstate(invalid="ignore", over="ignore"):
        middle = np.clip((below + above) / 2, first, last)
        middle = np.where(below == -np.inf, first, np.where(above == np.inf, last, middle))
        # d*^2 - d^2 for the nearer of the two; rounded, and large where its rounding matters.
        nearest = np.where(middle - below <= above - middle, below, above)
        score = (nearest - x) * (nearest + x - 2 * middle)
        bound = HALF_LOG2E * data.w * data.w * score
    return np.where(np.isnan(bound), np.inf, bound)


def _by_key_side(
    data: Data, accuracy: Accuracy, parts: list, saved: tuple, exclude_self: bool, which: np.ndarray
) -> np.ndarray:
    x = parts[1].numpy()[which]
    scale = abs(data.w)
    low = min(float(data.key[0]), float(data.query[0]))
    high = max(float(data.key[-1]), float(data.query[-1]))
    margin = OUTSIDE / scale if scale else math.inf
    ends = np.array([max(float(x.min()), low - margin), min(float(x.max()), high + margin)])
    ends = np.array([min(low, ends[0]), max(high, ends[1])])
    plan = make_plan(accuracy, scale, data.key, ends, unevenness=data.unevenness)
    targets = Targets(data, exclude_self, which, x)
    return key_side(data, plan, accuracy, targets, saved, parts[2], None, True)[2]


def _by_rows(
    data: Data, accuracy: Accuracy, parts: list, saved: tuple, exclude_self: bool, which: np.ndarray
) -> np.ndarray:
    grad_out, grad_lse, out, state = saved
    rows = data.rows
    active = (grad_out[rows] != 0).any(1)
    if len(grad_lse):
        active |= grad_lse[rows] != 0
    active = (active & (state[rows, 1] > 0)).nonzero()[0]
    rows, x, key = rows[active], as_double(data.query)[active], as_double(data.key)
    star = _nearest(key, x, data.own[active] if len(data.own) else np.full(len(x), -1))
    distance = (x - key[star]) * data.w
    apart = state[rows, 0] - (HALF_LOG2E * distance * distance - data.exponent)
    # Shifts that differ by their rounding are those of one key.
    apart[np.abs(apart) <= 2.0**-49 * np.abs(state[rows, 0])] = 0.0
    base = apart - data.exponent - np.log2(state[rows, 1])
    given = zero_weights.rows_of(
        x[:, None],
        key[star][:, None],
        base,
        grad_out[rows],
        grad_lse[rows] if len(grad_lse) else None,
        out[rows],
        np.array([data.w]),
    )
    own = np.full(len(which), -1)
    if exclude_self:
        own = places_among(rows, data.count)[which]
    found = np.zeros(len(which))
    keys = parts[1][which].double().numpy()[:, None], parts[2][which].double().numpy()
    run_units(lambda first, last: zero_weights.weights(given, *keys, own, found, first, last), len(which))
    result = np.zeros(data.count)
    result[which] = found
    return result


def _nearest(key: np.ndarray, x: np.ndarray, own: np.ndarray) -> np.ndarray:
    """The nearest key of each row but its own, of rows that have one."""
    right = np.searchsorted(key, x)
    left = right - 1
    left, right = left - (left == own), right + (right == own)
    lower, upper = key[np.maximum(left, 0)], key[np.minimum(right, len(key) - 1)]
    number, rest = mirrored.py_func(x, lower)
    take_left = (left >= 0) & ((right >= len(key)) | ((number - upper) + rest <= 0))
    return np.where(take_left, left, right)
