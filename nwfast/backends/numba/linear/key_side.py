"""The key side of one batch element: the steps of query_side.py backwards.

With b_ic = g_ic / total_i for each channel and b_i = (<g_i, centre - out_i> + grad_lse_i) / total_i in one more column,
R(k) = sum_i b_i exp(-(w (q_i - k))^2 / 2) and its derivative give, for a key of weight a and centred value v,

    d value_c = a R_c,   d weight = sum_c v_c R_c + R_last,   d key = a (sum_c v_c R_c' + R_last').
"""

import numpy as np
import torch

from ..dense.call import run_units
from .boxes import Boxes, Series
from .data import Data, as_double, places_among, places_in_order, ready
from .far_rows import CHUNK
from .key_kernels import KeySums, Nearest, Owned, Senders, crowd_keys, far_keys, find_windows, near_keys
from .plan import Accuracy, Plan, node_charges
from .query_side import (
    KEY_CHUNK,
    NO_CROWDS,
    NO_FLOATS,
    NO_PLACES,
    SLAB,
    by_level,
    crowded_boxes,
    cut,
    in_list,
    level_range,
    moments_of,
    near_field,
    pieces_of,
    run_pieces,
    sources_of,
    translated,
)
from .windows import Windows, windows_for


class _Rows:
    """What the key side takes from rows, in sorted order: charges b (columns, M), totals, shifts."""

    def __init__(self, data: Data, saved: tuple, through_keys: bool):
        grad_out, grad_lse, out, state = saved
        if len(data.row_order):
            grad_out, out, state = grad_out[data.row_order], out[data.row_order], state[data.row_order]
            grad_lse = grad_lse[data.row_order] if len(grad_lse) else grad_lse
        self.total, self.shift = np.ascontiguousarray(state[:, 1]), np.ascontiguousarray(state[:, 0])
        channels = grad_out.shape[1]
        self.charge = np.zeros((channels + through_keys, len(self.total)))
        with_keys = self.total > 0
        for c in range(channels):
            np.divide(grad_out[:, c], self.total, out=self.charge[c], where=with_keys)
        if through_keys:
            pull = np.zeros(len(self.total))
            for c in range(channels):
                pull -= grad_out[:, c] * (out[:, c] - data.centre[0, c])
            if len(grad_lse):
                pull += grad_lse
            np.divide(pull, self.total, out=self.charge[channels], where=with_keys)
        self.with_keys = with_keys


class Targets:
    """Sorted keys that get gradients; owner: the sorted row that leaves each out, own: the reverse, -1 for none.

    Those that have a weight, or those at the caller's places `which`, where `key` are.
    """

    def __init__(
        self, data: Data, exclude_self: bool, which: np.ndarray | None = None, key: np.ndarray = NO_FLOATS
    ):
        self.order, self.key, self.own, self.owner = data.key_order, data.key, data.own, NO_PLACES
        if which is not None:
            sort = places_in_order(key)
            self.order, self.key = which[sort], key[sort]
        if exclude_self:
            order = self.order if which is not None or len(self.order) else np.arange(len(self.key))
            self.own = places_among(order, data.count)[data.rows]
            self.owner = np.full(len(self.key), -1)
            owned = (self.own >= 0).nonzero()[0]
            self.owner[self.own[owned]] = owned


