"""The query side of the linear method, for one batch element: which kernels run, over which boxes and pieces.

Query side: keys -> moments of boxes -> power series of query boxes -> near rows; far rows, which the series do not
serve, are summed over their windows, crowded windows through the nodes of their boxes. The key side is the transpose.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ..dense.call import run_units
from .boxes import (
    GROUP,
    PIECE,
    UNIT,
    Boxes,
    Charges,
    Choice,
    Errors,
    Pieces,
    Series,
    box_series,
    choose_boxes,
    cut_points,
    piece_moments,
)
from .data import Data, as_double, ready
from .far_rows import CHUNK, Crowds, far_rows, find_crowds
from .near_rows import Rows, Sources, near_rows
from .plan import Accuracy, Plan, node_charges, nodes, short_number
from .windows import MOST_LEVELS, Windows, windows_for

MOST_NUMBER = 2.0**50  # of boxes from 0: deeper levels are not cut
KEY_CHUNK = 2048
SLAB = 16384  # boxes whose series are held at once


class Near(NamedTuple):
    """Boxes of keys and of queries, which of them take part in translations, and reach and bound of each query box."""

    keys: Boxes
    queries: Boxes
    chosen: np.ndarray
    needed: np.ndarray
    reaches: np.ndarray
    bound: np.ndarray


NO_FLOATS, NO_ROWS, NO_PLACES = np.empty(0), np.empty((0, 0)), np.empty(0, np.int64)
NO_CROWDS = Crowds(NO_PLACES, NO_PLACES, NO_FLOATS, NO_FLOATS, NO_PLACES, NO_FLOATS, np.empty((0, 0, 0)))


def cut(x: np.ndarray, plan: Plan) -> Boxes:
    """The occupied boxes of sorted points."""
    if plan.one_box:
        return Boxes(np.zeros(min(len(x), 1), np.int64), np.array([0, len(x)][: 1 + min(len(x), 1)]))
    most = min(len(x), 4096)
    while True:
        number, start = np.empty(most, np.int64), np.empty(most + 1, np.int64)
        count = cut_points(x, plan.inverse, number, start)
        if count >= 0:
            return Boxes(number[:count], start[: count + 1])
        most = min(len(x), 8 * most)


def pieces_of(number: np.ndarray, start: np.ndarray, stop: np.ndarray, plan: Plan) -> Pieces:
    """Cut boxes into pieces; groups of about UNIT points."""
    centre = np.full(len(number), plan.origin) if plan.one_box else (number + 0.5) * plan.width
    pieces = cut_boxes(start, stop, centre)
    points = int((stop - start).sum())
    return pieces._replace(group=max(1, min(GROUP, UNIT * len(pieces.box) // max(points, 1))))


def cut_boxes(start: np.ndarray, stop: np.ndarray, centre: np.ndarray) -> Pieces:
    """Cut boxes into pieces of a size that does not depend on the number of threads, one a task."""
    counts = -(-(stop - start) // PIECE)
    box = np.repeat(np.arange(len(start)), counts)
    within = np.arange(len(box)) - np.repeat(np.cumsum(counts) - counts, counts)
    begin = start[box] + within * PIECE
    return Pieces(box, begin, np.minimum(begin + PIECE, stop[box]), centre[box], 1)


def run_pieces(kernel: Callable[[int, int], None], pieces: Pieces) -> None:
    """Run kernel(first, last) over the groups of pieces."""
    run_units(kernel, -(-len(pieces.box) // pieces.group))


def moments_of(
    x: np.ndarray, charges: Charges, columns: int, boxes: Boxes, which: np.ndarray, plan: Plan, terms: int
) -> np.ndarray:
    """Chebyshev moments (boxes, columns, terms) of the boxes `which`."""
    pieces = pieces_of(boxes.number[which], boxes.start[which], boxes.start[which + 1], plan)
    result = np.empty((len(pieces.box), columns, terms))
    return reduce_pieces(x, charges, pieces, 2 / plan.width, result, len(which))


def reduce_pieces(
    x: np.ndarray, charges: Charges, pieces: Pieces, scale: float, result: np.ndarray, boxes: int
) -> np.ndarray:
    """Moments of pieces, and their sums in order for each box."""

    def run(first: int, last: int) -> None:
        piece_moments(x, charges, pieces, scale, result, first, last)

    run_pieces(run, pieces)
    if len(pieces.box) == boxes:
        return result
    return np.add.reduceat(result, np.searchsorted(pieces.box, np.arange(boxes)), axis=0)


def translated(
    boxes: np.ndarray, reaches: np.ndarray, number: np.ndarray, moments: np.ndarray, plan: Plan, orders: int
) -> np.ndarray:
    """Power series (boxes, columns, terms), from the moments of the boxes `number`."""
    series = np.empty((len(boxes), (orders + 1) * moments.shape[1], plan.terms))

    def run(first: int, last: int) -> None:
        box_series(boxes, reaches, number, moments, plan.matrices, orders, series, first, last)

    run_units(run, -(-len(boxes) // GROUP))
    return series


def near_field(data: Data, plan: Plan, accuracy: Accuracy) -> Near:
    """Which boxes take part in translations."""
    if not plan.width or not len(data.query):
        none = Boxes(NO_PLACES, np.zeros(1, np.int64))
        return Near(none, none, NO_PLACES, NO_PLACES, NO_PLACES, NO_FLOATS)
    keys, queries = cut(data.key, plan), cut(data.query, plan)
    mass = data.mass(keys.start)
    chosen, needed = np.zeros(len(queries.number), np.bool_), np.zeros(len(keys.number), np.bool_)
    reaches, bound = np.zeros(len(queries.number), np.int64), np.empty(len(queries.number))
    tail = plan.tail * mass.sum()
    errors = Errors(plan.error, plan.least_kernel, plan.largest_kernel, tail, accuracy.accept)
    choice = Choice(chosen, needed, reaches, bound)
    choose_boxes(queries, keys, mass, plan.terms, 1 + data.channels, errors, choice)
    if data.uneven:
        decline_drowned(data, plan, accuracy, keys, queries.number, bound)
        reaches[:], needed[:] = len(plan.error) // 2, True
    return Near(keys, queries, chosen.nonzero()[0], needed.nonzero()[0], reaches, bound)


def decline_drowned(
    data: Data, plan: Plan, accuracy: Accuracy, keys: Boxes, number: np.ndarray, bound: np.ndarray
) -> None:
    """Set the bound of boxes `number` to inf where errors relative to large values may drown small ones."""
    reach = len(plan.error) // 2
    for channel in data.uneven:
        size = np.add.reduceat(np.abs(data.charge[1 + channel]), keys.start[:-1])
        error, least = np.full(len(number), plan.tail * size.sum()), np.zeros(len(number))
        for apart in range(-reach, reach + 1):
            place = np.minimum(np.searchsorted(keys.number, number - apart), len(keys.number) - 1)
            there = np.where(keys.number[place] == number - apart, size[place], 0.0)
            error += there * plan.error[apart + reach]
            least += there * plan.least_kernel[apart + reach]
        bound[~(error <= accuracy.accept * least)] = np.inf


def query_side(data: Data, plan: Plan, accuracy: Accuracy, rows: Rows, orders: int) -> None:
    """Finish all rows; orders 1 and 2 for the sums with one and two more factors of distance."""
    if not len(data.query):
        return
    far = np.ones(len(data.query), np.bool_)
    near = near_field(data, plan, accuracy)
    if len(near.chosen):
        terms = plan.terms + (4 if orders else 0)
        moments = moments_of(data.key, data.charges, 1 + data.channels, near.keys, near.needed, plan, terms)
        for at in range(0, len(near.chosen), SLAB):
            part = near.chosen[at : at + SLAB]
            sum_near_rows(data, plan, accuracy, rows, orders, near, moments, part, far)
    which = far.nonzero()[0]
    if len(which):
        sum_far_rows(sources_of(data, plan), as_double(data.query), accuracy, rows, orders, which)


def sources_of(data: Data, plan: Plan) -> Sources:
    """The keys that have a weight, for far rows."""
    return Sources(as_double(data.key), data.charge, data.w, float(data.exponent), plan.log_span)


def in_list(places: np.ndarray, count: int) -> np.ndarray:
    """Which of 0 .. count are among the places."""
    among = np.zeros(count, np.bool_)
    among[places] = True
    return among


def sum_near_rows(
    data: Data,
    plan: Plan,
    accuracy: Accuracy,
    rows: Rows,
    orders: int,
    near: Near,
    moments: np.ndarray,
    boxes: np.ndarray,
    far: np.ndarray,
) -> None:
    """Finish the rows of these boxes as far as the series serve them."""
    numbers, start = near.queries
    pieces = pieces_of(numbers[boxes], start[boxes], start[boxes + 1], plan)
    sources = near.keys.number[near.needed]
    series = translated(numbers[boxes], near.reaches[boxes], sources, moments, plan, orders)
    field = Series(2 / plan.width, series, near.bound[boxes] / accuracy.accept)
    charge = data.charge if len(data.own) else NO_ROWS
    own = Sources(data.key, charge, data.w, float(data.exponent), plan.log_span)

    def run(first: int, last: int) -> None:
        near_rows(rows, data.query, own, pieces, field, orders, far, first, last)

    run_pieces(run, pieces)


def sum_far_rows(
    sources: Sources, query: np.ndarray, accuracy: Accuracy, rows: Rows, orders: int, which: np.ndarray
) -> None:
    """Finish the far rows `which`, those of crowded windows last."""

    def finish(which: np.ndarray, windows: Windows, crowds: Crowds) -> None:
        def run(first: int, last: int) -> None:
            far_rows(rows, query, which, sources, orders, windows, crowds, first, last)

        run_units(run, -(-len(which) // CHUNK))

    windows = windows_for(len(which))
    finish(which, windows, NO_CROWDS)
    left = by_level(windows)
    if not len(left):
        return
    windows = Windows(windows.place[left], windows.level[left])
    crowds = crowded_boxes(sources.key, sources.w, windows, accuracy)
    crowds = crowds._replace(charge=crowd_charges(sources, crowds))
    finish(which[left], windows, crowds)


def by_level(windows: Windows) -> np.ndarray:
    """The rows of crowded windows in order of their levels."""
    crowded = (windows.level >= 0).nonzero()[0]
    return crowded[np.argsort(windows.level[crowded], kind="stable")]


def crowded_boxes(key: np.ndarray, w: float, windows: Windows, accuracy: Accuracy) -> Crowds:
    """The crowded boxes in the windows of rows, which are in order of their levels; without charges."""
    scale = abs(w)
    most = 1024
    start, stop, number = (np.empty(most, np.int64) for _ in range(3))
    by_level = np.zeros(MOST_LEVELS + 1, np.int64)
    widths = np.zeros(MOST_LEVELS)
    count = 0
    magnitude = max(abs(float(key[0])), abs(float(key[-1])))
    for level in range(MOST_LEVELS):
        by_level[level] = count
        begin, end = np.searchsorted(windows.level, [level, level + 1])
        some = Windows(windows.place[begin:end], windows.level[begin:end])
        if begin == end:
            continue
        width = short_number(2.0 / scale) * 2.0**-level if scale else 0.0
        if not width or not magnitude / width < MOST_NUMBER:
            continue
        widths[level] = width
        while True:
            found = find_crowds(key, some, 1 / width, level, start, stop, number, count)
            if found >= 0:
                break
            start, stop, number = (
                np.concatenate((part, np.empty_like(part))) for part in (start, stop, number)
            )
        count = found
    by_level[MOST_LEVELS] = count
    width_of = np.repeat(widths, np.diff(by_level))
    return Crowds(
        start[:count],
        stop[:count],
        (number[:count] + 0.5) * width_of,
        width_of / 2,
        by_level,
        nodes(accuracy.far_terms),
        NO_CROWDS.charge,
    )


def level_range(crowds: Crowds, level: int) -> slice:
    """The places of the boxes of a level."""
    return slice(crowds.by_level[level], crowds.by_level[level + 1])


def crowd_charges(sources: Sources, crowds: Crowds) -> np.ndarray:
    """Charges at the nodes of crowded boxes, (boxes, columns, nodes)."""
    key, charge, terms = sources.key, ready(sources.charge, sources.key.dtype), len(crowds.node)
    charges = np.empty((len(crowds.start), len(sources.charge), terms))
    for level in range(MOST_LEVELS):
        some = level_range(crowds, level)
        if some.start == some.stop:
            continue
        pieces = cut_boxes(crowds.start[some], crowds.stop[some], crowds.centre[some])
        result = np.empty((len(pieces.box), len(sources.charge), terms))
        scale = 1 / crowds.half[some.start]
        charges[some] = reduce_pieces(key, charge, pieces, scale, result, some.stop - some.start)
    return np.ascontiguousarray(charges @ node_charges(terms).T)
