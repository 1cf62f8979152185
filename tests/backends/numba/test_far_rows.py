"""The pieces of which far rows of the linear method are made, each alone: windows, sums over them, own keys."""

import numpy as np
import pytest

from nwfast import backends

numba = pytest.importorskip("numba")
far_rows, windows = backends.load("numba.linear.far_rows"), backends.load("numba.linear.windows")
plan, query_side = backends.load("numba.linear.plan"), backends.load("numba.linear.query_side")


def called(function):
    """A function that has no wrapper of its own (see base.py), for Python."""
    return numba.njit(lambda *args: function(*args))


first_at_least, nearest_key, row_at = map(
    called, (windows.first_at_least, windows.nearest_key, windows.row_at)
)
window_start, window_stop = map(called, (windows.window_start, windows.window_stop))
level_of, sum_keys, sum_window = map(called, (windows.level_of, far_rows.sum_keys, far_rows.sum_window))


def keys_of(kind):
    generator = np.random.default_rng(3)
    if kind == "one":
        return np.zeros(1)
    key = generator.normal(size=60)
    if kind == "duplicates":
        key = key.round()
    if kind == "clusters":
        key[::2] += 1e6
    return np.sort(key)


def scores_of(key, x, nearest):
    """(x - key)^2 - (x - nearest)^2 without cancellation."""
    x = np.longdouble(x)
    return ((nearest - key) * (2 * x - nearest - key)).astype(np.float64)


@pytest.mark.parametrize("kind", ["one", "uneven", "duplicates", "clusters"])
def test_windows_are_found_from_any_guess(kind):
    key, n = keys_of(kind), len(keys_of(kind))
    generator = np.random.default_rng(4)
    for x in (*key[:3], *generator.normal(size=10), -50.0, 50.0, 1e5, 2e6):
        for limit in (0.0, 1.0, 30.0, 1e7):
            guesses = generator.integers(0, n + 1, 3)
            place = first_at_least(key, guesses[0], x)
            assert place == np.searchsorted(key, x)
            star = nearest_key(key, place, x, -1)
            assert abs(x - key[star]) == np.abs(x - key).min()
            row = row_at(x, -1, key[star])
            inside = (~(scores_of(key, x, key[star]) > limit)).nonzero()[0]
            low = window_start(key, place, guesses[1], row, limit)
            high = window_stop(key, place, guesses[2], row, limit)
            assert low == min(inside[0], place) and high == max(inside[-1] + 1, place)


def test_the_nearest_key_but_the_own():
    key = np.array([0.0, 1.0, 3.0])
    assert [nearest_key(key, np.searchsorted(key, 1.2), 1.2, own) for own in (-1, 0, 1, 2)] == [
        1,
        1,
        0,
        1,
    ]
    assert nearest_key(key[:1], 0, -1.0, 0) == -1


def sums_over(sources, crowds, x, own, level, orders):
    """The sums of one row over all keys."""
    key, factor = sources.key, -np.log2(np.e) / 2 * sources.w**2
    star = nearest_key(key, np.searchsorted(key, x), x, own)
    row = row_at(x, own, key[star])
    strip = far_rows.Strip(*(np.empty(far_rows.STRIP) for _ in range(3)))
    sums = np.zeros((3, len(sources.charge), 4))
    if level < 0:
        sum_keys(key, sources.charge, 0, len(key), row, factor, orders, strip, sums, 2)
    else:
        sum_window(key, sources.charge, crowds, (0, len(key), level), row, factor, orders, strip, sums, 2)
    assert not sums[:, :, [0, 1, 3]].any()
    return key[star], sums[:, :, 2]


@pytest.mark.parametrize("columns", [2, 3])
@pytest.mark.parametrize("orders", [0, 2])
@pytest.mark.parametrize(("x", "own"), [(9.0, -1), (9.0, 3), (5.5, 999), (-20.0, 40), (0.3, 60)])
def test_sums_over_a_window_with_and_without_crowds(x, own, orders, columns):
    generator = np.random.default_rng(5)
    key = np.sort(generator.random(1000))
    charge = np.stack([np.ones(1000), *generator.normal(size=(columns - 1, 1000))])
    sources = query_side.Sources(key, charge, 1.0, 0.0, 30.0)
    nearest, alone = sums_over(sources, query_side.NO_CROWDS, x, own, -1, orders)
    z = scores_of(key, x, nearest)
    term = np.exp(-z / 2)
    term[own if own >= 0 else []] = 0
    parts = term * charge, term * charge * (nearest - key), term * charge * z
    for order in range(3 if orders else 1):
        np.testing.assert_allclose(
            alone[order], parts[order].sum(1), rtol=0, atol=1e-12 * np.abs(parts[order]).sum(1).max()
        )
    level = level_of(x - nearest, 1.0, 0.0)
    whole = windows.Windows(np.array([[0, 1000]]), np.array([level]))
    crowds = query_side.crowded_boxes(key, 1.0, whole, plan.DOUBLE)
    crowds = crowds._replace(charge=query_side.crowd_charges(sources, crowds))
    assert len(crowds.start)
    _, crowded = sums_over(sources, crowds, x, own, level, orders)
    for order in range(3 if orders else 1):
        np.testing.assert_allclose(
            crowded[order], alone[order], rtol=0, atol=1e-12 * np.abs(parts[order]).sum(1).max()
        )


def test_an_own_key_that_is_nearly_all_of_a_crowd_is_not_subtracted():
    """Key by key instead: the difference would have no digits."""
    key = np.concatenate([np.linspace(0, 1e-3, 400), np.linspace(0.5, 0.501, 100)])
    charge = np.ones((2, 500))
    charge[:, 450] = 1e8
    sources = query_side.Sources(key, charge, 30.0, 0.0, 60.0)
    _, alone = sums_over(sources, query_side.NO_CROWDS, 3.0, 450, -1, 0)
    level = level_of(2.5, 30.0, 0.0)
    crowds = query_side.crowded_boxes(
        key, 30.0, windows.Windows(np.array([[0, 500]]), np.array([level])), plan.DOUBLE
    )
    crowds = crowds._replace(charge=query_side.crowd_charges(sources, crowds))
    assert len(crowds.start)
    np.testing.assert_array_equal(sums_over(sources, crowds, 3.0, 450, level, 0)[1], alone)
