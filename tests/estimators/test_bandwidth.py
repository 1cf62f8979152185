"""`select_bandwidth`: the least of the criterion against fine grids, bounds and their reasons, forms of the input."""

import math
import warnings

import numpy as np
import pytest
import torch
from conftest import every_other, pairwise

import nwfast
from nwfast.estimators import CRITERIA, selection
from nwfast.estimators.criteria import criterion_of
from nwfast.estimators.search import data_bounds
from nwfast.estimators.selection import rule_of_thumb
from nwfast.estimators.sites import sites_of

SLACK = 5e-4  # relative, above the least of a fine grid


def noisy(function, n, seed, noise=0.3, low=0.0, high=1.0):
    random = np.random.default_rng(seed)
    x = np.sort(random.uniform(low, high, n))
    return x, function(x) + noise * random.standard_normal(n)


def fast_on_trend(n, seed):
    """A fast oscillation on a trend: one minimum follows the trend, another the oscillation."""
    return noisy(lambda x: 8 * x + 0.8 * np.sin(400 * x), n, seed)


def clusters(n, seed):
    random = np.random.default_rng(seed)
    x = np.concatenate(
        [random.normal(centre, 10.0**-power, n // 3) for power, centre in enumerate((0, 40, 41))]
    )
    return x, np.sin(x) + 0.2 * random.standard_normal(len(x))


PROBLEMS = {
    "sine": lambda seed: noisy(lambda x: np.sin(10 * x), 150, seed),
    "few": lambda seed: noisy(lambda x: np.sin(6 * x), 12, seed),
    "two": lambda seed: (np.array([0.0, 1.0]), np.array([0.0, 1.0 + seed])),
    "line": lambda seed: noisy(lambda x: 3 * x, 80, seed),
    "nothing": lambda seed: noisy(lambda x: 0 * x, 100, seed),
    "no noise": lambda seed: noisy(lambda x: np.sin(20 * x), 200, seed, noise=0.0),
    "fast on trend": lambda seed: fast_on_trend(600, seed),
    "sparse fast on trend": lambda seed: fast_on_trend(150, seed),
    "clusters": lambda seed: clusters(120, seed),
    "steps": lambda seed: noisy(lambda x: np.floor(8 * x), 300, seed, noise=0.1),
    "far from zero": lambda seed: noisy(lambda x: np.sin(x), 200, seed, low=1e4, high=1e4 + 20),
    "lattice": lambda seed: (np.arange(100.0), noisy(lambda x: np.sin(9 * x), 100, seed)[1]),
    "ties": lambda seed: (
        np.random.default_rng(seed).integers(0, 9, 200) / 2.0,
        np.random.default_rng(seed).standard_normal(200),
    ),
}


def columns(*arrays):
    return [torch.from_numpy(np.asarray(array, dtype=np.float64)).reshape(len(array), -1) for array in arrays]


def values(x, y, bandwidths, criterion, degree, weight=None):
    sites = sites_of(*columns(x, y), weight)
    return np.array(
        [
            float(criterion_of(criterion, sites, torch.from_numpy(1 / np.atleast_1d(h)), degree))
            for h in bandwidths
        ]
    )


@pytest.mark.filterwarnings("ignore:the bandwidth of:UserWarning")
@pairwise("problem, criterion, degree", list(PROBLEMS), CRITERIA, (0, 1))
def test_the_least_of_a_fine_grid(problem, criterion, degree):
    x, y = PROBLEMS[problem](3)
    if criterion == "aicc" and len(x) < 5:
        pytest.skip("AICc has no value for so few observations")
    found = nwfast.select_bandwidth(x, y, criterion=criterion, degree=degree)
    lower, upper = found.lower[0], found.upper[0]
    assert lower <= found.bandwidth * (1 + 1e-12) and found.bandwidth <= upper * (1 + 1e-12)
    grid = values(x, y, np.geomspace(lower, upper, 60 if degree else 300), criterion, degree)
    least = np.nanmin(grid)
    spread = 1.0 if criterion == "aicc" else abs(least)
    assert found.loss <= least + SLACK * spread + 1e-12 * np.var(y)
    assert found.loss == pytest.approx(
        values(x, y, [found.bandwidth], criterion, degree)[0], rel=1e-9, abs=1e-300
    )


@pytest.mark.parametrize("apart", [8.8, 9.5, 30.0])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_rounding_does_not_decide(criterion, apart):
    """Pairs so far from each other that a pair's keys have a line together with others only by rounding."""
    random = np.random.default_rng(4)
    x = (np.arange(50.0)[:, None] * apart + random.uniform(0, 0.6, (50, 2))).ravel()
    found = values(x, np.sin(x), 1 + np.arange(-10, 10) * 2.0**-50, criterion, 1)
    np.testing.assert_allclose(found, found[0], rtol=1e-4)


def test_the_loss_is_that_of_the_op():
    for problem in ("sine", "ties"):
        x, y = PROBLEMS[problem](1)
        found = nwfast.select_bandwidth(x, y)
        loss = nwfast.leave_one_out_loss(torch.from_numpy(x), torch.from_numpy(y), float(found.w))
        assert found.loss == pytest.approx(float(loss), rel=1e-9)


def test_two_minima_and_the_right_one():
    """With many observations the oscillation is followed, with few it is noise."""
    many, few = (
        nwfast.select_bandwidth(*fast_on_trend(600, 0)),
        nwfast.select_bandwidth(*fast_on_trend(60, 0)),
    )
    assert many.bandwidth < 0.01 < few.bandwidth


@pytest.mark.parametrize("degree", [0, 1])
def test_several_features(degree):
    random = np.random.default_rng(2)
    x = random.random((250, 3)) * np.array([1.0, 100.0, 1e-3])
    y = (
        np.sin(9 * x[:, 0]) + 2e3 * x[:, 2] + 0.2 * random.standard_normal(250)
    )  # the second feature says nothing
    found = nwfast.select_bandwidth(x, y, degree=degree)
    assert found.bandwidth.shape == (3,) and found.bandwidth[1] > 40
    tries = 100 if degree else 400  # a line costs some ten times what a mean does
    start = found.bandwidth * np.exp(random.uniform(-3, 3, (tries, 3)))
    others = np.clip(start, found.lower, found.upper)
    near = found.bandwidth * np.exp(random.uniform(-0.1, 0.1, (tries // 8, 3)))
    assert found.loss <= values(x, y, np.concatenate([others, near]), "loo", degree).min() * (1 + SLACK)


@pytest.mark.parametrize(
    ("degree", "seed"), [(0, 0), (0, 1), (1, 0), pytest.param(1, 1, marks=pytest.mark.full)]
)
def test_many_shallow_minima(degree, seed):
    """Outlying observations, whose leave-one-out lines hang on two or three others, make a loss of many minima.

    That of lines even jumps where such a line gives way to a mean, to minima that no search need find: there, a
    standard error of the loss, sqrt(2 / n), is what it may be off by.
    """
    slack = math.sqrt(2 / 300) if degree else SLACK
    random = np.random.default_rng(seed)
    x = random.standard_normal((300, 2)) * np.array([10.0, 4.0])
    y = 3 * np.sin(x[:, 0] / 6) + 0.1 * x[:, 1] + 0.3 * random.standard_normal(300)
    found = nwfast.select_bandwidth(x, y, degree=degree)
    axes = np.geomspace(0.4, 8, 12), np.geomspace(1, 300, 12)
    grid = np.stack(np.meshgrid(*axes), -1).reshape(-1, 2)
    assert found.loss <= values(x, y, grid, "loo", degree).min() * (1 + slack)


def test_an_oscillation_in_one_of_two_features():
    random = np.random.default_rng(4)
    x = random.random((1500, 2))
    y = x[:, 1] + np.sin(60 * x[:, 0]) + 0.2 * random.standard_normal(1500)
    found = nwfast.select_bandwidth(x, y)
    assert found.bandwidth[0] < 0.03 and found.bandwidth[1] > 0.05


def test_more_features_than_a_grid_can_have():
    random = np.random.default_rng(5)
    x = random.standard_normal((300, 6))
    y = x[:, 0] + np.tanh(2 * x[:, 3]) + 0.1 * random.standard_normal(300)
    found = nwfast.select_bandwidth(x, y)
    idle = [1, 2, 4, 5]
    assert found.bandwidth[[0, 3]].max() < 0.5 and found.bandwidth[idle].min() > 1
    assert found.loss < 0.05 * np.var(y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sample_serves_for_many_observations(dtype):
    x, y = noisy(lambda x: np.sin(30 * x) + 3 * x, 140_000, 6)
    order = np.random.default_rng(7).permutation(len(x))
    given = torch.from_numpy(x[order]).to(dtype), torch.from_numpy(y[order]).to(dtype)
    found = nwfast.select_bandwidth(*given)
    assert found.bandwidth.dtype == dtype and found.bandwidth.ndim == 0
    grid = values(x, y, np.geomspace(found.bandwidth / 3, found.bandwidth * 3, 40), "loo", 0)
    assert found.loss <= grid.min() * (1 + SLACK)


def test_narrow_minima_are_found_among_many_observations():
    """An oscillation so fast that a sample does not see it."""
    x, y = noisy(lambda x: np.sin(3e5 * x), 140_000, 8, noise=0.02, high=0.5)
    found = nwfast.select_bandwidth(x, y)
    grid = values(x, y, np.geomspace(1e-6, 1e-2, 30), "loo", 0)
    assert found.loss <= grid.min() * (1 + SLACK) and found.loss < 0.5 * y.var()


def test_of_one_order_only():
    x, y = PROBLEMS["sine"](9)
    order = np.random.default_rng(0).permutation(len(x))
    assert nwfast.select_bandwidth(x, y).bandwidth == nwfast.select_bandwidth(x[order], y[order]).bandwidth


def test_whole_weights_are_repeated_rows():
    x, y = PROBLEMS["sine"](10)
    counts = np.random.default_rng(1).integers(0, 4, len(x))
    for criterion in (*CRITERIA, "scott", "silverman"):
        weighted = nwfast.select_bandwidth(x, y, key_weight=counts, criterion=criterion)
        repeated = nwfast.select_bandwidth(np.repeat(x, counts), np.repeat(y, counts), criterion=criterion)
        assert weighted.bandwidth == pytest.approx(repeated.bandwidth, rel=1e-12)


def test_the_scale_of_weights_that_are_precisions_does_not_matter():
    x, y = PROBLEMS["sine"](11)
    weight = np.random.default_rng(1).random(len(x)) + 0.1
    first, second = (nwfast.select_bandwidth(x, y, key_weight=scale * weight) for scale in (1.0, 1234.5))
    assert first.bandwidth == pytest.approx(second.bandwidth, rel=1e-5)


def test_rules_of_thumb_are_those_of_scipy():
    from scipy.stats import gaussian_kde

    x = np.random.default_rng(3).standard_normal((90, 2)) * np.array([1.0, 8.0])
    for rule in ("scott", "silverman"):
        factor = gaussian_kde(x.T, bw_method=rule).factor
        found = nwfast.select_bandwidth(x, x[:, 0], criterion=rule)
        np.testing.assert_allclose(found.bandwidth, factor * x.std(0, ddof=1))
        assert np.isnan(found.loss) and found.evaluations == 0


def test_a_minimum_on_a_bound_has_its_reason():
    random = np.random.default_rng(12)
    site = random.integers(0, 20, 400)
    with pytest.warns(UserWarning, match="400 of 400 observations share their x"):
        found = nwfast.select_bandwidth(site * 1.0, (site % 2) * 5 + random.standard_normal(400))
    assert found.at_bound == ("lower",) and "ties" in found.note
    with pytest.warns(UserWarning, match="lattice of spacing 0.5"):
        found = nwfast.select_bandwidth(np.arange(60) / 2, np.arange(60.0) ** 2)
    assert found.at_bound == ("lower",)
    x, alternating = np.linspace(0, 1, 100) ** 2, np.tile([1.0, -1.0], 50)
    with pytest.warns(UserWarning, match="one mean over all of it"):
        found = nwfast.select_bandwidth(x, alternating)
    assert found.at_bound == ("upper",)
    with pytest.warns(UserWarning, match="one line over all of it"):
        found = nwfast.select_bandwidth(x, 2 * x + alternating, degree=1)
    assert found.at_bound == ("upper",)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = nwfast.select_bandwidth(*PROBLEMS["sine"](0))
        assert found.at_bound == (None,) and found.note == ""
        # One feature of two that says nothing is no reason to warn.
        x = random.random((300, 2))
        found = nwfast.select_bandwidth(x, np.sin(9 * x[:, 0]) + 0.1 * random.standard_normal(300))
        assert found.at_bound[0] is None


@every_other("exponent, criterion, degree", [-90, 80], ["loo", "gcv", "aicc"], [0, 1])
def test_float32_values_whose_squares_are_no_numbers(exponent, criterion, degree, monkeypatch):
    monkeypatch.setattr(selection, "MOST_WIDENED", 100)  # fewer are judged in float64
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(300, generator=generator)
    y = torch.sin(9 * x) + 0.2 * torch.randn(300, generator=generator)
    y[:20], x[:20] = y[20:40], x[20:40]  # ties, whose squares about their mean count
    plain = nwfast.select_bandwidth(x, y, criterion=criterion, degree=degree)
    found = nwfast.select_bandwidth(x, y * 2.0**exponent, criterion=criterion, degree=degree)
    assert float(found) == pytest.approx(float(plain), rel=2e-2)  # the descent is as exact as float32
    by_unit = found.loss - 2 * exponent * np.log(2) if criterion == "aicc" else found.loss / 4.0**exponent
    assert by_unit == pytest.approx(plain.loss, rel=1e-5)
    regressor = (nwfast.NadarayaWatsonRegressor, nwfast.LocalLinearRegressor)[degree]
    model, other = (regressor(bandwidth=criterion).fit(x[:, None], y * unit) for unit in (1.0, 2.0**exponent))
    assert other.report_["loo"] / 4.0**exponent == pytest.approx(model.report_["loo"], rel=1e-2)
    curves = [fitted.bandwidth_curve([1.0, 3.0], "loo")[1] for fitted in (model, other)]
    assert curves[1] / 4.0**exponent == pytest.approx(curves[0], rel=1e-2)


@pytest.mark.parametrize("criterion", ["loo", "gcv", "aicc"])
def test_constant_values(criterion):
    """No bandwidth is better than another: the widest, and no warning that neighbours predict best."""
    x = np.random.default_rng(0).uniform(0, 1, 50)
    found = nwfast.select_bandwidth(x, np.full(50, 0.1), criterion=criterion)
    assert float(found) == found.upper[0] and found.note.startswith("all observations have the same y")


@pytest.mark.parametrize("exponent", [-600, 600])
def test_units_beyond_float64_are_refused(exponent):
    x, y = np.linspace(0, 1, 30), np.sin(np.arange(30.0))
    unit = 2.0**exponent
    for name, given in ("x", (x * unit, y)), ("y", (x, y * unit)):
        with pytest.raises(ValueError, match=f"^{name} is of size .*: give it in another unit"):
            nwfast.select_bandwidth(*given)


def test_constant_features():
    x, y = PROBLEMS["sine"](13)
    alone = nwfast.select_bandwidth(x, y)
    beside = nwfast.select_bandwidth(np.stack([np.full_like(x, 7.0), x], 1), y)
    assert beside.bandwidth[0] == 1 and beside.bandwidth[1] == pytest.approx(alone.bandwidth, rel=1e-6)
    nothing = nwfast.select_bandwidth(np.ones(9), np.arange(9.0))
    assert nothing.bandwidth == 1 and "same x" in nothing.note


def test_bounds_that_are_given():
    x, y = PROBLEMS["sine"](14)
    free = nwfast.select_bandwidth(x, y)
    with pytest.warns(UserWarning, match="as narrow as it may be"):
        held = nwfast.select_bandwidth(x, y, bounds=(2 * float(free), 1.0))
    assert held.bandwidth == pytest.approx(2 * float(free)) and held.at_bound == ("lower",)
    for bounds in ((0.0, 1.0), (2.0, 1.0), (1.0, np.inf), (np.nan, 1.0)):
        with pytest.raises(ValueError, match="bounds must be"):
            nwfast.select_bandwidth(x, y, bounds=bounds)


def test_default_bounds():
    sites = sites_of(*columns(np.array([0.0, 1.0, 3.0, 7.0]), np.zeros(4)), None)
    lower, upper = data_bounds(sites)
    assert lower[0] == pytest.approx(np.quantile([1, 2, 4], 0.1) / 2) and upper[0] == 70
    assert rule_of_thumb(sites, "scott")[0] == pytest.approx(np.std([0, 1, 3, 7], ddof=1) * 4**-0.2)


def test_forms_of_the_input():
    x, y = PROBLEMS["sine"](15)
    expected = nwfast.select_bandwidth(x, y)
    assert isinstance(expected.bandwidth, float) and float(expected) == expected.bandwidth
    assert nwfast.select_bandwidth(list(x), list(y)).bandwidth == expected.bandwidth
    column = nwfast.select_bandwidth(x[:, None], y[:, None])
    assert column.bandwidth.shape == (1,) and float(column) == expected.bandwidth
    tensor = nwfast.select_bandwidth(torch.from_numpy(x), torch.from_numpy(y))
    assert isinstance(tensor.bandwidth, torch.Tensor) and float(tensor.w) == 1 / expected.bandwidth
    whole = nwfast.select_bandwidth(
        np.arange(40), np.random.default_rng(0).integers(0, 9, 40) + np.arange(40)
    )
    assert whole.bandwidth > 0
    frozen = x.copy()
    frozen.flags.writeable = False
    assert nwfast.select_bandwidth(frozen, y).bandwidth == expected.bandwidth
    two = nwfast.select_bandwidth(x, np.stack([y, -y], 1))
    assert two.bandwidth == pytest.approx(expected.bandwidth, rel=1e-3)
    bandwidths, losses = expected.path
    assert (
        bandwidths.shape == (len(losses), 1) and losses[0] == expected.loss and (np.diff(losses) >= 0).all()
    )


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (
            dict(criterion="cv"),
            ValueError,
            "criterion must be one of 'loo', 'gcv', 'aicc', 'silverman', 'scott'",
        ),
        (dict(degree=2), ValueError, "degree must be 0 or 1"),
        (dict(x=np.array([1.0, np.nan, 2.0])), ValueError, "x must be finite"),
        (dict(y=np.array([1.0, np.inf, 2.0])), ValueError, "y must be finite"),
        (dict(y=np.ones(4)), ValueError, "must be of the same n"),
        (dict(x=np.ones((3, 1, 1))), ValueError, "x must have shape"),
        (dict(x=np.array(["a", "b", "c"])), TypeError, "x must hold real numbers"),
        (dict(x=torch.ones(3, dtype=torch.complex64)), TypeError, "x must be real"),
        (dict(key_weight=np.array([1.0, -1.0, 1.0])), ValueError, "key_weight must not be negative"),
        (dict(key_weight=np.zeros(3)), ValueError, "not all weights zero"),
        (dict(key_weight=np.ones(2)), ValueError, "must be of the same n"),
        (dict(x=np.ones(0), y=np.ones(0)), ValueError, "must not be empty"),
        (dict(x=np.ones(1), y=np.ones(1)), ValueError, "two at least"),
        (dict(key_weight=np.array([1.0, 0.0, 0.0])), ValueError, "two at least"),
    ],
)
def test_bad_input(change, error, message):
    given = dict(x=np.array([0.0, 1.0, 2.0]), y=np.array([0.0, 1.0, 0.0])) | change
    with pytest.raises(error, match=message):
        nwfast.select_bandwidth(given.pop("x"), given.pop("y"), **given)


def test_threads_do_not_matter():
    x, y = PROBLEMS["fast on trend"](16)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2):
            torch.set_num_threads(count)
            found.append(nwfast.select_bandwidth(x, y).bandwidth)
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1]


# By npregbw(bwmethod = "cv.ls") and npreg of R's package np, as statsmodels' tests of KernelReg have them.
NP = {
    0: ([0.6163835, 0.1649656], [31.49157, 37.29536, 43.72332, 40.58997, 36.80711]),
    1: ([1.717891, 2.449415], [31.16003, 37.30323, 44.49870, 40.73704, 36.19083]),
}


@pytest.mark.parametrize("degree", [0, 1])
def test_numbers_of_r_np(degree):
    random = np.random.RandomState(123456)  # those tests' data
    random.binomial(2, 0.7, 60)
    random.binomial(3, 0.7, 60)
    first, second, _, noise = (
        random.normal(mean, std, 60) for mean, std in ((0, 1), (10, 1), (10, 2), (0, 1))
    )
    x, y = np.stack([first, second], 1), 0.3 + 1.2 * first + 3.7 * second + noise
    bandwidth, fit = NP[degree]
    np.testing.assert_allclose(nwfast.select_bandwidth(x, y, degree=degree).bandwidth, bandwidth, rtol=1e-5)
    regressor = (nwfast.NadarayaWatsonRegressor, nwfast.LocalLinearRegressor)[degree]
    found = regressor(bandwidth=bandwidth).fit(x, y).predict(x[:5])
    np.testing.assert_allclose(found, fit, rtol=0, atol=6e-6)  # half of the last digit that is printed
