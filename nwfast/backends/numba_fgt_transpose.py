"""The key side of one batch element: the steps of numba_fgt_steps backwards.

With b_ic = g_ic / total_i for each channel and b_i = (<g_i, centre - out_i> + grad_lse_i) / total_i in one more column,
R(k) = sum_i b_i exp(-(w (q_i - k))^2 / 2) and its derivative give, for a key of weight a and centred value v,

    d value_c = a R_c,   d weight = sum_c v_c R_c + R_last,   d key = a (sum_c v_c R_c' + R_last').
"""

import numpy as np
import torch

from . import numba_fgt_units as units
from .numba import run_units
from .numba_fgt_careful import CHUNK
from .numba_fgt_data import Data, as_double, places_in_order, ready
from .numba_fgt_plan import Accuracy, Plan, node_charges, nodes
from .numba_fgt_steps import (
    KEY_CHUNK,
    NO_CROWDS,
    NO_PLACES,
    SLAB,
    Boxes,
    crowded_boxes,
    cut,
    in_list,
    moments_of,
    near_field,
    pieces_of,
    translated,
)


class _Rows:
    """What the key side takes from rows, in sorted order: charges b (columns, M), which are careful, shifts."""

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


class _Keys:
    """All keys, also those of weight 0, sorted; owner: the sorted row that leaves each out, own: the reverse."""

    def __init__(self, data: Data, parts: list, exclude_self: bool):
        _, key, _, _, _ = parts
        self.order, self.key, self.own, self.owner = data.key_order, data.key, data.own, NO_PLACES
        if len(data.key) < data.count:
            self.order = places_in_order(key.contiguous().numpy())
            self.key = key.contiguous().numpy()[self.order]
        if exclude_self:
            rows = data.row_order if len(data.row_order) else np.arange(len(data.query))
            place = np.arange(data.count)
            if len(self.order):
                place[self.order] = np.arange(data.count)
            self.own = place[rows]
            self.owner = np.full(data.count, -1)
            self.owner[self.own] = np.arange(len(rows))