def key_side(
    data: Data,
    plan: Plan,
    accuracy: Accuracy,
    keys: Targets,
    saved: tuple,
    value: torch.Tensor,
    key_weight: torch.Tensor | None,
    through_keys: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradients of key (N), value (N, C) and key_weight (N), in the caller's order, 0 for keys that are no targets.

    saved: g, g of lse, out, state.
    """
    rows = _Rows(data, saved, through_keys)
    sums = KeySums(*np.zeros((2, len(rows.charge), len(keys.key))))
    far = _add_near_rows(data, plan, accuracy, keys, rows, sums)
    which = (far & rows.with_keys).nonzero()[0]
    if len(which) and len(keys.key):
        _add_far_rows(data, plan, accuracy, keys, rows, which, sums)
    return _gradients(data, keys, value, key_weight, sums, through_keys)


def _gradients(
    data: Data,
    keys: Targets,
    value: torch.Tensor,
    key_weight: torch.Tensor | None,
    sums: KeySums,
    through_keys: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """From the sums at sorted keys."""
    order = torch.from_numpy(keys.order)
    totals, bends = torch.from_numpy(sums.values), torch.from_numpy(sums.slopes)
    channels = value.shape[1]
    by_value = totals[:channels]
    pull, push = totals[-1], bends[-1]
    moved = len(order) > 0 or len(keys.key) < data.count
    if through_keys:
        for c in range(channels):
            v = value[:, c].double() if not moved else value[order, c].double()
            v = v - float(data.centre[0, c])
            pull = torch.addcmul(pull, totals[c], v)
            push = torch.addcmul(push, bends[c], v)
    scale = 2.0**-data.exponent
    if key_weight is not None:
        weight = key_weight.double() if not moved else key_weight[order].double()
        weight = weight * scale
        by_value, push = by_value * weight, push * weight
    pull = pull * scale
    results: tuple[torch.Tensor, ...] = push, by_value.T, pull
    if moved:
        wholes = tuple(part.new_zeros((data.count, *part.shape[1:])) for part in results)
        for whole, part in zip(wholes, results, strict=True):
            whole[order] = part
        results = wholes
    return tuple(part.numpy() for part in results)  # type: ignore[return-value]


def _add_near_rows(
    data: Data,
    plan: Plan,
    accuracy: Accuracy,
    keys: Targets,
    rows: _Rows,
    sums: KeySums,
) -> np.ndarray:
    """Fill the sums from the rows that the series served; return which rows are left."""
    near = near_field(data, plan, accuracy)
    if not len(near.chosen):
        return np.ones(len(data.query), np.bool_)
    counts = np.diff(near.queries.start)
    served = np.repeat(in_list(near.chosen, len(counts)), counts) & (rows.shift == -data.exponent)
    served &= np.repeat(near.bound / accuracy.accept, counts) <= rows.total
    charge = np.where(served, rows.charge, 0.0)
    boxes = Boxes(near.queries.number, near.queries.start)
    charges = ready(charge, data.query.dtype)
    moments = moments_of(data.query, charges, len(charge), boxes, near.chosen, plan, plan.terms + 4)
    # Keys further from all queries than the reach get nothing; their numbers of boxes may be beyond all bounds.
    first_key, last_key = 0, len(keys.key)
    if not plan.one_box:
        most = (len(plan.error) // 2 + 1) * plan.width
        ends = float(data.query[0]) - most, float(data.query[-1]) + most
        first_key, last_key = np.searchsorted(as_double(keys.key), ends)
    key, part = keys.key[first_key:last_key], slice(first_key, last_key)
    owner = keys.owner[part] if len(keys.owner) else NO_PLACES
    if not len(key):
        return ~served
    whole = sums
    if len(key) < len(keys.key):
        sums = KeySums(*np.zeros((2, len(charge), len(key))))
    targets = cut(key, plan)
    sources = near.queries.number[near.chosen]
    reaches = np.full(SLAB, len(plan.error) // 2)
    for at in range(0, len(targets.number), SLAB):
        number, start = targets.number[at : at + SLAB], targets.start[at : at + SLAB + 1]
        pieces = pieces_of(number, start[:-1], start[1:], plan)
        series = translated(number, reaches, sources, moments, plan, 1)

        field = Series(2 / plan.width, series, NO_FLOATS)

        def run(first: int, last: int, pieces=pieces, field=field, sums=sums) -> None:
            near_keys(Owned(key, owner), data.query, charge, pieces, field, data.w, sums, first, last)

        run_pieces(run, pieces)
    if sums is not whole:
        whole.values[:, part], whole.slopes[:, part] = sums
    return ~served


def _add_far_rows(
    data: Data,
    plan: Plan,
    accuracy: Accuracy,
    keys: Targets,
    rows: _Rows,
    which: np.ndarray,
    sums: KeySums,
) -> None:
    """Add what the far rows `which` give to the keys of their windows."""
    query, key, sources = as_double(data.query), as_double(keys.key), sources_of(data, plan)
    windows, found = windows_for(len(which)), Nearest(np.empty(len(which)), np.empty(len(which)))
    state = np.stack((rows.shift[which], rows.total[which]))

    def find(first: int, last: int) -> None:
        find_windows(which, query, data.own, sources, key, state, windows, found, first, last)

    run_units(find, -(-len(which) // CHUNK))
    charge = rows.charge[:, which] / np.where(found.factor > 0, found.factor, np.inf)
    charge = np.ascontiguousarray(charge)
    senders = Senders(which, found.key, *windows, *_monotone(windows.place), charge)
    crowded = by_level(windows)
    crowds = NO_CROWDS
    if len(crowded):
        crowds = crowded_boxes(key, data.w, Windows(windows.place[crowded], windows.level[crowded]), accuracy)
    size = max(16, min(KEY_CHUNK, -(-len(keys.key) // 16)))

    def add_one_by_one(first: int, last: int) -> None:
        far_keys(key, query, keys.own, senders, crowds, data.w, size, sums, first, last)

    run_units(add_one_by_one, -(-len(keys.key) // size))
    table = node_charges(accuracy.far_terms)
    for level in np.unique(windows.level[crowded]):
        some = level_range(crowds, level)
        if some.start == some.stop:
            continue
        boxes = crowds._replace(
            start=crowds.start[some],
            stop=crowds.stop[some],
            centre=crowds.centre[some],
            half=crowds.half[some],
        )
        places = crowded[windows.level[crowded] == level]
        low, high = _monotone(windows.place[places])
        index_of = NO_PLACES
        if len(keys.owner):
            index_of = places_among(which[places], len(data.query))
        ours = Senders(
            which[places],
            found.key[places],
            windows.place[places],
            windows.level[places],
            low,
            high,
            np.ascontiguousarray(charge[:, places]),
        )

        def add_boxes(first: int, last: int, boxes=boxes, ours=ours, index_of=index_of) -> None:
            owned = Owned(key, keys.owner)
            crowd_keys(owned, query, ours, index_of, boxes, table, data.w, sums, first, last)

        run_units(add_boxes, some.stop - some.start)


def _monotone(windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bounds of windows that ascend: no later window starts below the first, no earlier one ends above the second."""
    lowest = np.minimum.accumulate(windows[::-1, 0])[::-1]
    return np.ascontiguousarray(lowest), np.maximum.accumulate(windows[:, 1])
