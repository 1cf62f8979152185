"""Prepared keys: for a fixed bandwidth the power series of all boxes where queries may fall, so that one costs O(1).

A query looks up its box and sums the series there. Queries that no series serves (keys nearby are few, or far) are far
rows, summed as far_rows.py describes over keys that stay sorted.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..base import LN2, entry
from ..dense import call as dense
from ..dense.call import run_units
from ..zero_weights import anchored, places
from .boxes import Series
from .data import Data, as_double, places_in_order
from .near_rows import Rows, Sources
from .plan import DOUBLE, FLOAT, Accuracy, Plan, make_plan, no_plan
from .query_side import cut, decline_drowned, moments_of, sum_far_rows, translated

FEW = 96  # keys within reach up to which a box gets no series
TASK_QUERIES = 4096  # queries of a task
# Places in the first tensor: what is not an array.
USABLE, W, EXPONENT, WIDTH, ORIGIN, ONE_BOX, LOG_SPAN, IS_FLOAT, TABLE_START = range(9)


class Grid(NamedTuple):
    """Boxes of this width, and the place of each among the series."""

    width: float
    origin: float  # centre of the only box (one_box)
    one_box: bool
    start: float  # the first box of the table
    table: np.ndarray  # places, or -1


@entry
def lookup(query, grid, field, exponent, centre, out, lse, far, first, last):
    """Out and lse of blocks of queries in any order, those that a series serves; the others are marked as far."""
    (width, origin, one_box, table_start, table), (scale, series, least) = grid, field
    columns, terms = series.shape[1], series.shape[2]
    inverse, sums = 1.0 / width, np.empty(columns)
    for i in range(first * TASK_QUERIES, min(last * TASK_QUERIES, len(query))):
        q = query[i]
        far[i] = False
        if not abs(q) < np.inf:
            lse[i] = -np.inf if q == q else np.nan
            for c in range(columns - 1):
                out[i, c] = np.nan
            continue
        far[i] = True
        where = np.floor(q * inverse) if not one_box else 0.0
        if not (0 <= where - table_start < len(table)):
            continue
        box = table[np.int64(where - table_start)]
        if box < 0:
            continue
        s = (q - (origin if one_box else (where + 0.5) * width)) * scale
        if columns == 2:
            total, product = series[box, 0, terms - 1], series[box, 1, terms - 1]
            for m in range(terms - 2, -1, -1):
                total = total * s + series[box, 0, m]
                product = product * s + series[box, 1, m]
            sums[0], sums[1] = total, product
        else:
            for c in range(columns):
                total = series[box, c, terms - 1]
                for m in range(terms - 2, -1, -1):
                    total = total * s + series[box, c, m]
                sums[c] = total
        total = sums[0]
        if not (total > 0 and total >= least[box]):
            continue
        far[i] = False
        lse[i] = LN2 * (np.log2(total) + exponent)
        for c in range(columns - 1):
            out[i, c] = min(max(centre[0, c] + sums[1 + c] / total, centre[1, c]), centre[2, c])


def compress(key: Tensor, value: Tensor, key_weight: Tensor | None, w: Tensor | float) -> list[Tensor]:
    """What `predict` needs of keys (N, 1), values (N, C) and weights (N,) at this inverse bandwidth."""
    w = float(w)
    accuracy, is_float = (DOUBLE, 0.0) if key.dtype == torch.float64 else (FLOAT, 1.0)
    if key.dtype in (torch.float16, torch.bfloat16):
        key, value = key.float(), value.float()
        key_weight = None if key_weight is None else key_weight.float()
    key, value = anchored(key.reshape(-1, 1), value.reshape(len(value), -1), places(key_weight))
    data = Data(key.reshape(-1), value, key_weight, w)
    about = torch.zeros(9, dtype=torch.float64)
    about[W], about[IS_FLOAT] = w, is_float
    if not data.usable:
        return [about, key, value] + ([] if key_weight is None else [key_weight])
    plan, number, series, least = _series(data, accuracy)
    table, start = _table(number)
    about[USABLE], about[EXPONENT], about[WIDTH], about[ORIGIN] = 1.0, data.exponent, plan.width, plan.origin
    about[ONE_BOX], about[LOG_SPAN], about[TABLE_START] = float(plan.one_box), plan.log_span, start
    arrays = as_double(data.key), data.charge, data.centre, table, series, least
    return [about, *(torch.from_numpy(array) for array in arrays)]


def _series(data: Data, accuracy: Accuracy) -> tuple[Plan, np.ndarray, np.ndarray, np.ndarray]:
    """The plan, the numbers of boxes that get a series, the series, and the least totals that they serve."""
    nothing = np.empty(0, np.int64), np.empty((0, 1 + data.channels, 4)), np.empty(0)
    if not len(data.key):
        return no_plan(4, 0.0), *nothing
    plan = make_plan(accuracy, abs(data.w), data.key, data.key[:0], wide=True, unevenness=data.unevenness)
    if not plan.width:
        return plan, *nothing
    keys = cut(data.key, plan)
    reach = len(plan.error) // 2
    # Boxes with a key within two bandwidths: elsewhere few totals are large enough.
    near = 0 if plan.one_box else min(reach, 1 + int(np.ceil(2 / (plan.width * abs(data.w)))))
    number = np.unique((keys.number[:, None] + np.arange(-near, near + 1)).reshape(-1))
    low, high = (
        np.searchsorted(keys.number, number - reach),
        np.searchsorted(keys.number, number + reach, side="right"),
    )
    number = number[keys.start[high] - keys.start[low] > FEW]
    if not len(number):
        return plan, *nothing
    mass = data.mass(keys.start)
    bound = np.full(len(number), plan.tail * mass.sum())
    for o in range(-reach, reach + 1):
        place = np.minimum(np.searchsorted(keys.number, number - o), len(keys.number) - 1)
        bound += np.where(keys.number[place] == number - o, mass[place], 0.0) * plan.error[o + reach]
    decline_drowned(data, plan, accuracy, keys, number, bound)
    every, columns = np.arange(len(keys.number)), 1 + data.channels
    moments = moments_of(data.key, data.charges, columns, keys, every, plan, plan.terms)
    series = translated(number, np.full(len(number), reach), keys.number, moments, plan, 0)
    return plan, number, series, bound / accuracy.accept


def _table(number: np.ndarray) -> tuple[np.ndarray, float]:
    """A table from box numbers to places, over the range of numbers that is worth one."""
    if not len(number):
        return np.empty(0, np.int64), 0.0
    # Outliers would make it long: a range that holds most boxes, at most 64 entries for each.
    low, high = 0, len(number)
    while number[high - 1] - number[low] > 64 * len(number):
        middle = (low + high) // 2
        if number[middle] - number[low] > number[high - 1] - number[middle]:
            low = middle
        else:
            high = middle
    table = np.full(number[high - 1] - number[low] + 1, -1)
    table[number[low:high] - number[low]] = np.arange(low, high)
    return table, float(number[low])


def predict(compressed: list[Tensor], query: Tensor) -> tuple[Tensor, Tensor]:
    """Out (M, C) and lse (M,) at queries (M, 1) in any order."""
    about = compressed[0].tolist()
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    query = query.reshape(-1)
    if not about[USABLE]:
        key, value, *weight = compressed[1:]
        w = torch.tensor([about[W]], dtype=dtype)
        inputs = query[:, None].to(dtype), key.reshape(-1, 1), value.reshape(len(value), -1), w
        return dense.forward(*inputs, weight[0] if weight else None, False, False, False)[:2]
    keys, charge, centre, table, series, least = (tensor.numpy() for tensor in compressed[1:])
    x = query.double().contiguous().numpy()
    out, lse, far = (
        torch.empty((len(x), len(charge) - 1), dtype=dtype).numpy(),
        torch.empty(len(x), dtype=dtype).numpy(),
        np.empty(len(x), np.bool_),
    )
    width = about[WIDTH] or 1.0
    grid = Grid(width, about[ORIGIN], bool(about[ONE_BOX]), about[TABLE_START], table)
    field = Series(2.0 / width, series, least)

    def run(first: int, last: int) -> None:
        lookup(x, grid, field, about[EXPONENT], centre, out, lse, far, first, last)

    run_units(run, -(-len(x) // TASK_QUERIES))
    which = far.nonzero()[0]
    if len(which) and not len(keys):
        out[which], lse[which] = np.nan, -np.inf
    elif len(which):
        _sum_far_rows(about, keys, charge, centre, x, which, out, lse)
    return torch.from_numpy(out), torch.from_numpy(lse)


def _sum_far_rows(
    about: list[float], key: np.ndarray, charge: np.ndarray, centre: np.ndarray, x: np.ndarray, which: np.ndarray,
    out: np.ndarray, lse: np.ndarray
) -> None:  # fmt: skip
    """Finish the queries `which`."""
    which = which[places_in_order(x[which])]
    none, no_rows, no_places = np.empty(0), np.empty((0, 0)), np.empty(0, np.int64)
    state = np.empty(2 * len(x))
    rows = Rows(
        which, no_places, centre, out.reshape(-1), lse, state, lse[:0], lse[:0], no_rows, none, none, none
    )
    accuracy = FLOAT if about[IS_FLOAT] else DOUBLE
    sources = Sources(key, charge, about[W], about[EXPONENT], about[LOG_SPAN])
    sum_far_rows(sources, x[which], accuracy, rows, 0, np.arange(len(which)))