def key_side(
    data: Data,
    plan: Plan,
    accuracy: Accuracy,
    parts: list,
    saved: tuple,
    exclude_self: bool,
    through_keys: bool,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradients of key (N), value (N, C) and key_weight (N), in the caller's order; saved: g, g of lse, out, state."""
    keys, rows = _Keys(data, parts, exclude_self), _Rows(data, saved, through_keys)
    values, slopes = np.zeros((2, *rows.charge.shape[:1], data.count))
    careful = _near_field(data, plan, accuracy, keys, rows, values, slopes)
    which = (careful & rows.with_keys).nonzero()[0]
    if len(which):
        _careful_field(data, plan, accuracy, keys, rows, which, values, slopes)
    return _gradients(data, parts, keys, values, slopes, through_keys)


def _gradients(
    data: Data, parts: list, keys: _Keys, values: np.ndarray, slopes: np.ndarray, through_keys: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """From the sums at sorted keys."""
    _, _, value, _, key_weight = parts
    order = torch.from_numpy(keys.order)
    totals, bends = torch.from_numpy(values), torch.from_numpy(slopes)
    channels = value.shape[1]
    by_value = totals[:channels]
    pull, push = totals[-1], bends[-1]
    if through_keys:
        for c in range(channels):
            v = value[:, c].double() if not len(order) else value[order, c].double()
            v = v - float(data.centre[0, c])
            pull = torch.addcmul(pull, totals[c], v)
            push = torch.addcmul(push, bends[c], v)
    scale = 2.0**-data.exponent
    if key_weight is not None:
        weight = key_weight.double() if not len(order) else key_weight[order].double()
        weight = weight * scale
        by_value, push = by_value * weight, push * weight
    pull = pull * scale
    results = push, by_value.T, pull
    if len(order):
        back = torch.empty_like(order)
        back[order] = torch.arange(len(order))
        results = push[back], by_value.T[back], pull[back]
    return tuple(part.numpy() for part in results)  # type: ignore[return-value]


def _near_field(
    data: Data,
    plan: Plan,
    accuracy: Accuracy,
    keys: _Keys,
    rows: _Rows,
    values: np.ndarray,
    slopes: np.ndarray,
) -> np.ndarray:
    """Fill values and slopes from the rows that the series served; return which rows are left."""
    near = near_field(data, plan, accuracy)
    if not len(near.chosen):
        return np.ones(len(data.query), np.bool_)
    counts = np.diff(near.queries.start)
    served = np.repeat(in_list(near.chosen, len(counts)), counts) & (rows.shift == -data.exponent)
    served &= np.repeat(near.bound / accuracy.accept, counts) <= rows.total
    charge = np.where(served, rows.charge, 0.0)
    boxes = Boxes(near.queries.number, near.queries.start)
    charges = ready(charge, data.query.dtype)
    moments = moments_of(data.query, charges, len(charge), boxes, near.chosen, plan, plan.terms)
    targets = cut(keys.key, plan)
    sources = near.queries.number[near.chosen]
    reaches = np.full(SLAB, len(plan.error) // 2)
    for at in range(0, len(targets.number), SLAB):
        number, start = targets.number[at : at + SLAB], targets.start[at : at + SLAB + 1]
        pieces = pieces_of(number, start[:-1], start[1:], plan)
        series = translated(number, reaches, sources, moments, plan, 0)

        def run(first: int, last: int, pieces=pieces, series=series) -> None:
            units.near_keys(
                keys.key,
                keys.owner,
                data.query,
                charge,
                pieces.box,
                pieces.start,
                pieces.stop,
                pieces.centre,
                2 / plan.width,
                pieces.group,
                series,
                data.w,
                values,
                slopes,
                first,
                last,
            )

        run_units(run, -(-len(pieces.box) // pieces.group))
    return ~served


def _careful_field(
    data: Data,
    plan: Plan,
    accuracy: Accuracy,
    keys: _Keys,
    rows: _Rows,
    which: np.ndarray,
    values: np.ndarray,
    slopes: np.ndarray,
) -> None:
    """Add what the rows `which` give to the keys of their windows."""
    windows, levels = np.empty((len(which), 2), np.int64), np.empty(len(which), np.int64)
    nearest, factor = np.empty(len(which)), np.empty(len(which))
    shift = rows.shift[which]
    query, key, weighted = as_double(data.query), as_double(keys.key), as_double(data.key)

    def find(first: int, last: int) -> None:
        units.key_windows(
            which,
            query,
            data.own,
            weighted,
            data.charge[0],
            key,
            data.w,
            float(data.exponent),
            plan.log_span,
            shift,
            windows,
            nearest,
            factor,
            levels,
            first,
            last,
        )

    run_units(find, -(-len(which) // CHUNK))
    charge = np.ascontiguousarray(rows.charge[:, which] / np.where(factor > 0, factor, np.inf))
    lowest, highest = _monotone(windows)
    crowded = (levels >= 0).nonzero()[0]
    crowded = crowded[np.argsort(levels[crowded], kind="stable")]
    crowds = crowded_boxes(key, data.w, windows[crowded], levels[crowded]) if len(crowded) else NO_CROWDS
    size = max(16, min(KEY_CHUNK, -(-len(keys.key) // 16)))

    def give(first: int, last: int) -> None:
        units.careful_keys(
            key,
            query,
            keys.own,
            which,
            nearest,
            windows,
            lowest,
            highest,
            levels,
            crowds.start,
            crowds.stop,
            crowds.by_level,
            charge,
            data.w,
            size,
            values,
            slopes,
            first,
            last,
        )

    run_units(give, -(-len(keys.key) // size))
    for level in np.unique(levels[crowded]):
        begin, end = crowds.by_level[level], crowds.by_level[level + 1]
        if begin == end:
            continue
        places = crowded[levels[crowded] == level]
        low, high = _monotone(windows[places])
        index_of = NO_PLACES
        if len(keys.owner):
            index_of = np.full(len(data.query), -1)
            index_of[which[places]] = np.arange(len(places))
        node, table = nodes(accuracy.far_terms), node_charges(accuracy.far_terms)
        level_rows = (
            which[places],
            nearest[places],
            windows[places],
            low,
            high,
            np.ascontiguousarray(charge[:, places]),
            index_of,
        )

        def gather(
            first: int, last: int, begin=begin, end=end, level_rows=level_rows, node=node, table=table
        ) -> None:
            units.box_keys(
                key,
                keys.owner,
                query,
                *level_rows,
                crowds.start[begin:end],
                crowds.stop[begin:end],
                crowds.centre[begin:end],
                crowds.half[begin:end],
                node,
                table,
                data.w,
                values,
                slopes,
                first,
                last,
            )

        run_units(gather, end - begin)


def _monotone(windows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bounds of windows that ascend: no later window starts below the first, no earlier one ends above the second."""
    lowest = np.minimum.accumulate(windows[::-1, 0])[::-1]
    return np.ascontiguousarray(lowest), np.maximum.accumulate(windows[:, 1])
